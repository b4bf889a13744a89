"""NIfTI files to volumes: values exact, odd files refused by name, masks on the volume's grid, rescaled once."""

from __future__ import annotations

import gzip
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from shards.errors import ConfigError
from shards.ingest.class_map import ANATOMY_IDS, class_map
from shards.ingest.hounsfield import hounsfield
from shards.ingest.nifti import read_nifti
from shards.ingest.table import TableMapping, TableSource
from shards.ingest.volume import MARGIN_PIXELS, MARGIN_SLICES, VolumeRefusedError
from shards.ingest.volume_file import VolumeFiles, VolumeOptions, VolumeReader
from shards.manifest import Manifest
from shards.reader import read_samples
from shards.store import open_store
from shards.volume_codec import decode_labels, decode_volume
from shards.writer import WriterConfig, write_shards

OWN = VolumeOptions(spacing_mm=None, crop=False)
AFFINE = np.array([[0.8, 0, 0, -20], [0, 0.8, 0, 7], [0, 0, 2.5, 40], [0, 0, 0, 1.0]])


def body(shape: tuple[int, int, int] = (24, 22, 10)) -> np.ndarray:
    """[i, j, k] int16 HU: air around soft tissue with a lung in it."""
    generator = np.random.default_rng(7)
    hu = np.full(shape, -1000, np.int16)
    i, j, k = shape
    hu[i // 6 : -i // 6, j // 6 : -j // 6] = 40
    hu[i // 4 : i // 2, j // 4 : j // 2, k // 4 :] = -820
    return (hu + generator.integers(-30, 30, shape)).astype(np.int16)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def patch(path: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of a header in a .nii.gz."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


def oriented(voxels: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return nibabel.apply_orientation(voxels, transform), AFFINE @ inv_ornt_aff(transform, voxels.shape)


def refusal(path: Path, masks: Path | None = None, **options: Any) -> str:
    with pytest.raises(VolumeRefusedError) as caught:
        VolumeReader(options=VolumeOptions(**({"spacing_mm": None, "crop": False} | options))).read(path, masks)
    return str(caught.value)


# --- values ---


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "AIR"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_hu_are_exact_without_resampling(tmp_path: Path, codes: str, ending: str) -> None:
    hu = body()
    voxels, affine = oriented(hu, codes)
    read = VolumeReader(options=OWN).read(save(tmp_path / f"a{ending}", voxels, affine))
    assert read.volume.hu.dtype == np.int16
    np.testing.assert_array_equal(read.volume.hu, hu.transpose(2, 1, 0))
    assert read.volume.spacing_mm == pytest.approx((2.5, 0.8, 0.8))
    assert read.provenance == {
        "values": "as stored", "voxels rounded": 0, "voxels not a number": 0, "resampled": False, "cropped": False,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_plain_type_of_voxel_is_read(tmp_path: Path, kind: type) -> None:
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(kind)
    read = VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", values))
    np.testing.assert_array_equal(read.volume.hu, values.transpose(2, 1, 0))


def test_a_files_own_scale_is_applied(tmp_path: Path) -> None:
    hu = body()
    stored = (hu.astype(np.int32) + 1024).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", stored)
    patch(path, 112, np.array([1.0, -1024.0], "<f4").tobytes())  # scl_slope, scl_inter
    read = VolumeReader(options=OWN).read(path)
    assert read.provenance["values"] == "rescaled"
    np.testing.assert_array_equal(read.volume.hu, hu.transpose(2, 1, 0))


def test_floats_are_rounded_and_counted_and_no_number_is_air(tmp_path: Path) -> None:
    values = body().astype(np.float32)
    values[0, 0, :3], values[1, 1, 0] = 10.4, np.nan
    read = VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", values))
    assert read.provenance["voxels rounded"] == 3 and read.provenance["voxels not a number"] == 1
    assert read.volume.hu[0, 0, 0] == 10 and read.volume.hu[0, 1, 1] == -1024


def test_low_hu_stay(tmp_path: Path) -> None:
    values = body()
    values[0] = -3600
    assert VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", values)).volume.hu.min() == -3600


@pytest.mark.parametrize(("shape", "depth"), [((6, 5, 1), 1), ((6, 5), 1), ((4, 4, 2000), 2000), ((6, 5, 3, 1), 3)])
def test_few_and_many_slices(tmp_path: Path, shape: tuple[int, ...], depth: int) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", values)
    assert VolumeReader(options=OWN).read(path).volume.hu.shape[0] == depth
    spaced = VolumeReader().read(path).volume
    assert spaced.hu.shape[0] == max(1, round(depth * 2.5 / 3)) and spaced.spacing_mm == (3.0, 1.0, 1.0)


def test_values_that_no_ct_in_hu_has_are_told(tmp_path: Path) -> None:
    magnetic = np.random.default_rng(0).integers(0, 800, (6, 5, 3)).astype(np.int16)
    read = VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", magnetic))
    assert read.notes == ("no value below 0 HU: no CT, or never rescaled",)
    twice = VolumeReader(options=OWN).read(save(tmp_path / "b.nii.gz", body() - np.int16(1024)))
    assert twice.notes == ("hardly any soft tissue by HU: shifted, or rescaled twice",)
    assert not VolumeReader(options=OWN).read(save(tmp_path / "c.nii.gz", body())).notes


# --- refused by name ---

BAD = {
    "infinite voxels": np.full((3, 3, 3), np.inf, np.float32),
    "no voxel is a number": np.full((3, 3, 3), np.nan, np.float32),
    "HU beyond 16 bits": np.full((3, 3, 3), 70_000, np.int32),
    "volume of one flat value": np.full((3, 3, 3), 5, np.int16),
    "4D volume": np.zeros((3, 3, 3, 2), np.int16),
    "voxels are not plain numbers": np.zeros((3, 3, 3), np.complex64),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_voxels_are_refused(tmp_path: Path, reason: str) -> None:
    assert refusal(save(tmp_path / "a.nii.gz", BAD[reason])) == reason


def test_bad_files_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.nii.gz", body()).read_bytes()
    cut, empty, text, other = (tmp_path / name for name in ("cut.nii.gz", "empty.nii.gz", "text.nii", "a.mgz"))
    empty.write_bytes(b""), text.write_bytes(b"no volume " * 60), other.write_bytes(b"x")
    for share in (0.1, 0.5, 0.98):
        cut.write_bytes(whole[: int(len(whole) * share)])
        assert refusal(cut) == "truncated or damaged file"
    cut.write_bytes(whole[:-3])  # all voxels are there, the checksum is not
    assert refusal(cut) == "truncated or damaged file"
    cut.write_bytes(gzip.compress(gzip.decompress(whole)[:-200]))
    assert refusal(cut) == "truncated or damaged file"
    assert refusal(empty) == "file has 0 bytes"
    assert refusal(text) in ("not a NIfTI file", "NIfTI header does not parse")
    assert refusal(other).startswith("not a NIfTI file")
    assert refusal(tmp_path / "none.nii.gz") == "file missing"


def test_voxels_that_fail_their_checksum_are_refused(tmp_path: Path) -> None:
    voxels = gzip.decompress(save(tmp_path / "whole.nii.gz", body()).read_bytes())
    stored = bytearray(gzip.compress(voxels, compresslevel=0))  # any changed bit is a changed voxel
    stored[len(stored) // 2] ^= 1
    path = tmp_path / "flipped.nii.gz"
    path.write_bytes(stored)
    assert refusal(path) == "truncated or damaged file"


def test_an_unknown_orientation_is_refused(tmp_path: Path) -> None:
    path = patch(save(tmp_path / "a.nii.gz", body()), 252, bytes(4))  # qform_code, sform_code
    assert refusal(path).startswith("orientation unknown")
    image = nibabel.Nifti1Image(body(), AFFINE)
    image.set_qform(np.diag([-0.8, 0.8, 2.5, 1.0]), 1)
    nibabel.save(image, tmp_path / "b.nii.gz")
    assert refusal(tmp_path / "b.nii.gz") == "sform and qform disagree"


# --- rescaled once ---


def test_what_needs_a_tables_rescale_gets_it() -> None:
    hu = body()
    found = hounsfield((hu + 1024).astype(np.int16), (1.0, 0.0), (1.0, -1024.0))
    assert found.how == "rescaled"
    np.testing.assert_array_equal(found.hu, hu)


@pytest.mark.parametrize("header", [(1.0, 0.0), (1.0, -1024.0), (1.0, -8192.0)])
@pytest.mark.parametrize("stated", [None, (1.0, -1024.0), (1.0, -8192.0)])
def test_hu_are_not_rescaled_again(header: tuple[float, float], stated: tuple[float, float] | None) -> None:
    """The mended release of CT-RATE holds HU; its table, or a header, still states the scanner's rescale."""
    hu = body()
    found = hounsfield(hu, header, stated)
    np.testing.assert_array_equal(found.hu, hu)
    assert found.how == ("as stored" if header == (1.0, 0.0) and stated is None else "already rescaled")


def test_a_tables_rescale_is_refused_where_values_do_not_tell() -> None:
    inside = np.random.default_rng(0).integers(20, 90, (5, 6, 7)).astype(np.int16)
    with pytest.raises(VolumeRefusedError, match="neither reading looks like CT"):
        hounsfield(inside, (1.0, 0.0), (1.0, -1024.0))


# --- masks ---


def labels_of(shape: tuple[int, int, int]) -> np.ndarray:
    stored = np.zeros(shape, np.uint8)
    stored[4:9, 5:9, 2:6], stored[10:14, 6:12, 3:8], stored[3:5, 10:12, 2:4] = 5, 51, 79  # liver, heart, spinal cord
    return stored


def test_mask_ids_are_exact_whatever_the_orientation(tmp_path: Path) -> None:
    hu = body()
    stored = labels_of(hu.shape)
    masks = save(tmp_path / "m.nii.gz", *oriented(stored, "LIP"))
    read = VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", *oriented(hu, "PSR")), masks)
    expected = class_map("totalseg_v2").table()[stored].transpose(2, 1, 0)
    np.testing.assert_array_equal(read.volume.label_maps[0], expected)
    assert set(np.unique(expected)) == {0, ANATOMY_IDS["liver"], ANATOMY_IDS["heart"]}
    assert read.provenance["class map"] == "totalseg_v2 1" and not read.notes


def test_a_folder_of_structures_keeps_overlaps(tmp_path: Path) -> None:
    hu = body()
    regions = {
        "lung_upper_lobe_left": (slice(2, 9),),
        "lung_lower_lobe_left": (slice(7, 12),),
        "heart": (slice(8, 14),),
    }
    for name, region in regions.items():
        structure = np.zeros(hu.shape, np.uint8)
        structure[region] = 1
        save(tmp_path / "masks" / f"{name}.nii.gz", structure)
    (tmp_path / "masks" / "statistics.json").write_text("{}")
    read = VolumeReader(options=OWN).read(save(tmp_path / "a.nii.gz", hu), tmp_path / "masks")
    assert len(read.volume.label_maps) == 2
    for anatomy, (first, last) in {"lung": (2, 12), "heart": (8, 14)}.items():
        found = np.any([label_map == ANATOMY_IDS[anatomy] for label_map in read.volume.label_maps], axis=0)
        assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == list(range(first, last))
        assert found[:, :, first:last].all()


def test_masks_of_another_grid_are_refused_or_resampled(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", body())
    coarse = np.zeros((12, 11, 5), np.uint8)
    coarse[2:6, 3:7, 1:4] = 5
    affine = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] += 0.5 * np.array([0.8, 0.8, 2.5])
    masks = save(tmp_path / "m.nii.gz", coarse, affine)
    assert refusal(path, masks) == "mask of another grid"
    read = VolumeReader(options=VolumeOptions(spacing_mm=None, crop=False, other_grid="resample")).read(path, masks)
    expected = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2).transpose(2, 1, 0)
    np.testing.assert_array_equal(read.volume.label_maps[0] == ANATOMY_IDS["liver"], expected == 5)


def test_empty_and_unknown_masks(tmp_path: Path) -> None:
    path, stored = save(tmp_path / "a.nii.gz", body()), labels_of((24, 22, 10))
    empty = VolumeReader().read(path, save(tmp_path / "empty.nii.gz", np.zeros_like(stored)))
    assert empty.notes == ("mask without any anatomy",) and not empty.provenance["cropped"]
    stored[0, 0, 0] = 118
    unknown = save(tmp_path / "unknown.nii.gz", stored)
    assert refusal(path, unknown) == "mask ids unknown to the class map totalseg_v2"
    read = VolumeReader(options=VolumeOptions(spacing_mm=None, crop=False, unknown_ids="drop")).read(path, unknown)
    assert read.notes == ("mask ids unknown to the class map totalseg_v2, left out",)
    assert read.volume.label_maps[0].max() == ANATOMY_IDS["liver"]
    assert refusal(path, save(tmp_path / "f.nii.gz", np.full((24, 22, 10), 0.5, np.float32))).startswith("mask: ")
    (tmp_path / "cut.nii.gz").write_bytes(path.read_bytes()[:-300])
    assert refusal(path, tmp_path / "cut.nii.gz") == "mask: truncated or damaged file"


def test_the_crop_leaves_the_margin(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (90, 80, 40)).astype(np.int16)
    stored = np.zeros(hu.shape, np.uint8)
    stored[40:50, 30:35, 20:22] = 5
    masks = save(tmp_path / "m.nii.gz", stored)
    read = VolumeReader(options=VolumeOptions(spacing_mm=None)).read(save(tmp_path / "a.nii.gz", hu), masks)
    assert read.volume.hu.shape == (2 + 2 * MARGIN_SLICES, 5 + 2 * MARGIN_PIXELS, 10 + 2 * MARGIN_PIXELS)
    np.testing.assert_array_equal(read.volume.hu, hu.transpose(2, 1, 0)[15:27, 10:55, 20:70])
    whole = VolumeReader(options=VolumeOptions(crop=False)).read(tmp_path / "a.nii.gz", masks).volume
    part = VolumeReader().read(tmp_path / "a.nii.gz", masks).volume
    z0, y0, x0 = (int(np.flatnonzero((whole.label_maps[0] > 0).any(axis=axes))[0]) for axes in ((1, 2), (0, 2), (0, 1)))
    corner = (z0 - MARGIN_SLICES, y0 - MARGIN_PIXELS, x0 - MARGIN_PIXELS)
    within = tuple(slice(first, first + size) for first, size in zip(corner, part.hu.shape, strict=True))
    assert np.abs(part.hu - whole.hu[within]).max() <= 1
    np.testing.assert_array_equal(part.label_maps[0], whole.label_maps[0][within])


# --- to shards and back ---

MAPPING = {
    "table": "t.csv", "columns": {"file": "file", "patient": "patient", "study": "study"},
    "report": {"findings": "findings"},
}  # fmt: skip


def test_volumes_go_to_shards_and_back(tmp_path: Path) -> None:
    hu = {name: body() + number for number, name in enumerate(("a", "b", "c"))}
    for name, voxels in hu.items():
        save(tmp_path / "in" / f"{name}.nii.gz", voxels)
        save(tmp_path / "masks" / f"{name}.nii.gz", labels_of(voxels.shape))
    (tmp_path / "masks" / "c.nii.gz").unlink()
    rows = [
        "a.nii.gz,p1,s1,The liver is normal.",
        "b.nii.gz,p1,s1,The liver is normal.",
        "c.nii.gz,p2,s2,",
        "d.nii.gz,p3,s3,x",
    ]
    (tmp_path / "in" / "t.csv").write_text("\n".join(["file,patient,study,findings", *rows]) + "\n")
    files = VolumeFiles(
        folder=tmp_path / "in", mask_folder=tmp_path / "masks", reader=VolumeReader(options=OWN), body_part="CHEST"
    )
    mapping = TableMapping.model_validate(MAPPING)
    source = TableSource(input=tmp_path / "in", mapping=mapping, files=files, deidentified="invented", name="nifti")
    manifest = write_shards(source, str(tmp_path / "out"), WriterConfig(fractions={"train": 1.0}))
    assert manifest.refused == {"file missing": 1} and manifest.noted == {"volume without a mask": 1}
    assert manifest.masks == ANATOMY_IDS and manifest.samples == 2
    store = open_store(str(tmp_path / "out"))
    samples = [sample for shard in manifest.shards for sample in read_samples(store, manifest, shard)]
    first = next(sample for sample in samples if len(sample.record.views) == 2)  # type: ignore[union-attr]
    for number, name in enumerate(("a", "b")):
        view = first.record.views[number]
        assert (view.depth, view.height, view.width, view.mask_maps, view.body_part) == (10, 22, 24, 1, "CHEST")
        assert set(view.anatomy_boxes) == {"liver", "heart"}
        np.testing.assert_array_equal(decode_volume(first.images[number].parts), hu[name].transpose(2, 1, 0))
        found = decode_labels(first.masks[str(number), 0].parts)
        z0, y0, x0, z1, y1, x1 = view.anatomy_boxes["heart"]
        assert (found[z0:z1, y0:y1, x0:x1] == ANATOMY_IDS["heart"]).sum() == 4 * 6 * 5
    assert first.record.provenance["view 1 values"] == "as stored"
    assert Manifest.from_bytes(store.get("manifest.json")).masks == ANATOMY_IDS


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--masks"):
        VolumeFiles(folder=tmp_path, mask_folder=tmp_path / "none")
    with pytest.raises(ConfigError, match="class_map"):
        VolumeFiles(folder=tmp_path, reader=VolumeReader(options=VolumeOptions(class_map="v9")))
    with pytest.raises(ConfigError, match="--spacing"):
        VolumeFiles(folder=tmp_path, reader=VolumeReader(options=VolumeOptions(spacing_mm=(0.0, 1.0, 1.0))))


# --- files of others ---


def outcome(path: Path, options: VolumeOptions) -> str:
    """ "volume" or the reason."""
    try:
        read = VolumeReader(options=options).read(path)
    except VolumeRefusedError as error:
        return str(error)
    canonical = nibabel.as_closest_canonical(nibabel.load(path))
    assert read.volume.hu.shape[::-1] == (*canonical.shape, 1)[:3] or read.provenance["resampled"]
    return "volume"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["ct_totalseg", "ct_misc", "nifti_oddities"])
def test_every_odd_file_packs_or_is_refused_by_name(shared_data: Path, folder: str) -> None:
    reasons: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(path for path in (shared_data / folder).rglob("*") if path.is_file()):
            reasons[outcome(path, OWN)] += 1
    assert reasons["volume"] >= {"ct_totalseg": 45, "ct_misc": 8, "nifti_oddities": 4}[folder]
    assert all(len(reason) < 80 and str(shared_data) not in reason for reason in reasons)


@pytest.mark.slow
def test_a_real_ct_and_its_label_map_are_exact(shared_data: Path) -> None:
    folder = shared_data / "ct_totalseg"
    read = VolumeReader(options=OWN).read(folder / "example_ct_sm.nii.gz", folder / "example_seg.nii.gz")
    ct, seg = (
        nibabel.as_closest_canonical(nibabel.load(folder / name))
        for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz")
    )
    np.testing.assert_array_equal(read.volume.hu, np.asanyarray(ct.dataobj).transpose(2, 1, 0))
    expected = class_map("totalseg_v2").table()[np.asanyarray(seg.dataobj)].transpose(2, 1, 0)
    np.testing.assert_array_equal(read.volume.label_maps[0], expected)
    structures = VolumeReader(options=OWN).read(folder / "example_ct_sm.nii.gz", folder / "example_seg_fast")
    assert len({int(label) for one in structures.volume.label_maps for label in np.unique(one)}) > 10
    assert read_nifti(folder / "example_ct.nii.gz").grid.aligned


def test_no_damage_of_a_header_gets_past_the_reasons(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.nii", body((6, 5, 4))).read_bytes()
    generator = np.random.default_rng(11)
    path, reasons = tmp_path / "a.nii", Counter[str]()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for _ in range(120):
            raw = bytearray(whole)
            for place in generator.integers(0, 352, generator.integers(1, 6)):
                raw[place] = generator.integers(256)
            path.write_bytes(raw)
            try:
                VolumeReader(options=VolumeOptions(crop=False)).read(path)
                reasons["volume"] += 1
            except VolumeRefusedError as refused:
                reasons[str(refused)] += 1
    assert reasons["volume"] > 20 and len(reasons) > 3
