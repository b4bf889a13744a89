"""What the README names exists: tests, files, programs' options, settings, curves."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from configs import schema
from launchers import pack, pack_forget, restart, submit

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text("utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
PROGRAM = re.compile(r"launchers/(\w+)\.py")


@cache
def help_text(program: str) -> str:
    if program == "submit":  # what it does not know it hands on
        return submit.options_of("submit").format_help() + help_text("ray_pretrain")
    if program == "restart":  # what follows -- is another program's
        return restart.parser().format_help() + help_text("pretrain")
    if program == "pack":
        return pack.parser().format_help() + pack_forget.parser().format_help()
    parser = importlib.import_module(f"launchers.{program}").parser()
    return str(parser.format_help())


def commands() -> list[tuple[str, list[str]]]:
    """(program, its arguments) of every command line that runs one of ours."""
    found = []
    for line in SHELL.splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if match := PROGRAM.fullmatch(word):
                found.append((match[1], words[place + 1 :]))
    return found


@pytest.mark.parametrize("reference", re.findall(r"`(tests/[\w/]+\.py::\w+)`", README))
def test_named_test_exists(reference: str) -> None:
    path, name = reference.split("::")
    tree = ast.parse((REPOSITORY / path).read_text("utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert not [target for target in targets if not (REPOSITORY / target).exists()]


def test_options_of_commands_exist() -> None:
    assert {program for program, _ in commands()} == {
        "prepare_reports", "pack", "pretrain", "evaluate", "transfer", "export", "replay", "plan", "ray_pretrain",
        "submit", "doctor", "restart",
    }  # fmt: skip
    unknown = [
        f"{program}.py {word}"
        for program, words in commands()
        for word in words
        if word.startswith("--") and not re.search(rf"(^|\s|\[){word}\b", help_text(program))
    ]
    assert not unknown


def test_settings_exist() -> None:
    """Every dotted setting, in commands and in prose."""
    config = schema.load_recipe("chest:clip_tiny")
    known = set(schema._types(config))
    named = set(
        re.findall(r"`(?:--set )?((?:data|engine|optim|trainer|checkpoint|init|evaluation)\.[a-z_.]+)[=`]", README)
    )
    named |= {
        word.partition("=")[0] for _, words in commands() for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)
    }
    named -= {"engine.train_step"}  # a function
    assert named
    assert not {name for name in named if not any(name == one or name.startswith(f"{one}.") for one in known)}


def test_recipes_exist() -> None:
    named = set(re.findall(r"--recipe ([\w:]+)", README))
    assert named
    assert named <= set(schema.recipes())


def test_promises_are_seven() -> None:
    section = README.split("## What it promises")[1].split("\n## ")[0]
    numbers = re.findall(r"^(\d)\. \*\*", section, flags=re.MULTILINE)
    assert numbers == list("1234567")
    assert section.count("::") >= 14
