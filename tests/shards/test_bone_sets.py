"""Public sets of bone radiographs: small folders of the same layout, made here, become studies with what is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launchers import pack
from shards.batch import Sample
from shards.errors import ConfigError
from shards.ingest import Refusal
from shards.ingest.bone_sets import BONE_SETS, bone_set
from shards.ingest.image_file import ImageLimits
from tests.shards.sources import encoded
from tests.shards.test_dicom import write


def place(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body if isinstance(body, bytes) else body.encode())
    return folder


def read(name: str, folder: Path) -> tuple[dict[str, tuple[Sample, str | None]], list[Refusal]]:
    """(first file -> (sample, split), refusals)."""
    source = bone_set(name, folder, ImageLimits(side_min=16), None)
    plan = source.plan()
    found, refusals = {}, list(plan.refusals)
    for item in plan.items:
        loaded = source.load(item)
        refusals += loaded.refusals
        if loaded.sample is not None:
            found[item.payload.views[0].file] = (loaded.sample, item.split)
    return found, refusals


def fracatlas(folder: Path) -> Path:
    header = (
        "image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique\n"
    )
    coco = {
        "images": [{"id": 7, "file_name": "IMG0000001.jpg", "width": 80, "height": 60}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 0, "bbox": [10, 5, 20, 15], "segmentation": []}],
    }
    return place(folder, {
        "dataset.csv": header + "IMG0000001.jpg,0,1,0,0,0,1,0,1,1,1,0,0\nIMG0000002.jpg,1,1,0,0,1,0,1,0,0,1,1,0\n"
        "IMG0000003.jpg,1,0,0,0,0,0,0,0,0,0,0,1\n",
        "images/Fractured/IMG0000001.jpg": encoded(1), "images/Non_fractured/IMG0000002.jpg": encoded(2),
        "Annotations/COCO JSON/COCO_fracture_masks.json": json.dumps(coco), "Annotations/VGG JSON/vgg.json": "{}",
    })  # fmt: skip


def grazpedwri(folder: Path) -> Path:
    header = (
        "filestem,patient_id,study_number,timehash,gender,age,laterality,projection,initial_exam,ao_classification,"
        "cast,diagnosis_uncertain,osteopenia,fracture_visible,metal,pixel_spacing,device_manufacturer\n"
    )
    return place(folder, {
        "dataset.csv": "\ufeff" + header + "0001_1_01_WRI-L1_M014,1,1,12,M,14.1,L,1,1,23r-M/2.1,,,,1,,0.144,Siemens\n"
        "0001_1_01_WRI-L2_M014,1,1,12,M,14.1,L,2,1,23r-M/2.1,1,,,,,0.144,Siemens\n"
        "0002_1_01_WRI-R1_F005,2,1,12,F,5.0,R,1,1,,,,,,,0.144,Siemens\n"
        "0002_1_01_WRI-L1_F005,2,1,12,F,5.0,L,1,1,,,,,1,,0.144,Siemens\n",
        "images_part1/0001_1_01_WRI-L1_M014.png": encoded(1, extension="png"),
        "images_part2/0001_1_01_WRI-L2_M014.png": encoded(2, extension="png"),
        "images_part2/0002_1_01_WRI-R1_F005.png": encoded(3, extension="png"),
        "images_part2/0002_1_01_WRI-L1_F005.png": encoded(4, extension="png"),
        "folder_structure/yolov5/labels/0001_1_01_WRI-L1_M014.txt": "3 0.5 0.5 0.25 0.5\n8 0.9 0.1 0.1 0.1\n",
    })  # fmt: skip


def mura(folder: Path) -> Path:
    one, two = "XR_WRIST/patient00001/study1_positive", "XR_ELBOW/patient09999/study1_negative"
    return place(folder, {
        "MURA-v1.1/train_image_paths.csv": f"MURA-v1.1/train/{one}/image1.png\nMURA-v1.1/train/{one}/image2.png\n",
        "MURA-v1.1/train_labeled_studies.csv": f"MURA-v1.1/train/{one}/,1\n",
        "MURA-v1.1/valid_image_paths.csv": f"MURA-v1.1/valid/{two}/image1.png\n",
        "MURA-v1.1/valid_labeled_studies.csv": f"MURA-v1.1/valid/{two}/,0\n",
        f"MURA-v1.1/train/{one}/image1.png": encoded(1, extension="png"),
        f"MURA-v1.1/train/{one}/image2.png": encoded(2, extension="png"),
        f"MURA-v1.1/valid/{two}/image1.png": encoded(3, extension="png"),
    })  # fmt: skip


def rsna_bone_age(folder: Path) -> Path:
    return place(folder, {
        "boneage-training-dataset.csv": "id,boneage,male\n1377,180,False\n1378,12,True\n",
        "boneage-training-dataset/1377.png": encoded(1, extension="png"),
        "boneage-training-dataset/1378.png": encoded(2, extension="png"),
        "Bone Age Validation Set/Validation Dataset.csv": "Image ID,male,Bone Age (months)\n1386,TRUE,30.5\n",
        "Bone Age Validation Set/boneage-validation-dataset-1/1386.png": encoded(3, extension="png"),
        "boneage-test-dataset.csv": "Case ID,Sex\n4360,M\n",
    })  # fmt: skip


def oai(folder: Path) -> Path:
    pixels = (np.arange(64 * 96).reshape(64, 96) % 4096).astype(np.uint16)
    knees, legs = "0.C.2/9000099/20050915/00112233", "1.E.1/9000099/20060915/00445566"
    for study in (knees, legs, "0.C.2/9000099/20050915/00777777"):
        write(folder / study / "001", pixels)
    return place(folder, {
        "contents.csv": "Folder,ParticipantID,StudyDate,Barcode,StudyDescription,SeriesDescription\n"
        f"{knees},9000099,20050915,1,OAI^X-Ray,Bilateral PA Fixed Flexion Knee\n"
        f"{legs},9000099,20060915,2,OAI^X-Ray,Bilateral AP Full Limb\n"
        "0.C.2/9000099/20050915/00777777,9000099,20050915,3,OAI^X-Ray,PA Right Hand\n",
        "X-Ray/kxr_sq_bu00.txt": "ID|SIDE|READPRJ|VERSION|V00XRKL|V00XRJSM\n9000099|1: Right|37|0.8|4: 4|1\n"
        "9000099|1: Right|15|0.8|2: 2|1\n9000099|2: Left|15|0.8|.: Missing|0\n9000100|2: Left|15|0.8|3: 3|0\n",
        "X-Ray/flxr_kneealign_duryea01.txt": "ID|SIDE|READPRJ|V01HKANGJD\n9000099|1|60|-3.5\n9000099|2|60|1.25\n",
    })  # fmt: skip


def test_fracatlas(tmp_path: Path) -> None:
    found, refusals = read("fracatlas", fracatlas(tmp_path))
    sample, split = found["images/Fractured/IMG0000001.jpg"]
    view, box = sample.record.views[0], sample.record.boxes[0]
    assert sample.record.labels == {"fracture": 1, "implant": 1} and split is None
    assert (view.body_part, view.view) == ("LEG", "AP")
    assert (box.label, box.left, box.top, box.width, box.height) == ("fracture", 10, 5, 20, 15)
    other = found["images/Non_fractured/IMG0000002.jpg"][0].record
    assert other.labels["fracture"] == 0 and other.views[0].body_part is other.views[0].view is None  # of two each
    assert other.patient != sample.record.patient
    assert refusals == [Refusal("IMG0000003.jpg", "image missing")]


def test_grazpedwri(tmp_path: Path) -> None:
    found, refusals = read("grazpedwri", grazpedwri(tmp_path))
    assert refusals == [] and len(found) == 3
    record = found["images_part1/0001_1_01_WRI-L1_M014.png"][0].record
    assert record.labels == {"fracture": 1, "cast": 1, "implant": 0, "osteopenia": 0}  # of either view
    assert [(view.view, view.laterality, view.body_part) for view in record.views] == [
        ("AP", "L", "WRIST"), ("LATERAL", "L", "WRIST"),
    ]  # fmt: skip
    assert (record.sex, record.age_years) == ("M", 14.1)
    width, height = record.views[0].width, record.views[0].height
    fracture, text = record.boxes
    assert (fracture.label, text.label, fracture.view) == ("fracture", "text", "0")
    assert (fracture.left, fracture.top) == pytest.approx((0.375 * width, 0.25 * height))
    assert (fracture.width, fracture.height) == pytest.approx((0.25 * width, 0.5 * height))
    right, left = (found[f"images_part2/0002_1_01_WRI-{side}1_F005.png"][0].record for side in "RL")
    assert (right.labels["fracture"], left.labels["fracture"]) == (0, 1)  # two wrists at one visit
    assert right.patient == left.patient


@pytest.mark.parametrize("inside", [False, True])
def test_mura(tmp_path: Path, inside: bool) -> None:
    folder = mura(tmp_path)
    found, refusals = read("mura", folder / "MURA-v1.1" if inside else folder)
    assert refusals == [] and len(found) == 2
    studies = {split: sample for sample, split in found.values()}
    assert studies["train"].record.labels == {"anomaly": 1} and len(studies["train"].images) == 2
    assert studies["test"].record.labels == {"anomaly": 0} and studies["test"].record.views[0].body_part == "ELBOW"


def test_rsna_bone_age(tmp_path: Path) -> None:
    found, refusals = read("rsna_bone_age", rsna_bone_age(tmp_path))
    told = {
        Path(file).stem: (sample.record.sex, sample.record.measurements, split)
        for file, (sample, split) in found.items()
    }
    assert refusals == []
    assert told == {
        "1377": ("F", {"bone_age_months": 180.0}, "train"), "1378": ("M", {"bone_age_months": 12.0}, "train"),
        "1386": ("M", {"bone_age_months": 30.5}, "test"),
    }  # fmt: skip


def test_oai(tmp_path: Path) -> None:
    found, refusals = read("oai", oai(tmp_path))
    assert refusals == [] and len(found) == 2  # a hand is no film of this set
    knees, legs = (found[file][0].record for file in sorted(found))
    assert knees.measurements == {"kl_grade_right": 2.0}  # by the reading of the whole cohort; nobody read the left
    assert legs.measurements == {"hip_knee_ankle_degrees_right": -3.5, "hip_knee_ankle_degrees_left": 1.25}
    assert knees.patient == legs.patient and knees.views[0].body_part == "KNEE" and knees.views[0].laterality == "B"
    assert (knees.views[0].height, knees.views[0].width, knees.views[0].bits) == (64, 96, 16)


MAKERS = {
    "fracatlas": fracatlas, "grazpedwri": grazpedwri, "mura": mura, "rsna_bone_age": rsna_bone_age, "oai": oai,
}  # fmt: skip


@pytest.mark.parametrize("name", BONE_SETS)
def test_a_folder_of_something_else_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"--input .*give the folder|no table with columns"):
        list(bone_set(name, place(tmp_path, {"a/b.jpg": encoded(1)}), ImageLimits(), None).plan().items)
    out = str(tmp_path / "out")
    assert pack.main(["--source", name, "--public", "--input", str(tmp_path / "absent"), "--output", out]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["3 0.5 0.5", "9 0.5 0.5 0.1 0.1", "3 a b c d", "-1 0.5 0.5 0.1 0.1", "² 1 1 1 1", " "]
)
def test_damaged_boxes_of_yolo_stop(tmp_path: Path, line: str) -> None:
    folder = grazpedwri(tmp_path)
    (folder / "folder_structure/yolov5/labels/0001_1_01_WRI-L1_M014.txt").write_text(f"{line}\n")
    with pytest.raises(ConfigError, match="is no box of YOLO"):
        bone_set("grazpedwri", folder, ImageLimits(), None).plan()


@pytest.mark.parametrize(
    "body",
    [
        "{cut o", '{"images": [{"id": 7}], "annotations": []}',
        '{"images": [], "annotations": [{"image_id": 7, "bbox": [1, 2, 3]}]}',
        '{"images": [], "annotations": [{"image_id": 7, "bbox": [1, 2, 3, "x"]}]}',
    ],
)  # fmt: skip
def test_damaged_boxes_of_coco_stop(tmp_path: Path, body: str) -> None:
    folder = place(fracatlas(tmp_path), {"Annotations/COCO JSON/COCO_fracture_masks.json": body})
    with pytest.raises(ConfigError, match="not boxes in COCO's form"):
        bone_set("fracatlas", folder, ImageLimits(), None).plan()


def test_a_set_packs_with_its_measurements(tmp_path: Path) -> None:
    folder = rsna_bone_age(tmp_path / "set")
    arguments = ["--source", "rsna_bone_age", "--public", "--input", str(folder), "--side-min", "16", "--workers", "1"]
    assert pack.main([*arguments, "--output", str(tmp_path / "shards")]) == 0
    body = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert body["fields"]["measurements"] == 3 and body["patients"] == {"test": 1, "train": 2}
