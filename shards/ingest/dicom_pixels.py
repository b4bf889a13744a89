"""Pixels of a radiograph: stored values without loss, more is whiter, views upright; how they are shown is a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from shards.batch import EncodedImage, ViewRecord
from shards.ingest.dicom_file import (
    Dataset,
    FileDataset,
    RefusedError,
    big_endian,
    element_of,
    number_of,
    numbers_of,
    stored_pixels,
    text_of,
)
from shards.ingest.image_file import ImageLimits
from shards.ingest.png import encode_grey
from shards.ingest.view_files import OpenedView
from shards.reports.exam import term_of
from shards.reports.identity.header import VIEWS

if TYPE_CHECKING:  # only --refuse-burned-in-text needs it
    from shards.reports.identity.burned_in import BurnedInText

BITS_MAX = 16
# Without any window: the values shown black and white leave out this share of pixels at either end.
TAIL_SHARE = 0.005


def load_view(dataset: FileDataset, view_id: str, limits: ImageLimits, burned_in: BurnedInText | None) -> OpenedView:
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
    laterality = (text_of(dataset, "ImageLaterality") or text_of(dataset, "Laterality")).upper()
    spacing = _spacing_mm(dataset)
    record = ViewRecord(
        id=view_id, height=pixels.shape[0], width=pixels.shape[1], bits=16 if pixels.dtype == np.uint16 else 8,
        view=view, laterality=_one_of(laterality, ("L", "R", "B")),
        body_part=term_of(text_of(dataset, "BodyPartExamined").upper()),
        spacing_mm=(spacing[1], spacing[0]) if spacing and turned else spacing, window=stored.window,
    )  # fmt: skip
    return OpenedView(image=EncodedImage(data=encode_grey(pixels), extension="png"), record=record)


def _one_of(value: str, options: tuple[Literal["L", "R", "B"], ...]) -> Literal["L", "R", "B"] | None:
    return next((option for option in options if option == value), None)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """`values` [rows, columns] uint8 or uint16, more is whiter; `window` (shown black, shown white) or None: all."""

    values: np.ndarray
    window: tuple[float, float] | None


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
        kind = np.uint8 if len(data) < 2 * count else np.dtype(">u2" if big_endian(dataset) else "<u2")
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
