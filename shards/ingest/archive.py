"""A hospital's export, DICOM studies and their reports -> studies with both, de-identified: one report, many views.

The order is fixed: headers and report list are read, each report is matched with its study by true dates, then each
pair is loaded by itself: pixels, text, cleaning, de-identification with what header and table say of the patient,
extraction. What is not a pair of sound parts gives nothing: every file and every row is in a sample or counted.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from shards.batch import StudyRecord
from shards.errors import ConfigError, DataError
from shards.ingest import Item, Loaded, Plan, Refusal, hashed_key, key_fingerprint
from shards.ingest.archive_pairs import By, Dated, paired
from shards.ingest.archive_reports import MAPPING, ArchiveMapping, ArchiveReport, ArchiveReports, BadReport, day_of
from shards.ingest.dicom import DicomRadiographs, Header, files_below, read_headers
from shards.ingest.dicom_file import FileDataset, RefusedError, read_file, sop_class, text_of
from shards.reports.exam import has_two_languages, is_of_other_part, is_paired
from shards.reports.identity import KnownPatient
from shards.reports.identity.header import BODY_PARTS
from shards.reports.intake import known_patient
from shards.reports.language import clear_language, detect
from shards.reports.packing import Structured
from shards.reports.pipeline import WHOLE, Cell
from shards.reports.text import clean

VERSION = 2  # raised with every change that gives other pairs or refusals

NO_LATERALITY = "no laterality of a part that there are two of"
NO_SIDE_NO_PART = "neither laterality nor a known body part"
NO_BODY_PART = "views without a body part in the header, so that the report's was not compared"
TWO_IN_FOLDER = "study with views in a folder of two patients"
REPORT = "report: "  # before the reasons of reports, so that files and reports are counted apart
STUDY = "study: "  # before those of the views of a study that has no report of its own


@dataclass(frozen=True, kw_only=True)
class ArchiveOptions:
    """How strictly an export is read.

    `window_days`: most days between study and report that no accession number joins. `keep_without_laterality`: images
    of a hand, a knee and so on may lack it. `shared_folders`: a folder may hold images of several patients.
    """

    window_days: int = 0
    keep_without_laterality: bool = False
    shared_folders: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.window_days <= 365:
            raise ConfigError(f"--window-days {self.window_days}: use 0 (the same day) to 365")


@dataclass(frozen=True, kw_only=True)
class _File:
    """What planning keeps of a DICOM file, in memory only."""

    header: Header
    day: datetime.date | None
    born: datetime.date | None
    accession: str


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Payload of an Item: the views of a study, its report, and by what they were matched."""

    groups: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    report: ArchiveReport
    by: By
    told: str  # keyed hash of what the table says, which a resumed run must agree with


@dataclass(frozen=True, kw_only=True)
class HospitalArchive:
    """An export under `folder`; see `ArchiveMapping` for where in it images and reports lie."""

    folder: Path
    mapping: ArchiveMapping
    images: DicomRadiographs
    structured: Structured
    secret: bytes = field(repr=False)
    options: ArchiveOptions = field(default_factory=ArchiveOptions)
    name: str = "archive"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.structured.labels

    @property
    def masks(self) -> dict[str, int]:
        return {}

    @property
    def key_fingerprint(self) -> str | None:
        return key_fingerprint(self.secret)

    @property
    def settings(self) -> Mapping[str, Any]:
        mapping = hashlib.sha256(self.mapping.model_dump_json().encode()).hexdigest()
        return {"archive": VERSION, "mapping": mapping, "options": vars(self.options),
                "structured": self.structured.settings} | dict(self.images.settings)  # fmt: skip

    @cached_property
    def reports(self) -> ArchiveReports:
        """The reports of the export."""
        return ArchiveReports(self.folder, self.mapping)

    # --- plan: headers, list of reports, pairs ---

    def plan(self) -> Plan:
        """Reads all headers and the list of reports, then pairs them by true dates."""
        paths = sorted(path for path in files_below(self.folder) if path != MAPPING)
        if not paths:
            raise ConfigError(f"--input {self.folder}: holds no file")
        told = self.reports.read(paths)
        image_root = "" if self.mapping.images == "." else self.mapping.images.strip("/") + "/"
        others = [path for path in paths if not self.reports.is_report(path)]
        images = [path for path in others if path.startswith(image_root)]
        refusals = [
            Refusal(self._named("file", path), "neither report nor in the folder of images")
            for path in others
            if not path.startswith(image_root)
        ]
        read = read_headers(self._file, images)
        refusals += [one for one in read if isinstance(one, Refusal)]
        files = {one.header.path: one for one in read if isinstance(one, _File)}
        studies, refused = self.images.grouped([one.header for one in files.values()])
        refusals += refused
        self._drop_shared_folders(studies, refusals)
        dated = self._dated(studies, files, refusals)
        reports = self._sound(told, refusals)
        pairs = paired(dated, self._dated_reports(reports.values()), self.options.window_days)
        for name, reason in pairs.reports.items():
            refusals.append(Refusal(self._named("report", name), REPORT + reason))
        for study, reason in pairs.studies.items():
            refusals += self._refused_views(studies[study], STUDY + reason)
        items = []
        for study, (name, by) in pairs.of_study.items():
            views, report = studies[study], reports[name]
            born = next((files[view.path].born for view in views if files[view.path].born), None) or report.born
            if born is not None and born > report.day:
                refusals.append(Refusal(self._named("report", name), REPORT + "date before birth"))
                refusals += self._refused_views(views, STUDY + "date before birth")
                continue
            items.append(self._item(study, views, report, by))
        items.sort(key=lambda item: item.key)  # the order of UIDs is one of dates
        counts = {"inputs/files of images": len(others), "inputs/reports": len(told)}
        return Plan(items=items, refusals=refusals, counts=counts)

    def _item(self, study: str, views: Sequence[Header], report: ArchiveReport, by: By) -> Item:
        text = report.place.name if isinstance(report.place, Path) else report.place
        told = hashed_key(self.secret, "told", ascii((text, report.body_part, sorted(report.known.items()))))
        groups = tuple(((view.path,), ()) for view in views)
        return Item(
            key=hashed_key(self.secret, "study", study), patient=hashed_key(self.secret, "patient", views[0].patient),
            payload=_Pair(groups=groups, report=report, by=by, told=told),
        )  # fmt: skip

    def _named(self, kind: str, text: str) -> str:
        return hashed_key(self.secret, kind, text)

    def _refused_views(self, views: Sequence[Header], reason: str) -> list[Refusal]:
        return [Refusal(self._named("file", view.path), reason) for view in views]

    def _file(self, path: str) -> _File | Refusal:
        try:
            dataset = read_file(self.folder / path, pixels=False)
            header = self.images.header_of(dataset, path)
            _check(dataset, self.options)
        except RefusedError as error:
            return Refusal(self._named("file", path), str(error))
        return _File(
            header=header, day=day_of(text_of(dataset, "StudyDate")), born=day_of(text_of(dataset, "PatientBirthDate")),
            accession=text_of(dataset, "AccessionNumber"),
        )  # fmt: skip

    def _drop_shared_folders(self, studies: dict[str, list[Header]], refusals: list[Refusal]) -> None:
        """Studies with a view in a folder of two patients: one lies there by mistake, and nothing tells which."""
        if self.options.shared_folders:
            return
        patients: dict[PurePosixPath, set[str]] = defaultdict(set)
        for views in studies.values():
            for view in views:
                patients[PurePosixPath(view.path).parent].add(view.patient)
        for study, views in list(studies.items()):
            if any(len(patients[PurePosixPath(view.path).parent]) > 1 for view in views):
                refusals += self._refused_views(studies.pop(study), TWO_IN_FOLDER)

    def _dated(
        self, studies: Mapping[str, Sequence[Header]], files: Mapping[str, _File], refusals: list[Refusal]
    ) -> list[Dated]:
        """Studies of one possible date and at most one accession number."""
        found = []
        for study, views in studies.items():
            its = [files[view.path] for view in views]
            days, numbers = {one.day for one in its}, {one.accession for one in its} - {""}
            day = its[0].day
            if day is None or None in days:
                refusals += self._refused_views(views, STUDY + "impossible date")
            elif len(days) > 1 or len(numbers) > 1:
                refusals += self._refused_views(views, STUDY + "several dates or accession numbers")
            else:
                accession = next(iter(numbers), "")
                found.append(Dated(name=study, patient=views[0].patient, day=day, accession=accession))
        return found

    def _sound(self, told: Sequence[ArchiveReport | BadReport], refusals: list[Refusal]) -> dict[str, ArchiveReport]:
        """Reports by name; the others are refused."""
        found = {}
        for one in told:
            if isinstance(one, BadReport):
                refusals.append(Refusal(self._named("report", one.name), REPORT + one.reason))
            else:
                found[one.name] = one
        return found

    @staticmethod
    def _dated_reports(reports: Iterable[ArchiveReport]) -> list[Dated]:
        return [Dated(name=one.name, patient=one.patient, day=one.day, accession=one.accession) for one in reports]

    # --- load: one pair ---

    def load(self, item: Item) -> Loaded:
        pair: _Pair = item.payload
        report = pair.report
        opened = self.images.open_study(item.key, item.patient, pair.groups, searched=True)
        refusals = list(opened.refusals)
        name = self._named("report", report.name)
        if opened.sample is None:
            refusals.append(Refusal(name, REPORT + "no view of its study can be read"))
            return Loaded(sample=None, refusals=tuple(refusals))
        record = opened.sample.record
        counts: Counter[str] = Counter()
        text = report.text()
        reason = _fault(text, record, report.body_part)
        if reason is None and text is not None:
            known = _united(opened.known, known_patient(item.patient, **report.known))
            record, cause, counts = self.structured.complete(record, {WHOLE: text}, known, None)
            reason = cause.removeprefix(REPORT) if cause else None if record.report else "nothing is left to read"
        if reason is not None:
            refused = {refusal.name for refusal in refusals if not refusal.kept}
            views = (self._named("file", path) for paths, _ in pair.groups for path in paths)
            refusals += [Refusal(view, STUDY + "its report cannot be used") for view in views if view not in refused]
            refusals.append(Refusal(name, REPORT + reason))
            return Loaded(sample=None, refusals=tuple(refusals))
        record = record.model_copy(update={"provenance": {**record.provenance, "report matched by": pair.by}})
        if unknown := sum(view.body_part is None for view in record.views):
            counts[f"remarks/{NO_BODY_PART}"] += unknown
        counts["outputs/reports"] += 1
        counts["outputs/views"] += len(record.views)
        counts[f"matched by/{pair.by}"] += 1
        return Loaded(sample=replace(opened.sample, record=record), refusals=tuple(refusals), counts=counts)


def _check(dataset: FileDataset, options: ArchiveOptions) -> None:
    """Raises RefusedError for images that are no view of a patient, or of which nobody knows the side."""
    kind = sop_class(dataset)
    if kind is not None and "Secondary Capture" in kind.name:
        raise RefusedError(f"no radiograph: {kind.name}")
    if not text_of(dataset, "PatientID"):
        raise RefusedError("no PatientID")
    side = (text_of(dataset, "ImageLaterality") or text_of(dataset, "Laterality")).upper()
    part = text_of(dataset, "BodyPartExamined").upper()
    paired_part = is_paired(part)
    if paired_part is not False and side not in ("L", "R", "B") and not options.keep_without_laterality:
        raise RefusedError(NO_LATERALITY if paired_part else NO_SIDE_NO_PART)


def _fault(raw: Cell | None, record: StudyRecord, told: str) -> str | None:
    """Why a report cannot be that of its study; None for one that the pipeline shall judge."""
    if raw is None:
        return "file cannot be read"
    try:
        text = clean(raw).text
    except DataError:
        return None
    if has_two_languages(text):
        return "two languages"
    language = detect(text)
    if language == "unknown" and clear_language(text) == "other":
        return "neither French nor English"
    parts = [view.body_part for view in record.views if view.body_part in BODY_PARTS]
    if is_of_other_part(text, language, parts, told):
        return "another part of the body than its study"
    return None


def _united(header: KnownPatient | None, table: KnownPatient) -> KnownPatient:
    """What both say of the patient."""
    if header is None:
        return table

    def both(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*getattr(header, name), *getattr(table, name))))

    return replace(
        table, first_names=both("first_names"), last_names=both("last_names"), ids=both("ids"),
        birth_date=header.birth_date or table.birth_date,
    )  # fmt: skip
