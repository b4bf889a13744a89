"""The front door's scripts: what they refuse, and that the lock covers what the code asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("script", ["ci/setup.sh", "ci/check.sh", "ci/demo.sh", "ci/gpu.sh", ".ci/run"])
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


def gpu_script(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "ci/gpu.sh"], cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True
    )


def python_that(folder: Path, does: str) -> str:
    """An interpreter of its own, with no package but the stand-ins in `folder`."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


def test_gpu_script_says_that_there_is_no_gpu() -> None:
    outcome = gpu_script(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert outcome.returncode == 2
    assert re.fullmatch(r"ci/gpu\.sh: error: no GPU: torch \S+ sees no CUDA device\n", outcome.stderr)
    assert not outcome.stdout


def test_gpu_script_says_what_is_missing(tmp_path: Path) -> None:
    bare = python_that(tmp_path, f'exec {sys.executable} -S "$@"')
    for python, message in (
        (bare, "torch is not installed"),
        (str(tmp_path / "none"), f"{tmp_path / 'none'} is not there; name another with PYTHON="),
        ("false", "false does not run"),
    ):
        outcome = gpu_script(PYTHON=python)
        assert (outcome.returncode, outcome.stderr) == (2, f"ci/gpu.sh: error: {message}\n")
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1+cu130'")
    outcome = gpu_script(PYTHON=bare, PYTHONPATH=str(tmp_path))
    assert "torch 2.9.1+cu130 is too old; 2.11 or newer is needed" in outcome.stderr


GPU_TEST_FILE = """
from __future__ import annotations
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize(("b", "c"), [(1, 1), pytest.param(2, 4, id="two")])
def test_square(a: int, b: int, c: int) -> None:
    assert b * b == c

def test_words() -> None:
    assert 1.0 == pytest.approx(1.0 + 1e-9) and 1.0 != pytest.approx(1.1) and [1.0] == pytest.approx([1.0])
    with pytest.raises(ValueError, match="wrong"):
        raise ValueError("all wrong")

def test_left_out() -> None:
    pytest.importorskip("no_such_module")
"""


def plain_tests(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-m", "ci.plain_tests", str(file)], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_tests_run_without_pytest(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(GPU_TEST_FILE)
    outcome = plain_tests(file)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "5 passed, 0 FAILED, 1 skipped" in outcome.stdout
    assert "test_square[1-2-4]" in outcome.stdout


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("with pytest.raises(ValueError): pass", "was not raised"),
        ("with pytest.raises(ValueError, match='right'): raise ValueError('wrong')", "does not match"),
        ("import pytest_is_not_here", "ModuleNotFoundError"),
    ],
)
def test_a_failing_test_fails_without_pytest(tmp_path: Path, body: str, said: str) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(f"import pytest\n\ndef test_one():\n    {body}\n\ndef test_two():\n    pass\n")
    outcome = plain_tests(file)
    assert outcome.returncode == 1
    assert "1 passed, 1 FAILED, 0 skipped" in outcome.stdout and said in outcome.stdout


def test_no_test_is_no_success_without_pytest(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\n\ndef test_one(tmp_path):\n    pass\n")
    assert "asks for fixtures ['tmp_path'], which need pytest" in plain_tests(file).stdout
    file.write_text("")
    assert plain_tests(file).returncode == 1
