"""Study tasks as a user runs them: grades, bone age, angles and labels from views pooled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from core.models.vision import VisionEncoder
from launchers import transfer
from launchers.transfer_study_data import read_studies
from shards.decode import Decoder
from shards.ingest.phantom_bone import BonePhantom
from shards.writer import WriterConfig, write_shards
from tests.core.test_initialise import timm_names, vision


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bones")
    source = BonePhantom(BonePhantom.Config(train=60, validation=24, test=40, size=32))
    write_shards(source, str(folder), WriterConfig(shard_samples=70, workers=1))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def options(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    weights = tmp_path_factory.mktemp("weights") / "timm.safetensors"
    config = VisionEncoder.Config(image_size=32, patch_size=8, width=64, depth=1, heads=1)
    save_file(timm_names(vision(config, seed=1)), weights)
    return ["--encoder", f"ours={weights}", "--random", "--data", str(manifest), "--device", "cpu", "--seeds", "1",
            "--replicates", "20", "--steps", "2", "--batch-size", "8"]  # fmt: skip


def test_grades_numbers_and_labels_are_scored_by_study(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["kl_grade", "bone_age_months", "axis_angle_degrees", "fracture", "anomaly"]
    arguments = [*options, "--task", "study_probe", "study_fine_tune", "--percents", "10", "100", "--with-sex"]
    assert transfer.main([*arguments, "--targets", *targets, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "random - ours" in shown and "MAE, lower is better" in shown and "not known" in shown
    report = json.loads((tmp_path / "transfer.json").read_text())["tasks"]
    for task in ("study_probe", "study_fine_tune"):
        for target, figure in (
            ("kl_grade", "quadratic_kappa"), ("kl_grade", "accuracy"), ("kl_grade", "AUROC"),
            ("bone_age_months", "MAE"), ("axis_angle_degrees", "MAE"), ("fracture", "AUROC"), ("fracture", "AUPRC"),
            ("anomaly", "AUROC"),
        ):  # fmt: skip
            of = report[f"{task}/{target}/{figure}"]["100"]
            value = of["figures"]["ours"]["value"]
            assert value > 0 if figure == "MAE" else -1 <= value <= 1
            assert set(of["figures"]) == {"ours", "random"} and set(of["differences"]) == {"random"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "study tasks need --targets"),
        (["--targets", "kl"], "target 'kl': the data have no such label or measurement; there is fracture"),
        (["--targets", "fracture", "--limit", "1"], "target 'fracture': no AUROC in test of"),  # of one class
    ],
)
def test_bad_targets_are_one_line(
    change: list[str], message: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.main([*options, "--task", "study_probe", "--output", str(tmp_path), *change]) == 2
    assert message in capsys.readouterr().err


def test_all_views_of_a_study_are_read_in_order(manifest: Path) -> None:
    decode = Decoder.Config(image_size=32, threads=1)
    split = read_studies(str(manifest), "test", decode)
    assert len(split) == 40 and len(split.pixel_values) == len(split.study_index) > 40
    assert split.study_index.diff().min() >= 0 and set(split.study_index.tolist()) == set(range(40))
    assert set(split.measurements) == {"kl_grade", "bone_age_months", "axis_angle_degrees"}
    alone = read_studies(str(manifest), "test", decode, most_views=1, limit=5)
    assert len(alone) == len(alone.pixel_values) == 5
    assert (alone.pixel_values[0] == split.pixel_values[0]).all()
