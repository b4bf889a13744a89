"""Labels by rules against two real sets: micro and macro F1, each class, and where a denial was read wrongly.

The rules were made on reports of even number; figures are of odd ones. No word of a report is printed. Averages are
over the classes that the gold labels have: those of Open-i say "Hernia" of no report, though some tell of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ci.bench.figure import Figure, figure, seconds_of
from ci.bench.reports_data import Report, ct_rate, open_i
from shards.reports.entities import entities
from shards.reports.labels import labels
from shards.reports.sections import sections
from shards.reports.sentences import sentences

DEVELOPED_ON = 0  # number of the report modulo 2
QUICK_REPORTS = 40

# Set -> its name in figure ids, its ontology, its reader.
SETS: tuple[tuple[str, str, Callable[[], tuple[Report, ...]]], ...] = (
    ("openi", "nih14", open_i),
    ("ctrate", "ct_rate18", ct_rate),
)


@dataclass
class Counts:
    """Of one class; `denied` are reports whose only mentions of what gold has were read as absent."""

    hit: int = 0
    false: int = 0
    missed: int = 0
    denied: list[str] = field(default_factory=list)

    @property
    def gold(self) -> int:
        return self.hit + self.missed

    @property
    def f1(self) -> float:
        return 2 * self.hit / max(1, 2 * self.hit + self.false + self.missed)


def number(report: Report) -> int:
    """The number in a report's name (CXR12, train_12)."""
    return int("".join(re.findall(r"\d+", report.name)))


def count(reports: Sequence[Report], ontology: str) -> dict[str, Counts]:
    """Class -> counts. A label counts as given when it is 1; doubt (-1) does not, since the gold labels know none."""
    counts: dict[str, Counts] = {}
    for report in reports:
        spans = sentences(report.text, language="en")
        found = entities(report.text, spans, "en")
        told = labels(found, ontology, sections(report.text))
        for name, value in report.labels.items():
            if name == "normal":
                continue
            one = counts.setdefault(name, Counts())
            given = told.get(name) == 1
            one.hit += given and value == 1
            one.false += given and value != 1
            one.missed += not given and value == 1
            if value == 1 and told.get(name) == 0:
                one.denied.append(report.name)
    return counts


def averages(counts: dict[str, Counts]) -> tuple[float, float]:
    """Micro and macro F1 over the classes that the gold labels have at all."""
    held = [one for one in counts.values() if one.gold]
    sums = Counts(
        hit=sum(one.hit for one in held), false=sum(one.false for one in held), missed=sum(one.missed for one in held)
    )
    return sums.f1, sum(one.f1 for one in held) / max(1, len(held))


def _print(title: str, counts: dict[str, Counts], console: Console) -> None:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("class", "gold", "hit", "false", "missed", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, one in counts.items():
        f1 = f"{one.f1:.3f}" if one.gold else "no gold"
        table.add_row(name, str(one.gold), str(one.hit), str(one.false), str(one.missed), f1)
    console.print(table)
    denied = [f"{name}: {', '.join(one.denied)}" for name, one in counts.items() if one.denied]
    console.print(f"read as absent against the gold label: {'; '.join(denied) or 'none'}", highlight=False)


def figures_labels(quick: bool) -> list[Figure]:
    """Micro and macro F1 of both sets, reports of odd number; -1 counts as not given."""
    console = Console()
    figures = []
    for name, ontology, reader in SETS:
        reports = [one for one in reader() if one.labels and number(one) % 2 != DEVELOPED_ON]
        if quick:
            reports = reports[:QUICK_REPORTS]
        counts: dict[str, Counts] = {}
        wall_s = seconds_of(lambda: counts.update(count(reports, ontology)))  # noqa: B023 (called at once)
        _print(f"{name}: {len(reports)} reports", counts, console)
        classes = sum(1 for one in counts.values() if one.gold)
        note = f"{len(reports)} reports of odd number, {classes} classes with gold labels"
        for kind, value in zip(("micro", "macro"), averages(counts), strict=True):
            figures.append(
                figure(f"reports.labels_{name}_{kind}_f1", value, repeats=1, threads=1, wall_s=wall_s, note=note)
            )
    return figures
