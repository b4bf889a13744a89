"""DICOM radiographs: stored values, windows, orientation, transfer syntaxes, refusals; no header text leaks."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from shards.batch import Sample
from shards.errors import ConfigError
from shards.ingest.dicom import MODALITIES, DicomRadiographs
from shards.ingest.image_file import ImageLimits

SECRET = b"a secret of a test, 32 bytes long"
ROWS, COLUMNS = 40, 48
RNG = np.random.Generator(np.random.PCG64(7))
PIXELS_12 = RNG.integers(0, 4096, (ROWS, COLUMNS)).astype(np.uint16)
# Nothing of these may be found in a shard, a log line or a warning.
PRIVATE = {
    "PatientName": "Verheyen^Isolde", "PatientID": "MRN-4711-X", "PatientBirthDate": "19310203",
    "AccessionNumber": "ACC98765",
    "StudyDate": "20190817", "InstitutionName": "Sankt Nirgendwo", "ReferringPhysicianName": "Grau^Otto",
    "StudyDescription": "Thorax Verheyen", "PatientComments": "calls daily", "StationName": "ROOM42BUCKY",
    "ImageComments": "left by nurse Klee", "OperatorsName": "Klee^Ada",
}  # fmt: skip


def write(
    path: Path, pixels: np.ndarray | None = PIXELS_12, syntax: str = ExplicitVRLittleEndian, **values: Any
) -> Path:
    """A CR image of 12 bits unless `values` say otherwise; a value of None leaves the element out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elements: dict[str, Any] = {
        "SOPClassUID": ComputedRadiographyImageStorage, "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.78",
        "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.77", "Modality": "CR", "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
        "PixelRepresentation": 0, **PRIVATE,
    }  # fmt: skip
    if pixels is not None:
        elements |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "PixelData": pixels.tobytes()}
    for name, value in (elements | values).items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or ComputedRadiographyImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        if syntax == ExplicitVRBigEndian and "PixelData" in dataset:
            dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes() if pixels is not None else b""
            dataset["PixelData"].VR = "OW"
        dataset.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True, implicit_vr=syntax == ImplicitVRLittleEndian,
                    little_endian=syntax != ExplicitVRBigEndian)  # fmt: skip
    return path


def source(folder: Path, **options: Any) -> DicomRadiographs:
    return DicomRadiographs(folder=folder, **({"secret": SECRET} | options))


def only_sample(folder: Path, **options: Any) -> Sample:
    plan = source(folder, **options).plan()
    assert not plan.refusals
    (item,) = plan.items
    loaded = source(folder, **options).load(item)
    assert loaded.sample is not None, loaded.refusals
    assert not loaded.refusals
    return loaded.sample


def pixels_of(sample: Sample, view: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.images[view].data)))


def reasons(folder: Path, **options: Any) -> list[str]:
    made = source(folder, **options)
    plan = made.plan()
    refusals = list(plan.refusals)
    for item in plan.items:
        refusals += made.load(item).refusals
    return [refusal.reason for refusal in refusals]


def test_values_are_kept_and_the_window_moves_to_them(tmp_path: Path) -> None:
    write(tmp_path / "a", RescaleSlope=2, RescaleIntercept=-100, WindowCenter=2000.5, WindowWidth=2001)
    sample = only_sample(tmp_path)
    view = sample.record.views[0]
    assert (pixels_of(sample) == PIXELS_12).all()
    assert (view.height, view.width, view.bits) == (ROWS, COLUMNS, 16)
    assert view.window == ((1000 + 100) / 2, (3000 + 100) / 2)


def test_monochrome1_is_inverted_with_its_window(tmp_path: Path) -> None:
    write(tmp_path / "a", PhotometricInterpretation="MONOCHROME1", WindowCenter=1000.5, WindowWidth=1001)
    sample = only_sample(tmp_path)
    assert (pixels_of(sample) == 4095 - PIXELS_12).all()
    assert sample.record.views[0].window == (4095 - 1500, 4095 - 500)


def test_negative_slope_inverts_like_monochrome1(tmp_path: Path) -> None:
    write(tmp_path / "a", RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=1000.5, WindowWidth=1001)
    sample = only_sample(tmp_path)
    assert (pixels_of(sample) == 4095 - PIXELS_12).all()
    assert sample.record.views[0].window == (500, 1500)


def test_signed_values_are_shifted(tmp_path: Path) -> None:
    signed = (PIXELS_12.astype(np.int32) - 2048).astype(np.int16)
    write(tmp_path / "a", signed, PixelRepresentation=1, WindowCenter=0.5, WindowWidth=101)
    sample = only_sample(tmp_path)
    assert (pixels_of(sample) == PIXELS_12).all()
    assert sample.record.views[0].window == (2048 - 50, 2048 + 50)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "LINEAR_EXACT"}, (750, 1250)),
        ({"WindowCenter": [1000, 7], "WindowWidth": [501, 7]}, (749.5, 1249.5)),
        ({"WindowCenter": 1000, "WindowWidth": 0}, None),
        ({"WindowCenter": 1000}, None),
    ],
)
def test_windows(tmp_path: Path, values: dict[str, Any], window: tuple[float, float] | None) -> None:
    write(tmp_path / "a", **values)
    low, high = np.quantile(PIXELS_12, (0.005, 0.995))
    assert only_sample(tmp_path).record.views[0].window == pytest.approx(window or (low, high))


def test_eight_bits_stay_eight(tmp_path: Path) -> None:
    pixels = (PIXELS_12 >> 4).astype(np.uint8)
    write(tmp_path / "a", pixels, BitsAllocated=8, BitsStored=8, HighBit=7)
    sample = only_sample(tmp_path)
    assert pixels_of(sample).dtype == np.uint8
    assert (pixels_of(sample) == pixels).all()
    assert (sample.record.views[0].bits, sample.record.views[0].window) == (8, None)


def look_up_table(count: int, bits: int) -> Dataset:
    table = Dataset()
    table.LUTDescriptor = [count, 0, bits]
    table["LUTDescriptor"].VR = "US"
    table.LUTData = np.linspace(0, (1 << bits) - 1, count).astype(np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    return table


@pytest.mark.parametrize("name", ["VOILUTSequence", "ModalityLUTSequence"])
def test_tables_are_applied(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a", **{name: [look_up_table(4096, 10)]})
    expected = np.linspace(0, 1023, 4096).astype(np.uint16)[PIXELS_12]
    assert (pixels_of(only_sample(tmp_path)) == expected).all()


def test_window_wins_over_voi_table(tmp_path: Path) -> None:
    write(tmp_path / "a", VOILUTSequence=[look_up_table(4096, 10)], WindowCenter=1000.5, WindowWidth=1001)
    assert (pixels_of(only_sample(tmp_path)) == PIXELS_12).all()


def test_padding_is_black_and_outside_the_window(tmp_path: Path) -> None:
    pixels = np.maximum(PIXELS_12, 1)
    pixels[:, :10] = 0
    write(tmp_path / "a", pixels, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    sample = only_sample(tmp_path)
    assert (pixels_of(sample)[:, :10] == 0).all()
    assert (pixels_of(sample)[:, 10:] == 4095 - pixels[:, 10:]).all()
    low, high = np.quantile(pixels[:, 10:], (0.005, 0.995))
    assert sample.record.views[0].window == pytest.approx((4095 - high, 4095 - low))


def test_overlay_in_unused_bits_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a", PIXELS_12 | 0xF000)
    assert (pixels_of(only_sample(tmp_path)) == PIXELS_12).all()


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (["L", "F"], lambda upright: upright),
        (["R", "F"], lambda upright: upright[:, ::-1]),
        (["L", "H"], lambda upright: upright[::-1]),
        (["R", "H"], lambda upright: upright[::-1, ::-1]),
        (["F", "L"], lambda upright: upright.T),
        (["F", "R"], lambda upright: upright[:, ::-1].T),
        (["H", "L"], lambda upright: upright[::-1].T),
        (["H", "R"], lambda upright: upright[::-1, ::-1].T),
        (["LF", "FR"], lambda upright: upright),
        (["L", "R"], lambda upright: upright),  # makes no sense: left alone
        ("", lambda upright: upright),
    ],
)
def test_orientation(tmp_path: Path, orientation: Any, stored: Any) -> None:
    write(
        tmp_path / "a", np.ascontiguousarray(stored(PIXELS_12)), PatientOrientation=orientation,
        ViewPosition="PA", PixelSpacing=[0.1, 0.2],
    )  # fmt: skip
    sample = only_sample(tmp_path)
    view = sample.record.views[0]
    assert (pixels_of(sample) == PIXELS_12).all()
    turned = orientation[:1] in (["F"], ["H"])
    assert (view.height, view.width) == (ROWS, COLUMNS)
    assert view.spacing_mm == ((0.2, 0.1) if turned else (0.1, 0.2))


def test_lateral_faces_left(tmp_path: Path) -> None:
    write(tmp_path / "a", np.ascontiguousarray(PIXELS_12[:, ::-1]), PatientOrientation=["A", "F"], ViewPosition="LL")
    sample = only_sample(tmp_path)
    assert (pixels_of(sample) == PIXELS_12).all()
    assert sample.record.views[0].view == "LATERAL"


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian,
        RLELossless, JPEG2000Lossless, JPEGLSLossless,
    ],
)  # fmt: skip
def test_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    write(tmp_path / "a", syntax=syntax)
    assert (pixels_of(only_sample(tmp_path)) == PIXELS_12).all()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_without_preamble_and_meta_header(tmp_path: Path, syntax: str) -> None:
    path = write(tmp_path / "a", syntax=syntax)
    dataset = pydicom.dcmread(path)
    bare = tmp_path / "bare" / "a"
    bare.parent.mkdir()
    meta = dataset.file_meta
    del dataset.file_meta
    pydicom.dcmwrite(bare, dataset, implicit_vr=meta.TransferSyntaxUID == ImplicitVRLittleEndian,
                     little_endian=meta.TransferSyntaxUID != ExplicitVRBigEndian)  # fmt: skip
    assert (pixels_of(only_sample(bare.parent)) == PIXELS_12).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation YES: text in the pixels"),
        ({"NumberOfFrames": 3}, "several frames"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour image, RGB"),
        ({"PhotometricInterpretation": "YBR_FULL", "SamplesPerPixel": 3}, "colour image, YBR"),
        ({"PhotometricInterpretation": "Verheyen"}, "unknown kind of pixels"),
        ({"Modality": "CT"}, "modality CT"),
        ({"Modality": "VERHEYEN"}, "modality unknown"),
        ({"Modality": None}, "no modality"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}, "no radiograph: Basic Text SR Storage"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "DICOMDIR, an index of other files"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "raw image FOR PROCESSING; its presentation image is wanted"),
        ({"StudyInstanceUID": None}, "no StudyInstanceUID"),
        ({"PixelData": None}, "truncated: no pixel data"),
        ({"PixelData": b"\0" * 100}, "truncated: fewer pixels than rows x columns"),
        ({"PixelData": bytes(2 * ROWS * COLUMNS)}, "image of one flat value"),
        ({"Rows": 20}, "image side below 32 pixels"),
        ({"Rows": 20000, "Columns": 20000}, "image larger than 100000000 pixels"),
        ({"VOILUTSequence": [Dataset()]}, "broken look-up table"),
        ({"BitsStored": 1, "HighBit": 0}, "pixels of one bit"),
        ({"RescaleSlope": "0", "PixelRepresentation": 0, "Rows": None}, "image side below 32 pixels"),
    ],
)
def test_refusals(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    with pydicom.config.disable_value_validation():
        write(tmp_path / "a", **values)
    assert reasons(tmp_path) == [reason]


def test_files_that_are_no_dicom(tmp_path: Path) -> None:
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "note.txt").write_text("Verheyen was here")
    (tmp_path / "noise.dcm").write_bytes(bytes(128) + b"DICM" + RNG.bytes(300))
    whole = write(tmp_path / "whole.dcm").read_bytes()
    (tmp_path / "whole.dcm").unlink()
    (tmp_path / "half.dcm").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head.dcm").write_bytes(whole[:300])
    found = reasons(tmp_path)
    assert len(found) == 5
    assert "file has 0 bytes" in found
    assert "not a DICOM file" in found
    assert "truncated: fewer pixels than rows x columns" in found


def test_what_nobody_can_look_into_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/closed/a", "in/open/a", "out/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        write(tmp_path / name)
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    os.mkfifo(tmp_path / "in" / "pipe")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    plan = source(tmp_path / "in", secret=None).plan()
    assert len(plan.items) == 1
    unread = "folder that is a link, or may not be read"
    assert {(one.name, one.reason) for one in plan.refusals} == {
        ("closed", unread), ("linked", unread), ("gone", "file cannot be read"),
    }  # fmt: skip


def test_corrupt_compressed_pixels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", syntax=JPEG2000Lossless)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\x4f\xff\x51")
    data[at : at + 60] = bytes(60)
    path.write_bytes(bytes(data))
    assert reasons(tmp_path) == ["pixels do not decode: JPEG 2000 Image Compression (Lossless Only)"]


def test_studies_views_and_duplicates(tmp_path: Path) -> None:
    write(tmp_path / "s1" / "z", InstanceNumber=1, ViewPosition="PA", SOPInstanceUID="1.2.1")
    write(tmp_path / "s1" / "a", InstanceNumber=2, ViewPosition="LL", SOPInstanceUID="1.2.2", PixelSpacing=None,
          ImagerPixelSpacing=[0.14, 0.14], ImageLaterality="L", BodyPartExamined="CHEST")  # fmt: skip
    write(tmp_path / "copy" / "z", InstanceNumber=1, ViewPosition="PA", SOPInstanceUID="1.2.1")
    write(tmp_path / "other", StudyInstanceUID="1.2.9", SOPInstanceUID="1.2.3")
    made = source(tmp_path)
    plan = made.plan()
    assert [refusal.reason for refusal in plan.refusals] == ["the same DICOM instance twice"]
    assert len(plan.items) == 2
    assert len({item.patient for item in plan.items}) == 1
    sample = next(s for s in (made.load(item).sample for item in plan.items) if s and len(s.record.views) == 2)
    assert [view.view for view in sample.record.views] == ["PA", "LATERAL"]
    second = sample.record.views[1]
    assert (second.spacing_mm, second.laterality, second.body_part) == ((0.14, 0.14), "L", "CHEST")


def test_one_bad_view_does_not_cost_the_study(tmp_path: Path) -> None:
    write(tmp_path / "good", SOPInstanceUID="1.2.1")
    write(tmp_path / "bad", SOPInstanceUID="1.2.2", PixelData=b"\0" * 100)
    (item,) = source(tmp_path).plan().items
    loaded = source(tmp_path).load(item)
    assert loaded.sample is not None
    assert [view.id for view in loaded.sample.record.views] == ["0"]
    assert len(loaded.refusals) == 1


def test_study_of_two_patients_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", SOPInstanceUID="1.2.1", PatientID="one")
    write(tmp_path / "b", SOPInstanceUID="1.2.2", PatientID="two")
    assert reasons(tmp_path) == ["study of two patients"] * 2


def test_a_limb_in_words_passes_as_its_term(tmp_path: Path) -> None:
    write(tmp_path / "a", BodyPartExamined="GENOU DT KLEE", ImageLaterality="R")
    record = only_sample(tmp_path).record
    assert record.views[0].body_part == "KNEE" and "GENOU" not in record.model_dump_json()


def test_no_header_text_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    write(tmp_path / "Verheyen" / "MRN-4711-X.dcm", ViewPosition="VERHEYEN", BodyPartExamined="KLEE", PatientSex="F",
          PatientAge="093Y", ImageLaterality="K")  # fmt: skip
    write(tmp_path / "Verheyen" / "bad.dcm", Modality="VERHEYEN", SOPInstanceUID="1.2.3")
    with pydicom.config.disable_value_validation():  # what a careless device writes
        write(tmp_path / "Klee.dcm", StudyInstanceUID="1.2.Verheyen", StudyDate="Verheyen", PatientAge="KLEE",
              WindowCenter=None, SOPInstanceUID="1.2.4", Rows=None)  # fmt: skip
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = source(tmp_path)
        plan = made.plan()
        loaded = [made.load(item) for item in plan.items]
    sample = next(one.sample for one in loaded if one.sample)
    refusals = [*plan.refusals, *(refusal for one in loaded for refusal in one.refusals)]
    assert len(refusals) == 2
    said = sample.record.model_dump_json() + sample.key + repr(refusals) + repr(made) + caplog.text
    said += "".join(str(warning.message) for warning in caught) + "".join(capfd.readouterr())
    said = said.lower() + sample.images[0].data.decode("latin-1").lower()
    uids = ("1.2.826.0.1.3680043.8.498.77", "1.2.3", "1.2.4")
    for text in (*PRIVATE.values(), *uids, "verheyen", "klee", "isolde", str(SECRET), str(tmp_path).lower() + "/v"):
        assert text.lower() not in said, text
    assert (sample.record.age_years, sample.record.sex) == (90, "F")
    assert (sample.record.views[0].view, sample.record.views[0].laterality) == (None, None)


def test_keys_depend_on_the_secret(tmp_path: Path) -> None:
    write(tmp_path / "a")
    first, second, public = (source(tmp_path, secret=secret) for secret in (SECRET, b"another secret of 16 B", None))
    assert len({made.plan().items[0].key for made in (first, second, public)}) == 3
    assert first.key_fingerprint != second.key_fingerprint
    assert public.key_fingerprint is None


def test_reports_from_a_table(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a")
    table = tmp_path / "reports.csv"
    table.write_text('study,findings,impression\n1.2.826.0.1.3680043.8.498.77,"Clear lungs.",\nelse,x,y\n')
    with pytest.raises(ConfigError, match="--deidentified"):
        source(tmp_path / "in", reports=table)
    sample = only_sample(tmp_path / "in", reports=table, deidentified="by hand")
    assert sample.record.report == {"findings": "Clear lungs."}
    assert sample.record.deidentifier == "dicom headers dropped 2; text: by hand"
    table.write_text("uid,text\n1,2\n")
    with pytest.raises(ConfigError, match="needs a column study"):
        source(tmp_path / "in", reports=table, deidentified="by hand").plan()
    table.write_bytes(b"study,findings\n1,\xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        source(tmp_path / "in", reports=table, deidentified="by hand").plan()
    with pytest.raises(ConfigError, match="No such file"):
        source(tmp_path / "in", reports=tmp_path / "none.csv", deidentified="by hand").plan()


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        source(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no file"):
        source(tmp_path).plan()
    with pytest.raises(ConfigError, match="modalities=XRAY"):
        source(tmp_path, modalities=("XRAY",))


@pytest.mark.parametrize("modalities", [("CR", "DX", "DR"), MODALITIES])
@pytest.mark.parametrize("name", ["dicom_oddities", "raw_image_formats"])
def test_every_odd_file_ends_as_a_view_or_a_named_refusal(
    shared_data: Path, name: str, modalities: tuple[str, ...]
) -> None:
    folder = shared_data / name
    made = source(folder, secret=None, modalities=modalities, limits=ImageLimits(side_min=8))
    plan = made.plan()
    refusals, views = list(plan.refusals), 0
    for item in plan.items:
        loaded = made.load(item)
        refusals += loaded.refusals
        views += len(loaded.sample.record.views) if loaded.sample else 0
    assert views + len(refusals) == sum(path.is_file() for path in folder.rglob("*"))
    assert len(Counter(refusal.reason for refusal in refusals)) <= 25
    if name == "dicom_oddities":
        assert views == (4 if modalities == ("CR", "DX", "DR") else 38)


def test_real_monochrome_pair_comes_out_equal(shared_data: Path, tmp_path: Path) -> None:
    pixels = []
    for path in sorted((shared_data / "dicom_oddities" / "cxr_mono1_mono2").iterdir()):
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / "a").write_bytes(path.read_bytes())
        pixels.append(pixels_of(only_sample(folder)).astype(int))
    assert (pixels[0] == 255 - pixels[1]).all()  # the second was made by changing the header only
