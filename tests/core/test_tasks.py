"""The contrastive tasks: encode and objective on a small batch, views, voids, smooth bounds, one rank against two."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core import collectives
from core.models.heads import LogitBias, LogitScale, soft_bound, soft_bound_inverse
from core.models.text import TextEncoder
from core.models.towers import mean_over_views
from core.models.vision import VisionEncoder
from core.tasks import Task
from core.tasks.clip import CLIP
from core.tasks.siglip import SigLIP
from shards.batch import FIELDS, Batch
from tests.distributed import run_distributed

VISION = VisionEncoder.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2)
TEXT = TextEncoder.Config(max_length=16, width=16, depth=1, heads=2, norm="pre", pool="mean", token_types=0)
TASKS: dict[str, type[CLIP] | type[SigLIP]] = {"clip": CLIP, "siglip": SigLIP}


def build(name: str, seed: int = 0) -> CLIP | SigLIP:
    return TASKS[name].Config(vision=VISION, text=TEXT, embed_dim=8).build(vocab_size=40, seed=seed)


def batch_of(studies: int, views: list[int], *, void: tuple[int, ...] = ()) -> Batch:
    """`studies` studies with `views[i]` images each; equal reports for studies 0 and 2."""
    generator = torch.Generator().manual_seed(3)
    valid = torch.ones(studies, dtype=torch.bool)
    valid[list(void)] = False
    study_index = torch.repeat_interleave(torch.arange(studies), torch.tensor(views))
    lengths = torch.tensor([4 + 3 * (i % 3) for i in range(studies)])
    mask = (torch.arange(10)[None] < lengths[:, None]) & valid[:, None]
    key = torch.arange(studies)
    key[2] = key[0]
    return {
        "pixel_values": torch.randn(len(study_index), 1, 16, 16, generator=generator)
        * valid[study_index, None, None, None],
        "study_index": study_index,
        "valid": valid,
        "input_ids": torch.randint(1, 40, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "report_key": key * valid,
    }


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """The part of a batch that a rank owning studies [start, stop) is given."""
    images = (batch["study_index"] >= start) & (batch["study_index"] < stop)
    per_image = ("pixel_values", "study_index", "patch_mask")
    part = {name: value[images] if name in per_image else value[start:stop] for name, value in batch.items()}
    return part | {"study_index": part["study_index"] - start}


def loss_of(task: Task, batch: Batch) -> Any:
    encoded = task.encode(batch)
    return task.objective(collectives.gather(encoded.gather), encoded.local)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_reaches_every_weight(name: str) -> None:
    task = build(name)
    batch = batch_of(5, [1, 3, 2, 1, 1], void=(3,))
    assert set(task.fields) == set(batch) and set(task.fields) <= set(FIELDS)
    out = loss_of(task, batch)
    out.loss.backward()
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    assert out.loss.dtype is torch.float32 and all(not value.requires_grad for value in out.metrics.values())
    torch.testing.assert_close(out.metrics["optim/logit_scale"], task.logit_scale().detach())


@pytest.mark.parametrize("name", TASKS)
def test_a_void_study_counts_for_nothing(name: str) -> None:
    task = build(name)
    with_void = batch_of(5, [1, 2, 1, 1, 1], void=(4,))
    without = rows_of(with_void, 0, 4)
    a, b = loss_of(task, with_void), loss_of(task, without)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(out.loss, list(task.parameters())) for out in (a, b)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    void_only = batch_of(3, [1, 1, 1], void=(0, 1, 2))
    nothing = loss_of(task, void_only)
    nothing.loss.backward()
    assert nothing.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters())


def test_equal_reports_are_no_negatives() -> None:
    task = build("clip")
    batch = batch_of(3, [1, 1, 1])
    keyed = loss_of(task, batch).loss
    batch["report_key"] = torch.arange(3)
    assert not torch.allclose(keyed, loss_of(task, batch).loss)


@pytest.mark.parametrize("name", TASKS)
def test_the_precision_of_the_product_is_the_recipes(name: str) -> None:
    losses = []
    for precision in (None, "fp32", "bf16"):
        config = replace(build(name).config, precision=precision)
        losses.append(loss_of(config.build(vocab_size=40, seed=0), batch_of(5, [1, 1, 1, 1, 1])).loss)
    assert losses[0] == losses[1] != losses[2]
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_embeddings_for_evaluation(name: str) -> None:
    task = build(name)
    batch = batch_of(4, [1, 2, 3, 1])
    images = task.embed_images(batch)
    texts = task.embed_texts(batch["input_ids"], batch["attention_mask"])
    assert images.shape == texts.shape == (4, 8) and task.image_features(batch).shape == (4, 16)
    for rows in (images, texts):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    projected = task.towers.vision_projection(task.towers.vision(batch["pixel_values"]).pooled)
    expected = F.normalize(torch.stack([x.mean(0) for x in projected.split([1, 2, 3, 1])]), dim=1)
    torch.testing.assert_close(images, expected)


def test_mean_over_views_of_a_study_without_views_is_zero() -> None:
    x = torch.tensor([[2.0], [4.0], [5.0]])
    assert mean_over_views(x, torch.tensor([0, 0, 2]), 3).tolist() == [[3.0], [0.0], [5.0]]


def test_same_seed_same_weights_whatever_was_built_before() -> None:
    first = build("clip", seed=5)
    torch.manual_seed(99)
    second, other = build("siglip", seed=5), build("clip", seed=6)
    for (name, a), (_, b) in zip(first.towers.named_parameters(), second.towers.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.towers.vision.patch.weight, other.towers.vision.patch.weight)


def test_bounds_are_smooth_and_start_exact() -> None:
    x = torch.linspace(-300.0, 300.0, 61, dtype=torch.float64, requires_grad=True)
    y = soft_bound(x, -40.0, 40.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y.abs() <= 40).all() and (y.diff() >= 0).all() and (slope[27:34] > 0.99).all()
    assert soft_bound(torch.tensor(soft_bound_inverse(1.5, 0.0, 4.6)), 0.0, 4.6).item() == pytest.approx(1.5)
    scale = LogitScale(1 / 0.07, 100.0)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        scale.log_scale.fill_(9.0)
    scale().backward()
    assert 95 < scale().item() <= 100.001 and scale.log_scale.grad is not None and scale.log_scale.grad.item() > 0
    assert scale.bound_near(98.9) is None and scale.bound_near(99.1) == pytest.approx(100)
    assert scale.bound_near(1.02) is None and scale.bound_near(1.005) == 1
    assert LogitBias(-10.0, 40.0)().item() == pytest.approx(-10.0, rel=1e-5)


def test_config_is_plain_data() -> None:
    def check(value: Any) -> None:
        if is_dataclass(value):
            for field in fields(value):
                check(getattr(value, field.name))
        elif isinstance(value, tuple):
            for part in value:
                check(part)
        else:
            assert value is None or isinstance(value, bool | int | float | str)

    for task in TASKS.values():
        check(task.Config(vision=VISION, text=TEXT))


def on_rank(rank: int, world_size: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    whole = {name: torch.from_numpy(value) for name, value in batch.items()}
    studies = len(whole["valid"]) // world_size
    out: dict[str, Any] = {}
    for name in TASKS:
        task = build(name)
        result = loss_of(task, rows_of(whole, rank * studies, (rank + 1) * studies))
        gradients = torch.autograd.grad(result.loss, list(task.parameters()))
        out[name] = {
            "loss": collectives.sum_over_ranks(result.loss).numpy(),
            "gradients": [collectives.sum_over_ranks(gradient).numpy() for gradient in gradients],
            "metrics": {key: float(collectives.sum_over_ranks(value)) for key, value in result.metrics.items()},
        }
    return out


def test_two_ranks_equal_one_process() -> None:
    batch = {name: value.numpy() for name, value in batch_of(6, [1, 2, 1, 3, 1, 1], void=(4,)).items()}
    alone = on_rank(0, 1, batch)
    for rank in run_distributed(on_rank, 2, args=(batch,)):
        for name in TASKS:
            np.testing.assert_allclose(rank[name]["loss"], alone[name]["loss"], rtol=1e-6)
            assert rank[name]["metrics"] == pytest.approx(alone[name]["metrics"], rel=1e-5)
            for ours, expected in zip(rank[name]["gradients"], alone[name]["gradients"], strict=True):
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_text_vocabulary_comes_from_the_tokenizer() -> None:
    config = CLIP.Config(vision=VISION, text=replace(TEXT, vocab_size=7), embed_dim=8)
    assert config.build().towers.text.config.vocab_size == 7
    assert config.build(vocab_size=11).towers.text.config.vocab_size == 11
