"""Language of a report, short ones and ones in two languages, and of neighbours that are neither."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.reports.language import detect, languages_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The heart is normal in size. No pleural effusion.", "en"),
        ("No active disease.", "en"),
        ("NORMAL CHEST", "en"),
        ("Stable XXXX opacity of the XXXX lobe.", "en"),
        ("Pas d'épanchement pleural. Silhouette cardiaque de taille normale.", "fr"),
        ("PAS DE FRACTURE VISIBLE SUR LES INCIDENCES REALISEES", "fr"),
        ("Cardiomégalie.", "fr"),
        ("Radiographie du thorax face", "fr"),
        ("Geen pleuravocht. Het hart is niet vergroot, normale longen.", "unknown"),
        ("Kein Erguss. Das Herz ist nicht vergrößert, keine Fraktur.", "unknown"),
        ("Non versamento pleurico. Il cuore è nei limiti della norma.", "unknown"),
        ("El corazón es normal y no hay derrame en los pulmones.", "unknown"),
        ("12.5 x 3 mm", "unknown"),
        ("XXXX", "unknown"),
        ("", "unknown"),
    ],
)
def test_language_of_a_document(text: str, language: str) -> None:
    assert detect(text) == language


def test_spans_of_a_mixed_report_each_have_their_language() -> None:
    french, english, none = "Pas de fracture du radius.", "There is no effusion.", "XXXX."
    text = f"{french} {english} {none}"
    spans = [(0, len(french)), (len(french) + 1, len(french) + 1 + len(english)), (len(text) - len(none), len(text))]
    assert languages_of(text, spans, "unknown") == ("fr", "en", "unknown")
    assert languages_of(text, spans, "en") == ("fr", "en", "en")


def test_a_word_of_the_other_language_makes_no_sentence_of_it() -> None:
    text = "Scan thoracique. The study of Dr de la Tour was compared. There is no effusion in the lungs."
    assert set(languages_of(text, [(0, 16), (17, 57), (58, len(text))], "en")) == {"en"}


@given(st.text())
def test_any_text_has_a_language(text: str) -> None:
    assert detect(text) in ("en", "fr", "unknown")
