from __future__ import annotations

import csv
from pathlib import Path

import pytest

from shards.errors import ConfigError
from shards.reports.entities import entities
from shards.reports.labels import ONTOLOGIES, labels
from shards.reports.lexicon.terms import concepts
from shards.reports.sections import sections
from shards.reports.sentences import sentences

KNOWLEDGE = Path(__file__).resolve().parents[4] / "shared" / "data" / "knowledge" / "chexpert_labeler"


def labelled(text: str, ontology: str = "chexpert14", language: str = "en") -> dict[str, int]:
    spans = sentences(text, language=language)
    return dict(labels(entities(text, spans, language), ontology, sections(text)))


# The sample of CheXpert's labeler in our own words of the same build, so that the rules are tested without its file.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Heart size is normal and the lungs are clear. No edema or pneumonia. No effusion",
            {"No Finding": 1, "Cardiomegaly": 0, "Edema": 0, "Pneumonia": 0, "Pleural Effusion": 0},
        ),
        (
            "1. Right pleural effusion with adjacent atelectasis. Left effusion is also present.\n\n"
            "2. Cardiomegaly without overt edema.",
            {"Cardiomegaly": 1, "Edema": 0, "Atelectasis": 1, "Pleural Effusion": 1},
        ),
        (
            "Patchy airspace disease in the right base, may reflect atelectasis or consolidation.",
            {"Lung Opacity": 1, "Consolidation": -1, "Atelectasis": -1},
        ),
        ("1. Unchanged mild cardiomegaly. 2. Hyperexpanded but clear lungs.", {"Cardiomegaly": 1}),
    ],
)
def test_chexpert(text: str, expected: dict[str, int]) -> None:
    assert labelled(text) == expected


@pytest.mark.skipif(not KNOWLEDGE.is_dir(), reason=f"no folder {KNOWLEDGE}")
def test_sample_of_the_chexpert_labeler_is_labelled_alike() -> None:
    with open(KNOWLEDGE / "labeled_reports.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for number, row in enumerate(rows):
        text = row.pop("Reports")
        told = {name: int(float(value)) for name, value in row.items() if value}
        assert labelled(text) == told, f"sample report {number}"


def test_a_present_mention_outweighs_a_possible_one_and_that_an_absent_one() -> None:
    assert labelled("No pneumothorax. Possible pneumothorax.")["Pneumothorax"] == -1
    assert labelled("No pneumothorax. Possible pneumothorax. Small pneumothorax.")["Pneumothorax"] == 1


def test_congestion_is_a_doubtful_edema() -> None:
    assert labelled("Pulmonary vascular congestion.") == {"Edema": -1}
    assert labelled("No pulmonary vascular congestion.") == {"No Finding": 1, "Edema": 0}


def test_what_is_asked_is_not_found() -> None:
    text = "INDICATION: Pneumonia, pneumothorax.\n\nFINDINGS: No pneumothorax. Left effusion."
    assert labelled(text) == {"Pneumothorax": 0, "Pleural Effusion": 1}
    # One heading and the whole report behind it: nothing else is there to count.
    assert labelled("COMPARISON: CT of May. There is a left pleural effusion.") == {"Pleural Effusion": 1}


def test_devices_do_not_spoil_no_finding_and_other_findings_do() -> None:
    assert labelled("Left chest tube. Lungs are clear.") == {"No Finding": 1, "Support Devices": 1}
    assert labelled("Emphysema. Lungs are otherwise clear.") == {}


@pytest.mark.parametrize(
    ("text", "language"),
    [("Normal chest.", "en"), ("The lungs are clear.", "en"), ("Examen normal.", "fr"), ("Poumons clairs.", "fr"),
     ("Radiographie sans particularité.", "fr")],
)  # fmt: skip
def test_no_finding_needs_words_that_say_so(text: str, language: str) -> None:
    assert labelled(text, language=language) == {"No Finding": 1}
    for silent in ("", "x", "The patient moved."):
        assert labelled(silent, language=language) == {}


def test_ct_labels() -> None:
    text = (
        "Calcified atheroma plaques are observed in the aortic arch and coronary arteries. "
        "Heart contour and size are normal. Pleural or pericardial effusion was not detected. "
        "Millimetric nodules and mosaic attenuation are seen in both lungs, with interlobular septal thickening."
    )
    assert labelled(text, "ct_rate18") == {
        "Arterial wall calcification": 1,
        "Cardiomegaly": 0,
        "Pericardial effusion": 0,
        "Coronary artery wall calcification": 1,
        "Lung nodule": 1,
        "Pleural effusion": 0,
        "Mosaic attenuation pattern": 1,
        "Interlobular septal thickening": 1,
    }


def test_french_reports_get_the_same_labels() -> None:
    text = "Résultats : cardiomégalie. Pas d'épanchement pleural ni de pneumothorax. Possible foyer de la base droite."
    assert labelled(text, language="fr") == {"Cardiomegaly": 1, "Pneumothorax": 0, "Pleural Effusion": 0}


def test_ontologies_name_only_concepts_of_the_lexicon() -> None:
    known = set(concepts())
    for ontology in ONTOLOGIES.values():
        for label in ontology.values():
            assert known.issuperset((*label.concepts, *label.doubtful))
    assert [len(ONTOLOGIES[name]) for name in ("chexpert14", "nih14", "ct_rate18")] == [13, 14, 18]


def test_unknown_ontology_is_refused() -> None:
    with pytest.raises(ConfigError, match="chexpert14"):
        labels((), "padchest")
