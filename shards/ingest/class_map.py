"""From the label ids of a segmentation model to the 36 anatomies: versioned tables, nothing guessed."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError
from shards.reports.anatomy import ANATOMIES

# Id of each anatomy in the label maps of a shard: the same in every set.
ANATOMY_IDS: dict[str, int] = {name: number for number, name in enumerate(ANATOMIES, start=1)}


_SIDES = frozenset({"left", "right", "l", "r", "lt", "rt", "both", "bilateral"})


@dataclass(frozen=True)
class KnownClass:
    """A class that is known; `anatomy` None: of no use."""

    anatomy: str | None


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """Classes of one model. `ids`: its label id -> class name; `anatomy_of`: class name -> anatomy, None for no use."""

    name: str
    version: int
    ids: dict[int, str]
    anatomy_of: dict[str, str | None]

    def find(self, names: Iterable[str]) -> KnownClass | None:
        """What the first known of several names or SCHEME:CODE stands for; None where none is known.

        Names are compared in words without a side: `Lung_L`, `left lung` and `LungLeft` are one.
        """
        return next((self._written[key] for name in names if (key := _words_of(name)) in self._written), None)

    @cached_property
    def _written(self) -> dict[str, KnownClass]:
        written = {_words_of(name): KnownClass(anatomy) for name, anatomy in self.anatomy_of.items()}
        for anatomy in ANATOMIES:
            names = (anatomy, f"{anatomy}s", *_words(_tables()["written"].get(anatomy, "")))
            written |= {_words_of(name): KnownClass(anatomy) for name in names}
        return written

    def table(self) -> np.ndarray:
        """[largest id + 1] uint8: label id of the model -> id of ANATOMY_IDS, 0 for classes of no use."""
        table = np.zeros(max(self.ids) + 1, dtype=np.uint8)
        for number, name in self.ids.items():
            anatomy = self.anatomy_of[name]
            table[number] = ANATOMY_IDS[anatomy] if anatomy else 0
        return table

    def known(self) -> np.ndarray:
        """[largest id + 1] bool: which ids the model can give, 0 among them."""
        known = np.zeros(max(self.ids) + 1, dtype=bool)
        known[[0, *self.ids]] = True
        return known


def class_map(name: str) -> ClassMap:
    """The table of a model, e.g. `totalseg_v2`. Raises ConfigError with the names there are."""
    tables = _tables()
    if name not in tables["models"]:
        raise ConfigError(f"class_map={name!r}: there is {', '.join(tables['models'])}")
    classes = _words(tables["models"][name]["classes"])
    anatomy_of: dict[str, str | None] = dict.fromkeys(classes)
    for anatomy, patterns in tables["anatomies"].items():
        for pattern in _words(patterns):
            anatomy_of |= dict.fromkeys(fnmatch.filter(classes, pattern), anatomy)
    return ClassMap(
        name=name, version=tables["version"], ids=dict(enumerate(classes, start=1)), anatomy_of=anatomy_of
    )  # fmt: skip


@cache
def _tables() -> dict[str, Any]:
    with open(Path(__file__).with_name("class_maps.toml"), "rb") as file:
        return tomllib.load(file)


def _words_of(name: str) -> str:
    """A name in lower-case words without left and right; `LungLeft` is two words, a code SCHEME:CODE one of its own."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[a-z]+\d*|\d+", parted.lower())
    return " ".join(word for word in words if word not in _SIDES)


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]
