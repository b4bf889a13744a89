"""The files of a checkpoint: names, checksums, and finding a run's weights again. No process group, no DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from shards.errors import ConfigError, DataError

SUMS = "SHA256SUMS"  # the format of sha256sum, so that `sha256sum -c SHA256SUMS` works without us
WEIGHTS = "weights.safetensors"
STATE = "state.json"
ENGINE = "engine"
LATEST = "latest"
BEST = "best"
EVALUATED = "evaluated"

STEP_NAME = re.compile(r"step-(\d+)")


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` or the file as it was, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names of files made or renamed in `folder` survive a power cut from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, *, sync: bool = False) -> str:
    """Hex digest of a file; `sync` flushes the file to disk first."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def checksums(folder: Path) -> str:
    """The text of `SHA256SUMS`, every file flushed to disk on the way."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return "".join(f"{sha256(path, sync=True)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if it is whole."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} is missing or unreadable"
    if not lines:
        return f"{SUMS} is empty"
    for line in lines:
        expected, _, name = line.partition("  ")
        if not name or name.startswith("/") or ".." in name.split("/"):
            return f"{SUMS} is damaged"
        try:
            seen = sha256(folder / name)
        except OSError:
            return f"{name} is missing or unreadable"
        if seen != expected:
            return f"{name} differs from its checksum"
    return None


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending; half-written ones are not listed."""
    found = [STEP_NAME.fullmatch(path.name) for path in (folder / "checkpoints").glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def find_weights(run_dir: Path, which: str = LATEST) -> Path:
    """Weights file of a run: `which` is `latest`, `best` or a step. For evaluation and export, without DeepSpeed.

    Raises:
        ConfigError: no such checkpoint. DataError: it is damaged.
    """
    name = which
    if which in (LATEST, BEST):
        pointer = run_dir / which
        if not pointer.is_file():
            raise ConfigError(f"{run_dir}: has no `{which}` checkpoint; is it a run directory, and has it saved once?")
        name = json.loads(pointer.read_text())["checkpoint"] if which == BEST else pointer.read_text().strip()
    elif which.isdigit():
        name = f"step-{which}"
    if not STEP_NAME.fullmatch(name):
        raise ConfigError(f"{run_dir}: {which!r} names no checkpoint; use latest, best or a step")
    folder = run_dir / "checkpoints" / name
    if not folder.is_dir():
        known = ", ".join(map(str, steps_in(run_dir))) or "none"
        raise ConfigError(f"{folder}: no such checkpoint; steps at hand: {known}")
    lines = (folder / SUMS).read_text().splitlines()
    if f"{sha256(folder / WEIGHTS)}  {WEIGHTS}" not in lines:
        raise DataError(f"{folder / WEIGHTS}: differs from its checksum; take another checkpoint")
    return folder / WEIGHTS
