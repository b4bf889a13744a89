"""Prepared reports on disk: JSON lines or Parquet, one study each, sealed so that only what passed the pipeline packs.

The seal is a keyed hash of all members: a line that was written or changed by anything without the secret is refused,
and so is one that was made with another secret, whose names of studies would not fit.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from shards.batch import LabelValue
from shards.errors import ConfigError, DataError
from shards.ingest import hashed_key

SEAL_LENGTH = 32
ROWS_A_GROUP = 1000

Place = tuple[int, int] | bytes  # first byte and bytes of a line in its file, or the line itself


@dataclass(frozen=True, kw_only=True)
class PreparedReport:
    """What of a report goes into a StudyRecord. `study` and `patient` are keyed hashes, the text is de-identified."""

    study: str
    patient: str
    language: str
    deidentifier: str
    extractor: str
    report: dict[str, str] = field(repr=False)
    anatomy: dict[str, str] = field(repr=False)
    entities: list[dict[str, Any]] = field(repr=False)
    labels: dict[str, LabelValue] = field(repr=False)
    structured_report: dict[str, Any] | None = field(repr=False)
    # Lines of an earlier format lack these.
    anatomy_status: dict[str, str] = field(default_factory=dict, repr=False)
    anatomy_findings: dict[str, str] = field(default_factory=dict, repr=False)
    anatomy_impression: dict[str, str] = field(default_factory=dict, repr=False)
    distilled: list[dict[str, Any]] = field(default_factory=list, repr=False)
    boilerplate: list[Sequence[int]] = field(default_factory=list, repr=False)
    descriptors: list[Sequence[int]] = field(default_factory=list, repr=False)

    def _body(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def members(self) -> dict[str, Any]:
        """Members of a StudyRecord by name."""
        return {name: value for name, value in self._body().items() if name not in ("study", "patient", "extractor")}

    def to_line(self, secret: bytes | None) -> bytes:
        """One line of JSON with its seal; the same bytes for the same report and secret."""
        body = _dumps(self._body())
        return body[:-1] + b',"seal":"' + _seal(body, secret).encode() + b'"}\n'

    @classmethod
    def from_line(cls, line: bytes, secret: bytes | None) -> PreparedReport:
        """Parse and check the seal. Raises DataError, which quotes nothing of the line."""
        try:
            body = orjson.loads(line)
            seal = body.pop("seal")
            report = cls(**body)
            right = isinstance(seal, str) and hmac.compare_digest(seal, _seal(_dumps(body), secret))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError("no prepared report; make it with launchers/prepare_reports.py") from None
        if not right:
            raise DataError(
                "seal does not fit: the line was changed, or made with another --key-file; prepare the reports again "
                "with the key that names the studies"
            )
        return report


def _dumps(body: dict[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def _seal(body: bytes, secret: bytes | None) -> str:
    return hashed_key(secret, "prepared report", body.decode(), SEAL_LENGTH)


class PreparedFile:
    """A file of prepared reports by study. Of JSON lines only the places are kept, so that millions of studies fit."""

    def __init__(self, path: Path, secret: bytes | None) -> None:
        self.path, self._secret = path, secret
        self._places: dict[str, Place] = {}
        self.labels: set[str] = set()  # names of all labels that any report gives
        digest = hashlib.sha256()
        try:
            if path.suffix.lower() in (".parquet", ".pq"):
                for line in _lines_of_parquet(path):
                    digest.update(line)
                    self._add(line, line)
            else:
                with open(path, "rb") as file:
                    start = 0
                    for line in file:
                        digest.update(line)
                        self._add(line, (start, len(line)))
                        start += len(line)
        except OSError as error:
            raise ConfigError(f"prepared reports {path}: {error.strerror or 'cannot be read'}") from None
        if not self._places:
            raise ConfigError(f"prepared reports {path}: no report in it; is it the right file?")
        self.sha256 = digest.hexdigest()

    def _add(self, line: bytes, place: Place) -> None:
        where = f"prepared reports {self.path}: report {len(self._places) + 1}"
        try:
            report = PreparedReport.from_line(line, self._secret)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from None
        study = report.study
        self.labels.update(report.labels)
        if study in self._places:
            raise ConfigError(f"{where}: its study stands twice")
        self._places[study] = place

    def __len__(self) -> int:
        return len(self._places)

    def place(self, study: str) -> Place | None:
        """Where `read` finds the report of a study; None without one."""
        return self._places.get(study)

    @staticmethod
    def read(path: Path, place: Place) -> bytes:
        """The line at a place."""
        if isinstance(place, bytes):
            return place
        with open(path, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])


def is_prepared(path: Path) -> bool:
    """Whether a file claims to hold prepared reports, rather than raw ones."""
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            with pq.ParquetFile(path) as file:
                return "seal" in file.schema_arrow.names
        with open(path, "rb") as file:
            return b'"seal":' in file.readline()
    except (OSError, pa.ArrowException):
        return False


_TEXT_COLUMNS = ("study", "patient", "language", "deidentifier", "extractor", "seal")


def write_parquet(lines: Iterable[bytes], path: Path) -> None:
    """The same reports as a table: nested members as JSON text. The same bytes for the same lines and pyarrow."""
    names = [*(one.name for one in fields(PreparedReport)), "seal"]
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        group: list[dict[str, str]] = []
        for line in lines:
            body = orjson.loads(line)
            group.append(
                {name: value if name in _TEXT_COLUMNS else _dumps(value).decode() for name, value in body.items()}
            )
            if len(group) == ROWS_A_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


def _lines_of_parquet(path: Path) -> Iterator[bytes]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_A_GROUP):
                for row in batch.to_pylist():
                    yield _dumps(
                        {name: value if name in _TEXT_COLUMNS else orjson.loads(value) for name, value in row.items()}
                    )
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise ConfigError(f"prepared reports {path}: no such table ({type(error).__name__}); write it anew") from None
