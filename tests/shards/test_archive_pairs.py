"""Pairs of studies and reports: accession number before day, and nothing where it could be otherwise."""

from __future__ import annotations

import datetime

import pytest

from shards.ingest.archive_pairs import NO_REPORT, NO_STUDY, TWO_PATIENTS, Dated, paired


def of(words: str) -> list[Dated]:
    """ "s1 P 3 A9": name, patient, day of March 2020, accession number."""
    found = []
    for one in words.split(","):
        name, patient, day, accession = (*one.split(), "")[:4]
        found.append(Dated(name=name, patient=patient, day=datetime.date(2020, 3, int(day)), accession=accession))
    return found


@pytest.mark.parametrize(
    ("studies", "reports", "window", "pairs", "left"),
    [
        ("s1 P 3", "r1 P 3", 0, {"s1": "r1"}, {}),
        ("s1 P 3", "r1 P 4", 0, {}, {"s1": NO_REPORT, "r1": NO_STUDY}),
        ("s1 P 3", "r1 P 4", 1, {"s1": "r1"}, {}),
        ("s1 P 3", "r1 Q 3", 0, {}, {"s1": NO_REPORT, "r1": NO_STUDY}),
        ("s1 P 3", "r1 P 3,r2 P 3", 0, {}, dict.fromkeys(("s1", "r1", "r2"), "several reports of one patient and day")),
        ("s1 P 3,s2 P 3", "r1 P 3", 0, {}, dict.fromkeys(("s1", "s2", "r1"), "several studies of one patient and day")),
        ("s1 P 3,s2 P 5", "r1 P 4", 1, {}, dict.fromkeys(("s1", "s2", "r1"), "several studies of one patient and day")),
        ("s1 P 3 A,s2 P 3 B", "r1 P 3 B,r2 P 3 A", 0, {"s1": "r2", "s2": "r1"}, {}),
        ("s1 P 3 A,s2 P 3", "r1 P 9 A,r2 P 3", 0, {"s1": "r1", "s2": "r2"}, {}),
        ("s1 P 3 A", "r1 P 3 B", 0, {}, {"s1": NO_REPORT, "r1": NO_STUDY}),
        ("s1 P 3 A", "r1 Q 3 A", 0, {}, {"s1": TWO_PATIENTS, "r1": TWO_PATIENTS}),
        (
            "s1 P 3 A", "r1 P 3 A,r2 P 3 A", 0, {},
            dict.fromkeys(("s1", "r1", "r2"), "several reports of one accession number"),
        ),
    ],
)  # fmt: skip
def test_pairs(studies: str, reports: str, window: int, pairs: dict[str, str], left: dict[str, str]) -> None:
    for turn in (1, -1):  # the order of the input says nothing
        found = paired(of(studies)[::turn], of(reports)[::turn], window)
        assert {study: report for study, (report, _) in found.of_study.items()} == pairs
        assert {**found.studies, **found.reports} == left
