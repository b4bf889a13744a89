"""Known patients and second mentions of names: every way of writing them goes, findings of the same word stay."""

from __future__ import annotations

import datetime
import re

import pytest

from shards.reports.identity import KnownPatient
from shards.reports.identity.gazetteers import plain
from tests.shards.reports.rules import RULES

PATIENT = KnownPatient(
    key="1", first_names=("Maëlys",), last_names=("Quintrell",), birth_date=datetime.date(1981, 2, 3), ids=("A-778812",)
)


def hidden(text: str, patient: KnownPatient | None = None, language: str = "fr") -> str:
    """The text with every found identifier as a star, neighbours as one."""
    for one in reversed(RULES.find(text, language, patient)):
        text = text[: one.start] + "*" + text[one.end :]
    return re.sub(r"\*[* ,]*\*", "*", text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Seen: Quin-\ntrell is well.", "Seen: * is well."),
        ("Vue ce jour, Quin-\n   trel va bien.", "Vue ce jour, * va bien."),
        ("Seen: Quin\ntrell is well.", "Seen: * is well."),
        ("Q U I N T R E L L", "*"),
        ("nom q.u.i.n.t.r.e.l.l, vue", "nom *, vue"),
        ("Ｑｕｉｎｔｒｅｌｌ et ＱＵＩＮＴＲＥＬＬ", "* et *"),
        ("\U0001d410uintrell", "*"),
        ("QUINTRELL's chest, quintrell, QuintrellMaelys, QUINTREL", "*'s chest, *"),
        ("login mquintrell", "login *"),
        ("Quintrell12345 va, quintrell_1 va", "* va, *_* va"),
        ("nee 03.02.81, 1981-02-03, 3 févr. 1981, February 3rd, 1981, 03021981", "nee *"),
        ("dossier a 778 812", "dossier *"),
    ],
)
def test_a_known_patient_goes_however_written(text: str, left: str) -> None:
    assert hidden(text, PATIENT) == left


FINDINGS = {
    "Côte": [
        "5EME COTE DROITE FRACTUREE.", "Fracture de la 5ème Côte droite.", "CÔTE : intègre.", "la cote droite",
        "Douleur de Côte ancienne.",
    ],
    "Mass": ["IMPRESSION: Mass.", "Mass in the left lobe.", "A Mass was seen.", "MASS OF THE RIGHT LUNG."],
    "Paget": ["Maladie de Paget.", "Paget's disease of bone.", "PAGET DISEASE OF BONE", "paget du bassin"],
    "Petit": ["Petit épanchement.", "PETIT NODULE APICAL.", "un petit nodule"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FINDINGS.items() for text in texts])
def test_a_finding_that_is_the_patients_name_stays(name: str, text: str) -> None:
    assert hidden(text, KnownPatient(key="2", first_names=("Maëlys",), last_names=(name,))) == text


@pytest.mark.parametrize("name", FINDINGS)
@pytest.mark.parametrize(
    "text",
    ["Mme {} va bien.", "Mrs. {} agreed.", "MME {} VUE", "Nom : {}", "{} Maëlys", "vu avec {} hier", "{} agreed."],
)  # fmt: skip
def test_the_patient_goes_even_where_the_name_is_a_word(name: str, text: str) -> None:
    patient = KnownPatient(key="2", first_names=("Maëlys",), last_names=(name,))
    written = text.format(name.upper() if text.isupper() else name)
    assert plain(name) not in plain(hidden(written, patient))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Mrs. Smith. Smith 556677 agreed.", "Mrs. *. * agreed."),
        ("Dr. Brown saw her. Brown's note. Brown agreed. Brown induration.",
         "Dr. * saw her. *'s note. * agreed. Brown induration."),
        ("Mme Quintrell. quintrell va bien.\nQUINTRELL, 12345Quintrell.", "Mme *. * va bien.\n*."),
        ("Mr Young came. Young patient. Seen by Young.", "Mr * came. Young patient. Seen by *."),
        ("Dr White: White matter is normal.", "Dr *: White matter is normal."),
        ("M. Paget. Maladie de Paget.", "M. *. Maladie de Paget."),
        ("Dr Martin 4521, Dr Durand 55 66 77", "Dr *, Dr *"),
        ("Mme Durand, 12,5 mg. Mme Durand 45 ans.", "Mme *, 12,5 mg. Mme * 45 ans."),
        ("Compte Quintrell12345.", "Compte *."),
    ],
)  # fmt: skip
def test_a_name_told_once_is_found_again(text: str, left: str) -> None:
    assert hidden(text) == left


def test_a_name_told_once_is_found_again_in_a_later_part() -> None:
    filling = "Le poumon est clair. " * 600
    assert "uintrell" not in hidden(f"Mme Quintrell. {filling} quintrell va bien.")
