"""The front door's scripts: what they refuse, and that the lock covers what the code asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = REPOSITORY / "ci" / "requirements.lock"


def normal(requirement: str) -> str:
    """Package name of a requirement, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), (
        "every line is name==version"
    )
    return {normal(line): line.split("==")[1] for line in lines}


@pytest.mark.parametrize("script", ["ci/setup.sh", "ci/check.sh", "ci/demo.sh", ".ci/run"])
def test_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_lock_covers_the_project_and_its_dev_tools() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert not [name for name in wanted if normal(name) not in locked()]


def test_exact_pins_of_the_project_are_those_of_the_lock() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    exact = {normal(name): name.split("==")[1] for name in project["dependencies"] if "==" in name}
    assert exact
    assert exact == {name: locked()[name] for name in exact}


def test_lock_names_no_local_version() -> None:
    """`torch==2.13.0` takes the CPU build where there is one; `2.13.0+cpu` would exist on few indexes."""
    assert "+" not in LOCK.read_text("utf-8").split("absl-py")[1]
    assert "triton" not in locked(), "a CUDA build of torch brings its own triton; a pin here would contradict it"


def test_setup_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    for name in ("ci/setup.sh", "ci/requirements.lock", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    outcome = subprocess.run(
        ["bash", "ci/setup.sh"], cwd=tmp_path, env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True
    )
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "Python 3.11 or newer" in outcome.stderr
    assert "PYTHON=" in outcome.stderr
    assert not (tmp_path / ".venv").exists()


def test_check_refuses_unknown_options() -> None:
    outcome = subprocess.run(["bash", "ci/check.sh", "--fast"], cwd=REPOSITORY, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "usage: bash ci/check.sh [--full]" in outcome.stderr
