"""The one form of what is read out of a report: by rules, checked, stored; all text is ours."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards.batch import StudyRecord, ViewRecord
from shards.errors import DataError
from shards.reports.anatomy import AnatomyText
from shards.reports.distil import Distilled
from shards.reports.entities import Entity
from shards.reports.extract import Extraction, by_rules, record_members, verify
from shards.reports.lexicon.diseases import DISEASE_OF_CONCEPT, DISEASES, LOOKED_FOR, OF_THE_LUNG
from shards.reports.lexicon.terms import concepts
from shards.reports.structured import complete, parse, source_text, structured_by_rules

REPORT = """Indication: cough, known effusion.

Findings: There is a small left pleural effusion. The heart is normal. A mass of the liver is seen. No pneumothorax.

Impression: Left effusion, possible pneumonia of the right lower lobe."""
FRENCH = """Résultats : Fracture du radius distal. Pas de luxation.

Conclusion : Fracture du radius."""


def verdicts(found: Extraction) -> dict[str, str]:
    assert found.structured is not None
    return {item.disease: item.verdict for item in complete(found.structured).items}


def test_rules_read_all_of_a_report() -> None:
    found = verify(by_rules(REPORT, study="s1"), REPORT)
    assert (found.language, found.schema_version) == ("en", 2)
    assert [part.name for part in found.sections] == ["indication", "findings", "impression"]
    assert {one.anatomy: one.status for one in found.anatomy} == {
        "heart": "normal",
        "liver": "abnormal",
        "lung": "abnormal",
    }
    assert found.labels["chexpert14"]["Pleural Effusion"] == 1 and found.labels["chexpert14"]["Pneumothorax"] == 0
    told = {one.entity: one.status for one in found.context.distilled}
    assert (told["effusion"], told["pneumothorax"], told["pneumonia"]) == ("present", "absent", "possible")


def test_each_sentence_is_read_in_its_language() -> None:
    text = (
        "FINDINGS: There is a small left pleural effusion. The heart is of normal size. "
        "The study was compared with that of the year before.\n\n"
        "CONCLUSION : Il n'y a pas de pneumothorax. Pas de fracture de côte sur les clichés réalisés."
    )
    found = verify(by_rules(text), text)
    assert found.language == "en"
    assert [(one.concept, one.status) for one in found.entities] == [
        ("pleural_effusion", "present"), ("cardiomegaly", "absent"), ("pneumothorax", "absent"), ("fracture", "absent"),
    ]  # fmt: skip
    assert found.labels["chexpert14"]["Pneumothorax"] == found.labels["chexpert14"]["Fracture"] == 0
    assert [text[start:end] for start, end in found.context.boilerplate] == ["Il n'y a pas de"]


def test_structured_report_by_rules() -> None:
    found = verdicts(by_rules(REPORT, study="s1"))
    assert (found["effusion"], found["pneumonia"], found["pneumothorax"]) == ("present", "uncertain", "absent")
    assert found["mass"] == "absent", "a mass of the liver is none of the lung"
    assert set(LOOKED_FOR["chest"]) <= set(found) and "dislocation" not in found
    french = by_rules(FRENCH, study="s2")
    assert verdicts(french) == {"fracture": "present", "dislocation": "absent"}
    assert by_rules("Seen.").structured is None


def test_concepts_and_diseases_meet() -> None:
    assert set(DISEASE_OF_CONCEPT) <= set(concepts())
    assert {*DISEASE_OF_CONCEPT.values(), *OF_THE_LUNG, *LOOKED_FOR["chest"], *LOOKED_FOR["bone"]} <= set(DISEASES)
    reached = {DISEASE_OF_CONCEPT.get(concept, concept) for concept in concepts()} & set(DISEASES)
    assert len(reached) >= 45


def test_positions_and_contradictions_of_observations() -> None:
    def said(start: int, side: Any, position: str, status: Any) -> Entity:
        return Entity(
            concept="pleural_effusion", start=start, end=start + 8, sentence=0, laterality=side, position=position,
            status=status, descriptor=None,
        )  # fmt: skip

    entities = (said(0, "left", "base", "present"), said(9, "left", "base", "present"), said(18, "right", "", "absent"))
    report = structured_by_rules("s", entities, lung=[(0, 35)])
    assert report is not None
    (item,) = [item for item in report.items if item.disease == "effusion"]
    assert [(one.position, one.exist) for one in item.observations] == [("left base", "yes"), ("right side", "no")]
    assert item.verdict == "present"
    report = structured_by_rules("s", (*entities, said(27, "left", "base", "absent")), lung=[(0, 35)])
    assert report is not None
    assert {item.disease: item.verdict for item in report.items}["effusion"] == "uncertain"


def test_what_a_record_holds_fits_it_and_the_structured_spans_move_with_their_sections() -> None:
    found = by_rules(REPORT, study="s1")
    members = json.loads(json.dumps(record_members(found, REPORT)))
    record = StudyRecord(study="s1", patient="p1", views=[ViewRecord(id="0", height=8, width=8)], **members)
    text = source_text(record.report)
    spans = {
        item.disease: [text[slice(*one.span)] for one in item.observations if one.span is not None]
        for item in parse(record.structured_report or {}).items
    }
    assert spans["effusion"] == ["pleural effusion"] and spans["pneumonia"] == ["pneumonia"]
    assert record.report["impression"].startswith("Left effusion")
    assert record.anatomy["heart"] == "The heart is normal."
    assert record.anatomy_status["heart"] == "normal" and record.anatomy_status["lung"] == "abnormal"
    assert "heart" not in record.anatomy_impression and record.anatomy_findings["heart"] == "The heart is normal."
    lung = (record.anatomy_impression["lung"], record.anatomy_findings["lung"])
    assert record.anatomy["lung"] == " ".join(lung)
    told = {one.entity: (one.sentence, [text[slice(*span)] for span in one.spans]) for one in record.distilled}
    assert told["effusion"][0] == "There is an effusion." and any("effusion" in said for said in told["effusion"][1])
    assert [text[slice(*span)].lower() for span in record.boilerplate] == ["there is no"] * len(record.boilerplate)
    assert record.descriptors and all(1 <= len(text[slice(*span)].split()) <= 2 for span in record.descriptors)
    assert all(text[slice(*entity["span"])] == entity["text"] for entity in record.entities)


def test_a_record_refuses_spans_outside_of_its_report() -> None:
    plain = {"study": "s", "patient": "p", "views": [{"id": "0", "height": 8, "width": 8}]}
    told = plain | {"report": {"a": "12", "b": "3"}}
    distilled = {"entity": "mass", "status": "absent", "sentence": "There is no mass.", "spans": [[0, 4]]}
    record = StudyRecord.model_validate(told | {"boilerplate": [[0, 4]], "distilled": [distilled]})
    assert record.boilerplate == [(0, 4)]
    for wrong in (
        {"boilerplate": [[3, 5]]}, {"descriptors": [[2, 2]]}, {"distilled": [distilled | {"spans": [[-1, 2]]}]},
        {"distilled": [distilled | {"other": 1}]}, {"anatomy_status": {"lung": "well"}},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            StudyRecord.model_validate(told | wrong)


def test_an_extraction_survives_json() -> None:
    for text in (REPORT, FRENCH, ""):
        found = by_rules(text)
        assert Extraction.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": ()}, r"anatomy\.0\.findings: span .* lies in no such section"),
        ({"sentences": ((0, 1000),)}, r"sentences: span \[0, 1000\) lies outside"),
        ({"sentences": ((34, 36),)}, r"sentences: span \[34, 36\) holds no word"),
        ({"sentences": ()}, r"entities\.0: sentence \d of 0"),
        ({"labels": {"chexpert": {}}}, "labels: an ontology is unknown"),
        ({"labels": {"chexpert14": {"Secret": 1}}}, "labels.chexpert14: a label is unknown"),
        ({"anatomy": (AnatomyText(anatomy="secret", status="normal", findings=((36, 40),)),)}, "anatomy.0: its name"),
        ({"anatomy": (AnatomyText(anatomy="heart", status="normal"),)}, "anatomy.0: it has no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_true_of_the_document(change: dict[str, Any], message: str) -> None:
    broken = by_rules(REPORT).model_copy(update=change)
    with pytest.raises(DataError, match=message) as caught:
        verify(broken, REPORT)
    assert not any(word in str(caught.value).lower() for word in ("secret", "effusion", "liver", "cough"))


def test_distilled_sentences_are_the_templates_own() -> None:
    found = by_rules(REPORT)
    for one in (
        Distilled(entity="effusion", status="present", sentence="The patient's secret.", spans=()),
        Distilled(entity="secret", status="present", sentence="There is an effusion.", spans=()),
    ):
        context = type(found.context)(distilled=(one,))
        with pytest.raises(DataError, match=r"context\.distilled\.0: ") as caught:
            verify(found.model_copy(update={"context": context}), REPORT)
        assert "secret" not in str(caught.value)


def test_a_verdict_without_grounds_becomes_uncertain() -> None:
    found = by_rules(REPORT)
    assert found.structured is not None
    items = [
        replace(item, verdict="present") if item.disease == "pneumothorax" else item for item in found.structured.items
    ]
    wrong = found.model_copy(update={"structured": replace(found.structured, items=items)})
    assert verdicts(verify(wrong, REPORT))["pneumothorax"] == "uncertain"


PIECES = (
    "The liver is normal. ", "Findings: ", "Impression: ", "Résultats : ", "épanchement pleural ", "no effusion, ",
    "\n\n", "nodule", "there is no ", "İ", "ﬁ", "\u0301", "(", '"', ". ", "1.5 cm ", "XXXX ", "<b>", "mass ", "T12 ",
    "\u200f", "fracture ",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.sampled_from(["en", "fr", "unknown"]))
@settings(max_examples=60, deadline=None)
def test_whatever_the_text_the_rules_pass_their_own_check(text: str, language: Any) -> None:
    found = by_rules(text, language, study="s")
    assert verify(found, text) == found
    json.dumps(record_members(found, text))
