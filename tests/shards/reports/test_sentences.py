"""Sentences of clinical prose: what ends one, what does not, and what holds for any text."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.reports.sentences import MAX_SENTENCE, sentences
from shards.reports.text import clean

CT_RATE = Path(__file__).resolve().parents[4] / "shared/data/ct_rate_reports/train.csv"


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    "text",
    [
        "A 3.5 x 2,5 cm mass is seen.",
        "The mass measures 1. 5 cm.",
        "Dr. Smith was called.",
        "Discussed with Prof. J. Smith at 3 p.m. by phone.",
        "Adressé par M. Martin et Mme. Durand.",
        "Nodule du lobe sup. droit, cf. examen du 3 janv. 2019.",
        "Approx. 3 nodules, e.g. No. 5 and fig. 2.",
        "Fracture de L. 5 et de la côte no. 7.",
        "Mosaic pattern (small airway disease? Small vessel disease?) in both lungs.",
        "Lesion (cyst?) in the left kidney.",
        "Seen on 08 . 04 . 1941 by name @ site . com.",
        "There is ... something.",
        "Nodule (see image 5. Series 2) of the left lung.",
        "The heart is normal in size and the mediastinum is of\nnormal width on both of the views.",
        "Pas d'épanchement pleural visible sur les deux incidences de\nFace et de profil.",
        "Vu avec le Dr\nDupont.",
        "XXXX-year-old XXXX with XXXX.",
    ],
)
def test_one_sentence_stays_one(text: str) -> None:
    assert split(text) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. No pneumothorax.", ["No effusion.", "No pneumothorax."]),
        ("no effusion. heart is normal.", ["no effusion.", "heart is normal."]),
        ("Lungs are clear.No effusion.", ["Lungs are clear.", "No effusion."]),
        ("LUNGS ARE CLEAR. NO EFFUSION OF 3.5 CM. DR. X", ["LUNGS ARE CLEAR.", "NO EFFUSION OF 3.5 CM.", "DR. X"]),
        ("LUNGS CLEAR.NO EFFUSION.", ["LUNGS CLEAR.", "NO EFFUSION."]),
        ("Nodule of 5 mm. 3 others are stable.", ["Nodule of 5 mm.", "3 others are stable."]),
        ("Lack of vitamin D. The bones are thin.", ["Lack of vitamin D.", "The bones are thin."]),
        ("Opacités, kystes, etc. Pas de masse.", ["Opacités, kystes, etc.", "Pas de masse."]),
        ("Fracture ? Non visible ! Contrôle.", ["Fracture ?", "Non visible !", "Contrôle."]),
        ("Old (healed) fracture (left). New one.", ["Old (healed) fracture (left).", "New one."]),
        ("Mass (left. No effusion. Stable.", ["Mass (left.", "No effusion.", "Stable."]),
        ("1. Clear lungs\n2. Normal heart\n- no effusion", ["Clear lungs", "Normal heart", "no effusion"]),
        ("1) Clear lungs 2) Normal heart", ["Clear lungs", "Normal heart"]),
        ("Read: 1. Clear lungs 2. Normal heart.", ["Read:", "Clear lungs", "Normal heart."]),
        ("• Clear lungs • Normal heart", ["Clear lungs", "Normal heart"]),
        ('Bones intact. " Hiatal hernia " Normal heart', ["Bones intact.", "Hiatal hernia", "Normal heart"]),
        ("o Fer\no Aucun autre", ["Fer", "Aucun autre"]),
        ("Lungs clear\nHeart normal\nBones intact", ["Lungs clear", "Heart normal", "Bones intact"]),
        ("lungs clear\nheart normal", ["lungs clear", "heart normal"]),
        ("Lungs clear\n\nheart normal", ["Lungs clear", "heart normal"]),
        ("| Aorta | 32 mm |\n| Heart | normal |", ["Aorta | 32 mm |", "Heart | normal |"]),
        ("Comparison: XXXX. XXXX. No change.", ["Comparison: XXXX.", "XXXX.", "No change."]),
        ("-\n*** \n1.\n", []),
        ("", []),
        ("a", ["a"]),
    ],
)
def test_sentences_and_their_marks(text: str, expected: list[str]) -> None:
    assert [sentence.removesuffix(" |") for sentence in split(text)] == [one.removesuffix(" |") for one in expected]


def test_language_decides_the_words_that_only_one_shortens() -> None:
    text = "Seen in. 3 nodules."
    assert len(sentences(text, language="en")) == 1
    assert len(sentences(text, language="fr")) == 2


def test_only_the_asked_part_is_read_and_counted_in_the_document() -> None:
    text = "FINDINGS: Clear. Normal. IMPRESSION: None."
    assert sentences(text, 10, 24) == [(10, 16), (17, 24)]


PIECES = [
    "No effusion", ".", "?", " ", "\n", "\n\n", "3.5", "1,2 cm", "Dr", "e.g.", "(", ")", "1. ", "- ", "XXXX", '"', "•",
    "é", "A", "a", "…", "M.", "²", "٣", "@",
]  # fmt: skip
WILD = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@pytest.mark.parametrize("text", ["no effusion or nodule " * 2000, "x" * 9000, "lung, " * 3000])
def test_endless_run_is_cut_between_words(text: str) -> None:
    spans = sentences(text)
    assert len(spans) > 4 and all(end - start <= MAX_SENTENCE for start, end in spans)
    between = " " if " " in text else ""
    assert between.join(text[start:end] for start, end in spans) == text.strip(" ,") + "," * text.endswith(", ")


@given(WILD, st.sampled_from(["en", "fr", "unknown"]))
def test_spans_lie_apart_in_order_and_leave_out_only_marks(text: str, language: str) -> None:
    done = 0
    for start, end in [*sentences(text, language=language), (len(text), len(text))]:
        assert done <= start <= end
        left_out = text[done:start]
        assert not re.search(r"[^\W\d_]{2}|\d{3}", left_out), left_out  # numbers and letters of a list have fewer
        sentence = text[start:end]
        assert sentence == sentence.strip() and (sentence or start == len(text))
        done = end


@given(st.lists(st.one_of(WILD, st.from_regex(r"[0-9]{1,4}[.,][0-9]{1,3}", fullmatch=True))).map("".join))
def test_no_decimal_is_split(text: str) -> None:
    bounds = {bound for span in sentences(text) for bound in span}
    for decimal in re.finditer(r"[0-9][.,][0-9]", text):
        assert not bounds & {decimal.start() + 1, decimal.start() + 2}


@pytest.mark.skipif(not CT_RATE.is_file(), reason="../shared/data/ct_rate_reports is missing")
def test_real_reports_leave_no_word_out_and_split_no_decimal() -> None:
    with CT_RATE.open(newline="", encoding="utf-8") as file:
        reports = [row["report_text"] for row in csv.DictReader(file)][1::8]
    for number, report in enumerate(reports):
        text = clean(report).text
        spans = sentences(text)
        outside = "".join(text[a:b] for (_, a), (b, _) in zip([(0, 0), *spans], [*spans, (len(text), 0)], strict=True))
        assert not re.search(r"[^\W\d_]{2}", outside), number
        assert not any(re.search(r"\d\.$", text[a:b]) and text[b : b + 1].isdigit() for a, b in spans), number
        assert len(spans) > 1, number
