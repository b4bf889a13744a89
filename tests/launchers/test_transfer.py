"""The transfer suite as a user runs it: on weights of others by path alone, kept, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.models.vision import VisionEncoder
from launchers import transfer
from shards.ingest.phantom_chest import ChestPhantom
from shards.writer import WriterConfig, write_shards
from tests.core.test_initialise import hugging_face_names, timm_names, vision


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    source = ChestPhantom(ChestPhantom.Config(train=24, validation=12, test=20, size=32))
    write_shards(source, str(folder), WriterConfig(shard_samples=40, workers=1))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same encoder in timm's, Hugging Face's and ECAMP's names."""
    folder = tmp_path_factory.mktemp("weights")
    config = VisionEncoder.Config(image_size=32, patch_size=8, width=64, depth=1, heads=1)
    timm = timm_names(vision(config, seed=1))
    save_file(timm, folder / "timm.safetensors")
    (folder / "hf").mkdir()
    save_file(hugging_face_names(timm, dinov2=False), folder / "hf" / "model.safetensors")
    (folder / "hf" / "config.json").write_text('{"num_attention_heads": 1, "layer_norm_eps": 1e-6}')
    torch.save({"model": timm | {"bert_encoder.x": torch.zeros(3)}, "epoch": 119}, folder / "ecamp.pth")
    return [f"timm={folder}/timm.safetensors", f"hf={folder}/hf", f"ecamp={folder}/ecamp.pth"]


def test_every_task_is_scored_kept_and_resumed(
    manifest: Path,
    weights: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = ["linear_probe", "fine_tune", "segmentation"]
    options = ["--encoder", *weights, "--random", "--data", str(manifest), "--output", str(tmp_path), "--device", "cpu"]
    options += ["--task", *tasks, "--percents", "50", "100", "--seeds", "2", "--steps", "2", "--replicates", "20"]
    options += ["--structures", "heart", "effusion", "--batch-size", "8"]
    assert transfer.main(options) == 0
    shown = capsys.readouterr()
    assert (
        "ecamp - timm" in shown.out
        and '"unexpected": ["bert_encoder.x"]' in shown.out
        and "by subgroup" in shown.out
        and '"missing": []' in shown.out
    )
    report = json.loads((tmp_path / "transfer.json").read_text())
    assert set(report["tasks"]) == set(tasks) and report["images"] == {"train": 24, "validation": 12, "test": 20}
    for percents in report["tasks"].values():
        for of in percents.values():
            assert set(of["figures"]) == {"timm", "hf", "ecamp", "random"}
            # One encoder in three dialects: it learns and scores the same.
            for name in ("hf", "ecamp"):
                assert of["differences"][name]["value"] == pytest.approx(0.0, abs=0.02)
    assert report["tasks"]["linear_probe"]["100"]["seeds"] == 1 and report["tasks"]["fine_tune"]["100"]["seeds"] == 2
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "transfer/segmentation/random_at_50" in events.Tags()["scalars"]

    def again(*arguments: object, **more: object) -> None:
        raise AssertionError("it was learned before")

    monkeypatch.setattr(transfer, "learn", again)
    assert transfer.main(options) == 0
    assert json.loads((tmp_path / "transfer.json").read_text()) == report
    with pytest.raises(AssertionError, match="learned before"):
        transfer.main([*options, "--steps", "3"])


def test_a_damaged_file_of_what_was_learned_is_made_again(tmp_path: Path) -> None:
    kept = transfer.KeptOutputs(tmp_path)
    assert kept.of({"seed": 0}, lambda: {"dice": np.ones(9)})["dice"].sum() == 9
    assert kept.of({"seed": 0}, dict)["dice"].sum() == 9
    (path,) = tmp_path.iterdir()
    for damaged in (b"", path.read_bytes()[:60], path.read_bytes().replace(b"PK\x01", b"PK\x07"), b"\x93NUMPY"):
        path.write_bytes(damaged)
        assert kept.of({"seed": 0}, lambda: {"dice": np.zeros(9)})["dice"].sum() == 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--task", "segmentation"], 2, "segmentation needs --structures"),
        (["--percents", "0"], 2, "shares lie above 0"),
        (["--steps", "0"], 2, "--steps 0 is below 1"),
        (["--task", "study_fine_tune", "--with-sex"], 2, "of --task study_probe alone"),
        (["--structures", "spleen", "--task", "segmentation"], 2, "do not know spleen"),
        (["--split", "exam"], 3, "split 'exam' has no shard"),
        (["--heads", "7"], 2, "says nothing of its heads"),
        (["--encoder", "nowhere.safetensors"], 2, "no such weights file"),
    ],
)
def test_bad_arguments_are_one_line(
    change: list[str], code: int, message: str, manifest: Path, weights: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--encoder", weights[0], "--data", str(manifest), "--output", str(tmp_path), "--device", "cpu"]
    assert transfer.main([*options, *change]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_detection_is_scored_over_all_images(
    manifest: Path, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools")
    options = ["--encoder", *weights[:2], "--data", str(manifest), "--output", str(tmp_path), "--device", "cpu"]
    options += ["--task", "detection", "--percents", "100", "--seeds", "2", "--steps", "2", "--replicates", "5"]
    assert transfer.main(options) == 0
    assert "detection: mAP, 20 images" in capsys.readouterr().out
    of = json.loads((tmp_path / "transfer.json").read_text())["tasks"]["detection"]["100"]
    assert 0 <= of["figures"]["timm"]["value"] < 0.5
    assert of["differences"]["hf"]["value"] == pytest.approx(0.0, abs=0.02)
    assert transfer.main([*options, "--percents", "1", "100"]) == 2
    assert "draws them, no image has a box (18 of 24 training images have one)" in capsys.readouterr().err
