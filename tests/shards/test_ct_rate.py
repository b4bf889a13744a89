"""CT-RATE's layout: studies with their reconstructions, tables joined by name, values rescaled once."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest

from shards.errors import ConfigError
from shards.ingest.ct_rate import ct_rate
from shards.ingest.table import TableSource
from shards.ingest.volume_file import VolumeFiles, VolumeOptions, VolumeReader
from shards.volume_codec import decode_volume

NAMES = ("train_1_a_1", "train_1_a_2", "train_1_b_1", "valid_2_a_1")
LABELS = ("Cardiomegaly", "Emphysema")


def body(number: int) -> np.ndarray:
    hu = np.full((20, 18, 8), -1000, np.int16)
    hu[3:-3, 3:-3] = 30 + number
    return hu


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Volumes hold HU, as the mended release does, and the table still states the scanner's rescale."""
    folder = tmp_path / "dataset"
    for number, name in enumerate(NAMES):
        patient, study = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
        path = folder / f"{name.split('_')[0]}_fixed" / patient / study / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(body(number), np.diag([1.0, 1.0, 1.0, 1.0])), path)
    volumes = [f"{name}.nii.gz" for name in NAMES]
    write(folder / "metadata" / "m.csv", [
        {"VolumeName": name, "PatientSex": "F", "PatientAge": "061Y", "RescaleSlope": 1, "RescaleIntercept": -1024.0,
         "XYSpacing": "[0.7, 0.7]", "ZSpacing": 1.5, "Manufacturer": "x"} for name in volumes
    ])  # fmt: skip
    write(folder / "radiology_text_reports" / "r.csv", [
        {"VolumeName": name, "ClinicalInformation_EN": "", "Technique_EN": "Without contrast.",
         "Findings_EN": "The heart is enlarged.", "Impressions_EN": "Cardiomegaly."} for name in volumes
    ])  # fmt: skip
    write(folder / "multi_abnormality_labels" / "l.csv", [
        {"VolumeName": name, "Cardiomegaly": 1, "Emphysema": 0} for name in volumes
    ])  # fmt: skip
    return folder


def source(folder: Path, **options: object) -> TableSource:
    reader = VolumeReader(options=VolumeOptions(spacing_mm=None))
    return ct_rate(folder, VolumeFiles(folder=folder, reader=reader), deidentified="public set", **options)


def test_studies_views_splits_and_tables(dataset: Path) -> None:
    found = source(dataset)
    plan = found.plan()
    assert not plan.refusals and found.labels == LABELS
    assert sorted((item.split, len(item.payload.views)) for item in plan.items) == [
        ("train", 1), ("train", 2), ("validation", 1),
    ]  # fmt: skip
    assert len({item.patient for item in plan.items}) == 2
    for item in plan.items:
        loaded = found.load(item)
        sample = loaded.sample
        assert sample is not None and not loaded.refusals
        assert sample.record.report == {
            "technique": "Without contrast.", "findings": "The heart is enlarged.", "impression": "Cardiomegaly.",
        }  # fmt: skip
        assert sample.record.labels == {"Cardiomegaly": 1, "Emphysema": 0}
        assert (sample.record.sex, sample.record.age_years) == ("F", 61.0)
        for view, image, told in zip(sample.record.views, sample.images, item.payload.views, strict=True):
            assert view.spacing_mm == pytest.approx((1.5, 0.7, 0.7))
            number = NAMES.index(Path(told.file).name.removesuffix(".nii.gz"))
            np.testing.assert_array_equal(decode_volume(image.parts), body(number).transpose(2, 1, 0))
            assert sample.record.provenance[f"view {view.id} values"] == "already rescaled"


def test_values_of_the_first_release_are_rescaled(dataset: Path) -> None:
    for path in dataset.rglob("*.nii.gz"):
        image = nibabel.load(path)
        stored = (np.asanyarray(image.dataobj) + 1024).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(stored, image.affine), path)
    found = source(dataset)
    sample = found.load(found.plan().items[0]).sample
    assert sample is not None and sample.record.provenance["view 0 values"] == "rescaled"
    assert decode_volume(sample.images[0].parts).min() == -1000


def test_volumes_without_any_table_are_refused_one_by_one(dataset: Path) -> None:
    for path in dataset.rglob("*.csv"):
        path.unlink()
    plan = source(dataset).plan()
    assert not plan.items and {refusal.reason for refusal in plan.refusals} == {"report empty and no label"}


def test_other_names_and_two_releases(dataset: Path) -> None:
    first = next(dataset.rglob("train_1_a_1.nii.gz"))
    (dataset / "scan.nii.gz").write_bytes(first.read_bytes())
    plan = source(dataset).plan()
    assert [(refusal.name, refusal.reason) for refusal in plan.refusals] == [("scan.nii.gz", "row without a patient")]
    second = dataset / "train" / first.name
    second.parent.mkdir()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=r"holds train_1_a_1\.nii\.gz twice"):
        source(dataset).plan()


def test_raw_text_needs_a_statement_or_the_pipeline(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="deidentified"):
        ct_rate(dataset, VolumeFiles(folder=dataset))
    with pytest.raises(ConfigError, match="no such folder"):
        ct_rate(dataset / "none", VolumeFiles(folder=dataset), deidentified="x")
