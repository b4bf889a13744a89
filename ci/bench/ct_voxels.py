"""Voxels of a real CT for the benchmarks of volumes, from ../shared/data/ct_totalseg; nothing of it is kept here."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from ci.bench.figure import REPOSITORY
from shards.errors import ConfigError

FOLDER = REPOSITORY.parent / "shared" / "data" / "ct_totalseg"


def real_slices() -> np.ndarray:
    """20 slices of 512 x 512 voxels, 3 x 0.98 x 0.98 mm: HU int16 [D, H, W]."""
    files = [pydicom.dcmread(path) for path in sorted(_existing("example_ct_dicom").iterdir())]
    files.sort(key=lambda file: float(file.ImagePositionPatient[2]))
    rescaled = [
        file.pixel_array.astype(np.int32) * int(file.RescaleSlope) + int(file.RescaleIntercept) for file in files
    ]
    return np.stack(rescaled).astype(np.int16)


def real_trunk() -> np.ndarray:
    """A whole trunk, 112 slices of 101 x 122 voxels of 3 mm: HU int16 [D, H, W]."""
    image = nib.load(_existing("example_ct.nii.gz"))
    assert isinstance(image, nib.Nifti1Image)
    return np.ascontiguousarray(np.asanyarray(image.dataobj).transpose(2, 1, 0)).astype(np.int16)


def full_size(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A volume of `shape` with the content and noise of the real slices: pieces of them, each from another place."""
    slices = real_slices()
    generator = np.random.default_rng(number)
    pieces = []
    for _ in range(-(-shape[0] // len(slices))):
        y, x = (int(generator.integers(0, 512 - side + 1)) for side in shape[1:])
        pieces.append(slices[:: generator.choice([-1, 1]), y : y + shape[1], x : x + shape[2]])
    return np.ascontiguousarray(np.concatenate(pieces)[: shape[0]])


def _existing(name: str) -> Path:
    path = FOLDER / name
    if not path.exists():
        raise ConfigError(f"{path} is missing; this benchmark reads real CT voxels from there")
    return path
