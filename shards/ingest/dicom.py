"""A folder of DICOM radiographs -> studies: pixels without loss, views upright, a dozen closed facts, no header text.

Stored values stay what the detector system wrote, turned so that more is whiter; how they are shown (VOI window) is
kept as `ViewRecord.window`. Only values from the closed lists below, numbers and keyed hashes leave a header, so no
name, date, comment or private element can reach a shard. Every file ends in a sample or in a refusal with one of few
reasons.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gdcm
import numpy as np
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from shards.batch import EncodedImage, EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded, Plan, Refusal, hashed_key, key_fingerprint
from shards.ingest.image_file import ImageLimits, ImageRefusedError
from shards.ingest.view_files import Fact, OpenedView
from shards.reports.identity.header import BODY_PARTS, MODALITIES, SEARCHED, VIEWS, age_years_of, sex_of
from shards.reports.text import wide_charset

if TYPE_CHECKING:  # only --reports structured needs them
    from shards.reports.identity import KnownPatient
    from shards.reports.identity.burned_in import BurnedInText
    from shards.reports.packing import Structured

DEIDENTIFIER = "dicom headers dropped 1"
REPORT_SECTIONS = ("report", "indication", "technique", "comparison", "findings", "impression")
# Radiography by its DICOM terms; DR is no standard term but common. Others come by the `modalities` option.
RADIOGRAPHY = ("CR", "DX", "DR")
BITS_MAX = 16
# Without any window: the values shown black and white leave out this share of pixels at either end.
TAIL_SHARE = 0.005
_PLAN_THREADS = 8

# Its messages and its validation warnings quote header values.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
for _channel in (gdcm.Trace.DebugOff, gdcm.Trace.WarningOff, gdcm.Trace.ErrorOff):
    _channel()


class RefusedError(ImageRefusedError):
    """The reason why a file gives no view; one of few, quoting nothing of the header."""


class _Silence:
    """Switches off Python warnings while any thread is inside: pydicom's quote header values."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_silence = _Silence()


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What planning keeps of one file, in memory only."""

    path: str  # relative to the folder
    study: str
    series: str
    patient: str
    instance: str
    order: tuple[int, int, str]  # series number, instance number, instance


class SeriesReader(Protocol):
    """Reads the files of a series as one view; picklable."""

    @property
    def masks(self) -> dict[str, int]: ...  # name -> id in the label maps

    @property
    def settings(self) -> dict[str, Any]: ...  # all that changes the output

    def check(self, dataset: FileDataset) -> None:
        """Raises RefusedError for a file that belongs to no view of this kind, by its header."""
        ...

    def open(self, datasets: Sequence[FileDataset], view_id: str) -> OpenedView:
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
        with _silence, ThreadPoolExecutor(_PLAN_THREADS, thread_name_prefix="header") as pool:
            headers = list(pool.map(self._header, paths))
        refusals = [header for header in headers if isinstance(header, Refusal)]
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
                    payload=(self._views(views), tuple(sorted(reports.get(study, {}).items())), place),
                )
            )
        if self.structured is not None:
            self.structured.check_joins([(item.key, item.patient, item.payload[2]) for item in items])
        items.sort(key=lambda item: item.key)  # the order of UIDs is one of dates
        return Plan(items=items, refusals=refusals)

    def load(self, item: Item) -> Loaded:
        groups, report, place = item.payload
        images: list[EncodedImage | EncodedVolume] = []
        masks: dict[tuple[str, int], EncodedImage | EncodedVolume] = {}
        views: list[ViewRecord] = []
        refusals: list[Refusal] = []
        persons: list[dict[str, Any]] = []
        known: KnownPatient | None = None
        provenance: dict[str, Fact] = {"source": self.name}
        for paths in groups:
            with _silence:
                datasets = self._read_all(paths, refusals)
                if not datasets:
                    continue
                try:
                    view = self._open(list(datasets.values()), str(len(views)))
                except ImageRefusedError as error:
                    refusals += [Refusal(self._log_name(path), str(error)) for path in datasets]
                    continue
                first = next(iter(datasets.values()))
                persons.append(_person(first))
                provenance |= _provenance(first, view.record.id)
                if self.structured is not None and known is None:
                    known = _known_patient(first, item.patient)
            provenance |= {f"view {view.record.id} {name}": fact for name, fact in view.provenance.items()}
            refusals += [Refusal(self._log_name(paths[0]), note) for note in view.notes]
            images.append(view.image)
            masks |= view.masks
            views.append(view.record)
        if not views:
            return Loaded(sample=None, refusals=tuple(refusals))
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
                dataset = _read(self.folder / path)
                _check(dataset, self.modalities)
            except RefusedError as error:
                refusals.append(Refusal(self._log_name(path), str(error)))
            else:
                datasets[path] = dataset
        return datasets

    def _views(self, headers: Sequence[_Header]) -> tuple[tuple[str, ...], ...]:
        """The files of each view."""
        if self.series is None:
            return tuple((header.path,) for header in headers)
        files: dict[str, list[str]] = {}
        for header in headers:
            files.setdefault(header.series, []).append(header.path)
        return tuple(map(tuple, files.values()))

    def _open(self, datasets: Sequence[FileDataset], view_id: str) -> OpenedView:
        if self.series is not None:
            return self.series.open(datasets, view_id)
        return _load_view(datasets[0], view_id, self.limits, self.burned_in)

    def _log_name(self, path: str) -> str:
        return path if self.secret is None else hashed_key(self.secret, "file", path)

    def _header(self, path: str) -> _Header | Refusal:
        try:
            dataset = _read(self.folder / path, pixels=False)
            _check(dataset, self.modalities)
            if self.series is not None:
                self.series.check(dataset)
            study = text_of(dataset, "StudyInstanceUID")
            if not study:
                raise RefusedError("no StudyInstanceUID")
            instance = text_of(dataset, "SOPInstanceUID") or path
            series, number = (number_of(dataset, name) or 0.0 for name in ("SeriesNumber", "InstanceNumber"))
            return _Header(
                path=path, study=study, series=text_of(dataset, "SeriesInstanceUID"), instance=instance,
                patient=text_of(dataset, "PatientID") or f"of study {study}",
                order=(int(series), int(number), instance),
            )  # fmt: skip
        except RefusedError as error:
            return Refusal(self._log_name(path), str(error))

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


# --- headers ---


def _read(path: Path, pixels: bool = True) -> FileDataset:
    """One file, also without preamble or meta header. Raises RefusedError when it is no DICOM."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError:
        raise RefusedError("file cannot be read") from None
    if not start:
        raise RefusedError("file has 0 bytes")
    has_preamble = start[128:] == b"DICM"
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
    except Exception:  # pydicom raises many kinds for broken files; all mean the same here
        raise RefusedError("DICOM header does not parse" if has_preamble else "not a DICOM file") from None
    if not has_preamble and not _sop_class(dataset):
        raise RefusedError("not a DICOM file")
    meta = dataset.file_meta
    if "TransferSyntaxUID" not in meta:  # no meta header: pydicom saw the encoding while parsing
        implicit, little = dataset.original_encoding
        if little is False:
            meta.TransferSyntaxUID = ExplicitVRBigEndian
        else:
            meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return dataset


def element_of(dataset: Dataset, name: str) -> Any:
    """An element's value; None when it is absent, empty or cannot be converted."""
    try:
        value = dataset.get(name)
    except Exception:  # conversion of a broken value happens on access
        return None
    return None if value is None or (isinstance(value, str | list) and not value) else value


def text_of(dataset: Dataset, name: str) -> str:
    """The first value as text without padding; empty where there is none."""
    value = element_of(dataset, name)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    return "" if value is None else str(value).strip().strip("\0")


def number_of(dataset: Dataset, name: str) -> float | None:
    """The first value as a finite float, or None."""
    numbers = numbers_of(dataset, name)
    return numbers[0] if numbers else None


def numbers_of(dataset: Dataset, name: str) -> list[float]:
    """All values as finite floats; empty where one is none."""
    value = element_of(dataset, name)
    values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    try:
        numbers = [float(one) for one in values]
    except (TypeError, ValueError):
        return []
    return numbers if all(math.isfinite(number) for number in numbers) else []


def _sop_class(dataset: Dataset) -> UID | None:
    """The SOP class when DICOM knows it, so that its name may be shown."""
    for holder, name in (
        (dataset, "SOPClassUID"),
        (getattr(dataset, "file_meta", Dataset()), "MediaStorageSOPClassUID"),
    ):
        uid = UID(text_of(holder, name))
        if uid.is_valid and not uid.is_private and uid.type == "SOP Class":
            return uid
    return None


def _check(dataset: FileDataset, modalities: tuple[str, ...]) -> None:
    """Raises RefusedError for all that no reading of the pixels could mend."""
    sop_class, modality = _sop_class(dataset), text_of(dataset, "Modality").upper()
    if sop_class == MediaStorageDirectoryStorage:
        raise RefusedError("DICOMDIR, an index of other files")
    is_image = sop_class is None or any(word in sop_class.name for word in ("Image Storage", "Image Information"))
    if sop_class is not None and not is_image:
        raise RefusedError(f"no radiograph: {sop_class.name}")
    if modality not in modalities:
        if modality:
            raise RefusedError(f"modality {modality if modality in MODALITIES else 'unknown'}")
        raise RefusedError("no modality" if "Rows" in dataset else "no image")
    if text_of(dataset, "BurnedInAnnotation").upper() == "YES":
        raise RefusedError("BurnedInAnnotation YES: text in the pixels")
    if text_of(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
        raise RefusedError("raw image FOR PROCESSING; its presentation image is wanted")
    if "NumberOfFrames" in dataset and number_of(dataset, "NumberOfFrames") not in (1.0, 0.0):
        raise RefusedError("several frames")
    photometric = text_of(dataset, "PhotometricInterpretation").upper()
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        known = {"RGB": "RGB", "PALETTE COLOR": "palette"} | dict.fromkeys(
            ("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_RCT", "YBR_ICT", "YBR_PARTIAL_422"), "YBR"
        )
        if not photometric:
            raise RefusedError("no image")
        raise RefusedError(f"colour image, {known[photometric]}" if photometric in known else "unknown kind of pixels")


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


# --- pixels ---


def _load_view(dataset: FileDataset, view_id: str, limits: ImageLimits, burned_in: BurnedInText | None) -> OpenedView:
    """Decode, turn upright and encode one image. Raises RefusedError."""
    rows, columns = number_of(dataset, "Rows") or 0, number_of(dataset, "Columns") or 0
    if rows * columns > limits.area_max:
        raise RefusedError(f"image larger than {limits.area_max} pixels")
    if min(rows, columns) < limits.side_min:
        raise RefusedError(f"image side below {limits.side_min} pixels")
    stored = _stored_values(dataset)
    view = VIEWS.get(text_of(dataset, "ViewPosition").upper())
    pixels, turned = _upright(stored.values, dataset, view)
    if burned_in is not None and (reason := burned_in.refusal(pixels)):
        raise RefusedError(reason)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    laterality = (text_of(dataset, "ImageLaterality") or text_of(dataset, "Laterality")).upper()
    body_part = text_of(dataset, "BodyPartExamined").upper()
    spacing = _spacing_mm(dataset)
    record = ViewRecord(
        id=view_id, height=pixels.shape[0], width=pixels.shape[1], bits=16 if pixels.dtype == np.uint16 else 8,
        view=view, laterality=_one_of(laterality, ("L", "R", "B")),
        body_part=body_part if body_part in BODY_PARTS else None,
        spacing_mm=(spacing[1], spacing[0]) if spacing and turned else spacing, window=stored.window,
    )  # fmt: skip
    return OpenedView(image=EncodedImage(data=buffer.getvalue(), extension="png"), record=record)


def _one_of(value: str, options: tuple[Literal["L", "R", "B"], ...]) -> Literal["L", "R", "B"] | None:
    return next((option for option in options if option == value), None)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """`values` [rows, columns] uint8 or uint16, more is whiter; `window` (shown black, shown white) or None: all."""

    values: np.ndarray
    window: tuple[float, float] | None


def stored_pixels(dataset: FileDataset) -> np.ndarray:
    """Raw stored values [rows, columns] int64. Raises RefusedError naming the transfer syntax."""
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    # A private syntax has no public name, and its UID could tell a site.
    syntax_name = syntax.name if not syntax.is_private and syntax.is_transfer_syntax else "unknown transfer syntax"
    if "PixelData" not in dataset:
        raise RefusedError("truncated: no pixel data")
    try:
        pixels = dataset.pixel_array
    except Exception as error:  # each plug-in raises its own kinds; messages may quote the header
        plain = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
        if syntax in plain and isinstance(error, ValueError):
            raise RefusedError("truncated: fewer pixels than rows x columns") from None
        raise RefusedError(f"pixels do not decode: {syntax_name}") from None
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu":
        raise RefusedError("several frames" if pixels.ndim == 3 else "pixels are not integers")
    return pixels.astype(np.int64)


def _stored_values(dataset: FileDataset) -> _Stored:
    """Order of DICOM PS3.3 C.11: modality transform, VOI transform, photometric interpretation; kept as integers.

    A linear rescale is not carried out but the window moved to stored values, which loses nothing. Tables (modality or
    VOI LUT) cannot be expressed so and are applied; where a header has both window and VOI LUT, the window is taken.
    """
    pixels = stored_pixels(dataset)
    bits = int(number_of(dataset, "BitsStored") or 0)
    if not 1 < bits <= BITS_MAX:
        raise RefusedError("pixels of more than 16 bits" if bits > BITS_MAX else "pixels of one bit")
    padding = _padding(pixels, dataset)
    offset, slope, intercept = 0, 1.0, 0.0
    if element_of(dataset, "ModalityLUTSequence"):
        pixels, bits = _apply_table(pixels, dataset, "ModalityLUTSequence")
    else:
        if number_of(dataset, "PixelRepresentation") == 1:
            offset = 1 << (bits - 1)
        slope, intercept = number_of(dataset, "RescaleSlope") or 1.0, number_of(dataset, "RescaleIntercept") or 0.0
    window = _window(dataset)
    if window is None and element_of(dataset, "VOILUTSequence") and slope == 1.0 and intercept.is_integer():
        pixels, bits = _apply_table(pixels + int(intercept), dataset, "VOILUTSequence")
        offset, intercept = 0, 0.0
    top = (1 << bits) - 1
    values = pixels + offset
    shown = values if padding is None else values[~padding]
    if not shown.size or shown.min() == shown.max():
        raise RefusedError("image of one flat value")
    if shown.min() < 0 or shown.max() > top:
        raise RefusedError("values beyond the bits stored")
    if window is not None:
        window = ((window[0] - intercept) / slope + offset, (window[1] - intercept) / slope + offset)
    elif bits > 8:
        low, high = np.quantile(shown, (TAIL_SHARE, 1.0 - TAIL_SHARE))
        window = (float(low), float(high)) if high > low else (float(shown.min()), float(shown.max()))
    if (text_of(dataset, "PhotometricInterpretation").upper() == "MONOCHROME1") != (slope < 0):
        values = top - values
        window = window and (top - window[0], top - window[1])
    if window is not None:
        window = (min(window), max(window))
    if padding is not None:  # what the detector did not see is black
        values = np.where(padding, 0, values)
    return _Stored(values=values.astype(np.uint8 if bits <= 8 else np.uint16), window=window)


def _apply_table(values: np.ndarray, dataset: FileDataset, name: str) -> tuple[np.ndarray, int]:
    """Values [rows, columns] through the first table of a LUT sequence, and the bits of its output (8 to 16)."""
    item = element_of(dataset, name)[0]
    descriptor, data = numbers_of(item, "LUTDescriptor"), element_of(item, "LUTData")
    if len(descriptor) != 3 or not 8 <= descriptor[2] <= BITS_MAX:
        raise RefusedError("broken look-up table")
    count = int(descriptor[0]) or 1 << 16  # 0 stands for what 16 bits cannot hold
    if isinstance(data, bytes):
        big_endian = dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
        kind = np.uint8 if len(data) < 2 * count else np.dtype(">u2" if big_endian else "<u2")
        entries = np.frombuffer(data[: count * np.dtype(kind).itemsize], kind).astype(np.int64)
    else:
        entries = np.asarray(numbers_of(item, "LUTData"), dtype=np.int64)
    if len(entries) < count:
        raise RefusedError("broken look-up table")
    return entries[np.clip(values - int(descriptor[1]), 0, count - 1)], int(descriptor[2])


def _window(dataset: Dataset) -> tuple[float, float] | None:
    """First VOI window as (black, white) in rescaled values; a sigmoid one by its straight middle."""
    centre, width = number_of(dataset, "WindowCenter"), number_of(dataset, "WindowWidth")
    if centre is None or width is None:
        return None
    if text_of(dataset, "VOILUTFunction").upper() in ("LINEAR_EXACT", "SIGMOID"):
        return (centre - width / 2, centre + width / 2) if width > 0 else None
    return (centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2) if width > 1 else None


def _padding(pixels: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """Where Pixel Padding Value (or its range) says that nothing was measured; None for nowhere or everywhere."""
    value = number_of(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = number_of(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    padding = (pixels >= low) & (pixels <= high)
    return padding if padding.any() and not padding.all() else None


def _spacing_mm(dataset: Dataset) -> tuple[float, float] | None:
    """(row, column) spacing: calibrated where given, else at the detector."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = numbers_of(dataset, name)
        if len(spacing) == 2 and min(spacing) > 0:
            return spacing[0], spacing[1]
    return None


def _upright(pixels: np.ndarray, dataset: Dataset, view: str | None) -> tuple[np.ndarray, bool]:
    """Head up, the patient's left on the image's right (laterals: back on the right). Says whether axes were swapped.

    Patient Orientation names where a row's and a column's end point to; without it, or where it
    makes no sense, the image stays.
    """
    orientation = element_of(dataset, "PatientOrientation")
    if not isinstance(orientation, Sequence) or isinstance(orientation, str) or len(orientation) != 2:
        return pixels, False
    along_row, along_column = (str(part).strip().upper()[:1] for part in orientation)
    turned = along_row in ("F", "H") and along_column in ("L", "R", "A", "P")
    if turned:
        pixels, along_row, along_column = pixels.T, along_column, along_row
    if along_column == "H":
        pixels = pixels[::-1]
    elif along_column != "F":
        return pixels, turned
    if along_row == "R" or (along_row == "A" and view == "LATERAL"):
        pixels = pixels[:, ::-1]
    return pixels, turned


# --- the few facts kept ---


def _person(dataset: Dataset) -> dict[str, Any]:
    """Sex and age in years, as far as the header policy lets them pass."""
    return {"sex": sex_of(text_of(dataset, "PatientSex")), "age_years": age_years_of(text_of(dataset, "PatientAge"))}


def _provenance(dataset: FileDataset, view_id: str) -> dict[str, str | int | float | bool | None]:
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    lossy = text_of(dataset, "LossyImageCompression") == "01"
    return {
        f"view {view_id} modality": text_of(dataset, "Modality").upper(),
        f"view {view_id} transfer syntax": syntax.name,
        f"view {view_id} bits stored": int(number_of(dataset, "BitsStored") or 0),
        f"view {view_id} lossy": lossy,
    }
