"""The readers of DICOM read no attribute that the header policy does not name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shards.reports.identity.header import MATCHED, OLDEST_AGE_YEARS, PASSES, age_years_of, sex_of

REPOSITORY = Path(__file__).resolve().parents[3]
READERS = {"text_of", "element_of", "number_of", "numbers_of", "items_of"}


def attributes(path: Path) -> set[str]:
    """Names of the attributes that a module asks a data set for."""
    tree = ast.parse(path.read_text("utf-8"))
    asked = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            asked |= {
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            name = node.left.value  # "Rows" in dataset
            asked |= {name} if isinstance(name, str) and name[:1].isupper() and name.isalnum() else set()
    return asked


def test_only_named_attributes_are_read() -> None:
    asked = {
        room: attributes(REPOSITORY / f"shards/ingest/{room}.py")
        for room in ("dicom", "dicom_file", "dicom_pixels", "dicom_ct", "dicom_slices", "dicom_masks")
    }
    assert {"PatientID", "PatientAge"} <= asked["dicom"] and "Modality" in asked["dicom_file"]
    assert {"ImagePositionPatient", "RescaleSlope"} <= asked["dicom_slices"] and "ROIName" in asked["dicom_masks"]
    assert set().union(*asked.values()) <= set(PASSES)
    matched = attributes(REPOSITORY / "shards/ingest/archive.py")
    assert "StudyDate" in matched and matched <= {*PASSES, *MATCHED}


def test_names_dates_and_institutions_have_no_entry() -> None:
    for name in ("PatientName", "PatientBirthDate", "StudyDate", "InstitutionName", "ReferringPhysicianName",
                 "StudyDescription", "AccessionNumber", "DeviceSerialNumber", "PatientComments"):  # fmt: skip
        assert name not in PASSES


@pytest.mark.parametrize(
    ("written", "years"), [("045Y", 45.0), ("018M", 1.5), ("099Y", OLDEST_AGE_YEARS), ("", None), ("12/03", None)]
)
def test_ages(written: str, years: float | None) -> None:
    assert age_years_of(written) == years


def test_sex_is_one_of_three_codes() -> None:
    assert [sex_of(written) for written in ("f", "M", "O", "Mme Durand", "")] == ["F", "M", "O", None, None]
