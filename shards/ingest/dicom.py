"""A folder of DICOM radiographs -> studies: pixels without loss, views upright, a dozen closed facts, no header text.

Stored values stay what the detector system wrote, turned so that more is whiter; how they are shown (VOI window) is
kept as `ViewRecord.window`. Only values from the closed lists below, numbers and keyed hashes leave a header, so no
name, date, comment or private element can reach a shard. Every file ends in a sample or in a refusal with one of few
reasons.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow.parquet as pq

from shards.batch import EncodedImage, EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded, Plan, Refusal, hashed_key, key_fingerprint
from shards.ingest.dicom_file import (
    Dataset,
    FileDataset,
    RefusedError,
    check_image,
    number_of,
    quiet,
    read_file,
    syntax_name,
    text_of,
)
from shards.ingest.dicom_pixels import load_view
from shards.ingest.image_file import ImageLimits, ImageRefusedError
from shards.ingest.view_files import Fact, OpenedView
from shards.reports.identity.header import MODALITIES, SEARCHED, age_years_of, sex_of
from shards.reports.text import wide_charset

if TYPE_CHECKING:  # only --reports structured needs them
    from shards.reports.identity import KnownPatient
    from shards.reports.identity.burned_in import BurnedInText
    from shards.reports.packing import Structured

DEIDENTIFIER = "dicom headers dropped 1"
REPORT_SECTIONS = ("report", "indication", "technique", "comparison", "findings", "impression")
# Radiography by its DICOM terms; DR is no standard term but common. Others come by the `modalities` option.
RADIOGRAPHY = ("CR", "DX", "DR")
_PLAN_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What planning keeps of one file, in memory only."""

    path: str  # relative to the folder
    study: str
    study_by: str | None  # what stands for a StudyInstanceUID that is missing
    series: str
    frame: str  # of reference
    patient: str
    instance: str
    order: tuple[int, int, str]  # series number, instance number, instance


@dataclass(frozen=True, kw_only=True)
class FoundMasks:
    """DICOM objects that hold masks: series -> its objects, all their files, and (name, reason) of those of no use."""

    of_series: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: frozenset[Path] = frozenset()
    refused: tuple[tuple[str, str], ...] = ()


class SeriesReader(Protocol):
    """Reads the files of a series as one view; picklable."""

    @property
    def masks(self) -> dict[str, int]: ...  # name -> id in the label maps

    @property
    def settings(self) -> dict[str, Any]: ...  # all that changes the output

    def check(self, dataset: FileDataset) -> None:
        """Raises RefusedError for a file that belongs to no view of this kind, by its header."""
        ...

    def find_masks(self, frames: Mapping[str, str]) -> FoundMasks:
        """Masks of the series there are: SeriesInstanceUID -> FrameOfReferenceUID."""
        ...

    def open(self, datasets: Sequence[FileDataset], view_id: str, masks: Sequence[str]) -> OpenedView:
        """The view of a series' files, in no order. Raises RefusedError or ImageRefusedError."""
        ...


@dataclass(frozen=True, kw_only=True)
class DicomRadiographs:
    """Every file under `folder`, grouped into studies by StudyInstanceUID; with `series` a series is one view.

    `secret` None means a public set: names are hashed with a public key, and refusals show file names. `reports` is a
    CSV or Parquet table with a column `study` (StudyInstanceUID) and columns named as report sections; its text is
    taken only with `structured`, through the pipeline of `shards.reports`, which then looks for what the headers say of
    the patient, or with `deidentified`, the user's statement of how it was cleared.
    """

    folder: Path
    secret: bytes | None = field(default=None, repr=False)
    modalities: tuple[str, ...] = RADIOGRAPHY
    reports: Path | None = None
    deidentified: str | None = None
    structured: Structured | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    burned_in: BurnedInText | None = None
    series: SeriesReader | None = None
    name: str = "dicom"

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"--input {self.folder}: no such folder")
        if not os.access(self.folder, os.R_OK | os.X_OK):
            raise ConfigError(f"--input {self.folder}: not readable; change its permissions or run as its owner")
        unknown = sorted(set(self.modalities) - set(MODALITIES))
        if unknown or not self.modalities:
            raise ConfigError(
                f"modalities={','.join(unknown) or 'none'}: use terms of DICOM such as {', '.join(RADIOGRAPHY)}"
            )
        if self.structured is not None and bool(self.reports) == bool(self.structured.prepared):
            raise ConfigError(
                "--reports structured: name the table of the reports, or the file that prepare_reports.py made of it: "
                "--reports structured FILE"
            )
        if self.reports and self.structured is None and not (self.deidentified or "").strip():
            raise ConfigError(
                f"--reports {self.reports}: raw text is packed only through de-identification, --reports structured "
                f"{self.reports}, or, where it was cleared elsewhere, with a statement how: --deidentified 'HOW'"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        return self.structured.labels if self.structured else ()

    @property
    def masks(self) -> dict[str, int]:
        return self.series.masks if self.series else {}

    @property
    def key_fingerprint(self) -> str | None:
        return key_fingerprint(self.secret)

    @property
    def settings(self) -> Mapping[str, Any]:
        chosen = {"structured": self.structured, "burned_in": self.burned_in, "series": self.series}
        return {
            "modalities": list(self.modalities), "reports": str(self.reports) if self.reports else None,
            "deidentified": self.deidentified, "limits": vars(self.limits), "deidentifier": DEIDENTIFIER,
        } | {name: option.settings for name, option in chosen.items() if option is not None}  # fmt: skip

    def plan(self) -> Plan:
        """Reads all headers. A study comes whole or, where two patients claim it, not at all."""
        reports = self._read_reports()
        paths = sorted(_files(self.folder))
        if not paths:
            raise ConfigError(f"--input {self.folder}: holds no file")
        with quiet, ThreadPoolExecutor(_PLAN_THREADS, thread_name_prefix="header") as pool:
            headers = list(pool.map(self._header, paths))
        masks = self._find_masks(headers)
        if masks.files:
            root = self.folder.resolve()
            pairs = zip(paths, headers, strict=True)
            headers = [header for path, header in pairs if (root / path).resolve() not in masks.files]
        refusals = [header for header in headers if isinstance(header, Refusal)]
        refusals += [Refusal(self._log_name(name), reason) for name, reason in masks.refused]
        studies: dict[str, list[_Header]] = {}
        seen: set[str] = set()
        for header in headers:
            if isinstance(header, Refusal):
                continue
            if header.instance in seen:
                refusals.append(Refusal(self._log_name(header.path), "the same DICOM instance twice"))
                continue
            seen.add(header.instance)
            studies.setdefault(header.study, []).append(header)
        items = []
        prepared = self.structured.file if self.structured else None
        for study, views in sorted(studies.items()):
            patients = {view.patient for view in views}
            if len(patients) > 1:
                refusals += [Refusal(self._log_name(view.path), "study of two patients") for view in views]
                continue
            views.sort(key=lambda view: view.order)
            key = hashed_key(self.secret, "study", study)
            place = prepared.place(key) if prepared else None
            items.append(
                Item(
                    key=key,
                    patient=hashed_key(self.secret, "patient", patients.pop()),
                    payload=(
                        self._views(views, masks),
                        tuple(sorted(reports.get(study, {}).items())),
                        place,
                        views[0].study_by,
                    ),
                )
            )
        if self.structured is not None:
            self.structured.check_joins([(item.key, item.patient, item.payload[2]) for item in items])
        items.sort(key=lambda item: item.key)  # the order of UIDs is one of dates
        return Plan(items=items, refusals=refusals)

    def load(self, item: Item) -> Loaded:
        groups, report, place, study_by = item.payload
        images: list[EncodedImage | EncodedVolume] = []
        masks: dict[tuple[str, int], EncodedImage | EncodedVolume] = {}
        views: list[ViewRecord] = []
        refusals: list[Refusal] = []
        persons: list[dict[str, Any]] = []
        known: KnownPatient | None = None
        provenance: dict[str, Fact] = {"source": self.name}
        for paths, mask_files in groups:
            with quiet:
                datasets = self._read_all(paths, refusals)
                if not datasets:
                    continue
                try:
                    view = self._open(list(datasets.values()), str(len(views)), mask_files)
                except ImageRefusedError as error:
                    refusals += [Refusal(self._log_name(path), str(error)) for path in datasets]
                    continue
                first = next(iter(datasets.values()))
                persons.append(_person(first))
                provenance |= _provenance(first, view.record.id)
                if self.structured is not None and known is None:
                    known = _known_patient(first, item.patient)
            provenance |= {f"view {view.record.id} {name}": fact for name, fact in view.provenance.items()}
            refusals += [Refusal(self._log_name(paths[0]), note, kept=True) for note in view.notes]
            images.append(view.image)
            masks |= view.masks
            views.append(view.record)
        if not views:
            return Loaded(sample=None, refusals=tuple(refusals))
        if study_by is not None:
            provenance["study told by"] = study_by
            reason = f"no StudyInstanceUID: study told by its {study_by}"
            refusals.append(Refusal(self._log_name(groups[0][0][0]), reason, kept=True))
        stated = bool(report) and self.structured is None
        record = StudyRecord(
            study=item.key, patient=item.patient, report=dict(report) if stated else {}, views=views,
            provenance=provenance, deidentifier=DEIDENTIFIER + (f"; text: {self.deidentified}" if stated else ""),
            **persons[0],
        )  # fmt: skip
        if self.structured is not None and (report or self.structured.prepared):
            record, cause = self.structured.complete(record, dict(report), known, place)
            if cause is not None:
                refusals.append(Refusal(item.key, cause))
        sample = Sample(key=item.key, record=record, images=tuple(images), masks=masks)
        return Loaded(sample=sample, refusals=tuple(refusals))

    def _read_all(self, paths: Sequence[str], refusals: list[Refusal]) -> dict[str, FileDataset]:
        """Path -> file, of those that can be read."""
        datasets = {}
        for path in paths:
            try:
                dataset = read_file(self.folder / path)
                check_image(dataset, self.modalities)
            except RefusedError as error:
                refusals.append(Refusal(self._log_name(path), str(error)))
            else:
                datasets[path] = dataset
        return datasets

    def _find_masks(self, headers: Sequence[_Header | Refusal]) -> FoundMasks:
        if self.series is None:
            return FoundMasks()
        with quiet:
            return self.series.find_masks(
                {header.series: header.frame for header in headers if isinstance(header, _Header) and header.series}
            )

    def _views(self, headers: Sequence[_Header], masks: FoundMasks) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """(files, files of masks) of each view."""
        if self.series is None:
            return tuple(((header.path,), ()) for header in headers)
        files: dict[str, list[str]] = {}
        for header in headers:
            files.setdefault(header.series, []).append(header.path)
        return tuple((tuple(paths), masks.of_series.get(series, ())) for series, paths in files.items())

    def _open(self, datasets: Sequence[FileDataset], view_id: str, masks: Sequence[str]) -> OpenedView:
        if self.series is not None:
            return self.series.open(datasets, view_id, masks)
        return load_view(datasets[0], view_id, self.limits, self.burned_in)

    def _log_name(self, path: str) -> str:
        return path if self.secret is None else hashed_key(self.secret, "file", path)

    def _header(self, path: str) -> _Header | Refusal:
        try:
            dataset = read_file(self.folder / path, pixels=False)
            check_image(dataset, self.modalities)
            if self.series is not None:
                self.series.check(dataset)
            study, study_by = self._study(dataset, path)
            instance = text_of(dataset, "SOPInstanceUID") or path
            series, number = (number_of(dataset, name) or 0.0 for name in ("SeriesNumber", "InstanceNumber"))
            return _Header(
                path=path, study=study, study_by=study_by, series=text_of(dataset, "SeriesInstanceUID"),
                frame=text_of(dataset, "FrameOfReferenceUID"), instance=instance,
                patient=text_of(dataset, "PatientID") or f"of study {study}",
                order=(int(series), int(number), instance),
            )  # fmt: skip
        except RefusedError as error:
            return Refusal(self._log_name(path), str(error))

    def _study(self, dataset: FileDataset, path: str) -> tuple[str, str | None]:
        """What names the study, and what stands for its StudyInstanceUID if that is missing. Raises RefusedError.

        Only slices of series are taken without it: they fit together or are refused, even by folder, while nothing
        tells whose radiographs lie side by side.
        """
        if study := text_of(dataset, "StudyInstanceUID"):
            return study, None
        if self.series is None:
            raise RefusedError("no StudyInstanceUID")
        for name in ("FrameOfReferenceUID", "SeriesInstanceUID"):
            if uid := text_of(dataset, name):
                return f"{name} {uid}", name
        return f"folder {PurePosixPath(path).parent}", "folder"

    def _read_reports(self) -> dict[str, dict[str, str]]:
        """StudyInstanceUID -> section -> text. Raises ConfigError for a table that cannot serve."""
        if self.reports is None:
            return {}
        try:
            if self.reports.suffix.lower() == ".parquet":
                rows = pq.read_table(self.reports).to_pylist()
            else:
                data = self.reports.read_bytes()
                text = data.decode(wide_charset(data[:4096]) or "utf-8-sig").lstrip("\ufeff")
                rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except OSError as error:
            raise ConfigError(f"--reports {self.reports}: {error.strerror or 'cannot be read'}") from None
        except (ValueError, csv.Error):
            raise ConfigError(
                f"--reports {self.reports}: no Parquet and no CSV in UTF-8 or UTF-16; convert it"
            ) from None
        columns = set(rows[0]) if rows else set()
        sections = [name for name in REPORT_SECTIONS if name in columns]
        if "study" not in columns or not sections:
            raise ConfigError(
                f"--reports {self.reports}: needs a column study (StudyInstanceUID) "
                f"and one of {', '.join(REPORT_SECTIONS)}"
            )
        reports: dict[str, dict[str, str]] = {}
        for row in rows:
            study = str(row["study"] or "").strip()
            if study in reports:
                raise ConfigError(f"--reports {self.reports}: a study stands twice; keep one row for each")
            texts = {name: str(row[name] or "").strip() for name in sections}
            reports[study] = {name: text for name, text in texts.items() if text}
        return reports


def _files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            path = Path(parent) / name
            if path.is_file():
                yield path.relative_to(folder).as_posix()


# --- the few facts kept ---


def _known_patient(dataset: Dataset, key: str) -> KnownPatient:
    """What the header says of persons and numbers, for the report to be searched for; in memory only."""
    from shards.reports.intake import known_patient

    def written(kind: str) -> list[str]:
        found = (text_of(dataset, attribute) for attribute, its in SEARCHED.items() if its == kind)
        return [text for text in found if text]

    return known_patient(
        key,
        names=(text.partition("=")[0] for text in written("person")),
        birth_dates=written("birth date"),
        ids=written("id"),
    )


def _person(dataset: Dataset) -> dict[str, Any]:
    """Sex and age in years, as far as the header policy lets them pass."""
    return {"sex": sex_of(text_of(dataset, "PatientSex")), "age_years": age_years_of(text_of(dataset, "PatientAge"))}


def _provenance(dataset: FileDataset, view_id: str) -> dict[str, Fact]:
    return {
        f"view {view_id} modality": text_of(dataset, "Modality").upper(),
        f"view {view_id} transfer syntax": syntax_name(dataset),
        f"view {view_id} bits stored": int(number_of(dataset, "BitsStored") or 0),
        f"view {view_id} lossy": text_of(dataset, "LossyImageCompression") == "01",
    }
