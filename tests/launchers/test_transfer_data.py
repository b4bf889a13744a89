"""Encoders by path and images with their truth: what downstream tasks are given."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core.evaluation.classification import Features, fine_tune_at_share, probe_at_share
from core.evaluation.fitting import FitConfig
from core.evaluation.images import share_of_patients
from core.evaluation.probe import LinearProbe
from core.evaluation.segmentation import SegmentationConfig, dice_per_image, segment
from core.models.vision import VisionEncoder
from launchers.transfer_data import TransferEncoder, age_band, open_encoder, random_like, read_images
from shards.batch import Box
from shards.decode import Decoder
from shards.errors import BadSampleError, ConfigError
from shards.image_truth import Frame
from shards.ingest.phantom_chest import ChestPhantom
from shards.transforms import augment
from shards.writer import WriterConfig, write_shards
from tests.core.test_initialise import timm_names, vision
from tests.launchers.past_runs import make_run, pack

CONFIG = Decoder.Config(image_size=32)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    source = ChestPhantom(ChestPhantom.Config(train=32, validation=8, test=12, size=48))
    write_shards(source, str(folder), WriterConfig(shard_samples=32, workers=1))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TransferEncoder:
    encoder = vision(VisionEncoder.Config(image_size=32, patch_size=8, width=64, depth=2, heads=1), seed=1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm_names(encoder), path)
    return open_encoder(str(path), device=torch.device("cpu"))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_masks_and_boxes_lie_on_the_pixels(fit: str) -> None:
    image = np.zeros((40, 24))
    image[14:22, 6:12] = 200
    config = replace(CONFIG, image_size=24, fit=fit, mean=0.0, std=1.0)
    window, bits = np.array([[0.0, 255.0]], dtype=np.float32), np.array([8])
    shown = Decoder(config).decode([png(image)], augment.identity(1), window, bits)[0][0, 0].numpy()
    frame = Frame.of(40, 24, config)
    mask = frame.masks([png(np.where(image > 0, 3, 1))], [3, 7])
    assert not mask[1].any() and np.mean(mask[0] != (shown > 0.39)) < 0.03
    box = frame.box(Box(view="0", label="x", left=6, top=14, width=6, height=8))
    assert not isinstance(box, str)
    left, top, right, bottom = (round(side) for side in box)
    assert mask[0][top:bottom, left:right].all() and mask[0].sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize("shape", [(20, 12), (24, 40), (40, 24, 3)])
def test_a_label_map_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadSampleError, match="label map: not of its image's size, or not of one channel"):
        Frame.of(40, 24, CONFIG).masks([png(np.ones(shape))], [1])


@pytest.mark.parametrize(
    ("sides", "why"),
    [
        ((6, 6, 0, 5), "box: empty"),
        ((6, float("nan"), 4, 5), "box: empty"),
        ((20, 6, 5, 5), "box: outside the image"),
        ((-3, 6, 5, 5), "box: outside the image"),
        ((2, 0, 4, 6), "box: outside the crop"),
    ],
)
def test_a_bad_box_says_why(sides: tuple[float, ...], why: str) -> None:
    left, top, width, height = sides
    box = Box.model_construct(view="0", label="x", left=left, top=top, width=width, height=height)
    assert Frame.of(40, 24, CONFIG).box(box) == why


def test_phantoms_come_with_masks_boxes_and_groups(phantoms: Path) -> None:
    found = read_images(str(phantoms), "test", CONFIG, structures=["heart", "effusion"])
    assert found.pixel_values.shape == (12, 1, 32, 32) and found.skipped == {}
    masks = found.need_masks()
    assert masks.shape == (12, 2, 32, 32) and masks[:, 0].flatten(1).any(1).all()
    effusion = found.label_names.index("effusion")
    present = found.labels[:, effusion] == 1
    assert present.any() and masks[present, 1].flatten(1).any(1).all()
    for labels, corners in zip(found.box_labels, found.boxes, strict=True):
        assert corners.shape == (len(labels), 4) and ((corners[:, 2:] - corners[:, :2]) >= 1).all()
    assert set(found.groups) == {"age", "sex", "view", "source"} and set(found.groups["view"]) == {"PA"}
    with pytest.raises(ConfigError, match=r"do not know spleen; there is .*heart"):
        read_images(str(phantoms), "test", CONFIG, structures=["spleen"])
    assert [age_band(years) for years in (None, 3, 18, 74.9, 75)] == [
        None, "below 18", "18 to 39", "60 to 74", "75 and above",
    ]  # fmt: skip


def test_dice_of_empty_masks_counts_false_alarms() -> None:
    empty, full = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    half = full.clone()
    half[..., 2:] = False
    found = [float(dice_per_image(a, b)) for a, b in ((empty, empty), (full, empty), (empty, full), (half, full))]
    assert found == [1.0, 0.0, 0.0, pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("decoder", "fine_tune"),
    [("progressive", False), ("unetr", True), pytest.param("unetr", False, marks=pytest.mark.slow)],
)
def test_a_decoder_learns_the_heart_and_leaves_the_encoder_alone(
    decoder: str, fine_tune: bool, phantoms: Path, tiny: TransferEncoder
) -> None:
    train, test = (read_images(str(phantoms), split, tiny.decode, structures=["heart"]) for split in ("train", "test"))
    before = {name: value.clone() for name, value in tiny.vision.state_dict().items()}
    config = SegmentationConfig(decoder=decoder, fine_tune=fine_tune, fit=FitConfig(steps=30, batch_size=8, lr=3e-3))  # type: ignore[arg-type]
    dice = segment(tiny.vision, train, test, config)
    assert dice.shape == (12, 1) and dice.mean() > 0.5
    assert all(torch.equal(before[name], value) for name, value in tiny.vision.state_dict().items())
    few = replace(config, fit=FitConfig(steps=2, batch_size=8))
    again = [segment(tiny.vision, train, test, few, rows=torch.arange(9)) for _ in range(2)]
    assert np.array_equal(*again)


def test_probe_and_fine_tuning_find_the_bright_half(tmp_path: Path, tiny: TransferEncoder) -> None:
    manifest = str(pack(tmp_path / "set"))
    train, validation, test = (read_images(manifest, split, tiny.decode) for split in ("train", "validation", "test"))
    assert len(share_of_patients(train, 0.1, 0)) == 6  # of 3 of 30 patients
    assert set(share_of_patients(train, 0.1, 0).tolist()) < set(share_of_patients(train, 0.5, 0).tolist())
    features = Features.of(tiny.vision, train, validation, test)
    fits = probe_at_share(features, train, validation, 1.0, 0, LinearProbe.Config(strengths=(0.01,)))
    truth = test.labels[:, 0].numpy()
    assert fits.fitted == [0] and fits.scores[truth == 1, 0].mean() > fits.scores[truth == 0, 0].mean() + 1
    fit = FitConfig(steps=40, lr=1e-2, encoder_lr=1e-3)
    logits = fine_tune_at_share(tiny.vision, train, validation, test, 1.0, fit)
    few = replace(fit, steps=3)
    again = [fine_tune_at_share(tiny.vision, train, validation, test, 0.2, few) for _ in range(2)]
    assert np.array_equal(*again)
    last = fine_tune_at_share(tiny.vision, train, validation, test, 1.0, replace(few, judged=1))
    two = validation.rows(torch.arange(2))  # who tell nothing: the last weights count
    assert np.array_equal(last, fine_tune_at_share(tiny.vision, train, two, test, 1.0, few))
    assert logits.shape == (40, 2)
    assert logits[truth == 1, 0].mean() > logits[truth == 0, 0].mean() + 1


def test_encoders_of_runs_and_of_files(tmp_path: Path, tiny: TransferEncoder) -> None:
    run = make_run(tmp_path / "run", pack(tmp_path / "set"))
    cpu = torch.device("cpu")
    encoder = open_encoder(str(run), device=cpu)
    assert encoder.source["step"] == 4 and encoder.decode.image_size == 32 and encoder.name == "tiny:clip step 4"
    assert tiny.source["missing"] == () and tiny.source["matched"] > 20
    other = random_like(encoder, 3)
    assert not torch.equal(other.vision.patch.weight, encoder.vision.patch.weight)
    with pytest.raises(ConfigError, match=r"image size 50 is no multiple of .* patch of 8; use 48"):
        open_encoder(str(run), image_size=50, device=cpu)
    with pytest.raises(ConfigError, match="no such weights file"):
        open_encoder(str(tmp_path / "absent.pt"))
