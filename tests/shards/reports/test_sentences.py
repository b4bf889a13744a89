"""Sentences of clinical prose: what ends one, what does not, and what holds for any text."""

from __future__ import annotations

from shards.reports.sentences import sentences


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


def test_decimals_abbreviations_and_brackets_stay_whole() -> None:
    assert split("A 3.5 cm mass. Dr. Smith saw it (malignant? benign?). No effusion.") == [
        "A 3.5 cm mass.",
        "Dr. Smith saw it (malignant? benign?).",
        "No effusion.",
    ]


def test_list_marks_stand_outside_the_sentences() -> None:
    assert split("1. Clear lungs\n2. Normal heart\n- no effusion") == ["Clear lungs", "Normal heart", "no effusion"]
