"""Raw reports from tables and folders: every row is a report or a refusal, and ids never change on the way."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.ingest import Refusal, hashed_key
from shards.reports.intake import Columns, birth_date, read_reports, split_name
from shards.reports.pipeline import WHOLE, RawReport

SECRET = b"0123456789abcdef"
ROWS: list[dict[str, Any]] = [
    {
        "study": "007",
        "patient": "12",
        "report": 'One, with "quotes"\nand lines.',
        "name": "Roe, Jane",
        "born": "1956-01-03",
    },
    {"study": "2", "patient": "12", "report": "Two é.", "name": "", "born": ""},
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def read(path: Path, **columns: Any) -> list[RawReport | Refusal]:
    return list(read_reports(path, Columns(**columns), SECRET))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_give_the_same_reports(ending: str, tmp_path: Path) -> None:
    first, second = read(write(tmp_path / f"t.{ending}", ROWS), names=("name",), birth_date="born")
    assert isinstance(first, RawReport) and isinstance(second, RawReport)
    assert first.study == hashed_key(SECRET, "study", "007") and first.patient == hashed_key(SECRET, "patient", "12")
    assert first.texts == {WHOLE: ROWS[0]["report"]} and second.texts == {WHOLE: "Two é."}
    assert first.known is not None and second.known is not None
    assert (first.known.first_names, first.known.last_names) == (("Jane",), ("Roe",))
    assert first.known.birth_date == datetime.date(1956, 1, 3) and first.known.ids == ("12", "007")
    assert second.known.last_names == () and second.known.birth_date is None
    assert "Jane" not in repr(first) and "quotes" not in repr(first)


def test_sections_in_columns(tmp_path: Path) -> None:
    rows = [{"study": "1", "patient": "1", "f": "Clear.", "i": " "}, {"study": "2", "patient": "1", "f": "", "i": ""}]
    texts = {"findings": "f", "impression": "i"}
    first, second = read(write(tmp_path / "t.csv", rows), texts=texts)
    assert isinstance(first, RawReport) and first.texts == {"findings": "Clear."}
    assert second == Refusal(hashed_key(SECRET, "study", "2"), "no text")


def test_folder(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "alone.txt", "b/picture.png", "b/empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else f"Text of {name} \xe9.".encode("latin-1"))
    found = read(tmp_path)
    reports = [one for one in found if isinstance(one, RawReport)]
    studies = ["alone", "a/1", "b/2"]
    assert [report.study for report in reports] == [hashed_key(SECRET, "study", name) for name in studies]
    assert reports[2].patient == hashed_key(SECRET, "patient", "b")
    assert reports[0].texts == {WHOLE: b"Text of alone.txt \xe9."}
    assert [one.reason for one in found if isinstance(one, Refusal)] == ["no text"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,2", "row that does not fit the table"),
        (b"1,2,3,4", "row that does not fit the table"),
        (b",2,text", "row without a study"),
        (b"1, ,text", "row without a patient"),
        (b"\xff\xfe,2,text", "row without a study"),
        (b"1,2,", "no text"),
    ],
)
def test_bad_row_is_refused_alone(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"study,patient,report\n" + line + b"\n9,9,Fine.\n")
    bad, good = read(tmp_path / "t.csv")
    assert isinstance(bad, Refusal) and bad.reason == reason and isinstance(good, RawReport)


def test_bytes_that_are_no_utf8_stay_bytes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"study,patient,report\n1,1,\xc9panchement\x00\n")
    (one,) = read(tmp_path / "t.csv")
    assert isinstance(one, RawReport) and one.texts == {WHOLE: b"\xc9panchement"}


def test_quotation_mark_that_is_not_closed_joins_no_patients(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        b'study,patient,report\n1,1,"Fine.\n2,2,"Two."\n3,3,Three.\n4,4,"Four.\n5,5,Five.\n'
    )
    first, good, last = read(tmp_path / "t.csv")
    assert isinstance(first, Refusal) and isinstance(last, Refusal)
    assert isinstance(good, RawReport) and good.texts == {WHOLE: "Three."}


def test_semicolons_of_a_french_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfstudy;"patient";report\r\n1;1;"Clair; net, 1,5 cm"\r\n')
    (one,) = read(tmp_path / "t.csv")
    assert isinstance(one, RawReport) and one.texts == {WHOLE: "Clair; net, 1,5 cm"}


@pytest.mark.parametrize(
    "row", [b"A1,MRN778812,Quintrell", b"A1,Quintrell,Seen on Tuesday by Dr Zwingmann of this clinic."]
)
def test_table_without_names_of_columns_shows_no_row(row: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(row + b"\n" + row + b"\n")
    with pytest.raises(ConfigError, match="holds no names of columns") as caught:
        read(tmp_path / "t.csv")
    assert "Quintrell" not in str(caught.value) and "Zwingmann" not in str(caught.value)


@pytest.mark.parametrize("charset", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_csv_as_spreadsheets_save_it(charset: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes('study;patient;report\r\n1;2;"Épanchement\nà gauche."\r\n'.encode(charset))
    (report,) = read(path)
    assert isinstance(report, RawReport) and str(report.texts[WHOLE]).split() == ["Épanchement", "à", "gauche."]


def test_known_names_in_an_old_charset(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"study,patient,report,name\n1,1,Fine.,Genevi\xe8ve\n")
    (one,) = read_reports(tmp_path / "t.csv", Columns(first_names=("name",)), SECRET)
    assert isinstance(one, RawReport) and one.known is not None and one.known.first_names == ("Genevi\u00e8ve",)


@pytest.mark.parametrize("line", ["{", "[]", '"x"', "[" * 5000, "null"])
def test_bad_json_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(f'{line}\n\n{{"study": 1, "patient": 2.0, "report": "Fine."}}\n')
    bad, good = read(tmp_path / "t.jsonl")
    assert isinstance(bad, Refusal) and isinstance(good, RawReport)
    assert good.study == hashed_key(SECRET, "study", "1") and good.patient == hashed_key(SECRET, "patient", "2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "no column 'study'"),
        ("t.csv", b"study,patient,report\n", "no rows"),
        ("t.csv", b"study,patient,rapport\n1,1,x\n", "no column 'report'; there is rapport"),
        ("t.csv", b"study,study,patient,report\n1,1,1,x\n", "'study' stands twice"),
        ("t.jsonl", b'{"study": 1, "patient": 1}\n', "no column 'report'"),
        ("t.jsonl", '{"study": 1}'.encode("utf-16"), "JSON lines in UTF-16"),
        ("t.parquet", b"PAR1", "no Parquet table"),
        ("t.xlsx", b"x", "no table by its name"),
        ("nowhere.csv", None, "no such file or folder"),
    ],
)
def test_table_that_cannot_serve(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no file that ends in"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("DOE^JANE^^^", ("JANE", "DOE")),
        ("de la Tour, Anne Marie", ("Anne Marie", "de la Tour")),
        ("Anne Marie Tour", ("Anne Marie", "Tour")),
        ("Tour", ("", "Tour")),
        ("", ("", "")),
    ],
)
def test_names_in_one_cell(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("1956-01-03", (1956, 1, 3)),
        ("19560103", (1956, 1, 3)),
        ("03/01/1956", (1956, 1, 3)),
        ("01/31/1956", (1956, 1, 31)),
        ("1956-01-03 00:00:00", (1956, 1, 3)),
        ("3.1.1956", (1956, 1, 3)),
        ("1956", None),
        ("99/99/1956", None),
        ("99999999", None),
        ("", None),
    ],
)
def test_birth_dates(text: str, date: tuple[int, int, int] | None) -> None:
    assert birth_date(text) == (None if date is None else datetime.date(*date))


@given(st.text())
def test_wild_names_and_dates_never_raise(text: str) -> None:
    split_name(text)
    birth_date(text)
