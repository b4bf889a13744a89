"""One ontology of thorax findings for label tables that name, and ask for, different things (umcl.md 6).

Each class has the names that sets give it, and narrower ones: where a narrower one is present so is the class, where it
is absent the class may still be there. What a set does not ask for is not known of its studies, never absent.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shards.batch import NO_FINDING, LabelValue
from shards.errors import BadSampleError, ConfigError

# Present beside "no finding" in sets that follow CheXpert: material is no disease.
MATERIAL = "support devices"


@dataclass(frozen=True, kw_only=True)
class Class:
    """Names of label tables, in any case, `_` as a space: those that mean the class, and those that imply it."""

    same: tuple[str, ...] = ()
    narrower: tuple[str, ...] = ()


# Of ChestX-ray14, CheXpert and MIMIC-CXR-JPG, PadChest, VinDr-CXR, RSNA, Kermany, covid-chestxray-dataset, Open-i (MeSH
# and its silver labels), and the chest phantom. A class's own name is one of its names.
THORAX: Mapping[str, Class] = {
    NO_FINDING: Class(same=("normal",)),
    "atelectasis": Class(same=("atelectases",), narrower=("lobar atelectasis", "laminar atelectasis")),
    "cardiomegaly": Class(same=("enlarged heart",)),
    "enlarged cardiomediastinum": Class(),
    "consolidation": Class(),
    "pulmonary edema": Class(same=("edema",)),
    "pleural effusion": Class(same=("effusion",)),
    "pneumothorax": Class(),
    "pneumonia": Class(
        narrower=("bacterial pneumonia", "viral pneumonia", "covid-19", "atypical pneumonia"),
    ),
    "lung opacity": Class(same=("opacity", "airspace opacity", "lung opacification"), narrower=("alveolar pattern",)),
    "pulmonary infiltration": Class(same=("infiltration", "infiltrate", "infiltrates")),
    "lung lesion": Class(same=("nodule or mass", "nodule/mass")),
    "lung mass": Class(same=("mass", "pulmonary mass")),
    "lung nodule": Class(same=("nodule", "pulmonary nodule"), narrower=("multiple nodules",)),
    "emphysema": Class(),
    "pulmonary fibrosis": Class(same=("fibrosis",)),
    "interstitial lung disease": Class(same=("ild", "interstitial pattern")),
    "pleural thickening": Class(),
    "other pleural disease": Class(same=("pleural other",)),
    "hiatal hernia": Class(same=("hernia",)),
    "fracture": Class(narrower=("rib fracture", "clavicle fracture", "vertebral fracture")),
    "calcification": Class(same=("calcinosis",)),
    "granuloma": Class(same=("calcified granuloma",)),
    "aortic enlargement": Class(same=("aortic elongation",)),
    "aortic atherosclerosis": Class(same=("atherosclerosis", "aortic atheromatosis")),
    "scoliosis": Class(),
    "tuberculosis": Class(same=("tb",)),
    "bronchiectasis": Class(),
    "lung tumor": Class(same=("lung cancer",)),
    "copd": Class(same=("copd signs",)),
    "ards": Class(),
    MATERIAL: Class(same=("support device", "medical material"), narrower=("pacemaker", "chest tube")),
}


def plain(name: str) -> str:
    """A label's name without case and underscores."""
    return " ".join(name.lower().replace("_", " ").split())


_CLASS_OF = {plain(label): name for name, one in THORAX.items() for label in (name, *one.same)}
_WIDER = {plain(label): name for name, one in THORAX.items() for label in one.narrower}


def class_of(label: str) -> str | None:
    """The class that a label means, None where the ontology has none."""
    return _CLASS_OF.get(plain(label))


@dataclass(frozen=True)
class LabelTable:
    """The labels of one set in words of the union.

    `meaning`: label -> class; `implying`: label -> class that is present where the label is.
    """

    meaning: Mapping[str, str]
    implying: Mapping[str, str]

    @classmethod
    def of(cls, labels: Iterable[str], names: Mapping[str, str] | None = None) -> LabelTable:
        """`names`: label -> class, before the ontology is asked; "" leaves a label out.

        Raises ConfigError for a label that nothing explains, and for two that mean one class.
        """
        own = {plain(label): name for label, name in (names or {}).items()}
        meaning: dict[str, str] = {}
        implying: dict[str, str] = {}
        for label in labels:
            key = plain(label)
            if key in own:
                if own[key]:
                    meaning[label] = own[key]
            elif key in _CLASS_OF:
                meaning[label] = _CLASS_OF[key]
            elif key in _WIDER:
                implying[label] = _WIDER[key]
            else:
                close = difflib.get_close_matches(key, [*_CLASS_OF, *_WIDER], n=1)
                hint = f" (close to {close[0]!r})" if close else ""
                raise ConfigError(
                    f"label {label!r}{hint} is not in the ontology of shards/label_union.py; say what it means with "
                    f'data.label_text.names, such as {{"{label}": "pneumonia"}}, or leave it out with {{"{label}": ""}}'
                )
        for name in set(meaning.values()):
            alike = [label for label, of in meaning.items() if of == name]
            if len(alike) > 1:
                raise ConfigError(
                    f"labels {', '.join(map(repr, alike))} all mean {name!r}: the table would contradict itself; leave "
                    f'all but one out with data.label_text.names={{"{alike[1]}": ""}}'
                )
        return cls(meaning, implying)

    @property
    def known(self) -> tuple[str, ...]:
        """Classes that the set's labels say something of, in the order of its labels."""
        return tuple(dict.fromkeys((*self.meaning.values(), *self.implying.values())))

    def classes(self, labels: Mapping[str, LabelValue]) -> dict[str, LabelValue]:
        """What a study's labels say of classes; what they do not say is missing.

        Without a label of its own, "no finding" is present where every finding that the set asks for is absent, and
        absent where one is present. Raises BadSampleError where labels contradict each other.
        """
        found: dict[str, LabelValue] = {
            self.meaning[name]: value for name, value in labels.items() if name in self.meaning
        }
        for label, name in self.implying.items():
            if labels.get(label) == 1:
                if found.get(name) == 0:
                    raise BadSampleError("", "", f"labels disagree: {label} is present and {name} absent")
                found[name] = 1
        diseases = [name for name in found if name not in (NO_FINDING, MATERIAL)]
        present = [name for name in diseases if found[name] == 1]
        if found.get(NO_FINDING) == 1 and present:
            raise BadSampleError("", "", f"labels disagree: {NO_FINDING} and {present[0]} are both present")
        if NO_FINDING not in found:
            asked = {*self.meaning.values()} - {NO_FINDING, MATERIAL}
            if present:
                found[NO_FINDING] = 0
            elif asked and all(found.get(name) == 0 for name in asked):
                found[NO_FINDING] = 1
        return found


@lru_cache(maxsize=64)
def _table(labels: tuple[str, ...], names: tuple[tuple[str, str], ...]) -> LabelTable:
    return LabelTable.of(labels, dict(names))


def table_of(labels: Sequence[str], names: Mapping[str, str]) -> LabelTable:
    """`LabelTable.of`, made once for a set."""
    return _table(tuple(labels), tuple(names.items()))
