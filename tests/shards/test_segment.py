"""Masks by an installed model: a stand-in with a known answer is asked once a volume, and its version is recorded."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from launchers import pack
from shards.ingest.class_map import ANATOMY_IDS
from shards.manifest import Manifest
from shards.reader import read_samples
from shards.store import open_store
from shards.volume_codec import decode_labels

STAND_IN = """
from pathlib import Path
import nibabel, numpy
def totalsegmentator(input, output=None, task="total", quiet=False):
    calls = Path(__file__).with_name("calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + "x")
    hu = numpy.asanyarray(input.dataobj)
    if hu.max() > 2000:
        raise SystemExit(1)
    assert output is None and task == "total"
    return nibabel.Nifti1Image(numpy.where(hu > 0, 5, 0).astype(numpy.uint8), input.affine)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    (folder / "totalsegmentator").mkdir(parents=True)
    (folder / "totalsegmentator" / "__init__.py").write_text("")
    (folder / "totalsegmentator" / "python_api.py").write_text(STAND_IN)
    (folder / "TotalSegmentator-9.9.dist-info").mkdir()
    (folder / "TotalSegmentator-9.9.dist-info" / "METADATA").write_text("Name: TotalSegmentator\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder)
    return folder / "totalsegmentator" / "calls"


def volumes(folder: Path) -> np.ndarray:
    """Two patients, from the left; the second has metal, at which the stand-in gives up. Returns where tissue is."""
    folder.mkdir()
    hu = np.full((9, 8, 7), -900, np.int16)
    hu[2:5, 3:6, 1:4] = 50
    for name, top in (("a", 50), ("b", 3000)):
        hu[2, 3, 1] = top
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-1.0, 1.0, 2.0, 1.0])), folder / f"{name}.nii.gz")
    (folder / "t.csv").write_text("file,patient\na.nii.gz,1\nb.nii.gz,2\n")
    (folder / "mapping.toml").write_text('table = "t.csv"\n[columns]\nfile = "file"\npatient = "patient"\n')
    return (hu > 0).transpose(2, 1, 0)[:, :, ::-1]


def run(folder: Path, *more: str) -> int:
    places = ["--input", str(folder / "in"), "--output", str(folder / "out")]
    return pack.main(["--source", "nifti", *places, "--public", "--own-spacing", "--no-crop", *more])


def test_volumes_are_segmented_once(tmp_path: Path, model: Path) -> None:
    inside = volumes(tmp_path / "in")
    arguments = ("--segment", "totalsegmentator", "--fractions", "train=1")
    assert run(tmp_path, *arguments) == 0
    store = open_store(str(tmp_path / "out"))
    manifest = Manifest.from_bytes(store.get("manifest.json"))
    assert manifest.source == "nifti, masks by totalsegmentator 9.9" and manifest.masks == ANATOMY_IDS
    assert manifest.refused == {"segmentation failed": 1}
    (sample,) = read_samples(store, manifest, manifest.shards[0])
    np.testing.assert_array_equal(decode_labels(sample.masks["0", 0].parts) == ANATOMY_IDS["liver"], inside)
    assert sample.record.provenance["view 0 masks"] == "totalsegmentator 9.9"
    assert run(tmp_path, *arguments, "--overwrite") == 0
    assert model.read_text() == "xxx"  # the volume that failed is asked for again


def test_a_missing_model_names_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volumes(tmp_path / "in")
    assert run(tmp_path, "--segment", "totalsegmentator") == 2
    assert "pip install TotalSegmentator" in capsys.readouterr().err.replace("\n", " ")
