"""A folder of DICOM radiographs -> studies: pixels without loss, views upright, a dozen closed facts, no header text.

Stored values stay what the detector system wrote, turned so that more is whiter; how they are shown (VOI window) is
kept as `ViewRecord.window`. Only values from the closed lists below, numbers and keyed hashes leave a header, so no
name, date, comment or private element can reach a shard. Every file ends in a sample or in a refusal with one of few
reasons.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
from shards.ingest.dicom_reports import read_reports
from shards.ingest.image_file import ImageLimits, ImageRefusedError
from shards.ingest.view_files import Fact, OpenedView
from shards.reports.identity.header import MODALITIES, SEARCHED, age_years_of, sex_of

if TYPE_CHECKING:  # only --reports structured needs them
    from shards.reports.identity import KnownPatient
    from shards.reports.identity.burned_in import BurnedInText
    from shards.reports.packing import Structured

DEIDENTIFIER = "dicom headers dropped 2"
# Radiography by its DICOM terms; DR is no standard term but common. Others come by the `modalities` option.
RADIOGRAPHY = ("CR", "DX", "DR")
_PLAN_THREADS = 8

Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Header:
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
class OpenedStudy:
    """A study's sample without its report, None where no view is left, and what was refused of it.

    `known`: what the headers say of persons and numbers, in memory only; None where no text is to be searched for it.
    """

    sample: Sample | None
    refusals: tuple[Refusal, ...]
    known: KnownPatient | None = None


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
        reports = {} if self.reports is None else read_reports(self.reports)
        paths = sorted(files_below(self.folder))
        if not paths:
            raise ConfigError(f"--input {self.folder}: holds no file")
        headers = read_headers(self._header, paths)
        masks = self._find_masks(headers)
        if masks.files:
            root = self.folder.resolve()
            pairs = zip(paths, headers, strict=True)
            headers = [header for path, header in pairs if (root / path).resolve() not in masks.files]
        studies, refusals = self.grouped(headers)
        refusals += [Refusal(self.log_name(name), reason) for name, reason in masks.refused]
        items = []
        prepared = self.structured.file if self.structured else None
        for study, views in studies.items():
            key = hashed_key(self.secret, "study", study)
            place = prepared.place(key) if prepared else None
            items.append(
                Item(
                    key=key,
                    patient=hashed_key(self.secret, "patient", views[0].patient),
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

    def grouped(self, headers: Sequence[Header | Refusal]) -> tuple[dict[str, list[Header]], list[Refusal]]:
        """Study -> its files in the order of its views, and what is refused: broken, twice there, of two patients."""
        refusals = [header for header in headers if isinstance(header, Refusal)]
        studies: dict[str, list[Header]] = {}
        seen: set[str] = set()
        for header in headers:
            if isinstance(header, Refusal):
                continue
            if header.instance in seen:
                refusals.append(Refusal(self.log_name(header.path), "the same DICOM instance twice"))
                continue
            seen.add(header.instance)
            studies.setdefault(header.study, []).append(header)
        kept = {}
        for study, views in sorted(studies.items()):
            if len({view.patient for view in views}) > 1:
                refusals += [Refusal(self.log_name(view.path), "study of two patients") for view in views]
            else:
                kept[study] = sorted(views, key=lambda view: view.order)
        return kept, refusals

    def load(self, item: Item) -> Loaded:
        groups, report, place, study_by = item.payload
        searched = self.structured is not None
        opened = self.open_study(item.key, item.patient, groups, searched=searched)
        if opened.sample is None:
            return Loaded(sample=None, refusals=opened.refusals)
        record, refusals = opened.sample.record, list(opened.refusals)
        if study_by is not None:
            record = record.model_copy(update={"provenance": {**record.provenance, "study told by": study_by}})
            reason = f"no StudyInstanceUID: study told by its {study_by}"
            refusals.append(Refusal(self.log_name(groups[0][0][0]), reason, kept=True))
        if self.structured is not None and (report or self.structured.prepared):
            record, cause, _ = self.structured.complete(record, dict(report), opened.known, place)
            if cause is not None:
                refusals.append(Refusal(item.key, cause))
        elif report:
            stated = {"report": dict(report), "deidentifier": f"{DEIDENTIFIER}; text: {self.deidentified}"}
            record = record.model_copy(update=stated)
        return Loaded(sample=replace(opened.sample, record=record), refusals=tuple(refusals))

    def open_study(
        self, key: str, patient: str, groups: Sequence[tuple[Sequence[str], Sequence[str]]], *, searched: bool
    ) -> OpenedStudy:
        """Read, check and encode the views of one study: (files, files of masks) of each. Never raises for data.

        `searched`: a text will be searched for what the headers say.
        """
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
                    refusals += [Refusal(self.log_name(path), str(error)) for path in datasets]
                    continue
                first = next(iter(datasets.values()))
                persons.append(_person(first))
                provenance |= _provenance(first, view.record.id)
                if searched and known is None:
                    known = _known_patient(first, patient)
            provenance |= {f"view {view.record.id} {name}": fact for name, fact in view.provenance.items()}
            refusals += [Refusal(self.log_name(paths[0]), note, kept=True) for note in view.notes]
            images.append(view.image)
            masks |= view.masks
            views.append(view.record)
        if not views:
            return OpenedStudy(sample=None, refusals=tuple(refusals))
        record = StudyRecord(
            study=key, patient=patient, views=views, provenance=provenance, deidentifier=DEIDENTIFIER, **persons[0]
        )
        sample = Sample(key=key, record=record, images=tuple(images), masks=masks)
        return OpenedStudy(sample=sample, refusals=tuple(refusals), known=known)

    def _read_all(self, paths: Sequence[str], refusals: list[Refusal]) -> dict[str, FileDataset]:
        """Path -> file, of those that can be read."""
        datasets = {}
        for path in paths:
            try:
                dataset = read_file(self.folder / path)
                check_image(dataset, self.modalities)
            except RefusedError as error:
                refusals.append(Refusal(self.log_name(path), str(error)))
            else:
                datasets[path] = dataset
        return datasets

    def _find_masks(self, headers: Sequence[Header | Refusal]) -> FoundMasks:
        if self.series is None:
            return FoundMasks()
        with quiet:
            return self.series.find_masks(
                {header.series: header.frame for header in headers if isinstance(header, Header) and header.series}
            )

    def _views(self, headers: Sequence[Header], masks: FoundMasks) -> tuple[tuple[tuple[str, ...], ...], ...]:
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

    def log_name(self, path: str) -> str:
        """The file as logs may show it."""
        return path if self.secret is None else hashed_key(self.secret, "file", path)

    def _header(self, path: str) -> Header | Refusal:
        try:
            return self.header_of(read_file(self.folder / path, pixels=False), path)
        except RefusedError as error:
            return Refusal(self.log_name(path), str(error))

    def header_of(self, dataset: FileDataset, path: str) -> Header:
        """What planning keeps of a file. Raises RefusedError for one that can be no view here."""
        check_image(dataset, self.modalities)
        if self.series is not None:
            self.series.check(dataset)
        study, study_by = self._study(dataset, path)
        instance = text_of(dataset, "SOPInstanceUID") or path
        series, number = (number_of(dataset, name) or 0.0 for name in ("SeriesNumber", "InstanceNumber"))
        return Header(
            path=path, study=study, study_by=study_by, series=text_of(dataset, "SeriesInstanceUID"),
            frame=text_of(dataset, "FrameOfReferenceUID"), instance=instance,
            patient=text_of(dataset, "PatientID") or f"of study {study}",
            order=(int(series), int(number), instance),
        )  # fmt: skip

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


def read_headers(read: Callable[[str], Read], paths: Sequence[str]) -> list[Read]:
    """`read` of every path, in their order, by threads: most of the time goes into waiting for files."""
    with quiet, ThreadPoolExecutor(_PLAN_THREADS, thread_name_prefix="header") as pool:
        return list(pool.map(read, paths))


def files_below(folder: Path) -> Iterator[str]:
    """Paths of all files, relative to the folder, and of what nobody can look into, so that it is refused by name.

    That is links that lead nowhere, links to folders, which are not followed, and folders that may not be read.
    """
    closed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=closed.append):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *links):
            path = os.path.join(parent, name)
            if os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path):  # no pipe: it would hang
                yield Path(path).relative_to(folder).as_posix()
    for error in closed:
        yield Path(error.filename).relative_to(folder).as_posix()


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
