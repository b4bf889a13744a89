"""Answers of a language model on disk, so that a run that was stopped, or is repeated, asks nothing twice.

A file's name is a hash of all that the answer follows from; its content is the answer, which quotes de-identified text.
Nothing in it is trusted: an answer from here is checked as one that has just come.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model said of one report. `text` None: no answer held, for `refused`, a reason of ours, each time."""

    text: str | None
    refused: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    retries: tuple[str, ...] = ()  # why earlier answers were sent back


@dataclass(frozen=True, kw_only=True)
class AnswerCache:
    """A folder of answers, for one secret: `fingerprint` is that of the key file, None for public sets."""

    folder: Path
    fingerprint: str | None

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"--llm-cache {self.folder}: {error.strerror}; name a folder that can be made") from None

    def name(self, *, prompt: str, model: str, mode: str, document: str) -> str:
        """64 hex digits for (prompt version, model, answer mode, report, key fingerprint)."""
        parts = [FORMAT, prompt, model, mode, self.fingerprint, hashlib.sha256(document.encode()).hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, name: str) -> Answered | None:
        """The answer of that name; None if there is none, or none that can be read."""
        try:
            body = json.loads(self._path(name).read_bytes())
            body["retries"] = tuple(str(reason) for reason in body["retries"])
            answered = Answered(**body)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        counts = (answered.prompt_tokens, answered.answer_tokens)
        known = isinstance(answered.text, str) or isinstance(answered.refused, str)
        return answered if known and all(isinstance(count, int) for count in counts) else None

    def put(self, name: str, answered: Answered) -> None:
        """Write an answer whole or not at all, for its owner only to read. Raises ConfigError where it cannot."""
        path = self._path(name)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(json.dumps(asdict(answered), sort_keys=True).encode())
            part.replace(path)
        except OSError as error:
            raise ConfigError(f"--llm-cache {self.folder}: {error.strerror}; mend it, then run again") from None

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
