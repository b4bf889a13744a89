"""DICOM series as volumes: HU and places exact, slices in any order of files, faults of a series named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pack_bits
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from shards.batch import Sample
from shards.ingest.class_map import ANATOMY_IDS
from shards.ingest.dicom import DicomRadiographs
from shards.ingest.dicom_ct import CtSeries
from shards.ingest.dicom_masks import inside
from shards.ingest.volume_file import VolumeOptions, VolumeReader
from shards.volume_codec import decode_labels, decode_volume

SECRET = b"a secret of a test, 32 bytes long"
ROOT_UID = "1.2.826.0.1.3680043.8.498."
OWN = VolumeReader(options=VolumeOptions(spacing_mm=None, crop=False))
DEPTH, ROWS, COLUMNS = 7, 18, 20
SPACING_MM = (2.5, 0.8, 0.7)  # slices, rows, columns


def body() -> np.ndarray:
    """HU [slice from the feet, row from the front, column from the patient's right]."""
    hu = np.full((DEPTH, ROWS, COLUMNS), -1000, np.int16)
    hu[:, 3:-3, 3:-3] = 40
    hu[2:, 5:9, 5:9] = -820
    return np.maximum(hu + np.random.default_rng(3).integers(-30, 30, hu.shape), -1020).astype(np.int16)


def write_slice(path: Path, number: int, hu: np.ndarray, **values: Any) -> None:
    """A slice of an axial series, from the front right corner; a value of None leaves the element out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    elements: dict[str, Any] = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": f"{ROOT_UID}9.{path.stem}.{number}", "Modality": "CT",
        "StudyInstanceUID": f"{ROOT_UID}1", "SeriesInstanceUID": f"{ROOT_UID}2", "PatientID": "MRN-1",
        "InstanceNumber": 100 - number, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "BodyPartExamined": "CHEST",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-7.0, -11.0, 50.0 + number * SPACING_MM[0]], "PixelSpacing": list(SPACING_MM[1:]),
        "SliceThickness": 3, "RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU",
    }  # fmt: skip
    elements |= values
    stored = (hu.astype(np.int64) - int(elements["RescaleIntercept"] or 0)).astype(np.uint16)
    elements |= {"Rows": hu.shape[0], "Columns": hu.shape[1], "PixelData": stored.tobytes()}
    for name, value in elements.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if path.suffix == ".rle":
        dataset.compress(RLELossless, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder: Path, hu: np.ndarray, skip: tuple[int, ...] = (), **values: Any) -> None:
    """`values` may be functions of the slice's number."""
    for number, image in enumerate(hu):
        if number not in skip:
            told = {name: value(number) if callable(value) else value for name, value in values.items()}
            write_slice(folder / f"{(number * 5) % 101}.dcm", number, image, **told)


def source(folder: Path, **options: Any) -> DicomRadiographs:
    return DicomRadiographs(folder=folder, secret=SECRET, modalities=("CT",), series=CtSeries(reader=OWN, **options))


def load(folder: Path, **options: Any) -> tuple[list[Sample], Counter[str]]:
    made = source(folder, **options)
    plan = made.plan()
    reasons = Counter(refusal.reason for refusal in plan.refusals)
    samples = []
    for item in plan.items:
        loaded = made.load(item)
        reasons.update(refusal.reason for refusal in loaded.refusals)
        samples += [loaded.sample] if loaded.sample else []
    return samples, reasons


def stored_volume(sample: Sample, view: int = 0) -> np.ndarray:
    return decode_volume(sample.images[view].parts)  # type: ignore[union-attr]


# Of the stored volume y grows to the front and x to the right: rows and columns of an axial slice are reversed.
def as_stored(hu: np.ndarray) -> np.ndarray:
    return hu[:, ::-1, ::-1]


def test_hu_order_and_spacing(tmp_path: Path) -> None:
    write_series(tmp_path, body())
    (sample,), reasons = load(tmp_path)
    assert not reasons
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))
    view = sample.record.views[0]
    assert (view.depth, view.height, view.width, view.body_part) == (DEPTH, ROWS, COLUMNS, "CHEST")
    assert view.spacing_mm == pytest.approx(SPACING_MM)
    assert sample.record.provenance["view 0 values"] == "rescaled"
    assert sample.record.provenance["view 0 slices"] == DEPTH


def test_hu_under_a_header_that_would_rescale_them_again(tmp_path: Path) -> None:
    for number, image in enumerate(body()):
        write_slice(tmp_path / f"{number}.dcm", number, image, PixelRepresentation=1, RescaleIntercept=0)
    (sample,), _ = load(tmp_path)
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))
    for path in tmp_path.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.RescaleIntercept = -1024
        dataset.save_as(path)
    (sample,), _ = load(tmp_path)
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))
    assert sample.record.provenance["view 0 values"] == "already rescaled"


def test_a_rescale_of_each_slice(tmp_path: Path) -> None:
    write_series(tmp_path, body(), RescaleIntercept=lambda number: -1024 - number)
    (sample,), _ = load(tmp_path)
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))


def test_other_directions_give_the_same_volume(tmp_path: Path) -> None:
    """The same patient in coronal slices, from the back to the front, rows from the head."""
    hu = as_stored(body()).transpose(1, 0, 2)[:, ::-1, ::-1]  # slices along y, rows downwards, columns from the right
    values = {
        "ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "PixelSpacing": [2.5, 0.7],
        "ImagePositionPatient": lambda number: [-7.0, 20.0 - 0.8 * number, 65.0],
    }  # fmt: skip
    write_series(tmp_path, hu, **values)
    (sample,), reasons = load(tmp_path)
    assert not reasons and sample.record.views[0].spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))


def test_gantry_tilt_is_resampled_upright(tmp_path: Path) -> None:
    """Tilted slices of a scene that only depends on height: upright, heights come back."""
    tilt = np.deg2rad(18)
    down = np.array([0.0, np.cos(tilt), -np.sin(tilt)])  # rows go down and to the feet
    heights = 50.0 + 2.5 * np.arange(12)[:, None] - np.sin(tilt) * 0.8 * np.arange(ROWS)
    hu = np.rint(np.repeat((heights * 10 - 900)[:, :, None], COLUMNS, 2)).astype(np.int16)
    write_series(
        tmp_path, hu, ImageOrientationPatient=[1, 0, 0, *down],
        ImagePositionPatient=lambda number: [-7.0, -11.0, 50.0 + 2.5 * number], GantryDetectorTilt=18,
    )  # fmt: skip
    (sample,), reasons = load(tmp_path)
    assert not reasons and sample.record.provenance["view 0 resampled"] is True
    volume = stored_volume(sample).astype(float)
    inside = volume > -1024
    middle = [np.unique(np.round(plane[mask])) for plane, mask in zip(volume, inside, strict=True) if mask.sum() > 100]
    assert len(middle) > 4
    assert all(np.ptp(values) <= 6 for values in middle[2:-2])  # 0.6 mm of 2.5


FAULTS: dict[str, dict[str, Any]] = {
    "missing slices: a gap in the series": {"skip": (3,)},
    "slices of different orientation in one series": {
        "ImageOrientationPatient": lambda number: [1, 0, 0, 0, 1, 0] if number < 3 else [1, 0, 0, 0, 0, -1]
    },
    "slices of different pixel spacing in one series": {
        "PixelSpacing": lambda number: [0.8, 0.7] if number else [0.8, 0.9]
    },
    "different slices in one place of a series": {
        "ImagePositionPatient": lambda number: [-7.0, -11.0, 50.0 + 2.5 * min(number, 5)]
    },
    "slices out of line": {
        "ImagePositionPatient": lambda number: [-7.0 + (3.0 if number == 3 else 0.0), -11.0, 50.0 + 2.5 * number]
    },
    "slice without position or orientation": {"ImagePositionPatient": None},
    "slice without pixel spacing": {"PixelSpacing": None},
    "values are no HU by RescaleType": {"RescaleType": "US"},
    "RescaleSlope is 0 or no number": {"RescaleSlope": 0},
    "localizer, no slice of a volume": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    "modality MR": {"Modality": "MR"},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_faults_of_a_series_are_named_for_each_file(tmp_path: Path, reason: str) -> None:
    write_series(tmp_path, body(), **FAULTS[reason])
    samples, reasons = load(tmp_path)
    assert not samples and reasons == {reason: len(list(tmp_path.iterdir()))}


def test_the_same_slice_twice_counts_once(tmp_path: Path) -> None:
    write_series(tmp_path, body())
    write_slice(tmp_path / "again.dcm", 4, body()[4], SOPInstanceUID=f"{ROOT_UID}77")
    write_slice(tmp_path / "file.dcm", 2, body()[2], SOPInstanceUID=f"{ROOT_UID}9.{(2 * 5) % 101}.2")
    (sample,), reasons = load(tmp_path)
    assert reasons == {"the same slice twice, left out once": 1, "the same DICOM instance twice": 1}
    np.testing.assert_array_equal(stored_volume(sample), as_stored(body()))


def test_series_of_a_study_are_views_and_a_bad_one_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path / "a", body())
    write_series(tmp_path / "b", body()[:4] + 1, SeriesInstanceUID=f"{ROOT_UID}3", SeriesNumber=2,
                 SOPInstanceUID=lambda number: f"{ROOT_UID}30.{number}")  # fmt: skip
    write_series(tmp_path / "c", body(), skip=(2,), SeriesInstanceUID=f"{ROOT_UID}4", SeriesNumber=3,
                 SOPInstanceUID=lambda number: f"{ROOT_UID}40.{number}")  # fmt: skip
    (sample,), reasons = load(tmp_path)
    assert reasons == {"missing slices: a gap in the series": DEPTH - 1}
    assert [view.depth for view in sample.record.views] == [DEPTH, 4]
    np.testing.assert_array_equal(stored_volume(sample, 1), as_stored(body()[:4] + 1))


def test_one_slice_and_one_of_unknown_thickness(tmp_path: Path) -> None:
    write_series(tmp_path / "a", body()[:1])
    (sample,), _ = load(tmp_path / "a")
    assert sample.record.views[0].spacing_mm == pytest.approx((3.0, 0.8, 0.7))
    write_series(tmp_path / "b", body()[:1], SliceThickness=None)
    assert load(tmp_path / "b") == ([], {"one slice of unknown thickness": 1})


def test_uneven_slices_are_made_even(tmp_path: Path) -> None:
    """HU that grow with height stay on their line; two zones of slices are no gap, too large a distance is."""
    z_mm = np.array([0.0, 2.0, 4.0, 6.0, 10.0, 14.0, 18.0])
    hu = np.rint(np.broadcast_to((z_mm * 20 - 300)[:, None, None], (7, ROWS, COLUMNS))).astype(np.int16)
    write_series(tmp_path / "a", hu, ImagePositionPatient=lambda number: [-7.0, -11.0, z_mm[number]])
    (sample,), reasons = load(tmp_path / "a")
    assert not reasons and sample.record.views[0].spacing_mm == pytest.approx((2.0, 0.8, 0.7))
    np.testing.assert_array_equal(stored_volume(sample)[:, 0, 0], np.arange(0, 20, 2) * 20 - 300)
    facts = sample.record.provenance
    assert facts["view 0 slices made even"] is True and facts["view 0 largest distance of slices"] == 4.0
    far = np.array([0.0, 2.0, 4.0, 6.0, 17.0, 28.0, 39.0])
    write_series(tmp_path / "b", hu, ImagePositionPatient=lambda number: [-7.0, -11.0, far[number]])
    assert load(tmp_path / "b") == ([], {"missing slices: a gap in the series": 7})


@pytest.mark.parametrize(
    ("there", "told_by"),
    [({"FrameOfReferenceUID": f"{ROOT_UID}8"}, "FrameOfReferenceUID"), ({}, "SeriesInstanceUID"), (None, "folder")],
)
def test_a_missing_study_is_told_by_what_there_is(tmp_path: Path, there: dict[str, str] | None, told_by: str) -> None:
    values: dict[str, Any] = {"SeriesInstanceUID": None} if there is None else there
    write_series(tmp_path / "visit of Ann", body(), StudyInstanceUID=None, **values)
    (sample,), reasons = load(tmp_path)
    assert reasons == {f"no StudyInstanceUID: study told by its {told_by}": 1}
    assert sample.record.provenance["study told by"] == told_by
    assert ROOT_UID not in str(sample.record) and "Ann" not in str(sample.record)


# --- SEG and RTSTRUCT ---

FRAME = f"{ROOT_UID}8"
POSITIONS = [[-7.0, -11.0, 50.0 + SPACING_MM[0] * number] for number in range(DEPTH)]


def nested(**values: Any) -> Dataset:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def write_object(path: Path, kind: str, elements: dict[str, Any]) -> None:
    dataset = nested(SOPClassUID=kind, SOPInstanceUID=f"{ROOT_UID}5.{len(path.name)}", PatientID="MRN-1", **elements)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_seg(
    path: Path, segments: dict[str, np.ndarray], code: str = "", series: str = f"{ROOT_UID}2", **values: Any
) -> None:
    """Segments [DEPTH, ROWS, COLUMNS] bool, or 0 to 255 for a fractional one; frames only where they are not empty."""
    frames, images = [], []
    for number, region in enumerate(segments.values(), start=1):
        for height in np.flatnonzero(region.any(axis=(1, 2))):
            images.append(region[height])
            which = nested(ReferencedSegmentNumber=number)
            where = nested(ImagePositionPatient=POSITIONS[height])
            frames.append(nested(SegmentIdentificationSequence=[which], PlanePositionSequence=[where]))
    fractional = images[0].dtype != bool
    pixels = np.stack(images).astype(np.uint8)
    bits = 8 if fractional else 1
    category = nested(CodeValue="123037004", CodingSchemeDesignator="SCT", CodeMeaning="Anatomical Structure")
    kind = nested(CodeValue=code or "0", CodingSchemeDesignator="SCT", CodeMeaning="?")
    elements = {
        "Modality": "SEG", "SegmentationType": "FRACTIONAL" if fractional else "BINARY", "Rows": ROWS,
        "Columns": COLUMNS, "NumberOfFrames": len(frames), "BitsAllocated": bits, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": 0, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "MaximumFractionalValue": 255, "FrameOfReferenceUID": FRAME,
        "ReferencedSeriesSequence": [nested(SeriesInstanceUID=series)], "PerFrameFunctionalGroupsSequence": frames,
        "SharedFunctionalGroupsSequence": [nested(
            PlaneOrientationSequence=[nested(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelMeasuresSequence=[nested(PixelSpacing=list(SPACING_MM[1:]))],
        )],
        "SegmentSequence": [
            nested(SegmentNumber=number, SegmentLabel=label, SegmentedPropertyCategoryCodeSequence=[category],
                   SegmentedPropertyTypeCodeSequence=[kind])
            for number, label in enumerate(segments, start=1)
        ],
        "PixelData": pixels.tobytes() if fractional else pack_bits(pixels),
    }  # fmt: skip
    write_object(path, SegmentationStorage, elements | values)


def write_contours(path: Path, regions: dict[str, list[np.ndarray]]) -> None:
    """Regions by name: closed contours [N, 3] mm."""
    series = nested(RTReferencedSeriesSequence=[nested(SeriesInstanceUID=f"{ROOT_UID}2")])
    elements = {
        "Modality": "RTSTRUCT",
        "ReferencedFrameOfReferenceSequence": [nested(FrameOfReferenceUID=FRAME, RTReferencedStudySequence=[series])],
        "StructureSetROISequence": [
            nested(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=FRAME)
            for number, name in enumerate(regions, start=1)
        ],
        "ROIContourSequence": [
            nested(ReferencedROINumber=number, ContourSequence=[
                nested(ContourGeometricType="CLOSED_PLANAR", ContourData=[round(x, 4) for x in points.ravel().tolist()])
                for points in contours
            ])
            for number, contours in enumerate(regions.values(), start=1)
        ],
    }  # fmt: skip
    write_object(path, RTStructureSetStorage, elements)


def mask_of(sample: Sample, anatomy: str) -> np.ndarray:
    maps = [decode_labels(parts.parts) for parts in sample.masks.values()]  # type: ignore[union-attr]
    return np.any([label_map == ANATOMY_IDS[anatomy] for label_map in maps], axis=0)


def test_segments_that_overlap_and_a_fractional_one(tmp_path: Path) -> None:
    write_series(tmp_path, body(), FrameOfReferenceUID=FRAME)
    generator = np.random.default_rng(5)
    lung, heart = np.zeros((2, DEPTH, ROWS, COLUMNS), bool)
    lung[1:4, 3:9, 4:11], heart[3:6, 5:12, 8:15] = True, True
    share = np.where(lung, generator.integers(1, 256, lung.shape), 0).astype(np.uint8)
    write_seg(tmp_path / "one.seg", {"Left Lung": lung, "Heart": heart})
    write_seg(tmp_path / "fractions.seg", {"a name nobody knows": share}, code="10200004")
    (sample,), reasons = load(tmp_path, mask_folder=tmp_path)
    assert not reasons and sample.record.views[0].mask_maps > 1
    for anatomy, region in {"lung": lung, "heart": heart, "liver": share >= 127.5}.items():
        np.testing.assert_array_equal(mask_of(sample, anatomy), as_stored(region), err_msg=anatomy)


def test_contours_with_a_hole_are_filled_to_the_analytic_shape(tmp_path: Path) -> None:
    write_series(tmp_path / "in", body(), FrameOfReferenceUID=FRAME)
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)

    def circle(radius: float, z: float) -> np.ndarray:
        return np.stack([radius * np.cos(angles), -4 + radius * np.sin(angles), np.full(400, z)], axis=1)

    heights = [POSITIONS[number][2] + 0.3 for number in (2, 3)]  # a little off the slices
    ring = [circle(radius, z) for z in heights for radius in (5.03, 2.02)]
    write_contours(tmp_path / "masks" / "rt", {"Liver": ring, "Heart": [circle(1.5, POSITIONS[4][2])]})
    (sample,), reasons = load(tmp_path / "in", mask_folder=tmp_path / "masks")
    assert not reasons
    y, x = np.meshgrid(-11 + 0.8 * np.arange(ROWS), -7 + 0.7 * np.arange(COLUMNS), indexing="ij")
    away = np.hypot(x, y + 4)
    sure = (np.abs(away - 5.03) > 0.01) & (np.abs(away - 2.02) > 0.01)  # the polygon lies within it
    expected = np.zeros((DEPTH, ROWS, COLUMNS), bool)
    expected[2:4] = (away < 5.03) & (away > 2.02)
    found = mask_of(sample, "liver")[:, ::-1, ::-1]
    np.testing.assert_array_equal(found[:, sure], expected[:, sure])
    assert found[2].sum() > 80 and sure.mean() > 0.95
    assert mask_of(sample, "heart").any(axis=(1, 2)).tolist() == [number == 4 for number in range(DEPTH)]


def test_polygons_agree_with_another_raster_and_share_no_pixel() -> None:
    generator = np.random.default_rng(1)
    centres = np.stack(np.meshgrid(np.arange(30), np.arange(40), indexing="ij"), -1).reshape(-1, 2)
    for _ in range(20):
        polygon = generator.uniform(-5, 40, (generator.integers(3, 9), 2))
        simple = polygon[np.argsort(np.arctan2(*(polygon - polygon.mean(0)).T))]
        expected = Outline(simple).contains_points(centres).reshape(30, 40)
        np.testing.assert_array_equal(inside([simple], (30, 40)), expected)
    left, right = (np.array([[2, a], [2, b], [9, b], [9, a]], float) for a, b in ((3, 7), (7, 12)))
    halves = inside([left], (15, 15)).astype(int) + inside([right], (15, 15))
    assert halves.max() == 1 and halves.sum() == 7 * 9


def test_objects_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    region = np.zeros((DEPTH, ROWS, COLUMNS), bool)
    region[2, 3:6, 3:6] = True
    write_series(tmp_path / "in", body(), FrameOfReferenceUID=FRAME)
    write_seg(tmp_path / "a" / "other", {"Liver": region}, series=f"{ROOT_UID}77")
    write_seg(tmp_path / "a" / "frame", {"Liver": region}, FrameOfReferenceUID=f"{ROOT_UID}66")
    write_seg(tmp_path / "a" / "unnamed", {"Liver": region}, ReferencedSeriesSequence=[])
    (sample,), reasons = load(tmp_path / "in", mask_folder=tmp_path / "a")
    assert not sample.masks and reasons == {
        "mask of a series that is not here": 1, "mask in another frame of reference than its series": 1,
        "mask that names no series": 1, "volume without a mask": 1,
    }  # fmt: skip
    write_seg(tmp_path / "b" / "name", {"Smith": region})
    assert load(tmp_path / "in", mask_folder=tmp_path / "b") == (
        [], {"structure unknown to the class map totalseg_v2": DEPTH}
    )  # fmt: skip
    write_contours(tmp_path / "c" / "far", {"Liver": [np.array([[0, 0, 99.0], [3, 0, 99.0], [0, 3, 99.0]])]})
    assert load(tmp_path / "in", mask_folder=tmp_path / "c")[1] == {"mask: contour outside of the slices": DEPTH}


def test_masks_by_series(tmp_path: Path) -> None:
    write_series(tmp_path / "in", body())
    labels = np.zeros((DEPTH, ROWS, COLUMNS), np.uint8)
    labels[2:5, 4:9, 6:12] = 5
    affine = np.diag([-0.7, -0.8, 2.5, 1.0])
    affine[:3, 3] = (7.0, 11.0, 50.0)
    (tmp_path / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), affine), tmp_path / "masks" / f"{ROOT_UID}2.nii.gz")
    (sample,), reasons = load(tmp_path / "in", mask_folder=tmp_path / "masks")
    assert not reasons
    found = decode_labels(sample.masks["0", 0].parts)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found == ANATOMY_IDS["liver"], as_stored(labels) == 5)


@pytest.mark.slow
def test_a_real_series_agrees_with_its_label_map(shared_data: Path) -> None:
    folder = shared_data / "ct_totalseg" / "example_ct_dicom"
    samples, reasons = load(folder)
    assert len(samples) == 1 and reasons == {"no StudyInstanceUID: study told by its FrameOfReferenceUID": 1}
    volume = stored_volume(samples[0])
    masks = nibabel.as_closest_canonical(nibabel.load(shared_data / "ct_totalseg" / "example_seg_dicom.nii.gz"))
    labels = np.asanyarray(masks.dataobj).transpose(2, 1, 0)
    assert volume.shape == labels.shape
    assert 60 < np.median(volume[labels == 5]) < 200  # liver


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["ct_misc/rt_utils", "ct_totalseg", "nifti_oddities", "dicom_oddities"])
def test_every_odd_file_gives_a_volume_or_a_named_reason(shared_data: Path, folder: str) -> None:
    samples, reasons = load(shared_data / folder)
    assert samples or reasons
    assert all(len(reason) < 90 for reason in reasons)
