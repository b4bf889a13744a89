"""What all phantoms have in common: studies of a difficulty, counted by split, under keys that anyone can compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shards.errors import ConfigError
from shards.ingest import PUBLIC_SECRET, Item, Plan, hashed_key
from shards.ingest.phantom_chest_scene import patient_of

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """`train`, `validation` and `test` count studies; each split has its own generator seed and patients."""

    difficulty: str = "easy"
    seed: int = 0
    train: int = 3000
    validation: int = 300
    test: int = 600

    def __post_init__(self) -> None:
        for split in SPLITS:
            if getattr(self, split) < 0:
                raise ConfigError(f"{split}={getattr(self, split)}: counts of studies must not be negative")


AnyConfig = TypeVar("AnyConfig", bound=PhantomConfig)


class Phantom(Generic[AnyConfig]):
    """Source of phantom studies. Study i of a split is a pure function of (seed, split, i).

    Subclasses draw them: `load` of the sources' protocol, `name`, `labels` and `masks`.
    """

    labels: tuple[str, ...]
    masks: dict[str, int]
    key_fingerprint: str | None = None

    def __init__(self, config: AnyConfig, kind: str, generator: str) -> None:
        """`kind`: beginning of what keys are made from; `generator`: hash of what the generator gives."""
        self.config, self.generator, self._kind = config, generator, kind
        self.settings: Mapping[str, Any] = {"generator": generator, **vars(config)}

    def plan(self) -> Plan:
        counts = {split: getattr(self.config, split) for split in SPLITS}
        return Plan(items=[self._item(split, index) for split in SPLITS for index in range(counts[split])])

    def _item(self, split: str, index: int) -> Item:
        name = f"{self._kind}/{self.config.seed}/{split}"
        return Item(
            key=hashed_key(PUBLIC_SECRET, "study", f"{name}/{index}"),
            patient=hashed_key(PUBLIC_SECRET, "patient", f"{name}/{patient_of(index)}"),
            split=split, payload=index,
        )  # fmt: skip


def check_difficulty(difficulty: str, known: Mapping[str, Any]) -> None:
    """Raises ConfigError for one that this phantom does not have."""
    if difficulty not in known:
        raise ConfigError(f"difficulty={difficulty!r}: this phantom has {', '.join(known)}")
