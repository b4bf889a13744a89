"""Labels of a study from the findings of its report, for the label sets that public data carry.

A label is 1 (present), 0 (absent), -1 (possible, or said in doubt) or missing: not mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from shards.errors import ConfigError
from shards.reports.entities import Entity
from shards.reports.language import within
from shards.reports.sections import Section
from shards.reports.status import Status

LabelValue = Literal[-1, 0, 1]

NO_FINDING = "No Finding"  # of chexpert14, made of the absence of the others
# Sections that speak of other times or of what is asked.
NOT_FINDINGS = frozenset({"history", "indication", "technique", "comparison"})


@dataclass(frozen=True, kw_only=True)
class Label:
    """`concepts` make the label; those of `doubtful` are no more than a hint of it: -1 when present."""

    concepts: tuple[str, ...]
    doubtful: tuple[str, ...] = field(default=())


_MATERIAL = ("support_device", "surgical_material", "orthopedic_hardware", "joint_prosthesis")
_CHEXPERT14: dict[str, Label] = {
    "Enlarged Cardiomediastinum": Label(concepts=("enlarged_cardiomediastinum",)),
    "Cardiomegaly": Label(concepts=("cardiomegaly",)),
    "Lung Lesion": Label(
        concepts=("nodule", "nodular_opacity", "mass", "malignancy", "metastasis", "cavity", "lung_lesion", "lung_cyst")
    ),
    "Lung Opacity": Label(
        concepts=(
            "lung_opacity", "increased_density", "infiltrate", "ground_glass_opacity", "interstitial_opacity",
            "scarring", "peribronchial_thickening", "bronchial_wall_thickening", "tree_in_bud", "centrilobular_nodule",
            "septal_thickening",
        )
    ),
    "Edema": Label(concepts=("pulmonary_edema", "heart_failure"), doubtful=("vascular_congestion",)),
    "Consolidation": Label(concepts=("consolidation",)),
    "Pneumonia": Label(concepts=("pneumonia", "infection", "aspiration")),
    "Atelectasis": Label(concepts=("atelectasis",)),
    "Pneumothorax": Label(concepts=("pneumothorax",)),
    "Pleural Effusion": Label(concepts=("pleural_effusion",)),
    "Pleural Other": Label(concepts=("pleural_thickening", "pleural_plaque", "fibrosis")),
    "Fracture": Label(concepts=("fracture", "vertebral_compression")),
    "Support Devices": Label(concepts=_MATERIAL),
}  # fmt: skip
_NIH14: dict[str, Label] = {
    "Atelectasis": Label(concepts=("atelectasis",)),
    "Cardiomegaly": Label(concepts=("cardiomegaly",)),
    "Effusion": Label(concepts=("pleural_effusion",)),
    "Infiltration": Label(concepts=("infiltrate",)),
    "Mass": Label(concepts=("mass",)),
    "Nodule": Label(concepts=("nodule", "calcified_nodule")),
    "Pneumonia": Label(concepts=("pneumonia",)),
    "Pneumothorax": Label(concepts=("pneumothorax",)),
    "Consolidation": Label(concepts=("consolidation",)),
    "Edema": Label(concepts=("pulmonary_edema",)),
    "Emphysema": Label(concepts=("emphysema",)),
    "Fibrosis": Label(concepts=("fibrosis",)),
    "Pleural_Thickening": Label(concepts=("pleural_thickening",)),
    "Hernia": Label(concepts=("hiatal_hernia", "hernia")),
}
_CT_RATE18: dict[str, Label] = {
    "Medical material": Label(concepts=_MATERIAL),
    "Arterial wall calcification": Label(concepts=("arterial_calcification",)),
    "Cardiomegaly": Label(concepts=("cardiomegaly",)),
    "Pericardial effusion": Label(concepts=("pericardial_effusion",)),
    "Coronary artery wall calcification": Label(concepts=("coronary_calcification",)),
    "Hiatal hernia": Label(concepts=("hiatal_hernia",)),
    "Lymphadenopathy": Label(concepts=("lymphadenopathy", "lymph_node", "calcified_lymph_node")),
    "Emphysema": Label(concepts=("emphysema",)),
    "Atelectasis": Label(concepts=("atelectasis",)),
    "Lung nodule": Label(concepts=("nodule", "nodular_opacity", "calcified_nodule", "centrilobular_nodule")),
    "Lung opacity": Label(concepts=("lung_opacity", "ground_glass_opacity")),
    "Pulmonary fibrotic sequela": Label(concepts=("scarring", "fibrosis")),
    "Pleural effusion": Label(concepts=("pleural_effusion",)),
    "Mosaic attenuation pattern": Label(concepts=("mosaic_attenuation",)),
    "Peribronchial thickening": Label(concepts=("peribronchial_thickening",)),
    "Consolidation": Label(concepts=("consolidation",)),
    "Bronchiectasis": Label(concepts=("bronchiectasis",)),
    "Interlobular septal thickening": Label(concepts=("septal_thickening",)),
}
ONTOLOGIES: Mapping[str, Mapping[str, Label]] = {"chexpert14": _CHEXPERT14, "nih14": _NIH14, "ct_rate18": _CT_RATE18}


def labels(found: Sequence[Entity], ontology: str, sections: Sequence[Section] = ()) -> dict[str, LabelValue]:
    """Label -> value for the labels that the report speaks of, in the order of the ontology.

    Of several mentions a present one decides, then a possible one. Findings in a section on history, indication,
    technique or comparison do not count, unless the report has no other. Raises ConfigError for an unknown ontology.
    """
    if ontology not in ONTOLOGIES:
        raise ConfigError(f"ontology={ontology!r} is unknown; use {', '.join(ONTOLOGIES)}")
    return _labels(_said(found, sections), ontology)


def all_labels(
    found: Sequence[Entity], sections: Sequence[Section], ontologies: Iterable[str] = tuple(ONTOLOGIES)
) -> dict[str, dict[str, LabelValue]]:
    """Ontology -> what `labels` gives."""
    said = _said(found, sections)
    return {ontology: _labels(said, ontology) for ontology in ontologies}


_Said = Set[tuple[str, Status]]


def _said(found: Sequence[Entity], sections: Sequence[Section]) -> _Said:
    """(concept, status) of the entities that count."""
    outside = [(section.start, section.end) for section in sections if section.name in NOT_FINDINGS]
    if len(outside) == len(sections):  # a report under one heading that says more than it
        outside = []
    return {(one.concept, one.status) for one in found if not within((one.start, one.start + 1), outside)}


def _labels(said: _Said, ontology: str) -> dict[str, LabelValue]:
    names, doubtful = _labels_of(ontology)
    told: dict[str, LabelValue] = {}
    for concept, status in said:
        value = _VALUES[status]
        for name in names.get(concept, ()):
            if name not in told or _WEIGHT[value] > _WEIGHT[told[name]]:
                told[name] = value
        for name in doubtful.get(concept, ()):
            hinted: LabelValue = -1 if value else 0
            if name not in told or _WEIGHT[hinted] > _WEIGHT[told[name]]:
                told[name] = hinted
    values = {name: told[name] for name in ONTOLOGIES[ontology] if name in told}
    if ontology == "chexpert14" and _nothing_found(values, said):
        values = {NO_FINDING: 1, **values}
    return values


def label_names(ontology: str) -> tuple[str, ...]:
    """Every label that `labels` may give."""
    return (*([NO_FINDING] if ontology == "chexpert14" else []), *ONTOLOGIES[ontology])


_VALUES: Mapping[str, LabelValue] = {"present": 1, "possible": -1, "absent": 0}
_WEIGHT: Mapping[LabelValue, int] = {0: 0, -1: 1, 1: 2}  # of mentions that differ the heavier one decides


@cache
def _labels_of(ontology: str) -> tuple[Mapping[str, Sequence[str]], Mapping[str, Sequence[str]]]:
    """Concept -> the labels it makes, and those it only hints at."""
    made: dict[str, list[str]] = {}
    hinted: dict[str, list[str]] = {}
    for name, label in ONTOLOGIES[ontology].items():
        for concepts, told in ((label.concepts, made), (label.doubtful, hinted)):
            for concept in concepts:
                told.setdefault(concept, []).append(name)
    return made, hinted


# Present, these are no abnormality of the chest, or say themselves that there is none.
_NO_ABNORMALITY = frozenset({"abnormality", "lymph_node", *_MATERIAL})


def _nothing_found(values: Mapping[str, LabelValue], said: _Said) -> bool:
    """Findings are spoken of, and nothing is present or possible but devices.

    CheXpert's "No Finding" also looks beyond its own 13 labels. Of a text that speaks of no finding it says nothing.
    """
    if not said or any(value != 0 for name, value in values.items() if name != "Support Devices"):
        return False
    return not any(status == "present" and concept not in _NO_ABNORMALITY for concept, status in said)
