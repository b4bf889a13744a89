"""What every raw source promises the writer: a cheap ordered plan, one expensive `load` per study, names by keyed hash.

A source is a picklable object, since `load` runs in worker processes. Nothing is lost silently: every input of a plan
ends as a sample or as a `Refusal` with a reason that is counted in the manifest.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shards.batch import Sample
from shards.errors import ConfigError

MINIMUM_SECRET_BYTES = 16
# Key of sets that anyone may download: there the hash only gives uniform names, it hides nothing.
PUBLIC_SECRET = b"roentgen: names of a public set"


@dataclass(frozen=True)
class Refusal:
    """An input that gives no sample, or a view or a report left out of one.

    `name` may be logged: a relative file name for public sets, a keyed hash for clinical ones. `reason` is short and
    one of few (it is counted in the manifest); it holds no value taken from the input. `kept`: the input is in its
    sample all the same, and the reason says what of it is missing or was done to it.
    """

    name: str
    reason: str
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Item:
    """One study of a plan. `payload` is what `load` needs: small, picklable, with a `repr` that tells its content."""

    key: str  # sample key: keyed hash, [0-9a-f]+
    patient: str  # keyed hash
    split: str | None = None  # None: the writer splits by patient
    payload: Any = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All studies of a source, and what was refused before any pixel was read."""

    items: Sequence[Item]
    refusals: Sequence[Refusal] = ()
    counts: Mapping[str, int] = field(default_factory=dict)  # of inputs, for an audit; named `group/member`


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of one item: a sample or None, and what was refused (None without a refusal is a mistake)."""

    sample: Sample | None
    refusals: tuple[Refusal, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)  # of what was done, for an audit; named `group/member`


class Source(Protocol):
    """One raw source; the attributes go into the manifest."""

    @property
    def name(self) -> str: ...  # "table", "dicom", "phantom ..."

    @property
    def labels(self) -> tuple[str, ...]: ...  # column order of Batch["labels"]

    @property
    def masks(self) -> dict[str, int]: ...  # name -> id in the label maps

    @property
    def key_fingerprint(self) -> str | None: ...

    @property
    def settings(
        self,
    ) -> Mapping[str, Any]: ...  # all that changes the output; a resumed run must agree

    def plan(self) -> Plan:
        """Cheap and deterministic; headers at most. Raises ConfigError for missing folders, tables and columns."""
        ...

    def load(self, item: Item) -> Loaded:
        """Read, check and encode one study. Never raises for data; `sample.key` equals `item.key`."""
        ...


def hashed_key(secret: bytes | None, kind: str, text: str, length: int = 32) -> str:
    """HMAC-SHA256 of (kind, text) as `length` hex digits; `kind` keeps patient "12" and study "12" apart."""
    message = f"{kind}\0{text}".encode("utf-8", "surrogateescape")
    return hmac.new(secret or PUBLIC_SECRET, message, hashlib.sha256).hexdigest()[:length]


def read_key_file(path: str | Path) -> bytes:
    """The secret of a `--key-file`. Raises ConfigError when it is missing, too open or too short."""
    path = Path(path)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"--key-file {path}: {error.strerror}; make one with `(umask 077; openssl rand -hex 32 > {path})`"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"--key-file {path}: mode {mode:04o} lets others read it; run `chmod 600 {path}`")
    if len(secret) < MINIMUM_SECRET_BYTES:
        raise ConfigError(
            f"--key-file {path}: {len(secret)} bytes, needs {MINIMUM_SECRET_BYTES} or more; "
            f"make one with `(umask 077; openssl rand -hex 32 > {path})`"
        )
    return secret


def key_fingerprint(secret: bytes | None) -> str | None:
    """16 hex digits that tell whether two sets were named with the same secret, and tell nothing else."""
    if secret is None:
        return None
    return hmac.new(secret, b"roentgen key fingerprint", hashlib.sha256).hexdigest()[:16]
