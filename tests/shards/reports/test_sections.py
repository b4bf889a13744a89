"""Sections by heading, in both languages, however they are set; and that they are the whole document."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.reports.sections import SECTION_NAMES, sections


def parts(text: str) -> list[tuple[str, str]]:
    """Name and what is said of every section, white space around it aside."""
    return [(section.name, text[slice(*section.body)].strip()) for section in sections(text)]


def test_english_report() -> None:
    text = (
        "CHEST TWO VIEWS\n\nCLINICAL INDICATION: Cough.\nTECHNIQUE: PA and lateral.\nComparison: None.\n\n"
        "FINDINGS:\nThe heart is normal.\n\nNo effusion.\n\nIMPRESSION:\n1. Normal.\n\nElectronically signed by X"
    )
    assert parts(text) == [
        ("header", "CHEST TWO VIEWS"),
        ("indication", "Cough."),
        ("technique", "PA and lateral."),
        ("comparison", "None."),
        ("findings", "The heart is normal.\n\nNo effusion."),
        ("impression", "1. Normal."),
        ("other", "Electronically signed by X"),
    ]


def test_french_report() -> None:
    text = (
        "Renseignements cliniques : chute.\nTechnique : face et profil\nRésultats :\nFracture du radius.\n"
        "CONCLUSION : fracture déplacée.\nConduite à tenir : avis chirurgical.\nDr X"
    )
    assert parts(text) == [
        ("indication", "chute."),
        ("technique", "face et profil"),
        ("findings", "Fracture du radius."),
        ("impression", "fracture déplacée."),
        ("other", "avis chirurgical."),
        ("other", "Dr X"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "FINDINGS: Clear lungs. IMPRESSION: Normal.",
        "Findings\nClear lungs.\n\nImpression\nNormal.",
        "**FINDINGS:** Clear lungs.\n**IMPRESSION:** Normal.",
        "## Findings\nClear lungs.\n## Impression\nNormal.",
        "FINDINGS Clear lungs.\nIMPRESSION Normal.",
        "1. Findings: Clear lungs.\n2. Impression: Normal.",
        "Findings (chest): Clear lungs.\nImpression - Normal.",
        "RESULTATS : Clear lungs.\nSYNTHESE : Normal.",
        "Constatations : Clear lungs.\nAu total, Normal.",
        "Re\u0301sultats : Clear lungs.\nConclusion : Normal.".replace("e\u0301", "é"),
        "Clear lungs. CONCLUSION: Normal.".replace("Clear", "FINDINGS: Clear"),
    ],
)
def test_headings_in_every_dress(text: str) -> None:
    assert parts(text) == [("findings", "Clear lungs."), ("impression", "Normal.")]


@pytest.mark.parametrize(
    "text",
    [
        "No effusion. Impression of a mass in the left lung.",
        "IMPRESSION OF A MASS IN THE LEFT LUNG",
        "Study was limited by motion.\nComparison with the study of last year shows no change.",
        "Heart: normal.\nLungs: clear.",
        "Technique limits the study. Conclusion was given by phone.",
        "Bilan demandé. Examen: abdomen souple.",
        "Normal.",
        "x",
    ],
)
def test_text_with_no_heading_is_findings(text: str) -> None:
    assert [(section.name, section.start, section.end) for section in sections(text)] == [("findings", 0, len(text))]


def test_findings_without_heading_are_told_from_what_comes_before() -> None:
    technique = "TECHNIQUE: PA and lateral.\n\nThe heart is of normal size. No effusion.\n\nIMPRESSION: Normal."
    assert [name for name, _ in parts(technique)] == ["technique", "findings", "impression"]
    prose = "The heart is of normal size. No effusion.\nCONCLUSION: Normal."
    assert [name for name, _ in parts(prose)] == ["findings", "impression"]
    short = "RX THORAX: HEART NORMAL. NO EFFUSION. IMPRESSION: NORMAL CHEST."
    assert [name for name, _ in parts(short)] == ["findings", "impression"]
    letterhead = "Centre de radiologie\n1 rue Haute\nCONCLUSION: Normal."
    assert [name for name, _ in parts(letterhead)] == ["header", "impression"]


def test_list_marks_after_prose_begin_an_impression_that_lost_its_heading() -> None:
    prose = "The heart is of normal size. No effusion was seen. "
    for listed in ('" Normal chest. " Small cyst', "• Normal chest. • Small cyst.", '"Normal chest.'):
        assert parts(prose + listed)[0] == ("findings", prose.strip()) and parts(prose + listed)[1][0] == "impression"
    for quoted in ('"Normal" is what was said before.', "The liver shows: • a cyst."):
        assert [name for name, _ in parts(prose + quoted)] == ["findings"]
    assert [name for name, _ in parts("• The heart is of normal size. • No effusion.")] == ["findings"]


def test_empty_text_has_no_section() -> None:
    assert sections("") == ()


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                ["FINDINGS:", "Impression", "\n", "\n\n", "Résultats :", "Technique", "Au total,", "Signé", "- ", "1. "]
            ),
            st.text(max_size=20),
        )
    ).map(" ".join)
)
def test_sections_are_the_whole_document_and_hold_their_heading(text: str) -> None:
    found = sections(text)
    assert "".join(text[section.start : section.end] for section in found) == text
    for section in found:
        assert section.name in SECTION_NAMES and section.start < section.end
        assert section.start <= section.body[0] <= section.body[1] == section.end
        assert section.heading is None or section.heading[0] == section.start


def test_letters_that_only_look_like_those_of_a_heading_open_no_section() -> None:
    assert [name for name, _ in parts("Final diagno\u017fis: none")] == ["findings"]
