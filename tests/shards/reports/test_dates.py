"""Dates of reports found in the forms that letters of four countries hold, and what looks like a date left alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from shards.reports.identity.dates import find
from shards.reports.identity.view import view_of
from tests.shards.reports.rules import RULES

DATED = [  # the date between ^ and ^
    "Contrôle en ^S12 2020^, puis ^semaine 14 de 2020^.",
    "Bilan du ^T3 2019^ inchangé.",
    "Acquisition ^2019-03-12^T10:20:30.125.",
    "Date : ^jeu. 14/11/2019^",
    "^Sam 14 nov. 2019^ : chute.",
    "Suivi ^2018-19^, puis ^2020/2021^.",
    "Vu le ^1ermars 2019^.",
    "Phase 3 - ^12-03-19^, phase 4.",
    "Phase 3 - ^12 . 03 . 2019^.",
    "Cures S1 ^15/07/1990^, S2 ^20 mars 19^, S3 ^2019^.",
    "Imprimé ^12:03:2019^.",
    "Revu le ^12-03^.",
    "Comparison: CT dated ^12/3^.",
    "Opéré dans les années ^90^ à droite, puis en ^'98^ à gauche.",
    "Exam of ^Mar-19^.",
    "Hospitalisé ^du 12 au 15^ mars ^2019^, revu mi-^août^.",
    "Le ^douze mars deux mille dix-neuf^ et en ^mars-avril 2018^.",
    "Fait le ^deux avril^, revu ^lundi 12^ à 15h30.",
]
UNDATED = [
    "Rapport L4-L5, T2 10/12, pT2N1M0, 1/3 moyen du fémur, 3/4 inférieur.",
    "Protrusion discale L5-S1, 12 x 15 mm, indice 2/10, EVA 3/10, arc de 12-13 mm.",
    "Clichés 2/2, coupes de 1.5 mm, TE 12/24, TR 2000/90, T1 2500 ms.",
    "Doliprane 1 g 3/jour, 2/3 du volume, grade 3/4, ratio 1/12, tension 12/8.",
    "Series 2/34, image 12/45, 5/6 ribs, 7-8 o'clock; march fracture that may heal.",
    "Anneaux 5/6 et 7/8, disques L3/L4, T11/T12, C5/C6, flexion 0/0/130.",
    "Matrice 512 x 512, 120 kV, 250 mAs, DLP 450 mGy.cm, densité 1000 UH, 2000 mL.",
]


@pytest.mark.parametrize("marked", DATED)
def test_dates_are_found(marked: str) -> None:
    text = marked.replace("^", "")
    covered = {position for one in find(view_of(text)) for position in range(one.start, one.end)}
    position = 0
    for index, piece in enumerate(marked.split("^")):
        wanted = [p for p in range(position, position + len(piece)) if text[p].isdigit()]
        assert index % 2 == 0 or covered.issuperset(wanted), piece
        position += len(piece)


@pytest.mark.parametrize("text", UNDATED)
def test_measures_are_no_dates(text: str) -> None:
    assert [text[one.start : one.end] for one in find(view_of(text))] == []


def calls_of(text: str) -> int:
    """Calls, of C functions too, that one search of the dates makes."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    view = view_of(text)
    sys.setprofile(counted)
    try:
        find(view)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "piece", ["L1-", "12/", "12 mars ", "1-", "le 12/03, ", "2019 ", "1 2 ", "12 et ", "S2 12/05 "]
)
def test_work_grows_with_the_length(piece: str) -> None:
    assert calls_of(piece * 800) < 2.2 * calls_of(piece * 400)


@pytest.mark.parametrize("piece", ["L1-", "12/", "rue ", "1", " ", "deux "])
def test_repetitions_end(piece: str) -> None:
    """The suite's timeout is the judge."""
    assert isinstance(RULES.find(piece * 8000), tuple)
