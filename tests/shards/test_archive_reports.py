"""Reports of an export as rows of a table that name files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.ingest.archive_reports import ArchiveMapping, ArchiveReport, ArchiveReports, BadReport, Columns
from shards.reports.text import MAX_SIZE, clean

MAPPING = ArchiveMapping(table="t/reports.jsonl", columns=Columns(patient="p", date="d", file="f"))


def read(folder: Path, rows: list[tuple[str, str]], files: dict[str, bytes]) -> list[ArchiveReport | BadReport]:
    """Of (patient, file) a row, all of one day."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    lines = [json.dumps({"p": patient, "d": "2020-01-02", "f": file}) for patient, file in rows]
    (folder / "t").mkdir(exist_ok=True)
    (folder / "t" / "reports.jsonl").write_text("\n".join(lines))
    return ArchiveReports(folder, MAPPING).read(["t/reports.jsonl", *files])


@pytest.mark.parametrize("written", ["a/b.txt", "a\\b.txt", "./a/../a/b.txt"])
def test_a_row_names_its_file_from_the_table(written: str, tmp_path: Path) -> None:
    (found,) = read(tmp_path, [("P", written)], {"t/a/b.txt": b"Genou normal."})
    assert isinstance(found, ArchiveReport) and found.text() == b"Genou normal."


@pytest.mark.parametrize("written", ["Pas de fracture. " * 400, "a\0b.txt", "", "a", "gone.txt"])
def test_a_cell_that_names_no_file_is_a_reason_and_never_shown(written: str, tmp_path: Path) -> None:
    found = read(tmp_path, [("P", written)], {"t/a/b.txt": b"x"})
    assert [(one.reason, one.name) for one in found if isinstance(one, BadReport)] == [
        ("file is missing", "row 1"), ("file that no row names", "t/a/b.txt"),
    ]  # fmt: skip


def test_a_file_of_two_patients_is_nobodys(tmp_path: Path) -> None:
    rows = [("P", "a.txt"), ("Q", "./a.txt"), ("P", "b.txt"), ("P", "b.txt"), ("Q", "../../etc/passwd")]
    found = read(tmp_path, rows, {"t/a.txt": b"x", "t/b.txt": b"y"})
    two = "file that rows of two patients name"
    reasons = [one.reason if isinstance(one, BadReport) else None for one in found]
    assert reasons == [two, two, None, None, "file outside of the input folder"]  # b.txt: settled by pairing


def test_a_report_that_is_too_large_is_called_so(tmp_path: Path) -> None:
    (found,) = read(tmp_path, [("P", "a.txt")], {"t/a.txt": b"x" * (MAX_SIZE + 5)})
    assert isinstance(found, ArchiveReport)
    text = found.text()
    assert text is not None
    with pytest.raises(DataError, match="is larger than"):
        clean(text)
