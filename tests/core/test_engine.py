"""A step is the same step whatever the schedule, ZeRO stage or number of ranks; a bad one moves nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from core.engine import EngineConfig, deepspeed_options, split
from core.world import World
from shards.batch import Batch
from shards.errors import ConfigError, NonFiniteError
from tests.core.runs import Options, build, global_batch, in_ranks, own_rows

STEPS, FEW_STEPS = 20, 4


def losses(world: World, options: Options, steps: int = STEPS) -> list[float]:
    _, _, engine = build(options, world)
    return [
        engine.train_step(own_rows(global_batch(step), world), step=step).metrics["loss/total"] for step in range(steps)
    ]


def curves(world: World, options: Options, schedules: tuple[tuple[int, int | None], ...]) -> list[list[float]]:
    """The loss of three steps, by (ZeRO stage, micro-batch)."""
    return [losses(world, replace(options, zero_stage=stage, micro_batch=size), 3) for stage, size in schedules]


def assert_one_loss_curve(options: Options) -> None:
    """One rank with the whole batch, and two by every stage and in micro-batches."""
    ((expected,),) = in_ranks(1, partial(curves, options=options, schedules=((1, None),)))
    assert len(set(expected)) == 3
    schedules = ((1, None), (2, 3), (3, None), (3, 2))
    for curve in in_ranks(2, partial(curves, options=options, schedules=schedules))[0]:
        assert curve == pytest.approx(expected, rel=1e-5)


def losses_of_all(world: World) -> dict[str, list[float]]:
    """One curve a variant, all in this group of ranks; a few steps only where the schedule takes long."""
    base = Options(run_dir="", steps=STEPS)
    share = 12 // world.world_size
    return {
        "zero 0": losses(world, replace(base, zero_stage=0)),
        "zero 1": losses(world, base),
        "zero 2": losses(world, replace(base, zero_stage=2)),
        "zero 3": losses(world, replace(base, zero_stage=3)),
        "zero 2, ring": losses(world, replace(base, zero_stage=2, exchange="ring"), FEW_STEPS),
        "zero 1, ring, cached": losses(world, replace(base, exchange="ring", micro_batch=share // 2), FEW_STEPS),
        "zero 0, cached": losses(world, replace(base, zero_stage=0, micro_batch=share // 2), FEW_STEPS),
        "zero 1, cached unevenly": losses(world, replace(base, micro_batch=share - 1), FEW_STEPS),
        "zero 2, cached": losses(world, replace(base, zero_stage=2, micro_batch=share // 3), FEW_STEPS),
        "zero 3, cached": losses(world, replace(base, zero_stage=3, micro_batch=share // 2), FEW_STEPS),
    }


def losses_of_one(world: World) -> dict[str, list[float]]:
    base = Options(run_dir="", steps=STEPS)
    return {
        "zero 0": losses(world, replace(base, zero_stage=0)),
        "zero 1, cached unevenly": losses(world, replace(base, micro_batch=5), FEW_STEPS),
    }


def assert_one_curve(curves: dict[str, list[float]]) -> None:
    reference = np.array(curves["zero 0"])
    assert len(set(reference)) == STEPS
    for name, curve in curves.items():
        error = np.abs(np.array(curve) - reference[: len(curve)]) / reference[: len(curve)]
        assert error.max() < 1e-5, f"{name}: {error.max():.2e} at step {error.argmax()}"


def test_ranks_stages_and_schedules_give_one_loss_curve() -> None:
    one = in_ranks(1, losses_of_one)[0]
    two = in_ranks(2, losses_of_all)
    assert two[0] == two[1]
    assert_one_curve({**one, **{f"2 ranks, {name}": curve for name, curve in two[0].items()}})


def validations(world: World) -> list[tuple[int, dict[str, float]]]:
    """Of each schedule: the most studies that were encoded at once, and the figures."""
    found = []
    for stage, micro_batch in ((1, None), (1, 5), (3, 2)):
        _, task, engine = build(Options(run_dir="", zero_stage=stage, micro_batch=micro_batch), world)
        with patch.object(task, "encode", wraps=task.encode) as encode:
            metrics = engine.validation_step(own_rows(global_batch(0), world))
        found.append((max(len(call.args[0]["valid"]) for call in encode.call_args_list), metrics))
    return found


def test_validation_takes_micro_batches_and_finds_what_the_whole_batch_does() -> None:
    (whole, expected), *cut = in_ranks(2, validations)[0]
    assert whole == 6 and [most for most, _ in cut] == [5, 2]
    for _, metrics in cut:
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_four_ranks_give_the_same_curve() -> None:
    one = in_ranks(1, losses_of_one)[0]
    assert_one_curve({**one, **{f"4 ranks, {name}": curve for name, curve in in_ranks(4, losses_of_all)[0].items()}})


def bad_steps(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            for kind in ("loss", "gradient"):
                options = Options(run_dir="", zero_stage=stage, precision=precision, steps=5)
                _, task, engine = build(options, world)
                engine.train_step(own_rows(global_batch(0), world), step=0)
                before = engine.full_weights()
                batch = own_rows(global_batch(1), world)
                if kind == "loss" and world.rank == world.world_size - 1:
                    batch["pixel_values"][0] = float("inf")
                if kind == "gradient" and world.rank == 0:
                    weight = next(iter(task.parameters()))
                    weight.register_hook(lambda grad: grad * float("nan"))
                try:
                    engine.train_step(batch, step=1)
                    message = "no error"
                except NonFiniteError as error:
                    message = str(error)
                after = engine.full_weights()
                same = all(torch.equal(before[name], after[name]) for name in before)
                found[f"{stage} {precision} {kind}"] = (message, same)
    return found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_non_finite_loss_or_gradient_stops_all_ranks_before_the_optimizer(ranks: int) -> None:
    of_rank = in_ranks(ranks, bad_steps)
    for name, (message, same) in of_rank[0].items():
        assert message.startswith("step 1: "), f"{name}: {message}"
        what = "loss=" if name.endswith("loss") else "gradient norm is not finite"
        assert what in message, f"{name}: {message}"
        named = f"embeddings are not finite for samples {24 - 12 // ranks}"
        assert (
            f"no weight was moved; {named if name.endswith('loss') else 'samples of the batch: 12, 13, 14'}" in message
        )
        assert message.endswith("launchers/replay.py --step 1")
        assert same, name
    if ranks == 2:
        assert {name: value[0] for name, value in of_rank[1].items()} == {
            name: value[0] for name, value in of_rank[0].items()
        }


def variants(world: World) -> dict[str, list[float]]:
    found = {"plain": losses(world, Options(run_dir="", zero_stage=2), 3)}
    found["checkpointed activations"] = losses(world, Options(run_dir="", zero_stage=3, recompute=True), 3)
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found["optimizer on the host"] = losses(world, Options(run_dir="", zero_stage=2, deepspeed=offload), 3)
    buckets = {"zero_optimization": {"reduce_bucket_size": 4096, "allgather_bucket_size": 4096}}
    found["small buckets"] = losses(world, Options(run_dir="", zero_stage=2, deepspeed=buckets), 3)
    found["bf16"] = losses(world, Options(run_dir="", zero_stage=1, precision="bf16"), 3)
    found["bf16 weights, fp32 master"] = losses(world, Options(run_dir="", zero_stage=2, precision="bf16_master"), 3)
    found["bf16 weights, ZeRO 3"] = losses(world, Options(run_dir="", zero_stage=3, precision="bf16_master"), 3)
    return found


def test_options_reach_deepspeed_and_leave_the_curve_alone() -> None:
    found = in_ranks(2, variants)[0]
    reference = found.pop("plain")
    for name, curve in found.items():
        tolerance = 0.05 if "bf16" in name else 1e-5
        assert curve == pytest.approx(reference, rel=tolerance), name


def test_split_keeps_images_with_their_studies() -> None:
    batch = global_batch(0)
    parts = split(batch, 5)
    assert [len(part["valid"]) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])
    starts = torch.tensor([0, 5, 10])
    joined: list[torch.Tensor] = [part["study_index"] + start for part, start in zip(parts, starts, strict=True)]
    assert torch.equal(torch.cat(joined), batch["study_index"])
    for part in parts:
        assert len(part["pixel_values"]) == len(part["study_index"])
        assert part["study_index"].min() == 0
    no_images: Batch = {"valid": torch.ones(4, dtype=torch.bool), "input_ids": torch.zeros(4, 3)}
    assert [len(part["input_ids"]) for part in split(no_images, 2)] == [2, 2]


def test_pass_through_is_merged_last_and_cannot_take_what_the_engine_owns() -> None:
    config = EngineConfig(deepspeed={"zero_optimization": {"overlap_comm": True, "offload_param": {"device": "cpu"}}})
    options = deepspeed_options(config, World())
    assert options["zero_optimization"]["overlap_comm"] is True
    assert options["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert options["zero_optimization"]["stage"] == 1
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        EngineConfig(deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps.*micro_batch does not"):
        EngineConfig(deepspeed={"gradient_accumulation_steps": 4})
    for name in ("exchange", "attention", "kernel"):
        with pytest.raises(ConfigError, match=rf"engine\.{name}='other' is unknown; use "):
            EngineConfig(**{name: "other"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bf16_master"):
        EngineConfig(precision="bf16_master", zero_stage=0)
