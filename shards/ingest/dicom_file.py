"""A DICOM file -> its elements and stored values, read without trust; the reasons of a refusal quote no header."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from shards.ingest.image_file import ImageRefusedError
from shards.reports.identity.header import MODALITIES

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


quiet = _Silence()


def read_file(path: Path, pixels: bool = True) -> FileDataset:
    """One file, also without preamble or meta header. Raises RefusedError when it is no DICOM."""
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except IsADirectoryError:
        raise RefusedError("folder that is a link, or may not be read") from None
    except OSError:
        raise RefusedError("file cannot be read") from None
    if not start:
        raise RefusedError("file has 0 bytes")
    has_preamble = start[128:] == b"DICM"
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)
    except Exception:  # pydicom raises many kinds for broken files; all mean the same here
        raise RefusedError("DICOM header does not parse" if has_preamble else "not a DICOM file") from None
    if not has_preamble and not sop_class(dataset):
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


def items_of(dataset: Dataset, name: str) -> list[Dataset]:
    """The items of a sequence; none where there is no such sequence."""
    value = element_of(dataset, name)
    return [item for item in value if isinstance(item, Dataset)] if isinstance(value, Sequence) else []


def sop_class(dataset: Dataset) -> UID | None:
    """The SOP class when DICOM knows it, so that its name may be shown."""
    for holder, name in (
        (dataset, "SOPClassUID"),
        (getattr(dataset, "file_meta", Dataset()), "MediaStorageSOPClassUID"),
    ):
        uid = UID(text_of(holder, name))
        if uid.is_valid and not uid.is_private and uid.type == "SOP Class":
            return uid
    return None


def check_image(dataset: FileDataset, modalities: tuple[str, ...]) -> None:
    """Raises RefusedError for all that no reading of the pixels could mend."""
    kind, modality = sop_class(dataset), text_of(dataset, "Modality").upper()
    if kind == MediaStorageDirectoryStorage:
        raise RefusedError("DICOMDIR, an index of other files")
    is_image = kind is None or any(word in kind.name for word in ("Image Storage", "Image Information"))
    if kind is not None and not is_image:
        raise RefusedError(f"no radiograph: {kind.name}")
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


def syntax_name(dataset: FileDataset) -> str:
    """The name of the transfer syntax; a private one has no public name, and its UID could tell a site."""
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    return syntax.name if not syntax.is_private and syntax.is_transfer_syntax else "unknown transfer syntax"


def big_endian(dataset: FileDataset) -> bool:
    """Whether words of several bytes are stored with the largest first."""
    return bool(dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian)


def pixels_of(dataset: FileDataset) -> np.ndarray:
    """Stored values, [rows, columns] or [frames, rows, columns]. Raises RefusedError naming the transfer syntax."""
    if "PixelData" not in dataset:
        raise RefusedError("truncated: no pixel data")
    try:
        return dataset.pixel_array
    except Exception as error:  # each plug-in raises its own kinds; messages may quote the header
        plain = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
        if dataset.file_meta.TransferSyntaxUID in plain and isinstance(error, ValueError):
            raise RefusedError("truncated: fewer pixels than rows x columns") from None
        raise RefusedError(f"pixels do not decode: {syntax_name(dataset)}") from None


def stored_pixels(dataset: FileDataset) -> np.ndarray:
    """Raw stored values [rows, columns] int64. Raises RefusedError naming the transfer syntax."""
    pixels = pixels_of(dataset)
    if pixels.ndim != 2 or pixels.dtype.kind not in "iu":
        raise RefusedError("several frames" if pixels.ndim == 3 else "pixels are not integers")
    return pixels.astype(np.int64)
