"""The table of reports that stands beside DICOM studies: a column `study`, StudyInstanceUID, and one a section."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow.parquet as pq

from shards.errors import ConfigError
from shards.reports.text import wide_charset

REPORT_SECTIONS = ("report", "indication", "technique", "comparison", "findings", "impression")


def read_reports(path: Path) -> dict[str, dict[str, str]]:
    """StudyInstanceUID -> section -> text. Raises ConfigError for a table that cannot serve."""
    try:
        if path.suffix.lower() == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            data = path.read_bytes()
            text = data.decode(wide_charset(data[:4096]) or "utf-8-sig").lstrip("\ufeff")
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except OSError as error:
        raise ConfigError(f"--reports {path}: {error.strerror or 'cannot be read'}") from None
    except (ValueError, csv.Error):
        raise ConfigError(f"--reports {path}: no Parquet and no CSV in UTF-8 or UTF-16; convert it") from None
    columns = set(rows[0]) if rows else set()
    sections = [name for name in REPORT_SECTIONS if name in columns]
    if "study" not in columns or not sections:
        raise ConfigError(
            f"--reports {path}: needs a column study (StudyInstanceUID) and one of {', '.join(REPORT_SECTIONS)}"
        )
    reports: dict[str, dict[str, str]] = {}
    for row in rows:
        study = str(row["study"] or "").strip()
        if study in reports:
            raise ConfigError(f"--reports {path}: a study stands twice; keep one row for each")
        texts = {name: str(row[name] or "").strip() for name in sections}
        reports[study] = {name: text for name, text in texts.items() if text}
    return reports
