"""The reports of a hospital's export: files whose names tell patient and date, or a table, told by a small TOML file.

Nothing here leaves memory but keyed hashes and reasons.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from shards.errors import ConfigError
from shards.ingest.image_file import ImageRefusedError
from shards.ingest.view_files import path_within
from shards.reports import intake
from shards.reports.pipeline import Cell
from shards.reports.text import MAX_SIZE

MAPPING = "archive.toml"
TEXTS = (*intake.TEXTS, ".rtf", ".pdf")
FIRST_YEAR, LAST_YEAR = 1896, 2100  # of radiographs; what is dated outside is dated wrongly

_FIELDS = {"patient": r"[^/]+?", "date": r"\d[\d./-]{5,9}\d", "accession": r"[^/_]+?"}
_FIELD = re.compile(r"\{(\w+)\}")
_YEAR_FIRST = re.compile(r"(\d{4})([-/.]?)(\d\d?)\2(\d\d?)(?!\d)|(\d{4})(\d\d)(\d\d)\d{4,6}(?!\d)")
_DAY_FIRST = re.compile(r"(\d\d?)([-/.])(\d\d?)\2(\d{4})(?!\d)")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Strict):
    """Columns of the table. `text` holds the report, or `file` its path from the table's folder."""

    patient: str
    date: str
    text: str | None = None
    file: str | None = None
    accession: str | None = None
    body_part: str | None = None

    @model_validator(mode="after")
    def _one_of_text_and_file(self) -> Columns:
        if (self.text is None) == (self.file is None):
            raise ValueError("name a column of text, or one of files, and not both")
        return self


class Known(_Strict):
    """Columns with what the record system knows of the patient: looked for in the text and replaced, stored nowhere.

    `names` hold first and last name in one cell. Patient and accession number count as ids.
    """

    first_names: tuple[str, ...] = ()
    last_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    birth_date: str | None = None
    ids: tuple[str, ...] = ()
    phones: tuple[str, ...] = ()
    address: str | None = None
    city: str | None = None


class ArchiveMapping(_Strict):
    """`archive.toml`: where images and reports of an export lie, all relative to --input.

    `images` is the folder of DICOM files. `files` are patterns of report files, without their ending:
    "reports/{patient}/{date}_{accession}"; the first that fits tells. `table` is a table of reports instead.
    """

    images: str = "."
    files: tuple[str, ...] = ()
    table: str | None = None
    columns: Columns | None = None
    known: Known = Known()

    @field_validator("files")
    @classmethod
    def _patterns_tell_patient_and_date(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            names = _FIELD.findall(pattern)
            if not {"patient", "date"} <= set(names) or len(set(names)) < len(names) or set(names) - set(_FIELDS):
                raise ValueError("a pattern holds {patient} and {date} once, and {accession} or not")
        return value

    @model_validator(mode="after")
    def _files_or_table(self) -> ArchiveMapping:
        if bool(self.files) == bool(self.table) or (self.table is None) != (self.columns is None):
            raise ValueError("give patterns of files, or a table with its [columns]")
        return self

    @classmethod
    def read(cls, path: Path) -> ArchiveMapping:
        """Parse a mapping file. Raises ConfigError naming the file and the key."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text("utf-8")))
        except OSError as error:
            raise ConfigError(f"--mapping {path}: {error.strerror}; see ci/data/mappings/archive.toml") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--mapping {path}: not TOML: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"--mapping {path}: {place}: {first['msg'].lower()}".replace(": :", ":")) from None


@dataclass(frozen=True, kw_only=True)
class ArchiveReport:
    """One report as planning and a worker need it, in memory only. `place` is its text, or the path of its file."""

    name: str  # of its row or file, no other report's
    patient: str = field(repr=False)
    day: datetime.date = field(repr=False)
    accession: str = field(default="", repr=False)
    body_part: str = field(default="", repr=False)
    born: datetime.date | None = field(default=None, repr=False)
    known: Mapping[str, Any] = field(default_factory=dict, repr=False)
    place: Cell | Path = field(repr=False)

    def text(self) -> Cell | None:
        """The report as it came, cut behind what is too large for one; None where its file cannot be read."""
        if not isinstance(self.place, Path):
            return self.place
        try:
            with self.place.open("rb") as file:
                return file.read(MAX_SIZE + 1)
        except OSError:
            return None


@dataclass(frozen=True, kw_only=True)
class BadReport:
    """A row or file that gives no report; `file` is the one that a row names, and is counted with it."""

    name: str
    reason: str
    file: Path | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ArchiveReports:
    """All reports below a folder, as its mapping tells them."""

    folder: Path
    mapping: ArchiveMapping

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(_pattern(pattern) for pattern in self.mapping.files)

    def is_report(self, path: str) -> bool:
        """Whether a file, relative to the folder, holds reports and no image."""
        if self.mapping.table is not None:
            of_rows = self.mapping.columns is not None and self.mapping.columns.file is not None
            return path == self.mapping.table or (of_rows and Path(path).suffix.lower() in TEXTS)
        return Path(path).suffix.lower() in TEXTS

    def read(self, paths: Sequence[str]) -> list[ArchiveReport | BadReport]:
        """The reports of the table, or of those of `paths` that are report files; in their order.

        Every text file that no row of a table names is told, too. Raises ConfigError for a table that cannot serve.
        """
        files = [path for path in paths if self.is_report(path) and path != self.mapping.table]
        if self.mapping.table is None:
            return [self._of_file(path) for path in files]
        found = _of_one_patient(list(self._of_table(self.folder / self.mapping.table)))
        root = self.folder.resolve()
        named = {one.file if isinstance(one, BadReport) else one.place for one in found}
        bad = [BadReport(name=path, reason="file that no row names") for path in files if root / path not in named]
        return [*found, *bad]

    def _of_file(self, path: str) -> ArchiveReport | BadReport:
        stem = path[: -len(Path(path).suffix)]
        match = next(filter(None, (pattern.fullmatch(stem) for pattern in self._patterns)), None)
        if match is None:
            return BadReport(name=path, reason="name of a file that tells no patient and date")
        day = day_of(match["date"])
        if day is None:
            return BadReport(name=path, reason="impossible date")
        accession = match.groupdict().get("accession") or ""
        return ArchiveReport(
            name=path, patient=match["patient"], day=day, accession=accession, place=self.folder / path,
            known={"ids": tuple(filter(None, (match["patient"], accession)))},
        )  # fmt: skip

    def _of_table(self, path: Path) -> Iterator[ArchiveReport | BadReport]:
        columns, known = self.mapping.columns, self.mapping.known
        assert columns is not None
        used = [column for column in columns.model_dump().values() if column is not None]
        for value in known.model_dump().values():
            used += [value] if isinstance(value, str) else value or ()
        for number, row in enumerate(intake.rows(path, tuple(dict.fromkeys(used))), start=1):
            yield self._of_row(row, f"row {number}", columns, known)

    def _of_row(
        self, row: Mapping[str, Cell] | None, name: str, columns: Columns, known: Known
    ) -> ArchiveReport | BadReport:
        if row is None:
            return BadReport(name=name, reason="row that does not fit the table")

        def cells(names: Sequence[str | None]) -> tuple[str, ...]:
            return intake.cells_of(row, [column for column in names if column is not None])

        def cell(column: str | None) -> str:
            return next(iter(cells([column])), "")

        patient, accession = cell(columns.patient), cell(columns.accession)
        day, born = day_of(cell(columns.date)), day_of(cell(known.birth_date))
        file, reason = self._named_file(cell(columns.file)) if columns.file is not None else (None, None)
        if not patient:
            reason = "row without a patient"
        elif day is None:
            reason = "impossible date" if cell(columns.date) else "row without a date"
        if reason is not None or day is None:
            return BadReport(name=name, reason=str(reason), file=file)
        place = row[str(columns.text)] if file is None else file
        return ArchiveReport(
            name=name, patient=patient, day=day, accession=accession, body_part=cell(columns.body_part), born=born,
            place=place,
            known={
                "first_names": cells(known.first_names), "last_names": cells(known.last_names),
                "names": cells(known.names), "birth_dates": cells([known.birth_date]),
                "ids": tuple(filter(None, (*cells(known.ids), patient, accession))), "phones": cells(known.phones),
                "address": cell(known.address), "city": cell(known.city),
            },
        )  # fmt: skip

    def _named_file(self, cell: str) -> tuple[Path | None, str | None]:
        """(the file that a row names, why it gives no report)."""
        try:
            # Exports of Windows write backslashes.
            file = path_within(self.folder, str(Path(self.mapping.table or "").parent / cell.replace("\\", "/")))
            return file, None if file.is_file() else "file is missing"
        except ImageRefusedError:
            return None, "file outside of the input folder"
        except (OSError, ValueError):  # no name of a file, such as a text; the message would quote it
            return None, "file is missing"


def _of_one_patient(rows: Sequence[ArchiveReport | BadReport]) -> list[ArchiveReport | BadReport]:
    """The rows, those refused whose file another patient's row names, too: nothing tells whose report it is."""
    patients: dict[Path, set[str]] = defaultdict(set)
    for one in rows:
        if isinstance(one, ArchiveReport) and isinstance(one.place, Path):
            patients[one.place].add(one.patient)
    shared = {file for file, of in patients.items() if len(of) > 1}
    return [
        BadReport(name=one.name, reason="file that rows of two patients name", file=one.place)
        if isinstance(one, ArchiveReport) and isinstance(one.place, Path) and one.place in shared
        else one
        for one in rows
    ]


def _pattern(written: str) -> re.Pattern[str]:
    parts = _FIELD.split(written)  # text, field, text, field, ...
    pieces = [
        f"(?P<{part}>{_FIELDS[part]})" if place % 2 else re.escape(part) for place, part in enumerate(parts)
    ]  # fmt: skip
    return re.compile("".join(pieces))


def day_of(text: str) -> datetime.date | None:
    """A day as systems write it: 2019-03-12, 20190312, 12/03/2019, 12.3.2019, with a time behind it or not.

    None for everything else, and for days that no calendar has or no radiograph.
    """
    text = text.strip()
    if match := _YEAR_FIRST.match(text):
        year, month, day = (match[5], match[6], match[7]) if match[5] else (match[1], match[3], match[4])
    elif match := _DAY_FIRST.match(text):
        day, month, year = match[1], match[3], match[4]
    else:
        return None
    try:
        found = datetime.date(int(year), int(month), int(day))
    except ValueError:
        return None
    return found if FIRST_YEAR <= found.year < LAST_YEAR else None
