from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs import ct, tiny
from configs.schema import TrainConfig
from core.models import attention
from core.tasks.volume_clip import VolumeCLIP
from kernels.gaussian_similarity import sweep
from launchers import export
from launchers.export import ExportedEncoder, load_exported
from launchers.past_run import open_run
from launchers.transfer_data import open_encoder
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
    with pytest.raises(ConfigError, match="version 9, this program reads 2"):
        load_exported(folder)
    (folder / "config.json").write_text(json.dumps(config | {"text_length": "wide"}))
    with pytest.raises(ConfigError, match="text_length"):
        load_exported(folder)
    config["task"]["embed_dim"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json: task\.embed_dim"):
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


def export_of(config: TrainConfig, manifest: str, folder: Path) -> tuple[Path, ExportedEncoder]:
    """The run directory of weights that were never trained, and what was exported of it."""
    run_dir = make_run(folder / "run", Path(manifest), config)
    assert export.main(["--run-dir", str(run_dir), "--output", str(folder / "out")]) == 0
    return run_dir, load_exported(folder / "out")


def ct_small() -> TrainConfig:
    """ct:fvlm_tiny on 16 x 16 x 32 voxels, with a peer."""
    config = ct.fvlm_tiny()
    vision = replace(config.task.vision, volume_size=(16, 16, 32), width=32, heads=2)
    data = replace(config.data, volume=replace(config.data.volume, size=vision.volume_size))
    return replace(config, recipe="ct:fvlm_tiny", task=replace(config.task, vision=vision, soft="peer"), data=data)


def test_anatomies_of_volumes_embed_as_in_the_run(run_dir: Path, tmp_path: Path) -> None:
    config = ct_small()
    ct_run, encoder = export_of(config, json.loads((run_dir / "config.json").read_text())["data"]["train"], tmp_path)
    assert encoder.config.volume is not None and encoder.config.volume.size == (16, 16, 32)
    assert not any(name.startswith(("peer", "teacher")) for name in load_file(tmp_path / "out" / "model.safetensors"))
    anatomies = config.task.anatomies
    generator = np.random.default_rng(0)
    volumes = [generator.integers(-1000, 400, shape).astype(np.int16) for shape in ((20, 18, 40), (9, 16, 32))]
    labels = [np.zeros(volume.shape, np.uint8) for volume in volumes]
    labels[0][8:12, 6:10, 15:25] = 1
    labels[0][:, :2] = 2  # cut by the crop
    labels[1][4:6, 5:9, 5:20] = 3
    views = encoder.read_volumes(volumes, labels, {name: index + 1 for index, name in enumerate(anatomies)})
    low, high = config.data.volume.windows_hu[0]
    centre = torch.from_numpy(volumes[0][2:18, 1:17, 4:36].clip(low, high))
    torch.testing.assert_close(views["pixel_values"][0, 0], ((centre - low) / (high - low)).float(), rtol=0, atol=1e-6)
    assert views["anatomy_intact"].nonzero().tolist() == [[0, 0], [1, 2]]
    with open_run(str(ct_run), device=CPU) as run:
        batch = views | {"study_index": torch.arange(2), "valid": torch.ones(2, dtype=torch.bool)}
        theirs, present = run.task.embed_anatomies(batch)  # type: ignore[operator]
        assert torch.equal(
            encoder.embed_texts(["Clear."]), run.encoders.embed_texts(*run.tokenizer.encode(["Clear."], 64))
        )
    ours = encoder.embed_anatomies(**views)
    assert torch.equal(ours[0], theirs) and torch.equal(ours[1], present)
    torch.testing.assert_close(ours[0][present].norm(dim=1), torch.ones(2))

    ids = dict.fromkeys(anatomies[1:], 1)
    for wrong, said in (
        (lambda: encoder.read_volumes(volumes, labels, ids), f"ids lack {anatomies[0]}"),
        (lambda: encoder.read_volumes(volumes, labels[:1], ids), "1 label maps of 2 volumes"),
        (lambda: encoder.embed_images(views["pixel_values"]), "anatomy_intact and anatomy_share missing"),
        (lambda: encoder.read_images(["a.png"]), "encodes volumes; use read_volumes"),
    ):
        with pytest.raises(ConfigError, match=said):
            wrong()
    with pytest.raises(DataError, match=r"volume 0: .*not finite"):
        encoder.read_volumes([np.full((16, 16, 32), np.nan)])


@pytest.mark.slow
def test_whole_volumes_and_gaussian_encoders_are_exported_too(run_dir: Path, tmp_path: Path) -> None:
    manifest = json.loads((run_dir / "config.json").read_text())["data"]["train"]
    base = ct_small()
    clip = VolumeCLIP.Config(vision=base.task.vision, text=base.task.text, embed_dim=16)
    _, encoder = export_of(replace(base, recipe="ct:clip_tiny", task=clip), manifest, tmp_path / "clip")
    assert encoder.embed_images(**encoder.read_volumes([np.zeros((16, 16, 32), np.int16)])).shape == (1, 16)
    with pytest.raises(ConfigError, match="VolumeCLIP has no embed_anatomies"):
        encoder.embed_anatomies(torch.zeros(1, 2, 16, 16, 32))
    _, encoder = export_of(replace(tiny.dmlm(), recipe="tiny:dmlm"), manifest, tmp_path / "dmlm")
    found = encoder.distribution_of_images(torch.zeros(2, 1, 32, 32))
    assert found.logvar.shape == found.mean.shape == (2, tiny.dmlm().task.embed_dim)
    assert not any("fused" in name for name in load_file(tmp_path / "dmlm" / "out" / "model.safetensors"))


@pytest.mark.parametrize("recipe", ["ecamp", "clip"])
def test_image_encoders_go_to_timm_and_come_back(recipe: str, run_dir: Path, tmp_path: Path) -> None:
    run, out = run_dir, tmp_path / "timm"
    if recipe == "ecamp":
        manifest = Path(json.loads((run_dir / "config.json").read_text())["data"]["train"])
        run = make_run(tmp_path / "run", manifest, replace(tiny.ecamp(), recipe="tiny:ecamp"))
        assert export.main(["--run-dir", str(run), "--output", str(out)]) == 2
    assert export.main(["--run-dir", str(run), "--output", str(out), "--form", "timm"]) == 0
    ours, theirs = (open_encoder(str(path), device=CPU) for path in (run, out))
    assert theirs.source["missing"] == () == theirs.source["unexpected"]
    assert theirs.vision.config.heads == ours.vision.config.heads and theirs.decode.fit == ours.decode.fit
    size = ours.decode.image_size
    grey = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(0))
    features = [one.vision((grey - one.decode.mean) / one.decode.std) for one in (ours, theirs)]
    torch.testing.assert_close(features[1].tokens, features[0].tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features[1].pooled, features[0].pooled, atol=1e-4, rtol=1e-4)
    assert export.main(["--run-dir", str(run), "--output", str(out), "--form", "timm"]) == 2, "not empty"


def test_a_task_without_texts_is_refused_by_name(tmp_path: Path) -> None:
    run = MagicMock(task=ct.supervised_tiny().task.build())
    run.config = ct.supervised_tiny()
    with pytest.raises(ConfigError, match="task Supervised has no image and text encoder to export"):
        export.export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_bucket(bucket: str, run_dir: Path, exported: Path) -> None:
    assert export.main(["--run-dir", str(run_dir), "--output", f"{bucket}/out"]) == 0
    with open_store(f"{bucket}/out") as store:
        for path in sorted(path for path in exported.rglob("*") if path.is_file()):
            assert store.get(path.relative_to(exported).as_posix()) == path.read_bytes()
