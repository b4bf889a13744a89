"""Which report belongs to which study: by accession number, else by patient and day; what is ambiguous gives nothing.

A pure function of numbers, patients and true dates, run before any date is shifted (bone_xray_french.md 6.3).
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

NO_REPORT = "no report of its patient and day"
NO_STUDY = "no study of its patient and day"
TWO_PATIENTS = "accession number of two patients"

By = Literal["accession number", "day"]


@dataclass(frozen=True, kw_only=True)
class Dated:
    """A study or a report as pairing sees it, in memory only. `name` is any text that no other one has."""

    name: str
    patient: str = field(repr=False)
    day: datetime.date = field(repr=False)
    accession: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """`of_study`: study -> its report and what told; why each other study and each other report has none."""

    of_study: Mapping[str, tuple[str, By]]
    studies: Mapping[str, str]
    reports: Mapping[str, str]


def paired(studies: Sequence[Dated], reports: Sequence[Dated], window_days: int = 0) -> Pairs:
    """Pairs of one study and one report.

    Accession numbers decide where both have one. Else a study and a report of one patient may belong together whose
    days are `window_days` apart at most; they do where neither of them may belong to anything else.
    """
    result = _Result()
    _by_accession(studies, reports, result)
    by_patient: dict[str, tuple[list[Dated], list[Dated]]] = defaultdict(lambda: ([], []))
    for side, ones, settled in ((0, studies, result.settled_studies), (1, reports, result.settled_reports)):
        for one in ones:
            if one.name not in settled:
                by_patient[one.patient][side].append(one)
    for of_patient in by_patient.values():
        _by_day(*of_patient, window_days, result)
    return Pairs(of_study=result.of_study, studies=result.studies, reports=result.reports)


class _Result:
    def __init__(self) -> None:
        self.of_study: dict[str, tuple[str, By]] = {}
        self.studies: dict[str, str] = {}
        self.reports: dict[str, str] = {}

    @property
    def settled_studies(self) -> set[str]:
        return {*self.of_study, *self.studies}

    @property
    def settled_reports(self) -> set[str]:
        return {*self.reports, *(report for report, _ in self.of_study.values())}

    def settle(self, studies: Sequence[Dated], reports: Sequence[Dated], by: By) -> None:
        """Those of one number, or of one day, which belong to nothing else."""
        if len(studies) == len(reports) == 1:
            self.of_study[studies[0].name] = (reports[0].name, by)
            return
        if len({one.patient for one in (*studies, *reports)}) > 1:
            reason = TWO_PATIENTS
        else:
            of = "accession number" if by == "accession number" else "patient and day"
            many = [word for word, ones in (("studies", studies), ("reports", reports)) if len(ones) > 1]
            reason = f"several {' and '.join(many)} of one {of}"
        self.refuse(studies, reports, reason)

    def refuse(self, studies: Sequence[Dated], reports: Sequence[Dated], reason: str) -> None:
        self.studies |= {one.name: reason for one in studies}
        self.reports |= {one.name: reason for one in reports}


def _by_accession(studies: Sequence[Dated], reports: Sequence[Dated], result: _Result) -> None:
    numbered: dict[str, tuple[list[Dated], list[Dated]]] = defaultdict(lambda: ([], []))
    for side, ones in ((0, studies), (1, reports)):
        for one in ones:
            if one.accession:
                numbered[one.accession][side].append(one)
    for its_studies, its_reports in numbered.values():
        if not its_studies or not its_reports:
            continue
        if len({one.patient for one in (*its_studies, *its_reports)}) > 1:
            result.refuse(its_studies, its_reports, TWO_PATIENTS)
        else:
            result.settle(its_studies, its_reports, "accession number")


def _by_day(studies: Sequence[Dated], reports: Sequence[Dated], window_days: int, result: _Result) -> None:
    """Pairs of one patient: groups that touch within the window, of one study and one report each."""
    group: dict[Hashable, Hashable] = {}

    def find(one: Hashable) -> Hashable:
        while group.setdefault(one, one) != one:
            one = group[one]
        return one

    for study in studies:
        find(("study", study.name))
        for report in reports:
            both_numbered = study.accession and report.accession
            if not both_numbered and abs((study.day - report.day).days) <= window_days:
                group[find(("report", report.name))] = find(("study", study.name))
    members: dict[Hashable, tuple[list[Dated], list[Dated]]] = defaultdict(lambda: ([], []))
    for study in studies:
        members[find(("study", study.name))][0].append(study)
    for report in reports:
        members[find(("report", report.name))][1].append(report)
    for its_studies, its_reports in members.values():
        if its_studies and its_reports:
            result.settle(its_studies, its_reports, "day")
        else:
            result.studies |= {one.name: NO_REPORT for one in its_studies}
            result.reports |= {one.name: NO_STUDY for one in its_reports}
