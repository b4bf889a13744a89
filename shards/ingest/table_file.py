"""Rows of a table: CSV, TSV or Parquet, as text, the columns that are used and no others."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ConfigError
from shards.reports.text import wide_charset


class Rows(Protocol):
    """Rows of a table, wherever they lie; picklable."""

    def read(self, used: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
        """(row number from 1, its `used` columns as text); None for a row whose cells do not fit the header."""
        ...


@dataclass(frozen=True)
class TableFile:
    """One table: CSV, TSV or Parquet."""

    path: Path

    def read(self, used: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
        return read_rows(self.path, used)


def read_rows(path: Path, used: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(row number from 1, the used columns as text) of a table; None for a row whose cells do not fit the header.

    Bytes that are not UTF-8 come as surrogates, so that only their rows are refused. Raises ConfigError for a missing,
    unreadable or empty table and for unknown columns, with the nearest names.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"table {path}: {error.strerror}; check `table` in the mapping and --input") from None
    if path.suffix.lower() in (".parquet", ".pq"):
        yield from _parquet_rows(path, data, used)
        return
    wide = wide_charset(data[:4096])
    text = data.decode(wide, "replace").lstrip("\ufeff") if wide else data.decode("utf-8-sig", "surrogateescape")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = next(rows, [])
        _check_columns(path, header, used)
        at = {column: header.index(column) for column in used.values()}
        count = 0
        for row in rows:
            if not row:
                continue
            count += 1
            yield count, {name: row[i] for name, i in at.items()} if len(row) == len(header) else None
    except csv.Error as error:
        raise ConfigError(f"table {path}: line {rows.line_num}: {error}; mend the line") from None
    if count == 0:
        raise ConfigError(f"table {path}: no rows below the header; is it the right file?")


def _parquet_rows(path: Path, data: bytes, used: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        _check_columns(path, file.schema_arrow.names, used)
        if file.metadata.num_rows == 0:
            raise ConfigError(f"table {path}: no rows; is it the right file?")
        count = 0
        for batch in file.iter_batches(columns=sorted(set(used.values()))):
            for row in batch.to_pylist():
                count += 1
                yield count, {name: _cell(value) for name, value in row.items()}
    except pa.ArrowException as error:
        raise ConfigError(f"table {path}: not a Parquet table ({type(error).__name__}); write it anew") from None


def _cell(value: object) -> str:
    if value is None or value != value:  # NaN is how pandas writes an empty cell
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check_columns(path: Path, header: Sequence[str], used: Mapping[str, str]) -> None:
    if not header:
        raise ConfigError(f"table {path}: empty file; is it the right one?")
    for key, column in used.items():
        if column not in header:
            raise ConfigError(f"table {path}: no column {column!r} ({key} of the mapping){nearest(column, header)}")
        if header.count(column) > 1:
            raise ConfigError(f"table {path}: column {column!r} stands twice; rename one")


def nearest(name: str, known: Sequence[str]) -> str:
    """End of an error about an unknown name: close ones, else all that there are."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else f"; known: {', '.join(known)}"
