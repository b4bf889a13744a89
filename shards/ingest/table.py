"""A table (CSV, TSV or Parquet) beside a folder of images -> studies, told by a small TOML mapping.

Report text is taken from a column only through the pipeline of `shards.reports`, or when the user states how it was
de-identified elsewhere, or it is written by a template from the labels. A bad row or image is refused by name and
reason; a bad mapping or table stops before anything is written.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shards.batch import Box, EncodedImage, EncodedVolume, LabelValue, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded, Plan, Refusal, hashed_key, key_fingerprint
from shards.ingest.image_file import ImageRefusedError
from shards.ingest.table_boxes import BoxTable, DrawnBox, read_boxes
from shards.ingest.table_file import Rows, TableFile, nearest
from shards.ingest.view_files import Fact, ImageFiles, View, ViewFiles

if TYPE_CHECKING:  # the tables of the pipeline take a second to load; only --reports structured needs them
    from shards.reports.identity import KnownPatient
    from shards.reports.packing import Structured
    from shards.reports.prepared import Place

TEMPLATE_DEIDENTIFIER = "none needed: report written from labels by a template"
LABEL_NUMBERS: dict[str, LabelValue] = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
SEX_WORDS = {"m": "M", "male": "M", "f": "F", "female": "F", "o": "O", "other": "O"}
AGE_YEARS_MAX = 120

_VIEW_WORD = re.compile(r"^[A-Z][A-Z0-9 _-]{0,23}$")  # what may be copied from a column; no room for a name and date
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_AGE = re.compile(r"^0*(\d+(?:\.\d+)?)\s*([YMWD]?)$")
_YEARS_OF_UNIT = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Strict):
    """Names of the table's columns. Rows with the same `study` are views of one study; without it each row is one."""

    file: str
    patient: str
    study: str | None = None
    split: str | None = None
    sex: str | None = None
    age: str | None = None
    view: str | None = None
    laterality: str | None = None
    body_part: str | None = None
    # Of volumes: what goes before the file's header. A cell may hold a list, "[0.7, 0.7]"; its first number counts.
    rescale_slope: str | None = None
    rescale_intercept: str | None = None
    xy_spacing: str | None = None  # mm
    z_spacing: str | None = None  # mm


VIEW_NUMBERS = ("rescale_slope", "rescale_intercept", "xy_spacing", "z_spacing")


class Known(_Strict):
    """Columns with what the record system knows of the patient: looked for in the text and replaced, stored nowhere.

    `names` hold first and last name in one cell. The cells of `columns.patient` and `columns.study` count as ids.
    """

    first_names: tuple[str, ...] = ()
    last_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    birth_date: str | None = None
    ids: tuple[str, ...] = ()


class LabelColumn(_Strict):
    """One label in a column of its own; `values` says what the cells mean (else 1, 0, -1), an empty cell nothing,
    unless they say what it means, too."""

    column: str
    values: dict[str, Literal[0, 1, -1]] = Field(default_factory=dict)


class Labels(_Strict):
    """Labels from one column of names (`column`, all names not in the cell are 0) or from one column each."""

    column: str | None = None
    separator: str = "|"
    names: tuple[str, ...] = ()
    normal: tuple[str, ...] = ()  # cell values that mean: none of the names
    unknown: tuple[str, ...] = ()  # cell values that mean: not annotated, as an empty cell does
    values: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # cell value -> names, where they differ
    columns: dict[str, LabelColumn] = Field(default_factory=dict)


class Template(_Strict):
    """Sentences for sets without reports; `{label}` stands for the label's word. Which of several is used follows from
    the study's key."""

    section: str = "findings"
    present: tuple[str, ...] = ("There is {label}.",)
    uncertain: tuple[str, ...] = ("{label} cannot be excluded.",)
    normal: tuple[str, ...] = ("No acute finding.",)
    words: dict[str, str] = Field(default_factory=dict)  # label -> how a report says it; else lower case, _ as space


class TableMapping(_Strict):
    """The mapping file. `table` and `images` are relative to the input folder."""

    table: str
    images: str = "."
    language: str = "en"
    columns: Columns
    values: dict[Literal["split", "sex", "view", "laterality"], dict[str, str]] = Field(default_factory=dict)
    report: dict[str, str] = Field(default_factory=dict)  # section -> column
    known: Known = Known()
    labels: Labels = Labels()
    measurements: dict[str, str] = Field(default_factory=dict)  # name with its unit, kl_grade -> column of numbers
    boxes: BoxTable | None = None
    template: Template | None = None
    provenance: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> TableMapping:
        """Parse a mapping file. Raises ConfigError naming the file and the key, with the nearest names."""
        try:
            body = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"--mapping {path}: {error.strerror}; see ci/data/nih_cxr/mapping.toml") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--mapping {path}: not TOML: {error}") from None
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            hint = ""
            if first["type"] == "extra_forbidden":
                hint = nearest(str(first["loc"][-1]), _names_beside(first["loc"]))
            raise ConfigError(f"--mapping {path}: {place}: {first['msg'].lower()}{hint}") from None

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels, in the order of the mapping."""
        extra = [name for names in self.labels.values.values() for name in names]
        return tuple(dict.fromkeys([*self.labels.names, *extra, *self.labels.columns]))

    def used_columns(self) -> dict[str, str]:
        """Key of the mapping -> column it names."""
        used = {f"columns.{name}": column for name, column in self.columns.model_dump().items() if column is not None}
        used |= {f"report.{section}": column for section, column in self.report.items()}
        for name, value in self.known.model_dump().items():
            named = (value,) if isinstance(value, str) else value or ()
            used |= {f"known.{name}.{place}": column for place, column in enumerate(named)}
        used |= {f"measurements.{name}": column for name, column in self.measurements.items()}
        used |= {f"labels.columns.{name}": label.column for name, label in self.labels.columns.items()}
        if self.labels.column is not None:
            used["labels.column"] = self.labels.column
        return used


def _names_beside(location: tuple[int | str, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "columns": Columns, "known": Known, "labels": Labels, "template": Template, "boxes": BoxTable,
    }  # fmt: skip
    model = models.get(str(location[0]), TableMapping) if len(location) > 1 else TableMapping
    return list(model.model_fields)


@dataclass(frozen=True)
class _Study:
    """Payload of an Item: one study with the views that the table names."""

    name: str  # of the study, for refusals; safe for logs
    views: tuple[View, ...]
    boxes: tuple[tuple[DrawnBox, ...], ...]  # of each view
    labels: tuple[tuple[str, LabelValue], ...]
    measurements: tuple[tuple[str, float], ...]
    report: tuple[tuple[str, str], ...]
    sex: Literal["F", "M", "O"] | None
    age_years: float | None
    known: KnownPatient | None = None
    prepared: Place | None = None


class _RowRefusedError(ValueError):
    """Reason why a row of the table gives nothing."""


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """Source of studies from a table; see `shards.ingest.Source` for the protocol.

    `secret` None means a public set: names are hashed with a public key, and refusals show file names.
    `deidentified` is the user's statement of how text columns were cleared; with `structured` they need none, since
    their text passes the pipeline of `shards.reports`.
    """

    input: Path
    mapping: TableMapping
    secret: bytes | None = field(default=None, repr=False)
    deidentified: str | None = None
    structured: Structured | None = None
    files: ViewFiles | None = None  # None: images in the folder that the mapping names
    rows: Rows | None = None  # None: those of the table that the mapping names
    box_rows: Rows | None = None  # None: those of the table that the mapping's [boxes] names
    name: str = "table"

    def __post_init__(self) -> None:
        columns = ", ".join(self.mapping.report.values())
        if self.structured is not None:
            if self.structured.prepared is None and not columns:
                raise ConfigError(
                    "--reports structured: the mapping names no column of report text; give it a [report], or name a "
                    "file of prepared reports: --reports structured FILE"
                )
            if self.structured.prepared is not None and columns:
                raise ConfigError(
                    f"--reports structured {self.structured.prepared}: the mapping takes text from column {columns}, "
                    "too; leave [report] out of it, or the file"
                )
            self.structured.check_sections(self.mapping.report)
        elif columns and not (self.deidentified or "").strip():
            raise ConfigError(
                f"the mapping takes report text from column {columns}; raw text is packed only through "
                "de-identification, --reports structured, or, where it was cleared elsewhere, after you state how: "
                "--deidentified 'HOW'"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        extra = self.structured.labels if self.structured else ()
        return tuple(dict.fromkeys((*self.mapping.label_names, *extra)))

    @property
    def view_files(self) -> ViewFiles:
        return self.files or ImageFiles(folder=self.input / self.mapping.images)

    @property
    def masks(self) -> dict[str, int]:
        return self.view_files.masks

    @property
    def key_fingerprint(self) -> str | None:
        return key_fingerprint(self.secret)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "mapping": hashlib.sha256(self.mapping.model_dump_json().encode()).hexdigest(),
            "deidentified": self.deidentified,
            **self.view_files.settings,
        } | ({"structured": self.structured.settings} if self.structured else {})

    def plan(self) -> Plan:
        """Read the table and group its rows. Raises ConfigError: no folder, no table, empty, unknown column."""
        for folder in (self.input, self.view_files.folder):
            if not folder.is_dir():
                raise ConfigError(f"--input {folder}: no such folder; give the folder that holds {self.mapping.table}")
        table = self.rows or TableFile(self.input / self.mapping.table)
        refusals: list[Refusal] = []
        groups: dict[str, list[tuple[str, dict[str, str]]]] = {}
        files: set[str] = set()
        for number, row in table.read(self.mapping.used_columns()):
            shown = f"row {number}"
            try:
                if row is None:
                    raise _RowRefusedError("row with too few or too many cells")
                _check_text(row)
                file = row[self.mapping.columns.file].strip()
                if not file:
                    raise _RowRefusedError("row without a file name")
                shown = self._shown(file)
                if not row[self.mapping.columns.patient].strip():
                    raise _RowRefusedError("row without a patient")
                if file in files:
                    raise _RowRefusedError("duplicate key: file named by an earlier row")
                files.add(file)
                study = row[self.mapping.columns.study].strip() if self.mapping.columns.study else file
                if not study:
                    raise _RowRefusedError("row without a study")
                groups.setdefault(study, []).append((shown, row))
            except _RowRefusedError as error:
                refusals.append(Refusal(shown, str(error)))
        boxes: Mapping[str, tuple[DrawnBox, ...]] = {}
        if self.mapping.boxes is not None:
            boxes, unused = read_boxes(self.input, self.mapping.boxes, sorted(files), self._shown, self.box_rows)
            refusals += unused
        items: list[Item] = []
        for study, rows in groups.items():
            try:
                items.append(self._item(study, rows, boxes))
            except _RowRefusedError as error:
                refusals += [Refusal(shown, str(error)) for shown, _ in rows]
        if self.structured is not None:
            self.structured.check_joins([(item.key, item.patient, item.payload.prepared) for item in items])
        return Plan(items=items, refusals=refusals)

    def _shown(self, file: str) -> str:
        return file if self.secret is None else hashed_key(self.secret, "file", file)

    def _item(
        self, study: str, rows: Sequence[tuple[str, dict[str, str]]], boxes: Mapping[str, tuple[DrawnBox, ...]]
    ) -> Item:
        columns = self.mapping.columns
        patients = {row[columns.patient].strip() for _, row in rows}
        if len(patients) > 1:
            raise _RowRefusedError("study of several patients")
        splits = {self._value("split", row) for _, row in rows}
        if len(splits) > 1:
            raise _RowRefusedError("study in several splits")
        key = hashed_key(self.secret, "study", study)
        patient = hashed_key(self.secret, "patient", patients.pop())
        labels = self._labels([row for _, row in rows])
        sex = SEX_WORDS.get((self._first("sex", rows) or "").lower())
        prepared_file = self.structured.file if self.structured else None
        payload = _Study(
            name=self._shown(study),
            views=tuple(self._view(row) for _, row in rows),
            boxes=tuple(boxes.get(row[columns.file].strip(), ()) for _, row in rows),
            labels=tuple(labels.items()),
            measurements=tuple(self._measurements([row for _, row in rows]).items()),
            report=tuple(self._report(key, labels, [row for _, row in rows]).items()),
            sex=cast(Literal["F", "M", "O"] | None, sex),
            age_years=parse_age(self._first("age", rows) or ""),
            known=self._known(study, patient, [row for _, row in rows]) if self.structured else None,
            prepared=prepared_file.place(key) if prepared_file else None,
        )
        told = payload.report or payload.labels or payload.measurements
        if not told and payload.prepared is None and not self.masks:
            raise _RowRefusedError("report empty and no label")
        return Item(key=key, patient=patient, split=splits.pop() or None, payload=payload)

    def _value(self, name: Literal["split", "sex", "view", "laterality"], row: Mapping[str, str]) -> str:
        """A cell through its value map; values that the map does not name stay."""
        column = getattr(self.mapping.columns, name)
        cell = row[column].strip() if column else ""
        return self.mapping.values.get(name, {}).get(cell, cell)

    def _first(self, name: Literal["sex", "age"], rows: Sequence[tuple[str, Mapping[str, str]]]) -> str | None:
        column = getattr(self.mapping.columns, name)
        if column is None:
            return None
        cells = [row[column].strip() if name == "age" else self._value("sex", row) for _, row in rows]
        return next((cell for cell in cells if cell), None)

    def _view(self, row: Mapping[str, str]) -> View:
        view = self._value("view", row).upper()
        body_part = row[self.mapping.columns.body_part].strip().upper() if self.mapping.columns.body_part else ""
        laterality = self._value("laterality", row).upper()[:1]
        return View(
            file=row[self.mapping.columns.file].strip(),
            view=view if _VIEW_WORD.match(view) else None,
            laterality=cast(Literal["L", "R", "B"], laterality) if laterality in ("L", "R", "B") else None,
            body_part=body_part if _VIEW_WORD.match(body_part) else None,
            numbers=tuple(self._numbers(row)),
        )

    def _numbers(self, row: Mapping[str, str]) -> Iterator[tuple[str, float]]:
        for name in VIEW_NUMBERS:
            column = getattr(self.mapping.columns, name)
            match = _NUMBER.search(row[column]) if column else None
            if match:
                yield name, float(match[0])

    def _labels(self, rows: Sequence[Mapping[str, str]]) -> dict[str, LabelValue]:
        """Labels of a study: present in one image is present, uncertain goes before absent."""
        merged: dict[str, LabelValue] = {}
        for row in rows:
            for name, value in self._row_labels(row).items():
                known = merged.get(name)
                merged[name] = value if known is None else max(known, value, key=(0, -1, 1).index)
        return {name: merged[name] for name in self.labels if name in merged}

    def _row_labels(self, row: Mapping[str, str]) -> dict[str, LabelValue]:
        mapping, result = self.mapping.labels, dict[str, LabelValue]()
        cell = row[mapping.column].strip() if mapping.column is not None else ""
        if cell and cell not in mapping.unknown:
            present: set[str] = set()
            for part in (part.strip() for part in cell.split(mapping.separator)):
                if part in mapping.values:
                    present.update(mapping.values[part])
                elif part in mapping.names:
                    present.add(part)
                elif part and part not in mapping.normal:
                    raise _RowRefusedError("label name that the mapping does not know")
            result = {name: 1 if name in present else 0 for name in (*mapping.names, *_flat(mapping.values))}
        for name, label in mapping.columns.items():
            cell = row[label.column].strip()
            if not cell and cell not in label.values:
                continue
            value = label.values.get(cell, None if label.values else LABEL_NUMBERS.get(cell))
            if value is None:
                raise _RowRefusedError("label outside 0, 1, -1")
            result[name] = value
        return result

    def _measurements(self, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
        """Numbers of a study, which all its rows that have one agree on."""
        found: dict[str, float] = {}
        for name, column in self.mapping.measurements.items():
            cells = {cell for row in rows if (cell := row[column].strip())}
            if any(_NUMBER.fullmatch(cell) is None for cell in cells):
                raise _RowRefusedError(f"{name} is no number")
            values = {float(cell) for cell in cells}
            if len(values) > 1:
                raise _RowRefusedError(f"{name} differs between the rows of a study")
            if values:
                found[name] = values.pop()
        return found

    def _report(self, key: str, labels: Mapping[str, LabelValue], rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
        report: dict[str, str] = {}
        for section, column in self.mapping.report.items():
            texts = dict.fromkeys(text for row in rows if (text := row[column].strip()))
            if texts:
                report[section] = "\n".join(texts)
        if not report and self.mapping.template is not None and labels:
            report[self.mapping.template.section] = write_report(self.mapping.template, key, labels)
        return report

    def _known(self, study: str, patient: str, rows: Sequence[Mapping[str, str]]) -> KnownPatient:
        from shards.reports.intake import known_patient

        def cells(columns: Sequence[str]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(cell for column in columns for row in rows if (cell := row[column].strip())))

        known = self.mapping.known
        return known_patient(
            patient,
            first_names=cells(known.first_names),
            last_names=cells(known.last_names),
            names=cells(known.names),
            birth_dates=cells((known.birth_date,)) if known.birth_date else (),
            ids=(*cells(known.ids), *cells((self.mapping.columns.patient,)), study),
        )

    def load(self, item: Item) -> Loaded:
        """Read and check the images of one study. A bad image is refused alone; without any the study is too.

        Text that does not pass the pipeline is left out; a study without labels and text is refused.
        """
        study: _Study = item.payload
        refusals: list[Refusal] = []
        views: list[ViewRecord] = []
        images: list[EncodedImage | EncodedVolume] = []
        masks: dict[tuple[str, int], EncodedImage | EncodedVolume] = {}
        provenance: dict[str, Fact] = dict(self.mapping.provenance)
        boxes: list[Box] = []
        for view, drawn in zip(study.views, study.boxes, strict=True):
            try:
                opened = self.view_files.open(view, str(len(views)))
            except ImageRefusedError as error:
                refusals.append(Refusal(self._shown(view.file), str(error)))
                continue
            refusals += [Refusal(self._shown(view.file), note, kept=True) for note in opened.notes]
            for box in self._placed(drawn, opened.record):
                if isinstance(box, str):
                    refusals.append(Refusal(self._shown(view.file), box, kept=True))
                else:
                    boxes.append(box)
            provenance |= {f"view {opened.record.id} {name}": fact for name, fact in opened.provenance.items()}
            views.append(opened.record)
            images.append(opened.image)
            masks |= opened.masks
        if not images:
            return Loaded(sample=None, refusals=tuple(refusals))
        has_text = bool(self.mapping.report) and bool(study.report)
        through_pipeline = self.structured is not None and (has_text or self.structured.prepared is not None)
        record = StudyRecord(
            study=item.key,
            patient=item.patient,
            language=self.mapping.language,
            report={} if through_pipeline else dict(study.report),
            labels=dict(study.labels),
            measurements=dict(study.measurements) or None,
            boxes=boxes,
            sex=study.sex,
            age_years=study.age_years,
            provenance=provenance,
            deidentifier=None if through_pipeline else self._statement(has_text, bool(study.report)),
            views=views,
        )
        if through_pipeline and self.structured is not None:
            record, cause, _ = self.structured.complete(record, dict(study.report), study.known, study.prepared)
            if cause is not None:
                refusals.append(Refusal(study.name, cause))
                if not study.labels and not study.measurements:
                    return Loaded(sample=None, refusals=tuple(refusals))
        sample = Sample(key=item.key, record=record, images=tuple(images), masks=masks)
        return Loaded(sample=sample, refusals=tuple(refusals))

    def _placed(self, drawn: Sequence[DrawnBox], view: ViewRecord) -> list[Box | str]:
        return [box.on(view, self.mapping.boxes.grid) for box in drawn] if self.mapping.boxes is not None else []

    def _statement(self, has_text: bool, has_report: bool) -> str | None:
        return self.deidentified if has_text else TEMPLATE_DEIDENTIFIER if has_report else None


def _flat(values: Mapping[str, tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(name for names in values.values() for name in names))


def _check_text(row: Mapping[str, str]) -> None:
    for cell in row.values():
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise _RowRefusedError("text not UTF-8") from None


def parse_age(text: str) -> float | None:
    """Years from `58`, `58.5`, `058Y`, `011M`; None when it says nothing plausible (NIH holds ages above 400)."""
    match = _AGE.match(text.strip().upper())
    if match is None:
        return None
    years = float(match[1]) * _YEARS_OF_UNIT[match[2]]
    return years if years <= AGE_YEARS_MAX else None


def write_report(template: Template, key: str, labels: Mapping[str, LabelValue]) -> str:
    """Report-like sentences for the labels; the wording follows from `key`, so a study always reads the same."""

    def choose(sentences: Sequence[str], purpose: str) -> str:
        return sentences[int(hashed_key(None, purpose, key, 8), 16) % len(sentences)]

    written: list[str] = []
    for name, value in labels.items():
        if value == 0:
            continue
        sentence = choose(template.present if value == 1 else template.uncertain, f"template {name}")
        word = template.words.get(name, name.replace("_", " ").lower())
        written.append(sentence.replace("{label}", word))
    sentences = written or [choose(template.normal, "template normal")]
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)
