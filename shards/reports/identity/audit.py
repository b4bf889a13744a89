"""What de-identification did, in counts only: no text, no offset, no name of a document."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import ConfigError

VERSION = 1


@dataclass(kw_only=True)
class Audit:
    """Running counts of one job. `key_fingerprint` tells the key and nothing of it."""

    deidentifier: str
    key_fingerprint: str
    documents: int = 0
    documents_changed: int = 0
    characters: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_layer: Counter[str] = field(default_factory=Counter)
    by_language: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)  # reason -> documents that were not passed on

    def add(self, counts: Counter[str], layers: Counter[str], *, characters: int, language: str) -> None:
        """Count one document that passed."""
        self.documents += 1
        self.documents_changed += bool(counts)
        self.characters += characters
        self.by_kind.update(counts)
        self.by_layer.update(layers)
        self.by_language[language] += 1

    def refuse(self, reason: str) -> None:
        """Count one document that did not; `reason` is one of few and quotes nothing."""
        self.refused[reason] += 1

    def merge(self, other: Audit) -> None:
        """Add the counts of another worker. Raises ConfigError when it ran with another key or version."""
        if (other.deidentifier, other.key_fingerprint) != (self.deidentifier, self.key_fingerprint):
            raise ConfigError("audits of different keys or versions of the de-identifier cannot be added up")
        self.documents += other.documents
        self.documents_changed += other.documents_changed
        self.characters += other.characters
        for name in ("by_kind", "by_layer", "by_language", "refused"):
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Everything, keys sorted, so that equal jobs give equal files."""
        return {
            "version": VERSION, "deidentifier": self.deidentifier, "key_fingerprint": self.key_fingerprint,
            "documents": self.documents, "documents_changed": self.documents_changed, "characters": self.characters,
            **{
                name: dict(sorted(getattr(self, name).items()))
                for name in ("by_kind", "by_layer", "by_language", "refused")
            },
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """One JSON file."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
