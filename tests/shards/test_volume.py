"""Volumes on their way into shards: orientation exact, resampling equal to SimpleITK's, crops, label maps."""

from __future__ import annotations

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from shards.ingest.volume import (
    Grid,
    VolumeRefusedError,
    anatomy_boxes,
    label_box,
    part_of,
    resample,
    stacked,
    target_grid,
    turned,
    with_margin,
)

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(range(3))
    for codes in itertools.product(*[("LR", "PA", "IS")[axis] for axis in order])
]


def numbered(shape: tuple[int, int, int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def rotation(degrees: float, axis: int) -> np.ndarray:
    angle = np.deg2rad(degrees)
    matrix = np.eye(3)
    first, second = [other for other in range(3) if other != axis]
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_becomes_the_one_of_nibabel(codes: str) -> None:
    upright = numbered((4, 5, 6))
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[:3, 3] = (-11.0, 7.0, 100.0)
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    stored = nibabel.Nifti1Image(
        nibabel.apply_orientation(upright, transform), affine @ inv_ornt_aff(transform, upright.shape)
    )
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    voxels, grid = turned(np.asanyarray(stored.dataobj), stored.affine)
    canonical = nibabel.as_closest_canonical(stored)
    np.testing.assert_array_equal(voxels, np.asanyarray(canonical.dataobj).transpose(2, 1, 0))
    np.testing.assert_array_equal(voxels, upright.transpose(2, 1, 0))
    assert grid.aligned
    np.testing.assert_allclose(grid.spacing_mm, (2.5, 0.8, 0.7), rtol=1e-12)
    np.testing.assert_allclose(grid.origin, canonical.affine[2::-1, 3], atol=1e-9)
    np.testing.assert_allclose(grid.origin, (100.0, 7.0, -11.0), atol=1e-9)


def test_orientations_are_48() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.diag([1.0, 1.0, 0.0, 1.0])])
def test_an_affine_without_three_axes_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(VolumeRefusedError, match="affine"):
        turned(numbered((3, 3, 3)), affine)


def as_itk(voxels: np.ndarray, grid: Grid) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(voxels)
    columns = grid.matrix[::-1, ::-1]
    spacing = np.linalg.norm(columns, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).ravel().tolist())
    image.SetOrigin(grid.origin[::-1].tolist())
    return image


def itk_resampled(voxels: np.ndarray, grid: Grid, target: Grid, *, nearest: bool, outside: float) -> np.ndarray:
    filtered = SimpleITK.Resample(
        as_itk(voxels, grid), as_itk(np.zeros(target.shape, np.uint8), target), SimpleITK.Transform(),
        SimpleITK.sitkNearestNeighbor if nearest else SimpleITK.sitkLinear, outside,
        SimpleITK.sitkUInt8 if nearest else SimpleITK.sitkFloat64,
    )  # fmt: skip
    return SimpleITK.GetArrayFromImage(filtered)


SKEW = {
    "upright": np.eye(3),
    "gantry tilt": np.array([[1.0, 0.21, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "oblique": rotation(20, 0) @ rotation(-12, 2),
}


@pytest.mark.parametrize("skew", SKEW)
@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (1.3, 2.1, 0.9), None])
def test_resampling_is_simpleitks(skew: str, spacing: tuple[float, float, float] | None) -> None:
    generator = np.random.default_rng(3)
    voxels = generator.integers(-1000, 1500, (17, 31, 26)).astype(np.int16)
    labels = generator.integers(0, 5, voxels.shape).astype(np.uint8)
    rotated = SKEW[skew] if skew != "gantry tilt" else rotation(0, 0)
    matrix = rotated @ np.diag([2.2, 0.93, 1.07])
    grid = Grid(shape=voxels.shape, matrix=matrix, origin=np.array([-40.0, 12.5, 3.0]))
    if skew == "gantry tilt":  # ITK knows no shear: there the tilted grid is compared with its own rotation-free form
        sheared = Grid(shape=voxels.shape, matrix=SKEW[skew] @ matrix, origin=grid.origin)
        assert not sheared.aligned
        target = target_grid(sheared, spacing)
        linear = resample(voxels, sheared, target, nearest=False, outside=-1024.0)
        assert_linear_at_places(voxels, sheared, target, linear)
        return
    assert grid.aligned == (skew == "upright")
    target = target_grid(grid, spacing)
    ours = resample(voxels, grid, target, nearest=False, outside=-1024.0)
    reference = itk_resampled(voxels, grid, target, nearest=False, outside=-1024.0)
    np.testing.assert_allclose(ours, reference, atol=2e-2)
    nearest = resample(labels, grid, target, nearest=True, outside=0)
    assert nearest.dtype == np.uint8
    different = nearest != itk_resampled(labels, grid, target, nearest=True, outside=0)
    np.testing.assert_array_equal(different & ~halfway(grid, target), False)
    if skew == "oblique":
        assert (ours == -1024.0).any()


def halfway(grid: Grid, target: Grid) -> np.ndarray:
    """Where a place lies between two voxels to the last bits: either is the nearest one."""
    places = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"))
    to_index = np.linalg.inv(grid.matrix)
    offset = to_index @ (target.origin - grid.origin)
    index = np.tensordot(to_index @ target.matrix, places, 1) + offset[:, None, None, None]
    return (np.abs(index - np.floor(index) - 0.5) < 1e-6).any(axis=0)


def assert_linear_at_places(voxels: np.ndarray, grid: Grid, target: Grid, values: np.ndarray) -> None:
    """Trilinear sums written out, at places well within the volume."""
    checked = 0
    for place in itertools.product(*[range(1, size, 3) for size in target.shape]):
        world = target.matrix @ np.array(place, dtype=float) + target.origin
        index = np.linalg.solve(grid.matrix, world - grid.origin)
        low = np.floor(index).astype(int)
        if (low < 0).any() or (low + 1 >= voxels.shape).any():
            continue
        part, total = index - low, 0.0
        for corner in itertools.product((0, 1), repeat=3):
            weight = np.prod(np.where(corner, part, 1 - part))
            total += weight * float(voxels[tuple(low + corner)])
        assert values[place] == pytest.approx(total, abs=2e-2)
        checked += 1
    assert checked > 50


def test_an_upright_grid_of_its_own_spacing_stays() -> None:
    grid = Grid(shape=(4, 5, 6), matrix=np.diag([3.0, 1.0, 1.0]), origin=np.array([1.0, 2.0, 3.0]))
    for target in (target_grid(grid, None), target_grid(grid, (3.0, 1.0, 1.0))):
        assert target.same_as(grid)


def test_a_part_of_a_grid_gives_the_part_of_the_values() -> None:
    voxels = numbered((9, 10, 11))
    grid = Grid(shape=voxels.shape, matrix=np.diag([2.0, 1.0, 1.0]), origin=np.zeros(3))
    target = target_grid(grid, (3.1, 1.7, 0.6))
    whole = resample(voxels, grid, target, nearest=False, outside=0)
    box = (1, 2, 3, 4, 5, 13)
    part = resample(voxels, grid, part_of(target, box), nearest=False, outside=0)
    np.testing.assert_allclose(part, whole[1:4, 2:5, 3:13], atol=1e-3)


def test_boxes_and_margins() -> None:
    first, second = np.zeros((20, 60, 60), np.uint8), np.zeros((20, 60, 60), np.uint8)
    first[8:10, 30:33, 40:41], second[9:12, 29:31, 5] = 3, 7
    assert label_box((first, second)) == (8, 29, 5, 12, 33, 41)
    assert anatomy_boxes((first, second), {"a": 3, "b": 7, "c": 9}) == {
        "a": (8, 30, 40, 10, 33, 41), "b": (9, 29, 5, 12, 31, 6),
    }  # fmt: skip
    assert with_margin((8, 29, 5, 12, 33, 41), first.shape) == (3, 9, 0, 17, 53, 60)
    assert label_box((np.zeros((2, 2, 2), np.uint8),)) is None


def test_overlapping_structures_keep_all_their_voxels() -> None:
    generator = np.random.default_rng(1)
    regions = [(label, generator.random((6, 7, 8)) < 0.4) for label in (1, 2, 3)] + [
        (1, generator.random((6, 7, 8)) < 0.2)
    ]
    maps = stacked(regions, (6, 7, 8))
    assert len(maps) > 1
    for label in (1, 2, 3):
        union = np.any([region for own, region in regions if own == label], axis=0)
        np.testing.assert_array_equal(np.any([label_map == label for label_map in maps], axis=0), union)
