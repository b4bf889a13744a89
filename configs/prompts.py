"""Prompts for zero-shot classification. They read like reports, since models were taught with reports.

Positive ones state a finding with side, zone and size; negative ones deny it the way reports do. A model of structured
reports has read no plain ones: its prompts are what such a report says of the one disease, in the same parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from core.evaluation.zero_shot import Prompt, Prompts
from shards.batch import NO_FINDING
from shards.ingest.phantom_bone_text import PROMPTS as BONE_PHANTOM
from shards.ingest.phantom_chest_text import PROMPTS as PHANTOM_PROMPTS
from shards.ingest.phantom_chest_text import STRUCTURED_PROMPTS as PHANTOM_STRUCTURED
from shards.ingest.phantom_ct_text import DISEASES as CT_PHANTOM_DISEASES
from shards.ingest.phantom_ct_text import PROMPTS as CT_PHANTOM
from shards.label_union import THORAX, class_of

_NORMAL = ["No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "The lungs are clear."]

# The fourteen labels of ChestX-ray14 (Wang et al. 2017), as its label file spells them.
NIH_PROMPTS: dict[str, dict[str, list[str]]] = {
    "Atelectasis": {
        "positive": [
            "Bibasilar linear atelectasis.",
            "Left lower lobe atelectasis with volume loss.",
            "Plate-like atelectasis in the right lower zone.",
            "There is mild subsegmental atelectasis at the left base.",
        ],
        "negative": ["No atelectasis.", "The lungs are well expanded.", *_NORMAL],
    },
    "Cardiomegaly": {
        "positive": [
            "The heart is enlarged.",
            "Moderate cardiomegaly.",
            "The cardiac silhouette is severely enlarged.",
            "Mildly increased heart size.",
        ],
        "negative": ["The heart is normal in size.", "Heart size is within normal limits.", "No cardiomegaly."],
    },
    "Consolidation": {
        "positive": [
            "Dense consolidation in the right lower lobe.",
            "Left lower zone airspace consolidation with air bronchograms.",
            "Extensive consolidation of the right upper lobe.",
            "Patchy consolidation in both lower lungs.",
        ],
        "negative": ["No consolidation.", "No focal airspace opacity.", *_NORMAL],
    },
    "Edema": {
        "positive": [
            "Moderate pulmonary edema.",
            "Bilateral perihilar opacities consistent with interstitial edema.",
            "Pulmonary vascular congestion with Kerley B lines.",
            "Severe alveolar pulmonary edema.",
        ],
        "negative": ["No pulmonary edema.", "The pulmonary vessels are normal.", *_NORMAL],
    },
    "Effusion": {
        "positive": [
            "Small left pleural effusion.",
            "Moderate right pleural effusion.",
            "Large bilateral pleural effusions.",
            "Blunting of the right costophrenic angle, pleural effusion.",
        ],
        "negative": ["No pleural effusion.", "The costophrenic angles are sharp.", *_NORMAL],
    },
    "Emphysema": {
        "positive": [
            "Hyperinflated lungs with flattened diaphragms, emphysema.",
            "Severe bullous emphysema in the upper lobes.",
            "Subcutaneous emphysema of the chest wall.",
            "Increased lucency of both lungs consistent with emphysema.",
        ],
        "negative": ["The lungs are not hyperinflated.", "No emphysema.", *_NORMAL],
    },
    "Fibrosis": {
        "positive": [
            "Bilateral basal reticular opacities, pulmonary fibrosis.",
            "Coarse interstitial markings consistent with fibrosis.",
            "Right apical fibrosis with volume loss.",
            "Chronic fibrotic changes in both lungs.",
        ],
        "negative": ["No fibrosis.", "The interstitial markings are normal.", *_NORMAL],
    },
    "Hernia": {
        "positive": [
            "Large hiatal hernia behind the heart.",
            "Retrocardiac air-fluid level, hiatal hernia.",
            "Moderate hiatal hernia.",
            "Diaphragmatic hernia on the left.",
        ],
        "negative": ["No hiatal hernia.", "The mediastinum is unremarkable.", *_NORMAL],
    },
    "Infiltration": {
        "positive": [
            "Patchy infiltrate in the right lower lobe.",
            "Bilateral interstitial infiltrates.",
            "Left perihilar infiltrate.",
            "Diffuse infiltrates in both lungs.",
        ],
        "negative": ["No infiltrate.", "No pulmonary infiltrates.", *_NORMAL],
    },
    "Mass": {
        "positive": [
            "Large mass in the right upper lobe.",
            "A 5 cm left perihilar mass.",
            "Right lower lobe lung mass.",
            "A rounded 4 cm mass in the left mid zone.",
        ],
        "negative": ["No lung mass.", "No suspicious nodule or mass.", *_NORMAL],
    },
    "Nodule": {
        "positive": [
            "A 12 mm nodule in the right upper lobe.",
            "Solitary pulmonary nodule in the left mid zone.",
            "Multiple small pulmonary nodules in both lungs.",
            "A nodular opacity in the right lower lung.",
        ],
        "negative": ["No pulmonary nodule.", "No suspicious nodule or mass.", *_NORMAL],
    },
    "Pleural_Thickening": {
        "positive": [
            "Right apical pleural thickening.",
            "Bilateral pleural thickening.",
            "Left basal pleural thickening with calcification.",
            "Diffuse thickening of the right pleura.",
        ],
        "negative": ["No pleural thickening.", "The pleura is unremarkable.", *_NORMAL],
    },
    "Pneumonia": {
        "positive": [
            "Right lower lobe pneumonia.",
            "Left lower zone opacity consistent with pneumonia.",
            "Multifocal pneumonia in both lungs.",
            "Lobar pneumonia of the right middle lobe.",
        ],
        "negative": ["No evidence of pneumonia.", "No focal airspace opacity.", *_NORMAL],
    },
    "Pneumothorax": {
        "positive": [
            "Small left apical pneumothorax.",
            "Large right pneumothorax with collapse of the lung.",
            "Moderate right pneumothorax.",
            "A left pleural line without lung markings beyond it, pneumothorax.",
        ],
        "negative": ["No pneumothorax.", "The lungs are fully expanded.", "No pleural line is seen."],
    },
}

# CT-RATE's labels that belong to one anatomy, 16 of 18, and fVLM's prompts for them: the name, and its denial.
CT_RATE_ANATOMY: dict[str, str] = {
    **dict.fromkeys(
        (
            "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
            "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
            "Interlobular septal thickening",
        ),
        "lung",
    ),
    **dict.fromkeys(("Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification"), "heart"),
    "Hiatal hernia": "esophagus",
    "Arterial wall calcification": "aorta",
}  # fmt: skip
CT_RATE_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    label: {"positive": (f"{label}.",), "negative": (f"Not {label.lower()}.",)} for label in CT_RATE_ANATOMY
}
# The CT phantom shares names of diseases with the chest phantom, not what is said of them.
CT_PHANTOM_ANATOMY = {name: disease.anatomy for name, disease in CT_PHANTOM_DISEASES.items()}
CT_PHANTOM_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    label: {side: tuple(texts) for side, texts in sides.items()} for label, sides in CT_PHANTOM.items()
}
# In French, as its reports are.
BONE_PHANTOM_PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    label: {side: tuple(texts) for side, texts in sides.items()} for label, sides in BONE_PHANTOM.items()
}

_WORDINGS = (
    ("There is {}.", "There is no {}."),
    ("Findings are consistent with {}.", "No evidence of {}."),
    ("Signs of {} are seen.", "No signs of {} are seen."),
    ("{}.", "No {}."),
    ("Evidence of {}.", "Without evidence of {}."),
    ("The image shows {}.", "The image does not show {}."),
    ("Chest radiograph with {}.", "Chest radiograph without {}."),
    ("{} is present.", "{} is absent."),
    ("{} is noted.", "{} is not noted."),
    ("Findings suggest {}.", "Findings do not suggest {}."),
    ("Impression: {}.", "Impression: no {}."),
    ("Known {}, unchanged.", "No {}, unchanged."),
    ("New {} since the prior study.", "No new {} since the prior study."),
    ("Features compatible with {}.", "No features of {}."),
    ("There are changes of {}.", "There are no changes of {}."),
    ("The patient has {}.", "The patient has no {}."),
    ("Appearances are those of {}.", "Appearances are not those of {}."),
    ("Mild {}.", "Not even mild {}."),
    ("Marked {} is demonstrated.", "No {} is demonstrated."),
    ("A radiograph in which {} can be seen.", "A radiograph in which no {} can be seen."),
)


def paraphrased(labels: Iterable[str], wordings: int = 3) -> tuple[dict[str, dict[str, tuple[str, ...]]], ...]:
    """More ways to ask for each label, up to 20, for how far figures hang on words (fvlm.md, 6.4; umcl.md, 7)."""
    assert 0 < wordings <= len(_WORDINGS), f"{wordings} wordings of {len(_WORDINGS)}"
    labels = tuple(labels)
    return tuple(
        {
            label: {"positive": (stated.format(label.lower()),), "negative": (denied.format(label.lower()),)}
            for label in labels
        }
        for stated, denied in _WORDINGS[:wordings]
    )


def _of_classes(prompts: Prompts) -> Prompts:
    """Under the names that the union of label tables gives their labels."""
    return {name: sides for label, sides in prompts.items() if (name := class_of(label)) is not None}


PLAIN_PROMPTS: Prompts = {**_of_classes(NIH_PROMPTS), **_of_classes(PHANTOM_PROMPTS), **NIH_PROMPTS, **PHANTOM_PROMPTS}
# What stands for the report of a study that has only labels: a plain sentence, as data sets are turned to text.
LABEL_SENTENCES: dict[str, tuple[str, ...]] = {
    NO_FINDING: ("No acute cardiopulmonary abnormality.", "The lungs are clear.", "No acute finding."),
    **{
        name: (f"There is {name}.", f"Findings are consistent with {name}.", f"{name.capitalize()} is present.")
        for name in THORAX
        if name != NO_FINDING
    },
}
# ChestX-ray14 spells the same diseases with a capital.
STRUCTURED_PROMPTS: Prompts = PHANTOM_STRUCTURED | {
    label: PHANTOM_STRUCTURED[label.lower()] for label in NIH_PROMPTS if label.lower() in PHANTOM_STRUCTURED
}


def choose(labels: Sequence[str], recipe: Prompts, report: str) -> tuple[Prompts, str]:
    """(prompts of the labels that have any, where they are from), for a model taught with `report`s, raw or structured.

    The recipe's come first, then structured ones if it was taught with these, then plain ones.
    """
    sources: dict[str, Prompts] = {"recipe": recipe}
    if report == "structured":
        sources["structured reports"] = STRUCTURED_PROMPTS
    sources["configs/prompts.py"] = PLAIN_PROMPTS
    chosen: dict[str, Mapping[str, Sequence[Prompt]]] = {}
    labels_of: dict[str, list[str]] = {}
    for label in labels:
        source = next((name for name, prompts in sources.items() if label in prompts), None)
        if source is not None:
            chosen[label] = sources[source][label]
            labels_of.setdefault(source, []).append(label)
    if len(labels_of) <= 1:
        return chosen, "".join(labels_of)
    return chosen, ", ".join(f"{source} ({' '.join(names)})" for source, names in labels_of.items())
