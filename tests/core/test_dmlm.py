"""The D-MLM task: what reaches what, what is hidden, voids, ranks and micro-batches, every switch, a resume."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from configs import chest, tiny
from configs.schema import apply_overrides
from core import collectives
from core.engine import split
from core.evaluation.embed import GaussianTask
from core.models.attention import cross_attention
from core.models.gaussian import Gaussian
from core.optim import parameter_groups
from core.tasks.dmlm import DMLM
from core.trainer import ScaleWatch
from core.world import World
from shards.batch import FIELDS, Batch
from shards.errors import ConfigError
from tests.core.runs import VOCABULARY, Options, build, global_batch, in_ranks, own_rows, run
from tests.core.test_tasks import loss_of
from tests.distributed import run_distributed

# Every part and pass in use, all numbers fp32.
EVERYTHING = (
    "task.weights.variance=1",
    "task.weights.excess=1",
    "task.variance.precision=fp32",
    "task.contrast.precision=fp32",
    "task.fusion.depth=2",
    "task.match_group=2",
    "task.fused_floor=1",
)


def task_of(*overrides: str, seed: int = 0) -> DMLM:
    built = apply_overrides(tiny.dmlm(), overrides).task.build(vocab_size=VOCABULARY, seed=seed)
    assert isinstance(built, DMLM)
    return built


def fields_of(batch: Batch) -> Batch:
    return {name: batch[name] for name in DMLM.fields}


def one_report_twice(step: int) -> Batch:
    """Studies 8 and 9 of one finding: with groups of two neither has a negative, and neither is first of a part."""
    batch = global_batch(step)
    batch["finding_key"][9] = batch["finding_key"][8]
    return batch


def gradients(task: DMLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*task.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def test_a_step_reaches_every_weight() -> None:
    task, batch = task_of(*EVERYTHING), fields_of(global_batch(0))
    assert set(DMLM.fields) <= set(FIELDS) and isinstance(task, GaussianTask)
    out = loss_of(task, batch)
    found = gradients(task, out.loss)
    for name, _ in task.named_parameters():
        # The last layer's first tokens and masked ones are read; nothing is left over.
        assert name in found and found[name].isfinite().all() and found[name].any(), name
    parts = {"contrast", "variance", "excess", "mlm", "mim", "itm", "kl", "floor", "vib"}
    assert {f"loss/{part}" for part in parts} <= set(out.metrics)
    logged = {"image_logvar", "text_logvar", "fused_logvar", "pair_w2", "pair_kl", "image_out_of_range"}
    assert {f"uncertainty/{name}" for name in logged} <= set(out.metrics)
    watched = ScaleWatch(task, lambda event: None)._scales
    assert set(watched) == {"optim/contrast_logit_scale", "optim/variance_logit_scale"} <= set(out.metrics)
    weights = task.config.weights
    total = sum(getattr(weights, part) * out.metrics[f"loss/{part}"] for part in parts)
    torch.testing.assert_close(out.loss.detach(), torch.as_tensor(total))
    assert out.loss.dtype is torch.float32 and all(not value.requires_grad for value in out.metrics.values())


def test_what_is_masked_is_not_seen() -> None:
    """Masked words and patches change targets only, the rest of a masked view's Gaussians not at all."""
    task, batch = task_of("task.weights.mlm=0", "task.weights.mim=0", "task.weights.itm=0"), global_batch(1)
    changed = dict(batch)
    changed["input_ids"] = batch["input_ids"].masked_fill(batch["text_mask"], 7)
    patches = batch["patch_mask"].view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    changed["pixel_values"] = batch["pixel_values"].masked_fill(patches, 3.0)
    hidden = (batch["text_mask"], task.word_mask_token)
    masked = [
        task.towers.text_tokens(each["input_ids"], each["attention_mask"], hidden=hidden) for each in (batch, changed)
    ]
    assert torch.equal(masked[0], masked[1])
    keep = (~batch["patch_mask"]).to(torch.int64).argsort(dim=1, descending=True, stable=True)[:, :6]
    masked = [task.towers.image_tokens(each["pixel_values"], keep) for each in (batch, changed)]
    valid = batch["valid"][batch["study_index"]]  # of a void study nothing is masked
    torch.testing.assert_close(masked[0][valid], masked[1][valid])


def test_a_prediction_does_not_see_what_it_predicts() -> None:
    """Through fusion, Gaussians and heads; what is not masked is seen there."""
    task, batch = task_of("task.weights.itm=0"), global_batch(1)

    def predicted(head: str, changed: Batch) -> Tensor:
        found: list[Tensor] = []
        assert task.fused is not None
        hook = getattr(task.fused, head).register_forward_hook(lambda module, inputs, out: found.append(out))
        with torch.no_grad():
            task.encode(changed)
        hook.remove()
        return found[0]

    words, real = batch["text_mask"], batch["attention_mask"] & batch["valid"][:, None]
    patches = batch["patch_mask"].view(-1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    for head, name, hidden, seen, value in (
        ("word_head", "input_ids", words, real & ~words, 7),
        ("patch_head", "pixel_values", patches, ~patches, 3.0),
    ):
        expected = predicted(head, batch)
        torch.testing.assert_close(predicted(head, {**batch, name: batch[name].masked_fill(hidden, value)}), expected)
        changed = predicted(head, {**batch, name: batch[name].masked_fill(seen, value)})
        assert not torch.allclose(changed, expected, rtol=1e-3, atol=1e-3)


def test_cross_attention_paths_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 7, 2, 3, 4, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([[7], [3]])
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(cross_attention(q, kv, mask), expected.transpose(1, 2).flatten(2))


def test_a_void_study_counts_for_nothing() -> None:
    task, batch = task_of(*EVERYTHING), fields_of(global_batch(2))
    noisy = dict(batch)
    void = ~batch["valid"]
    noisy["input_ids"] = batch["input_ids"].masked_fill(void[:, None], 9)
    noisy["report_key"] = noisy["finding_key"] = batch["report_key"].masked_fill(void, 0)
    noisy["pixel_values"] = batch["pixel_values"].masked_fill(void[batch["study_index"]][:, None, None, None], 5.0)
    a, b = loss_of(task, batch), loss_of(task, noisy)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-6)
    of_a, of_b = gradients(task, a.loss), gradients(task, b.loss)
    for name in of_a:
        torch.testing.assert_close(of_a[name], of_b[name], rtol=1e-4, atol=1e-6)


def test_void_studies_alone_give_nothing() -> None:
    task, batch = task_of(*EVERYTHING), fields_of(global_batch(3))
    for name in ("pixel_values", "input_ids", "attention_mask", "valid", "text_mask", "patch_mask"):
        batch[name] = torch.zeros_like(batch[name])
    out = loss_of(task, batch)
    assert out.loss.item() == 0
    assert all(not grad.any() for grad in gradients(task, out.loss).values())


def test_embeddings_for_evaluation() -> None:
    task, batch = task_of(), global_batch(4)
    images, texts = task.embed_images(batch), task.embed_texts(batch["input_ids"], batch["attention_mask"])
    of_images = task.distribution_of_images(batch)
    assert images.shape == texts.shape == of_images.logvar.shape == (12, 16)
    torch.testing.assert_close(images, of_images.mean)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(12))
    assert task.image_features(batch).shape == (12, 32)
    assert not torch.allclose(task_of("task.unit_norm=false").distribution_of_images(batch).mean, of_images.mean)


@pytest.mark.parametrize("similarity", ["wasserstein", "sampled", "cosine"])
def test_logit_scale_turns_differences_of_cosines_into_log_odds(similarity: str) -> None:
    task, batch = task_of(f"task.contrast.similarity={similarity}"), global_batch(4)
    images = task.distribution_of_images(batch)
    texts = task.distribution_of_texts(batch["input_ids"][:2], batch["attention_mask"][:2])
    texts = Gaussian(mean=texts.mean, logvar=texts.logvar[:1].expand(2, -1))  # as sure of one text as of the other
    assert task.contrast is not None
    logits = task.contrast.logits(images, texts)
    cosines = images.mean @ texts.mean.T
    torch.testing.assert_close(
        logits[:, 0] - logits[:, 1], task.logit_scale() * (cosines[:, 0] - cosines[:, 1]), rtol=1e-4, atol=1e-4
    )
    only_variance = task_of("task.weights.contrast=0.0", "task.weights.excess=0", "task.weights.variance=1.0")
    assert only_variance.logit_scale() is None
    of_any_length = task_of(f"task.contrast.similarity={similarity}", "task.unit_norm=false").logit_scale()
    assert (of_any_length is None) == (similarity != "cosine")


# ---- one batch, however it is cut ----


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    task = task_of(*EVERYTHING)
    batch = own_rows(
        one_report_twice(5), World(rank=rank, world_size=world_size, local_rank=0, device=torch.device("cpu"))
    )
    out = loss_of(task, batch)
    return {
        "loss": collectives.sum_over_ranks(out.loss).numpy(),
        "gradients": {n: collectives.sum_over_ranks(g).numpy() for n, g in gradients(task, out.loss).items()},
        "metrics": {key: float(collectives.sum_over_ranks(value)) for key, value in out.metrics.items()},
    }


def test_two_ranks_equal_one_process() -> None:
    alone = on_rank(0, 1)
    for rank in run_distributed(on_rank, 2):
        np.testing.assert_allclose(rank["loss"], alone["loss"], rtol=1e-6)
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-6)
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            np.testing.assert_allclose(rank["gradients"][name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


def stepped(
    overrides: tuple[str, ...], world: World, *, micro_batch: int | None, zero_stage: int = 1
) -> dict[str, Any]:
    """Metrics of a step and all weights after two of them, in the engine."""
    options = Options(
        run_dir="", recipe="dmlm", overrides=overrides, micro_batch=micro_batch, zero_stage=zero_stage,
        learning_rate=1e-3,
    )  # fmt: skip
    _, _, engine = build(options, world)
    metrics = [engine.train_step(own_rows(one_report_twice(step), world), step=step).metrics for step in range(2)]
    weights = engine.full_weights()
    return {"metrics": metrics, "weights": {name: value.numpy() for name, value in weights.items()}}


def test_micro_batches_equal_one_pass() -> None:
    direct, cut = (in_ranks(1, partial(stepped, EVERYTHING, micro_batch=size))[0] for size in (None, 4))
    for ours, expected in zip(cut["metrics"], direct["metrics"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert cut["metrics"][0]["optim/grad_norm"] == pytest.approx(direct["metrics"][0]["optim/grad_norm"], rel=1e-6)


def test_negatives_need_whole_groups() -> None:
    task, batch = task_of(), global_batch(6)
    with pytest.raises(ConfigError, match=r"6 studies .* task.match_group=4 does not divide; set it to 2"):
        task.encode(split(batch, 6)[0])
    with pytest.raises(ConfigError, match=r"3 studies .* does not divide; set engine.micro_batch, or .* of 4$"):
        task.encode(split(batch, 3)[0])


# ---- switches ----

SWITCHES = {
    "csd sigmoid": (
        "task.contrast.similarity=sampled", "task.contrast.loss=sigmoid", "task.embedding.logvar_init=-10",
        "task.weights.excess=0",
    ),
    "cosine": ("task.contrast.similarity=cosine",),
    "cosine and variances apart": (
        "task.contrast.similarity=cosine", "task.weights.variance=1", "task.embedding.detach_variance=true",
    ),
    "no forecast": ("task.weights.excess=0",),
    "plain means": ("task.unit_norm=false", "task.contrast.scale_init=0.07"),
    "linear variance": ("task.embedding.kind=linear", "task.fused.kind=linear"),
    "mean alone": ("task.samples=0",),
    "five samples": ("task.samples=5",),
    "reversed": ("task.kl=reversed",),
    "prior": ("task.kl=prior",),
    "both": ("task.kl=both", "task.positives=report"),
    "inclusion of embeddings": ("task.kl=inclusion", "task.kl_at=embedding"),
    "fused divergence": ("task.kl_at=fused", "task.weights.mlm=0", "task.weights.itm=0"),
    "one encoder a modality": ("task.share_gaussian_encoders=true", "task.fused.heads=2"),
    "words": ("task.weights.mim=0", "task.weights.itm=0", "task.weights.kl=0"),
    "patches": ("task.weights.mlm=0", "task.weights.itm=0", "task.weights.kl=0"),
    "matching": ("task.weights.mlm=0", "task.weights.mim=0", "task.weights.kl=0"),
    "masked prediction alone": ("task.weights.contrast=0", "task.weights.excess=0"),
    "point contrast": (
        "task.contrast.similarity=cosine", "task.weights.mlm=0", "task.weights.mim=0", "task.weights.itm=0",
        "task.weights.kl=0", "task.weights.floor=0", "task.weights.vib=0", "task.weights.excess=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_makes_a_step(name: str) -> None:
    task = task_of(*SWITCHES[name])
    out = loss_of(task, global_batch(7))
    assert out.loss.isfinite() and all(grad.isfinite().all() for grad in gradients(task, out.loss).values())
    assert not torch.equal(out.loss, loss_of(task_of(), global_batch(7)).loss)
    parts = {key.removeprefix("loss/") for key in out.metrics if key.startswith("loss/")}
    assert parts == {part for part, weight in asdict(task.config.weights).items() if weight}


def test_all_but_the_towers_learns_faster() -> None:
    task, optim = task_of(), chest.dmlm_b16().optim
    towers = set(task.towers.parameters())
    for group in parameter_groups(task, optim):
        assert {parameter in towers for parameter in group["params"]} == {group["multiplier"] == 1.0}


def weights_nobody_moves(world: World) -> list[dict[str, Any]]:
    cut = {"micro_batch": 4}
    return [
        stepped(SWITCHES[name], world, zero_stage=stage, **how)
        for name, stage, how in (("words", 2, {"micro_batch": None}), ("point contrast", 3, cut), ("words", 0, cut))
    ]  # fmt: skip


def test_the_engine_takes_weights_without_gradient() -> None:
    """Words alone read no image stream at its end; a contrast of points moves no log-variance."""
    for found in in_ranks(1, weights_nobody_moves)[0]:
        assert all(np.isfinite(value) for metrics in found["metrics"] for value in metrics.values())


def test_a_part_that_is_off_has_no_weights() -> None:
    off = ("task.weights.mlm=0", "task.weights.mim=0", "task.weights.itm=0", "task.weights.kl=0")
    names = {name.split(".")[0] for name, _ in task_of(*off).named_parameters()}
    assert names == {"towers", "image_in", "text_in", "image_gaussian", "text_gaussian", "contrast"}
    with pytest.raises(ConfigError, match="every weight that teaches the encoders is 0"):
        apply_overrides(tiny.dmlm(), [*off, "task.weights.contrast=0", "task.weights.excess=0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.samples=-1", "samples=-1 must lie between"),
        ("task.weights.kl=-1", "weights.kl=-1.0 must not be negative"),
        ("task.match_group=1", "match_group=1 leaves no other study"),
        ("task.share_gaussian_encoders=true", "needs embed_dim=128 and fusion.width=64 to be equal"),
        ("task.variance.similarity=cosine", "has no variance in it"),
        ("task.contrast.loss=sigmoid", "weights.excess=.* forecasts an InfoNCE"),
        ("task.contrast.scale_init=300", "must lie between 0.001 and scale_max"),
        ("task.fusion.depth=0", "fusion.depth=0 must be at least 1"),
        ("data.masking.patch_size=16", "task.vision.patch_size=8; set both to one value"),
        ("task.kl=none", "one of consistency, reversed, prior, both, inclusion"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(chest.dmlm_tiny(), [override])


# ---- a run ----


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dmlm", "align"])
def test_stop_and_resume_is_the_unbroken_run(recipe: str, tmp_path: Path) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    settings: dict[str, Any] = {"recipe": recipe, "steps": 4, "micro_batch": 4, "precision": "bf16"}
    assert run(1, Options(run_dir=whole, **settings)) == [0]
    assert run(1, Options(run_dir=broken, kill_at=3, **settings)) == [-9]
    assert run(1, Options(run_dir=broken, **settings)) == [0]
    first, second = (
        load_file(next(Path(folder).glob("checkpoints/step-*4/weights.safetensors"))) for folder in (whole, broken)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
