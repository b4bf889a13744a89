"""Which text a study gets: its report, or one made of its labels (umcl.md 3), so that labels alone are trained on.

The text of labels is a sentence for each class that is present, or nothing where the model has prompts of its own: it
then reads the columns of `labels`. A study with both gets one or the other by a draw of its own each epoch. Only
training reads labels as texts: what is held out is read with its reports alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shards import keyed
from shards.batch import LabelValue
from shards.errors import ConfigError
from shards.label_union import THORAX, plain

Key = tuple[int, int, int]  # (seed, epoch, sample)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`classes`: of the union, the columns of `labels`. `names`: what labels mean that the ontology does not know.

    `share`: of the studies with report and labels, those that get the text of their labels. `sentences`: of each class,
    one is drawn; empty: the text of labels is empty.
    """

    classes: tuple[str, ...]
    names: dict[str, str] = field(default_factory=dict)
    share: float = 0.5
    sentences: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [*THORAX, *self.names.values()]
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice or not self.classes:
            raise ConfigError(
                f"data.label_text.classes: {', '.join(twice) or 'no class'} "
                + ("is named twice" if twice else "is named; name some of shards/label_union.py")
            )
        unknown = [name for name in self.classes if name not in known]
        if unknown:
            raise ConfigError(
                f"data.label_text.classes: no label means {', '.join(map(repr, unknown))}; use classes of "
                "shards/label_union.py, or say with data.label_text.names which label does"
            )
        if not 0 <= self.share <= 1:
            raise ConfigError(f"data.label_text.share={self.share} is no share of studies; use 0 to 1")
        silent = [name for name in self.classes if self.sentences and not self.sentences.get(name)]
        if silent:
            raise ConfigError(f"data.label_text.sentences: none for {', '.join(silent)}; give each class one")


@dataclass(frozen=True, kw_only=True)
class LabelText:
    """The text of a study's labels and the key that equal ones share."""

    text: str
    key: int


def of_labels(config: Config, found: Mapping[str, LabelValue], key: Key) -> LabelText | None:
    """None where no class is present. `key`: of the draw of sentences."""
    present = [name for name in config.classes if found.get(name) == 1]
    if not present:
        return None
    if not config.sentences:
        return LabelText(text="", key=keyed.text_key(f"labels: {', '.join(present)}"))
    text = " ".join(_sentence(config.sentences[name], name, key) for name in present)
    return LabelText(text=text, key=keyed.text_key(text))


def _sentence(choices: Sequence[str], name: str, key: Key) -> str:
    seed, *ids = key
    return choices[int(keyed.integers(0, len(choices), seed, f"sentence of {plain(name)}", *ids)[0])]


def takes_labels(config: Config, key: Key) -> bool:
    """Whether a study with both gets the text of its labels now."""
    seed, *ids = key
    return bool(keyed.uniform(seed, "report or labels", *ids)[0] < config.share)
