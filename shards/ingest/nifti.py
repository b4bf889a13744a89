"""NIfTI files -> volumes in HU: what a header may say and a file may hold, checked before a voxel is believed.

Only numbers leave a header: descriptions, file names and extensions, which may name a patient, are never read.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import array_from_file

from shards.ingest.hounsfield import Rescale
from shards.ingest.volume import VOXELS_MAX, Array, Grid, VolumeRefusedError, turned

ENDINGS = (".nii", ".nii.gz")


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
        proxy = image.dataobj
        assert isinstance(proxy, ArrayProxy)  # of a file; only images made in memory hold arrays
        stored = _voxels(proxy, path)
    except VolumeRefusedError:
        raise
    except FileNotFoundError:
        raise VolumeRefusedError("file missing") from None
    except (ImageFileError, HeaderDataError):
        raise VolumeRefusedError("NIfTI header does not parse") from None
    except Exception:  # nibabel, gzip and mmap raise many kinds for broken files; all mean the same here
        raise VolumeRefusedError("truncated or damaged file") from None
    stored, grid = turned(stored.reshape(_spatial(image.shape)), affine)
    slope, intercept = proxy.slope, proxy.inter
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        slope, intercept = 1.0, 0.0
    return NiftiFile(stored=stored, grid=grid, rescale=(float(slope), float(intercept)))


def _voxels(proxy: ArrayProxy, path: Path) -> Array:
    """As stored. A gzip stream is read to its end, where its checksum stands: nibabel stops at the last voxel."""
    if not path.name.lower().endswith(".gz"):
        return np.asanyarray(proxy.get_unscaled())
    with gzip.open(path) as file:
        stored = array_from_file(proxy.shape, proxy.dtype, file, proxy.offset)
        while file.read(1 << 20):
            pass
    return np.asanyarray(stored)


def as_nifti(voxels: Array, grid: Grid) -> nibabel.Nifti1Image:
    """Voxels (z, y, x) as an image of nibabel."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = grid.matrix[::-1, ::-1], grid.origin[::-1]
    return nibabel.Nifti1Image(np.ascontiguousarray(voxels.transpose(2, 1, 0)), affine)


def save_nifti(image: nibabel.Nifti1Image, path: Path) -> None:
    """Label ids and their place, nothing else that an image may carry."""
    ids = np.asanyarray(image.dataobj).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(ids, image.affine), path)


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
