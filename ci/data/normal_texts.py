"""How reports word normal organs: CT-RATE's beside the CT phantom's (`python -m ci.data.normal_texts`).

What contrast by anatomy takes for negatives, and what the correction of normals is worth, depend on it: studies whose
texts are equal are no false negatives of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ci.bench.reports_data import ct_rate
from shards.ingest.phantom_ct import CtPhantom
from shards.ingest.phantom_ct_text import ORGANS
from shards.reports.extract import by_rules, record_members

PHANTOMS = 800


class Anatomies(NamedTuple):
    """What one report says: status and text of findings of the anatomies that it names."""

    status: Mapping[str, str]
    text: Mapping[str, str]


def real() -> list[Anatomies]:
    """Reports of CT-RATE, read by our rules."""
    reports = []
    for report in ct_rate():
        members = record_members(by_rules(report.text, "en"), report.text)
        reports.append(Anatomies(members["anatomy_status"], members["anatomy_findings"]))
    return reports


def phantoms() -> list[Anatomies]:
    """Reports of the phantom as its source gives them, 90 % of organs normal."""
    source = CtPhantom(CtPhantom.Config(train=PHANTOMS, validation=0, test=0, shape=(24, 32, 32)))
    reports = []
    for item in source.plan().items:
        sample = source.load(item).sample
        assert sample is not None
        reports.append(Anatomies(sample.record.anatomy_status, sample.record.anatomy_findings))
    return reports


def row(reports: Sequence[Anatomies], organ: str) -> list[str]:
    """Shares of named organs among normal ones, of pairs of normal studies with equal texts, and the mean of words."""
    normal = [report for report in reports if report.status.get(organ) != "abnormal"]
    texts = Counter(report.text.get(organ, "") for report in normal)
    unnamed = texts.pop("", 0)
    named = texts.total()
    pairs = sum(count * count for count in (*texts.values(), unnamed)) / len(normal) ** 2
    words = sum(len(text.split()) * count for text, count in texts.items()) / max(1, named)
    return [f"{named / len(normal):.2f}", f"{pairs:.2f}", f"{words:.0f}"]


def main() -> None:
    """Print the table."""
    table = Table(title="normal organs: share named, share of pairs with equal texts, words", title_justify="left")
    for heading in (
        "organ",
        *(f"{data}: {what}" for data in ("CT-RATE", "phantom") for what in ("named", "equal", "words")),
    ):
        table.add_column(heading)
    sets = (real(), phantoms())
    for organ in ORGANS:
        table.add_row(organ, *(cell for reports in sets for cell in row(reports, organ)))
    Console().print(table)


if __name__ == "__main__":
    main()
