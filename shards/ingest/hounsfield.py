"""Stored values -> HU, rescaled once, whatever a header or a table states beside values that are HU already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.ingest.volume import Array, VolumeRefusedError
from shards.volume_codec import AIR_HU, HU_MAX, HU_MIN

# Where air, lungs and fat, water, soft tissue lie. A CT shows a share of both or is cropped within the body.
_AIR_HU, _TISSUE_HU = (-1100, -800), (-150, 250)
_AIR_SHARE, _TISSUE_SHARE = 0.005, 0.02
_SAMPLE_VOXELS = 1_000_000

Rescale = tuple[float, float]  # slope, intercept
How = Literal["as stored", "rescaled", "already rescaled"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Hounsfield:
    """`hu` [D, H, W] int16; how it came from what was stored, and how many voxels were rounded or not a number."""

    hu: Array
    how: How
    rounded: int
    not_a_number: int


def hounsfield(stored: Array, header: Rescale, stated: Rescale | None = None) -> Hounsfield:
    """HU of stored values, rescaled once: `header` is the file's own rescale, `stated` that of a table beside it.

    Public sets hold HU under headers or tables that would rescale them again (CT-RATE's mended release). What is stated
    is taken where the values need it and left where they are HU already, by the shares of air and soft tissue. Voxels
    that are no number are air. Raises VolumeRefusedError where neither reading looks like CT although they differ, for
    infinite values, and for HU beyond 16 bits.
    """
    (slope, intercept), how = _rescale(stored, header, stated)
    not_a_number = rounded = 0
    if stored.dtype.kind == "f":
        missing = np.isnan(stored)
        not_a_number = int(missing.sum())
        if not_a_number == stored.size:
            raise VolumeRefusedError("no voxel is a number")
        if np.isinf(stored).any():
            raise VolumeRefusedError("infinite voxels")
    if slope == 1.0 and intercept == 0.0 and stored.dtype.kind in "iu":
        values: Array = stored
    else:
        values = stored.astype(np.float64 if stored.dtype.itemsize > 2 else np.float32)
        values *= slope
        values += intercept
        if not_a_number:
            values[missing] = AIR_HU
        whole = np.floor(values + 0.5)
        rounded = int((np.abs(values - whole) > 1e-3).sum())
        values = whole
    low, high = values.min(), values.max()
    if low < HU_MIN or high > HU_MAX:
        raise VolumeRefusedError("HU beyond 16 bits")
    if low == high:
        raise VolumeRefusedError("volume of one flat value")
    return Hounsfield(hu=values.astype(np.int16), how=how, rounded=rounded, not_a_number=not_a_number)


def _rescale(stored: Array, header: Rescale, stated: Rescale | None) -> tuple[Rescale, How]:
    """The rescale that gives HU. A file's own stands for integers that code HU, a table's may be spent already."""
    plain: Rescale = (1.0, 0.0)
    meant = header if stated in (None, plain) or header != plain else stated
    if meant == plain or meant is None:
        return plain, "as stored"
    sample = _sample(stored).astype(np.float64)
    if looks_like_hu(sample * meant[0] + meant[1]):
        return meant, "rescaled"
    if looks_like_hu(sample):
        return plain, "already rescaled"
    if meant == header:  # no table speaks against the file
        return meant, "rescaled"
    raise VolumeRefusedError("HU or stored values: neither reading looks like CT")


def doubts(hu: Array) -> list[str]:
    """Remarks on HU that are hardly those of a CT: stored values of one that was never rescaled, or rescaled twice."""
    if hu.min() >= 0:
        return ["no value below 0 HU: no CT, or never rescaled"]
    _, tissue = _shares(_sample(hu))
    return [] if tissue >= _TISSUE_SHARE else ["hardly any soft tissue by HU: shifted, or rescaled twice"]


def _sample(values: Array) -> Array:
    return values.ravel(order="K")[:: max(1, values.size // _SAMPLE_VOXELS)]  # as it lies in memory: no copy


def _shares(sample: Array) -> tuple[float, float]:
    """Of air or lung, and of soft tissue."""
    air, tissue = (float(np.mean((sample >= low) & (sample <= high))) for low, high in (_AIR_HU, _TISSUE_HU))
    return air, tissue


def looks_like_hu(sample: Array) -> bool:
    """Whether some voxels are air or lung and some are soft tissue."""
    air, tissue = _shares(sample)
    return air >= _AIR_SHARE and tissue >= _TISSUE_SHARE
