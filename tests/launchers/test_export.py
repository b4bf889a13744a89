from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs import tiny
from core.models import attention
from kernels.gaussian_similarity import sweep
from launchers import export
from launchers.export import load_exported
from launchers.past_run import open_run
from shards.errors import ConfigError, DataError
from shards.store import open_store
from tests.launchers.past_runs import STEP, make_run, pack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", pack(tmp_path_factory.mktemp("set")))


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "clip"
    assert export.main(["--run-dir", str(run_dir), "--output", str(folder)]) == 0
    return folder


def test_exported_encoders_embed_as_the_run_does(run_dir: Path, exported: Path) -> None:
    encoder = load_exported(exported)
    assert encoder.config.origin == {"task": "CLIP", "step": STEP, "recipe": "tiny:clip"}
    pixels = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["Left effusion.", "Normal chest, heart normal. " * 40, "The lungs are clear."]
    with open_run(str(run_dir), device=CPU) as run:
        index = torch.tensor([0, 0, 1, 2, 2])
        batch = {"pixel_values": pixels, "study_index": index, "valid": torch.ones(3, dtype=torch.bool)}
        assert torch.equal(encoder.embed_images(pixels, index), run.encoders.embed_images(batch))
        assert torch.equal(encoder.embed_texts(texts), run.encoders.embed_texts(*run.tokenizer.encode(texts, 48)))
    assert encoder.embed_images(pixels).shape == (5, 16) and encoder.embed_texts([]).shape == (0, 16)
    torch.testing.assert_close(encoder.embed_texts(texts).norm(dim=1), torch.ones(3))


def test_image_files_become_pixels_as_in_training(exported: Path, tmp_path: Path) -> None:
    grey = np.arange(64 * 64, dtype=np.float64).reshape(64, 64) / (64 * 64 - 1)
    Image.fromarray((grey * 255).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((grey * 65535).astype(np.uint16)).save(tmp_path / "b.png")
    encoder = load_exported(exported)
    pixels = encoder.read_images([tmp_path / "a.png", str(tmp_path / "b.png")])
    assert pixels.shape == (2, 1, 32, 32)
    torch.testing.assert_close(pixels[0], pixels[1], atol=0.03, rtol=0)  # 8 bits: steps of 0.016
    image = encoder.config.image
    assert abs(float(pixels[1].mean()) - (0.5 - image.mean) / image.std) < 0.02
    (tmp_path / "c.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"c\.png"):
        encoder.read_images([tmp_path / "c.png"])


def test_tokenizer_folder_is_readable_by_transformers(exported: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported / "tokenizer", local_files_only=True)
    ids, _ = load_exported(exported).tokenizer.encode(["Small left effusion."], 48)
    assert theirs("Small left effusion.")["input_ids"] == ids[0].tolist()


def test_folder_that_gives_other_embeddings_is_refused_and_removed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = export.save_file

    def slightly_off(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        saved({name: tensor * 1.01 for name, tensor in weights.items()}, path, metadata)

    monkeypatch.setattr(export, "save_file", slightly_off)
    assert export.main(["--run-dir", str(run_dir), "--output", str(tmp_path / "out")]) == 3
    assert "differ from the run's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_not_empty_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert export.main(["--run-dir", str(run_dir), "--output", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    assert export.main(["--run-dir", str(run_dir), "--output", str(tmp_path / "empty")]) == 0


def test_changed_and_incomplete_folders_are_named(exported: Path, tmp_path: Path) -> None:
    def spoilt(name: str) -> Path:
        shutil.copytree(exported, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        load_exported(tmp_path)
    folder = spoilt("weights")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors: sha256"):
        load_exported(folder)
    folder = spoilt("newer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"version": 9}))
    with pytest.raises(ConfigError, match="version 9, this program reads up to 1"):
        load_exported(folder)
    (folder / "config.json").write_text(json.dumps(config | {"embed_dim": "wide"}))
    with pytest.raises(ConfigError, match="embed_dim"):
        load_exported(folder)
    folder = spoilt("tokenizer")
    vocabulary = (folder / "tokenizer" / "tokenizer.json").read_text().replace('"effusion"', '"infusion"')
    (folder / "tokenizer" / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(ConfigError, match="is recorded"):
        load_exported(folder)


def test_a_run_is_opened_on_the_paths_that_its_recipe_names(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "plain")
    config = json.loads((run_dir / "config.json").read_text())
    config["engine"] |= {"attention": "sdpa", "kernel": "pytorch"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    found = []
    for folder in (tmp_path / "plain", run_dir):
        with open_run(str(folder), device=CPU):
            found.append((attention.choose("cpu", 8, False), sweep._only_pytorch))
    assert found == [("sdpa", True), ("matmul", False)]


def test_a_task_of_gaussian_encoders_is_refused_by_name(tmp_path: Path) -> None:
    run = MagicMock(task=tiny.dmlm().task.build(vocab_size=60))
    with pytest.raises(ConfigError, match="task DMLM: its Gaussian encoders cannot be exported yet; CLIP's and"):
        export.export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_bucket(bucket: str, run_dir: Path, exported: Path) -> None:
    assert export.main(["--run-dir", str(run_dir), "--output", f"{bucket}/out"]) == 0
    with open_store(f"{bucket}/out") as store:
        for path in sorted(path for path in exported.rglob("*") if path.is_file()):
            assert store.get(path.relative_to(exported).as_posix()) == path.read_bytes()
