"""ECAMP's sentences, boilerplate and descriptors; entities are made by the rules, sentences are ours."""

from __future__ import annotations

from typing import Literal

import pytest

from shards.reports.distil import ENTITIES, Context, boilerplate, sentence
from shards.reports.extract import by_rules
from shards.reports.language import Language


def read(text: str, language: Language = "en") -> Context:
    return by_rules(text, language).context


def test_the_list_has_44_words() -> None:
    assert len(ENTITIES) == 44
    assert {"abnormality", "copd", "hemidiaphragm", "vasculature"} < set(ENTITIES)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (
            "Small left pleural effusion. No pneumothorax. Possible consolidation.", "en",
            {"effusion": "There is an effusion.", "pneumothorax": "There is no pneumothorax.",
             "consolidation": "There may be a consolidation."},
        ),
        ("The aorta is tortuous.", "en", {"aorta": "The aorta is abnormal."}),
        ("Normal hilar contours.", "en", {"hilar": "The hila are normal.", "contour": "The contour is normal."}),
        (
            "Petit épanchement pleural gauche. Pas de pneumothorax.", "fr",
            {"effusion": "Présence d'un épanchement.", "pneumothorax": "Il n'y a pas de pneumothorax."},
        ),
    ],
)  # fmt: skip
def test_one_sentence_a_word(text: str, language: Language, expected: dict[str, str]) -> None:
    assert {one.entity: one.sentence for one in read(text, language).distilled} == expected


def test_a_present_mention_decides() -> None:
    (told,) = read("No effusion on the right. Small left effusion.").distilled
    assert (told.status, len(told.spans)) == ("present", 2)


def test_every_word_can_be_said() -> None:
    forms: tuple[Literal["present", "possible", "absent"], ...] = ("present", "possible", "absent")
    told = {sentence(name, form, language) for name in ENTITIES for form in forms for language in ("en", "fr")}
    assert len(told) == 44 * 6
    assert sentence("opacity", "absent", "fr") == "Il n'y a pas d'opacité."
    assert all(text.endswith(".") and text[0].isupper() for text in told)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("There is no evidence of effusion. There is no mass.", "en", ["There is no evidence of", "There is no"]),
        ("Il n'y a pas d'argument pour une fracture.", "fr", ["Il n'y a pas d'argument pour"]),
        ("Il n'y a pas d'épanchement.", "fr", ["Il n'y a pas d'"]),
        ("Normal heart.", "en", []),
    ],
)
def test_boilerplate(text: str, language: Language, expected: list[str]) -> None:
    assert [text[start:end] for start, end in boilerplate(text.lower(), language)] == expected


def test_descriptors_are_the_two_words_before_within_their_part() -> None:
    text = "There is a very small left pneumothorax, large mass. Effusion."
    assert [text[start:end] for start, end in read(text).descriptors] == ["small left", "large"]


def test_sections_that_are_not_read_give_nothing() -> None:
    assert read("Indication: there is no effusion known.\n\nFindings: Seen.") == Context()
