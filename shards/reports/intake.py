"""Raw reports from a table (CSV, TSV, JSON lines, Parquet) or a folder of text files, one by one, named by keyed hash.

Nothing is repaired or judged here beyond what a row needs to be one; a row that gives no report comes as a refusal with
its cause. Tables are read as they stream by: memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import difflib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ConfigError, DataError
from shards.ingest import Refusal, hashed_key
from shards.reports.identity import KnownPatient
from shards.reports.pipeline import WHOLE, Cell, RawReport
from shards.reports.text import MAX_SIZE, clean, wide_charset

CELL_MAX = 64 << 20  # characters; a cell above the size of a report is refused alone, above this the table is
CHARSET_BYTES = 4096  # even, since characters of UTF-16 have two or four
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq")
TEXTS = (".txt", ".text", ".md", ".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a table. `names` hold first and last name in one cell."""

    study: str = "study"
    patient: str = "patient"
    texts: Mapping[str, str] = field(default_factory=lambda: {WHOLE: WHOLE})  # section -> column
    first_names: tuple[str, ...] = ()
    last_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    birth_date: str | None = None
    ids: tuple[str, ...] = ()

    def used(self) -> tuple[str, ...]:
        """Every column that is read."""
        birth_date = () if self.birth_date is None else (self.birth_date,)
        known = (*self.first_names, *self.last_names, *self.names, *birth_date, *self.ids)
        return tuple(dict.fromkeys((self.study, self.patient, *self.texts.values(), *known)))


def read_reports(path: Path, columns: Columns, secret: bytes | None) -> Iterator[RawReport | Refusal]:
    """Every row of a table, or every text file below a folder in the order of their names, as a report or a refusal.

    A file `PATIENT/STUDY.txt` is a report of that patient, a file directly in the folder one of a patient of its own.
    Raises ConfigError: nothing there, not a table, no such column.
    """
    if path.is_dir():
        yield from _folder(path, secret)
        return
    if not path.is_file():
        raise ConfigError(f"--input {path}: no such file or folder")
    for number, row in enumerate(rows(path, columns.used()), start=1):
        yield _report(row, columns, secret, f"row {number}")


def _report(row: Mapping[str, Cell] | None, columns: Columns, secret: bytes | None, shown: str) -> RawReport | Refusal:
    if row is None:
        return Refusal(shown, "row that does not fit the table")
    study, patient = (_identifier(row[name]) for name in (columns.study, columns.patient))
    if study is None or patient is None:
        return Refusal(shown, f"row without a {'study' if study is None else 'patient'}")
    shown = hashed_key(secret, "study", study)
    texts = {section: row[column] for section, column in columns.texts.items() if row[column].strip()}
    if not texts:
        return Refusal(shown, "no text")
    key = hashed_key(secret, "patient", patient)
    known = known_patient(
        key,
        first_names=cells_of(row, columns.first_names),
        last_names=cells_of(row, columns.last_names),
        names=cells_of(row, columns.names),
        birth_dates=cells_of(row, (columns.birth_date,) if columns.birth_date else ()),
        # The names of patient and study are identifiers wherever they stand.
        ids=dict.fromkeys((*cells_of(row, columns.ids), patient, study)),
    )
    return RawReport(study=shown, patient=key, texts=texts, known=known)


def _identifier(cell: Cell) -> str | None:
    """A name of a study or patient; None for an empty one and for what is no text."""
    try:
        text = (cell.decode() if isinstance(cell, bytes) else cell).strip()
        text.encode()
    except UnicodeError:
        return None
    return text or None


def cells_of(row: Mapping[str, Cell], columns: Sequence[str]) -> tuple[str, ...]:
    """What stands in these columns of a row, those left out that are empty."""
    cells = (row[column] for column in columns)
    texts = (_decoded(cell) if isinstance(cell, bytes) else cell for cell in cells)
    return tuple(text.strip() for text in texts if text.strip())


def _decoded(cell: bytes) -> str:
    """Old charsets are read as those of the report are, or the names would not be found in it."""
    try:
        return clean(cell).text
    except DataError:
        return cell.decode("utf-8", "replace")


def known_patient(
    key: str,
    *,
    first_names: Iterable[str] = (),
    last_names: Iterable[str] = (),
    names: Iterable[str] = (),
    birth_dates: Sequence[str] = (),
    ids: Iterable[str] = (),
    phones: Iterable[str] = (),
    address: str = "",
    city: str = "",
) -> KnownPatient:
    """What a record says of a patient, as it is written there; `names` hold first and last name in one.

    Of several birth dates the first counts.
    """
    parts = [split_name(name) for name in names]
    return KnownPatient(
        key=key,
        first_names=(*first_names, *(first for first, _ in parts if first)),
        last_names=(*last_names, *(last for _, last in parts if last)),
        birth_date=birth_date(birth_dates[0]) if birth_dates else None,
        ids=tuple(ids),
        phones=tuple(phones),
        address=address,
        city=city,
    )


def split_name(name: str) -> tuple[str, str]:
    """(first names, last names) of a name in one cell: `LAST^FIRST^...` of DICOM, `Last, First`, or `First Last`."""
    for mark in ("^", ","):
        if mark in name:
            last, _, rest = name.partition(mark)
            return rest.replace("^", " ").strip(), last.strip()
    first, _, last = name.strip().rpartition(" ")
    return first.strip(), last


def birth_date(text: str) -> datetime.date | None:
    """A date as tables and DICOM write it: 1956-01-03, 19560103, 03/01/1956 (day first, unless that is none)."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if len(numbers) == 1 and len(text.strip()) == 8:
        numbers = [numbers[0] // 10000, numbers[0] // 100 % 100, numbers[0] % 100]
    if len(numbers) < 3:
        return None
    first, second, third = numbers[:3]
    orders = ((first, second, third),) if first > 31 else ((third, second, first), (third, first, second))
    for year, month, day in orders:
        with contextlib.suppress(ValueError, OverflowError):
            return datetime.date(year, month, day)
    return None


# --- folders ---


def _folder(folder: Path, secret: bytes | None) -> Iterator[RawReport | Refusal]:
    count = 0
    for path in _text_files(folder):
        count += 1
        relative = path.relative_to(folder)
        study = relative.with_suffix("").as_posix()
        patient = relative.parts[0] if len(relative.parts) > 1 else study
        try:
            key = hashed_key(secret, "study", study)
            data = path.read_bytes() if path.stat().st_size <= MAX_SIZE else None
        except (OSError, UnicodeError):
            yield Refusal(f"file {count}", "file cannot be read")
            continue
        if data is None:
            yield Refusal(key, "text too large")
        elif not data.strip():
            yield Refusal(key, "no text")
        else:
            patient_key = hashed_key(secret, "patient", patient)
            known = KnownPatient(key=patient_key, ids=tuple(dict.fromkeys((patient, relative.stem))))
            yield RawReport(study=key, patient=patient_key, texts={WHOLE: data}, known=known)
    if not count:
        raise ConfigError(f"--input {folder}: holds no file that ends in {', '.join(TEXTS)}")


def _text_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in TEXTS:
                yield Path(parent) / name


# --- tables ---


def rows(path: Path, used: Sequence[str]) -> Iterator[Mapping[str, Cell] | None]:
    """Cells of the columns `used` of every row of a table, None for a row that does not fit it.

    Raises ConfigError: not a table, no such column, no rows.
    """
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise ConfigError(f"--input {path}: no table by its name; known are {', '.join(TABLES)}, or give a folder")
    read = {".parquet": _parquet, ".pq": _parquet, ".jsonl": _json_lines, ".ndjson": _json_lines}.get(kind, _csv)
    count = 0
    try:
        for row in read(path, used):
            count += 1
            yield row
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror or 'cannot be read'}") from None
    if not count:
        raise ConfigError(f"--input {path}: no rows; is it the right file?")


def _csv(path: Path, used: Sequence[str]) -> Iterator[Mapping[str, Cell] | None]:
    csv.field_size_limit(CELL_MAX)
    # Bytes that are not UTF-8 come as surrogates, so that only their cells are decoded otherwise.
    with open(path, "rb") as file:
        wide = wide_charset(file.read(CHARSET_BYTES))
    errors = "replace" if wide else "surrogateescape"
    with open(path, encoding=wide or "utf-8-sig", errors=errors, newline="") as file:
        lines = _without_zeros(file)
        first = next(lines, "")
        # Strict, or a quotation mark that is never closed would make one report of those of several patients.
        reader = csv.reader(chain([first], lines), delimiter=_delimiter(path, first, used), strict=True)
        rows = _csv_rows(path, reader)
        header = next(rows, None) or []
        if not set(used) <= set(header) and not all(map(_is_name, header)):  # a row of data, which no error may show
            raise ConfigError(f"--input {path}: its first line holds no names of columns; put them there")
        _check(path, header, used)
        places = {column: header.index(column) for column in used}
        for row in rows:
            if row is None or len(row) != len(header):
                yield None
            else:
                yield {name: _as_read(row[place]) for name, place in places.items()}


def _csv_rows(path: Path, reader: Iterator[list[str]]) -> Iterator[list[str] | None]:
    """Rows that hold a cell; None where quotation marks do not pair, after which the next line begins a row."""
    while True:
        try:
            if row := next(reader):
                yield row
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error):
                raise ConfigError(f"--input {path}: a cell has more than {CELL_MAX} characters; mend it") from None
            yield None


def _delimiter(path: Path, first: str, used: Sequence[str]) -> str:
    """Tabs in TSV; of comma and semicolon, which spreadsheets write in French, the one that gives the columns."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    by_semicolon = {cell.strip('"') for cell in first.strip().split(";")}
    return ";" if set(used) <= by_semicolon else ","


def _is_name(cell: str) -> bool:
    """Whether a cell of the first line may be the name of a column, and not what a report or a record says."""
    return len(cell) <= 40 and not re.search(r"\d{3}|[\n@^]", cell)


def _without_zeros(file: io.TextIOBase) -> Iterator[str]:
    for line in file:
        yield line.replace("\0", "").replace("\ufeff", "")


def _as_read(cell: str) -> Cell:
    """The cell, or its bytes where they are no UTF-8."""
    try:
        cell.encode()
    except UnicodeEncodeError:
        return cell.encode("utf-8", "surrogateescape")
    return cell


def _json_lines(path: Path, used: Sequence[str]) -> Iterator[Mapping[str, Cell] | None]:
    with open(path, "rb") as file:
        if wide_charset(file.read(CHARSET_BYTES)):
            raise ConfigError(f"--input {path}: JSON lines in UTF-16 or UTF-32; JSON is UTF-8: convert it")
        file.seek(0)
        rows = (_json_object(line) for line in file if line.strip())
        head = list(islice(rows, 100))  # a row may leave columns out, not all of them do
        if head:
            _check(path, sorted({name for row in head for name in row or ()}), used)
        for row in chain(head, rows):
            yield None if row is None else {name: _cell(row.get(name)) for name in used}


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet(path: Path, used: Sequence[str]) -> Iterator[Mapping[str, Cell] | None]:
    try:
        with pq.ParquetFile(path) as file:
            _check(path, file.schema_arrow.names, used)
            for batch in file.iter_batches(batch_size=512, columns=sorted(set(used))):
                for row in batch.to_pylist():
                    yield {name: _cell(row[name]) for name in used}
    except pa.ArrowException as error:
        raise ConfigError(f"--input {path}: no Parquet table ({type(error).__name__}); write it anew") from None


def _cell(value: Any) -> Cell:
    if value is None or value != value:  # NaN is how pandas writes an empty cell
        return ""
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check(path: Path, header: Sequence[str], used: Sequence[str]) -> None:
    for column in used:
        if column not in header:
            close = difflib.get_close_matches(column, header, n=3, cutoff=0.4) or header[:20]
            raise ConfigError(f"--input {path}: no column {column!r}; there is {', '.join(close) or 'none'}")
        if list(header).count(column) > 1:
            raise ConfigError(f"--input {path}: column {column!r} stands twice; rename one")
