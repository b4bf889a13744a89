"""Reports read a little otherwise each epoch: sentences of the findings in another order, a few left out (umcl.md 5).

Draws follow from (seed, epoch, sample). Only training reads reports so, and never where places in the text mean
something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards import keyed
from shards.batch import StudyRecord
from shards.errors import ConfigError
from shards.reports.language import Language
from shards.reports.sentences import sentences
from shards.transforms.label_text import Key

SHUFFLED = frozenset({"findings"})  # an impression is told in the order of what matters


@dataclass(frozen=True, kw_only=True)
class Config:
    """`shuffle` the sentences of the findings; `drop` up to this share of all sentences, as many as a draw says."""

    shuffle: bool = False
    drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ConfigError(f"data.sentences.drop={self.drop} is outside [0, 1); 0 leaves all sentences")

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.shuffle or self.drop > 0


def varied(config: Config, record: StudyRecord, sections: Sequence[str], key: Key) -> StudyRecord:
    """The study with these sections of its report as they are read now; one sentence stays, if there was one."""
    seed, *ids = key
    language: Language = "en" if record.language == "en" else "fr" if record.language == "fr" else "unknown"
    said = {
        section: [
            sentence
            for start, end in sentences(text, language=language)
            if any(map(str.isalnum, sentence := text[start:end]))
        ]
        for section, text in sorted(record.report.items())
        if section in sections
    }
    places = [(section, number) for section, found in said.items() for number in range(len(found))]
    most = int(config.drop * len(places))
    draws = keyed.uniform(seed, "report: sentences left out", *ids, draws=1 + len(places))
    gone = {places[place] for place in np.argsort(draws[1:], kind="stable")[: int(draws[0] * (most + 1))]}
    report: dict[str, str] = {}
    for section, found in said.items():
        order = np.arange(len(found))
        if config.shuffle and section in SHUFFLED:
            order = np.argsort(
                keyed.uniform(seed, f"report: order of {section}", *ids, draws=len(found)), kind="stable"
            )
        report[section] = " ".join(found[number] for number in order.tolist() if (section, number) not in gone)
    return record.model_copy(update={"report": report})
