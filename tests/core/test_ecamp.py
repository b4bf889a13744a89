"""ECAMP and MAE: every weight learns, masked pixels reach no encoder, any number of ranks, the released forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import chest
from configs.schema import TrainConfig, apply_overrides
from core import collectives
from core.models.masked_image import DecoderConfig, SuperResolver, attended_window
from core.models.text import TextEncoder
from core.models.vision import VisionEncoder
from core.tasks import Task
from core.tasks.ecamp import ECAMP, Weights
from core.tasks.mae import MAE
from shards.batch import Batch
from shards.errors import ConfigError
from tests.core.runs import Options
from tests.core.test_checkpoint import assert_resumes_bit_identical
from tests.core.test_engine import assert_one_loss_curve
from tests.distributed import run_distributed

VISION = VisionEncoder.Config(image_size=16, patch_size=4, width=16, depth=1, heads=2, positions="sincos")
TEXT = TextEncoder.Config(max_length=16, width=16, depth=1, heads=2, token_types=0, mlp_ratio=2.0)
CONFIG = ECAMP.Config(vision=VISION, text=TEXT, decoder=DecoderConfig(width=8, depth=1, heads=2))
STUDIES, LENGTH, WORDS = 6, 10, 40


def batch_of(size: int = 32, void: int = 4) -> Batch:
    """Six studies of one or two images, of one void; words weigh unlike."""
    generator = torch.Generator().manual_seed(3)
    study = torch.repeat_interleave(torch.arange(STUDIES), torch.tensor([1, 2, 1, 1, 1, 2]))
    valid = torch.arange(STUDIES) != void
    mask = (torch.arange(LENGTH)[None] < torch.tensor([4, 9, 10, 6, 3, 5])[:, None]) & valid[:, None]
    hidden = torch.rand(len(study), 16, generator=generator).argsort(dim=1) < 12
    text_mask = mask & (torch.rand(mask.shape, generator=generator) < 0.6) & (torch.arange(LENGTH) > 0)
    return {
        "pixel_values": torch.randn(len(study), 1, size, size, generator=generator) * valid[study, None, None, None],
        "study_index": study,
        "valid": valid,
        "input_ids": torch.randint(5, WORDS, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "text_mask": text_mask,
        "token_weight": text_mask * (0.5 + torch.rand(mask.shape, generator=generator)),
        "cut_tokens": torch.tensor([0, 3, 0, 1, 0, 0]),
        "dropped_sentences": torch.zeros(STUDIES, dtype=torch.int64),
        "patch_mask": hidden & valid[study][:, None],
        "attention_grid": torch.rand(len(study), 16, generator=generator) * valid[study][:, None],
    }


def loss_of(task: Task, batch: Batch) -> Any:
    encoded = task.encode(batch)
    return task.objective(collectives.gather(encoded.gather), encoded.local)


@pytest.mark.parametrize("fusion", ["fine", "coarse", "both"])
def test_a_step_reaches_every_weight(fusion: Any) -> None:
    task = replace(CONFIG, fusion=fusion).build(vocab_size=WORDS)
    output = loss_of(task, batch_of())
    output.loss.backward()
    assert set(output.metrics) >= {"loss/mim", "loss/sr", "loss/mlm", "text/reports_cut"}
    assert float(output.metrics["text/reports_cut"]) == pytest.approx(2 / 5)
    for name, parameter in task.named_parameters():
        if name == "image.vision.class_token":  # of the encoder's one block the decoder reads it
            continue
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_parts_of_weight_zero_are_left_out() -> None:
    small = replace(CONFIG, weights=Weights(sr=0.0))
    assert small.pixels == 16 and CONFIG.pixels == 32
    task = small.build(vocab_size=WORDS)
    assert not any("super" in name for name, _ in task.named_parameters())
    assert "loss/sr" not in loss_of(task, batch_of(size=16)).metrics
    images_only = replace(CONFIG, weights=Weights(mlm=0.0)).build(vocab_size=WORDS)
    assert set(loss_of(images_only, batch_of()).metrics) >= {"loss/mim", "loss/sr"}
    with pytest.raises(ConfigError, match="nothing teaches the encoder"):
        Weights(mim=0.0, mlm=0.0)


def test_masked_patches_reach_no_encoder_and_mae_is_its_image_part() -> None:
    batch = batch_of(size=16, void=-1)
    task = MAE.Config(vision=VISION, decoder=CONFIG.decoder).build()
    seen = task.image(batch["pixel_values"], batch["patch_mask"], None)
    assert seen.tokens.shape[1] == 4, "only visible patches are encoded"
    hidden = batch["patch_mask"].view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(hidden, batch["pixel_values"] + 1.0, batch["pixel_values"])
    again = task.image(changed, batch["patch_mask"], None)
    torch.testing.assert_close(again.tokens, seen.tokens)
    assert not torch.allclose(again.losses["mim"], seen.losses["mim"])
    # The image part of both tasks is one: equal names, equal first weights, equal loss.
    ecamp = replace(CONFIG, weights=Weights(sr=0.0)).build(vocab_size=WORDS)
    torch.testing.assert_close(loss_of(ecamp, batch).metrics["loss/mim"], loss_of(task, batch).metrics["loss/mim"])


def test_words_are_completed_from_the_image_and_only_where_they_count() -> None:
    task, batch = CONFIG.build(vocab_size=WORDS), batch_of(void=-1)
    before = task.encode(batch).local["mlm"]
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert (task.encode(other).local["mlm"] - before).abs().min() > 1e-6
    one = batch["token_weight"].clone()
    one[1:] = 0
    alone = task.encode(batch | {"token_weight": one}).local["mlm"]
    torch.testing.assert_close(alone[0], before[0])
    assert not alone[1:].any()
    # Hidden words do not tell themselves, visible ones tell others.
    hidden = batch["input_ids"].clone()
    unpredicted = batch["text_mask"] & (batch["token_weight"] == 0)
    hidden[unpredicted] = 7
    torch.testing.assert_close(task.encode(batch | {"input_ids": hidden}).local["mlm"], before)


def test_the_released_loss_reads_padding_too() -> None:
    batch = batch_of(void=-1)
    task = replace(CONFIG, compat="original").build(vocab_size=WORDS)
    everywhere = batch | {"token_weight": torch.ones(STUDIES, LENGTH)}
    loss = task.encode(everywhere).local["mlm"]
    assert torch.isfinite(loss).all()
    padded = dict(everywhere)
    padded["input_ids"] = torch.where(batch["attention_mask"], batch["input_ids"], 9)
    assert (task.encode(padded).local["mlm"] - loss)[0].abs() > 1e-4, "the padding of a short report counts"
    # On real tokens alone packed and padded rows agree.
    real = batch | {"token_weight": batch["attention_mask"].float()}
    packed = task.encode(real).local["mlm"]
    chosen = real["token_weight"].clone()
    chosen[0, 9] = 1e-30  # one padding token makes all rows dense
    torch.testing.assert_close(task.encode(real | {"token_weight": chosen}).local["mlm"], packed, rtol=1e-5, atol=1e-5)


def test_super_resolution_can_be_black_and_its_window_follows_the_grid() -> None:
    image = torch.full((1, 1, 8, 8), -1.5)
    with torch.no_grad():
        residual, original = SuperResolver(1, "residual"), SuperResolver(1, "original")
        assert residual(image).min() < 0 <= original(image).min()
        assert residual(image).shape == original(image).shape == (1, 1, 16, 16)
    grid = torch.zeros(2, 14, 14)
    grid[0, 13, 0] = 1.0
    window = attended_window(grid)
    assert window.sum(dim=(1, 2)).tolist() == [144, 144]
    assert window[0, 2:, :12].all() and window[1, 1:13, 1:13].all()
    task, batch = replace(CONFIG, attention_floor=0.0).build(vocab_size=WORDS), batch_of(void=-1)
    task.encode(batch)
    none = task.encode(batch | {"attention_grid": torch.zeros_like(batch["attention_grid"])}).local["sr"]
    assert not none.any(), "what nobody looks at does not count"


def test_attention_maps_are_shares() -> None:
    task, batch = CONFIG.build(vocab_size=WORDS), batch_of(void=-1)
    maps = task.attention_maps(batch, batch["text_mask"])
    assert maps.shape == (STUDIES, 16) and (maps > 0).all() and (maps <= 1).all()
    with pytest.raises(ConfigError, match="looks at no patch"):
        replace(CONFIG, fusion="coarse").build(vocab_size=WORDS).attention_maps(batch, batch["text_mask"])


def test_the_recipes_fit_together_and_say_what_does_not() -> None:
    for recipe in (chest.ecamp_b16, chest.ecamp_tiny, chest.mae_tiny, chest.mrm_tiny):
        assert isinstance(recipe(), TrainConfig)
    with pytest.raises(ConfigError, match=r"data\.entity_masking\.compat=none"):
        apply_overrides(chest.ecamp_tiny(), ["task.compat=original"])
    apply_overrides(chest.ecamp_tiny(), ["task.compat=original", "data.entity_masking.compat=original"])
    with pytest.raises(ConfigError, match="set the latter to 128"):
        apply_overrides(chest.ecamp_tiny(), ["data.decode.image_size=64"])
    with pytest.raises(ConfigError, match="set the former to 16"):
        apply_overrides(chest.ecamp_tiny(), ["data.masking.patch_size=8"])


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    images = (batch["study_index"] >= start) & (batch["study_index"] < stop)
    per_image = ("pixel_values", "study_index", "patch_mask", "attention_grid")
    part = {name: value[images] if name in per_image else value[start:stop] for name, value in batch.items()}
    return part | {"study_index": part["study_index"] - start}


def on_rank(rank: int, world_size: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    whole = {name: torch.from_numpy(value) for name, value in batch.items()}
    studies = STUDIES // world_size
    task = CONFIG.build(vocab_size=WORDS)
    result = loss_of(task, rows_of(whole, rank * studies, (rank + 1) * studies))
    gradients = torch.autograd.grad(result.loss, list(task.parameters()), materialize_grads=True)
    return {
        "gradients": [collectives.sum_over_ranks(gradient).numpy() for gradient in gradients],
        "metrics": {key: float(collectives.sum_over_ranks(value)) for key, value in result.metrics.items()},
    }


def test_two_ranks_equal_one_process() -> None:
    batch = {name: value.numpy() for name, value in batch_of().items()}
    alone = on_rank(0, 1, batch)
    for rank in run_distributed(on_rank, 2, args=(batch,)):
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        for ours, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


# ---- in the engine ----


@pytest.mark.slow
def test_ranks_stages_and_schedules_give_one_loss_curve() -> None:
    assert_one_loss_curve(Options(run_dir="", recipe="ecamp", learning_rate=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage", "precision"), [(1, 1, "bf16"), (2, 2, "fp32"), (2, 3, "bf16")])
def test_a_killed_run_resumes_bit_identical(tmp_path: Path, ranks: int, zero_stage: int, precision: str) -> None:
    options = Options(run_dir="", recipe="ecamp", zero_stage=zero_stage, precision=precision)
    assert "report.mask_token" in assert_resumes_bit_identical(tmp_path, ranks, options)
