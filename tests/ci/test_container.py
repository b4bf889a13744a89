"""The container file, as far as it can be looked at without building it: what it copies exists, and nobody is root."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LINES = (REPOSITORY / "ci" / "Containerfile").read_text("utf-8").replace("\\\n", " ").splitlines()


def words(instruction: str) -> list[list[str]]:
    return [line.split()[1:] for line in LINES if line.startswith(f"{instruction} ")]


def test_it_copies_what_exists_and_nothing_that_may_hold_secrets() -> None:
    copied = [source for line in words("COPY") for source in line[:-1]]
    assert copied and not [source for source in copied if not (REPOSITORY / source).exists()]
    assert "." not in copied and not words("ADD")
    # All of the product is there.
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"ci", "tests"}
    assert folders <= set(copied)


def test_it_installs_the_lock_and_gives_up_being_root() -> None:
    assert any("ci/setup.sh" in " ".join(line) for line in words("RUN"))
    (image,), (user,) = words("FROM"), words("USER")
    assert re.fullmatch(r"docker\.io/nvidia/cuda:\d+\.\d+\.\d+-[\w.-]+", image[0]), "a release, not `latest`"
    assert user != ["root"] and LINES.index(f"USER {user[0]}") > max(
        number for number, line in enumerate(LINES) if line.startswith("RUN ")
    )
