"""NIfTI files -> volumes in HU: what a header may say and a file may hold, checked before a voxel is believed.

Only numbers leave a header: descriptions, file names and extensions, which may name a patient, are never read.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from shards.ingest.volume import AIR_HU, HU_MAX, HU_MIN, Array, Grid, VolumeRefusedError, turned

VOXELS_MAX = 2_000 * 1_024 * 1_024
ENDINGS = (".nii", ".nii.gz")

# Where air, lungs and fat, water, soft tissue lie. A CT shows a share of both or is cropped within the body.
_AIR_HU, _TISSUE_HU = (-1100, -800), (-150, 250)
_AIR_SHARE, _TISSUE_SHARE = 0.005, 0.02
_SAMPLE_VOXELS = 1_000_000

Rescale = tuple[float, float]  # slope, intercept


@dataclass(frozen=True, kw_only=True, eq=False)
class NiftiFile:
    """Voxels as stored, turned to (z, y, x), where they lie, and what the header would make of them."""

    stored: Array
    grid: Grid
    rescale: Rescale


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(ENDINGS)


def without_ending(name: str) -> str:
    """The name of a file without .nii or .nii.gz."""
    for ending in reversed(ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def read_nifti(path: Path) -> NiftiFile:
    """One file, NIfTI-1 or -2. Raises VolumeRefusedError with the reason."""
    if not is_nifti(path):
        raise VolumeRefusedError("not a NIfTI file: its name ends in neither .nii nor .nii.gz")
    try:
        if not path.stat().st_size:
            raise VolumeRefusedError("file has 0 bytes")
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise VolumeRefusedError("not a NIfTI file")
        affine = _affine(image)
        _check_shape(image.shape)
        if image.get_data_dtype().kind not in "iuf":
            raise VolumeRefusedError("voxels are not plain numbers")
        stored = np.asanyarray(image.dataobj.get_unscaled())
    except VolumeRefusedError:
        raise
    except FileNotFoundError:
        raise VolumeRefusedError("file missing") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise VolumeRefusedError("truncated or damaged file") from None
    except (ImageFileError, HeaderDataError):
        raise VolumeRefusedError("NIfTI header does not parse") from None
    except (OSError, ValueError):  # nibabel names too few bytes either way
        raise VolumeRefusedError("truncated or damaged file") from None
    stored, grid = turned(stored.reshape(_spatial(image.shape)), affine)
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        slope, intercept = 1.0, 0.0
    return NiftiFile(stored=stored, grid=grid, rescale=(float(slope), float(intercept)))


def _affine(image: nibabel.Nifti1Image) -> Array:
    """Index -> mm by sform, else qform. Raises VolumeRefusedError where neither is stated, or both and they differ."""
    (sform, s_code), (qform, q_code) = image.get_sform(coded=True), image.get_qform(coded=True)
    if not s_code and not q_code:
        raise VolumeRefusedError("orientation unknown: neither sform nor qform")
    if s_code and q_code and nibabel.aff2axcodes(sform) != nibabel.aff2axcodes(qform):
        raise VolumeRefusedError("sform and qform disagree")
    return np.asarray(sform if s_code else qform, dtype=np.float64)


def _spatial(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The three axes of space, with an axis of one for a single slice and without trailing ones."""
    i, j, k = (*shape, 1)[:3]
    return i, j, k


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) < 2 or 0 in shape:
        raise VolumeRefusedError("no voxels")
    if any(size != 1 for size in shape[3:]):
        raise VolumeRefusedError(f"{len(shape)}D volume")
    if np.prod(shape, dtype=np.float64) > VOXELS_MAX:
        raise VolumeRefusedError(f"more than {VOXELS_MAX} voxels")


# --- values ---

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
    sample = stored.ravel()[:: max(1, stored.size // _SAMPLE_VOXELS)].astype(np.float64)
    if looks_like_hu(sample * meant[0] + meant[1]):
        return meant, "rescaled"
    if looks_like_hu(sample):
        return plain, "already rescaled"
    if meant == header:  # no table speaks against the file
        return meant, "rescaled"
    raise VolumeRefusedError("HU or stored values: neither reading looks like CT")


def looks_like_hu(sample: Array) -> bool:
    """Whether some voxels are air or lung and some are soft tissue."""
    air, tissue = (np.mean((sample >= low) & (sample <= high)) for low, high in (_AIR_HU, _TISSUE_HU))
    return bool(air >= _AIR_SHARE and tissue >= _TISSUE_SHARE)
