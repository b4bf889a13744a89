"""The real report sets that the benchmark of `shards.reports` reads in place: they may not be copied, nor shown."""

from __future__ import annotations

import csv
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from ci.bench.figure import REPOSITORY
from shards.errors import ConfigError

SECTIONS = ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")


@dataclass(frozen=True, kw_only=True)
class Report:
    """One report as its set has it. `labels` is empty where the set has none."""

    name: str
    text: str
    labels: dict[str, int]


def folder(name: str) -> Path:
    """One set beside the repository. Raises ConfigError where it is missing."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_dir():
        raise ConfigError(f"no folder {path}: this benchmark reads real reports there, which may not be copied")
    return path


@cache
def ct_rate() -> tuple[Report, ...]:
    """Chest CT reports in English with the 18 labels of CT-RATE."""
    with open(folder("ct_rate_reports") / "train.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    known = {"AccessionNo", "report_text"}
    return tuple(
        Report(
            name=row["AccessionNo"],
            text=row["report_text"],
            labels={name: int(value) for name, value in row.items() if name not in known},
        )
        for row in rows
    )


@cache
def open_i() -> tuple[Report, ...]:
    """Chest radiograph reports of Indiana University, every section under its heading; labels: the 14 gold ones."""
    with open(folder("openi_reports") / "openi_gold14.csv", encoding="utf-8-sig", newline="") as file:
        gold = {row.pop("filename"): row for row in csv.DictReader(file)}
    found = []
    with tarfile.open(folder("openi_reports") / "ecgen-radiology.tar.gz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".xml") else None
            if content is None:
                continue
            parts = {
                part.get("Label", ""): (part.text or "").strip()
                for part in ElementTree.parse(content).iter("AbstractText")
            }
            text = "\n\n".join(f"{name}: {parts[name]}" for name in SECTIONS if parts.get(name))
            name = f"CXR{Path(member.name).stem}"
            if text:
                labels = {label: int(value) for label, value in gold.get(name, {}).items()}
                found.append(Report(name=name, text=text, labels=labels))
    return tuple(sorted(found, key=lambda report: report.name))
