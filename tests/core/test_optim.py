"""Learning rate as a function of the step; what decays."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.chest import clip_b16, siglip_tiny, umcl_b16
from configs.schema import apply_overrides, load_recipe
from core import optim
from core.optim import OptimConfig, build, decays, parameter_groups, schedule_factor
from core.tasks import Task
from shards.errors import ConfigError


def siglip() -> Task:
    task: Task = siglip_tiny().task.build(vocab_size=50)
    return task


def test_cosine_rises_to_one_and_falls_to_the_final_factor() -> None:
    config = OptimConfig(warmup_steps=4, final_factor=0.1)
    factors = [schedule_factor(config, step, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[12] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert factors[20] == pytest.approx(0.1)
    assert schedule_factor(config, 10**6, 20) == pytest.approx(0.1)


@pytest.mark.parametrize(("schedule", "half", "end"), [("linear", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_other_schedules(schedule: str, half: float, end: float) -> None:
    config = OptimConfig(schedule=schedule)  # type: ignore[arg-type]
    assert schedule_factor(config, 0, 10) == 1.0
    assert schedule_factor(config, 5, 10) == pytest.approx(half)
    assert schedule_factor(config, 10, 10) == pytest.approx(end)


def test_matrices_decay_and_nothing_else() -> None:
    named = dict(siglip().named_parameters())
    decaying = {name for name, parameter in named.items() if decays(name, parameter)}
    assert "towers.vision.transformer.blocks.0.qkv.weight" in decaying
    assert "towers.vision_projection.weight" in decaying
    for name in ("positions", "token", "norm", "bias", "scale"):
        assert not [found for found in decaying if name in found.rsplit(".", 1)[-1]], name
    assert {name for name, parameter in named.items() if parameter.ndim < 2}.isdisjoint(decaying)


def test_groups_hold_every_parameter_once_and_the_bias_learns_faster() -> None:
    task = siglip()
    config = siglip_tiny().optim
    groups = parameter_groups(task, config)
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))
    fast = [group for group in groups if group["multiplier"] == 10.0]
    assert [parameter is task.logit_bias.bias for group in fast for parameter in group["params"]] == [True]
    assert fast[0]["weight_decay"] == 0.0
    assert fast[0]["lr"] == pytest.approx(10 * config.learning_rate)
    assert build(task, config).defaults["fused"]


def test_the_learning_rate_falls_from_block_to_block() -> None:
    task = siglip()
    config = OptimConfig(
        learning_rate=1.0, multipliers={"towers.vision.patch": 2.0}, layer_decay={"towers.vision": 0.5}
    )
    rate = {id(one): group["lr"] for group in parameter_groups(task, config) for one in group["params"]}
    named = {name: rate[id(parameter)] for name, parameter in task.named_parameters()}
    assert len(named) == len(rate)
    depth = siglip_tiny().task.vision.depth
    for name, found in named.items():
        if not name.startswith("towers.vision."):
            assert found == 1.0, name
        elif ".blocks." in name:
            assert found == 0.5 ** (depth - int(name.split(".blocks.")[1].split(".")[0])), name
    assert named["towers.vision.norm.weight"] == 1.0
    assert named["towers.vision.positions"] == named["towers.vision.class_token"] == 0.5 ** (depth + 1)
    assert named["towers.vision.patch.weight"] == 2 * 0.5 ** (depth + 1)
    assert umcl_b16().optim.layer_decay == {"towers.vision": 0.75}


@pytest.mark.parametrize(
    ("recipe", "change"), [("bone:align_tiny", "task.pooling=mean"), ("bone:align_sigmoid_tiny", "task.loss=info_nce")]
)
def test_a_multiplier_of_what_a_switch_leaves_out_is_no_mistake(recipe: str, change: str) -> None:
    config = apply_overrides(load_recipe(recipe), [change])
    multipliers = {"view_pool": 5.0, "logit_bias": 10.0}  # of those two one is gone, or both
    task = config.task.build(vocab_size=50)
    assert len(parameter_groups(task, OptimConfig(multipliers=multipliers))) >= 2
    with pytest.raises(ConfigError, match="'view_pol' matches no"):
        parameter_groups(task, OptimConfig(multipliers={"view_pol": 5.0}))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"matches no trainable parameter, such as .*; mend it or leave it out"):
        parameter_groups(siglip(), OptimConfig(multipliers={"logit_bais": 2.0}))
    with pytest.raises(ConfigError, match=r"'towers\.visoin' has no trainable blocks"):
        parameter_groups(siglip(), OptimConfig(layer_decay={"towers.visoin": 0.5}))
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
    for bad in (
        {"layer_decay": {"a": 0.0}},
        {"learning_rate": 0.0},
        {"betas": (0.9, 1.0)},
        {"final_factor": 2.0},
        {"warmup_steps": -1},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            OptimConfig(**bad)  # type: ignore[arg-type]
    assert clip_b16().optim.multipliers == {}


STARTS = """
import sys, torch
from core.engine import _import_deepspeed
from core.optim import OptimConfig, build
_import_deepspeed()
module = torch.nn.Linear(3, 2)
optimizer = build(module, OptimConfig())
module(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
"""


def test_a_start_does_not_import_torchs_compiler() -> None:
    subprocess.run([sys.executable, "-c", STARTS], cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_steps_are_those_of_torchs_own_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2, "fused": True}
    optimizers = [optim.AdamW(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)]
    for _ in range(3):
        x = torch.randn(4, 5)
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.requires_grad
