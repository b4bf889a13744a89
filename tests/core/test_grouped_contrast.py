"""The grouped contrast (one group an anatomy) against a straight loop over groups in fp64, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import collectives
from core.losses import contrast
from kernels.gaussian_similarity import reference
from tests.distributed import run_distributed

STUDIES, GROUPS, SIZE = 11, 5, 6
# Studies of each rank. With 2 and 4 ranks one of them has no study, another none that has any anatomy.
SPLITS = {1: ((11,),), 2: ((6, 5), (11, 0)), 4: ((3, 3, 3, 2), (6, 0, 3, 2))}
SOFT = ("none", "added", "mixed")
SIMILARITIES: tuple[contrast.Similarity, ...] = ("cosine", "wasserstein")
SCALE, TEACHER_SCALE, WEIGHT = 3.0, 2.5, 0.7


def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings [B, A, E], keys and members [B, A]: group 3 has one row, group 4 none, the last two studies none."""
    generator = torch.Generator().manual_seed(5)
    shape = (STUDIES, GROUPS, SIZE)
    found: dict[str, Tensor] = {}
    for side in ("image", "text"):
        mean, spread = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        found[f"{side}_embeds"] = F.normalize(mean, dim=2).to(dtype)
        found[f"{side}_mean"], found[f"{side}_logvar"] = mean.to(dtype), (0.4 * spread - 1.0).to(dtype)
    found["key"] = torch.randint(0, 5, (STUDIES, GROUPS), generator=generator)  # 0: normal
    member = torch.rand(STUDIES, GROUPS, generator=generator) < 0.8
    member[:, 3] = torch.arange(STUDIES) == 4
    member[:, 4] = False
    member[-2:] = False
    found["member"] = member
    texts = F.normalize(torch.randn(5, SIZE, generator=generator, dtype=torch.float64), dim=1)
    found["teacher_text"] = texts[found["key"]].to(dtype)  # equal keys, equal texts
    found["teacher_image"] = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=2).to(dtype)
    return found


def straight(inputs: dict[str, Tensor], scale: Tensor, similarity: str, soft: str) -> Tensor:
    """Group after group, the whole target matrix written out."""
    total = scale.new_zeros(())
    for group in range(GROUPS):
        rows = inputs["member"][:, group]
        if not rows.any():
            continue
        of = {name: value[rows, group] for name, value in inputs.items()}
        if similarity == "cosine":
            pairs = of["image_embeds"] @ of["text_embeds"].T
        else:
            four = [of[f"{side}_{part}"] for side in ("image", "text") for part in ("mean", "logvar")]
            pairs = -reference.squared_wasserstein(*four)
        alike = of["key"][:, None] == of["key"]
        for logits, theirs in ((pairs, teacher_logits(of, soft)), (pairs.T, teacher_logits(of, soft).T)):
            target = targets(alike, theirs, of["key"] != 0, soft)
            total = total - 0.5 * (target * (scale * logits).log_softmax(1)).sum(1).mean()
    return total


def teacher_logits(of: dict[str, Tensor], soft: str) -> Tensor:
    rows = of["teacher_text"] if soft != "mixed" else of["teacher_image"]
    return TEACHER_SCALE * rows @ of["teacher_text"].T


def targets(alike: Tensor, theirs: Tensor, abnormal: Tensor, soft: str) -> Tensor:
    """fvlm.md 3.4 (`added`) and 3.3 (`mixed`), with the weight of the ramp."""
    target = alike.to(theirs.dtype)
    if soft == "added":
        both = abnormal[:, None] & abnormal
        softmax = torch.where(both, theirs, -torch.inf).softmax(1).nan_to_num()
        target = torch.where(alike, 1.0, WEIGHT * softmax)
    target = target / target.sum(1, keepdim=True)
    if soft == "mixed":
        target = torch.where(abnormal[:, None], (1 - WEIGHT) * target + WEIGHT * theirs.softmax(1), target)
    return target


def of_rows(similarity: Any, soft: str, exchange: Any, own: slice, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """A rank's share and the gradients of its own rows, and of the scale."""
    inputs = {name: value[own] for name, value in inputs_of(dtype).items()}
    learned = [f"{side}_{part}" for side in ("image", "text") for part in ("embeds", "mean", "logvar")]
    leaves = {name: inputs[name].clone().requires_grad_() for name in learned}
    leaves["scale"] = torch.tensor(SCALE, dtype=dtype, requires_grad=True)
    taught = None
    if soft != "none":
        taught = contrast.SoftTargets(
            rows=inputs["teacher_text"] if soft == "added" else inputs["teacher_image"],
            columns=inputs["teacher_text"],
            scale=torch.tensor(TEACHER_SCALE),
            taught=inputs["key"] != 0,
            weight=torch.tensor(WEIGHT, dtype=torch.float64),
            how=soft,  # type: ignore[arg-type]
        )
    gathered = collectives.gather({**inputs, **leaves, "scale": inputs["key"]}, exchange=exchange)
    found = contrast.grouped_info_nce(
        gathered, scale=leaves["scale"], similarity=similarity, key="key", member="member", soft=taught,
        precision="fp32",
    )  # fmt: skip
    gradients = torch.autograd.grad(found.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found.loss.detach(), (found.row_to_column + found.column_to_row) / 2)
    named = dict(zip(leaves, gradients, strict=True)) | {"loss": found.loss.detach()}
    return {name: value.numpy() for name, value in named.items()}


def expected(similarity: str, soft: str) -> dict[str, np.ndarray]:
    inputs = inputs_of(torch.float64)
    learned = [name for name, value in inputs.items() if value.is_floating_point() and "teacher" not in name]
    leaves = {name: inputs[name].requires_grad_() for name in learned}
    leaves["scale"] = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = straight(inputs, leaves["scale"], similarity, soft)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip(leaves, gradients, strict=True)) | {"loss": loss.detach()}
    return {name: value.numpy() for name, value in named.items()}


def cases(world_size: int) -> list[tuple[Any, ...]]:
    dtypes = ("float32", "float64") if world_size == 1 else ("float32",)
    return list(product(SIMILARITIES, SOFT, ("gather", "ring"), SPLITS[world_size], dtypes))


def on_rank(rank: int, world_size: int) -> dict[Any, Any]:
    found = {}
    for case in cases(world_size):
        similarity, soft, exchange, split, dtype = case
        own = slice(sum(split[:rank]), sum(split[: rank + 1]))
        found[case] = of_rows(similarity, soft, exchange, own, getattr(torch, dtype))
    return found


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_loss_and_gradients_of_a_loop_over_groups(world_size: int) -> None:
    """Both exchanges; ranks without a row of some group, without any row, without any study."""
    ranks = [on_rank(0, 1)] if world_size == 1 else run_distributed(on_rank, world_size)
    wanted = {each: expected(*each) for each in product(SIMILARITIES, SOFT)}
    for case in cases(world_size):
        bound = 1e-5 if case[-1] == "float32" else 1e-12
        for name, value in wanted[case[:2]].items():
            parts = [rank[case][name] for rank in ranks]
            found = np.concatenate(parts) if value.ndim else sum(parts)
            assert np.abs(found - value).max() <= bound * max(1.0, np.abs(value).max()), (case, name)


def test_a_group_of_normals_alone_pulls_all_of_them_together_and_a_lone_row_costs_nothing() -> None:
    inputs = inputs_of(torch.float64)
    inputs["key"] = torch.zeros_like(inputs["key"])
    inputs["member"][:, [0, 1, 2]] = False
    gathered = collectives.gather(inputs)
    found = contrast.grouped_info_nce(gathered, scale=torch.tensor(4.0), key="key", member="member")
    assert found.loss.item() == 0
    short = replace(gathered, own={**gathered.own, "key": gathered.own["key"].int()})
    with pytest.raises(ValueError, match=r"key is torch.int32 \(11, 5\); int64 \(11, 5\) was expected"):
        contrast.grouped_info_nce(short, scale=torch.tensor(4.0), key="key", member="member")


def test_a_teacher_at_weight_0_changes_nothing() -> None:
    inputs = inputs_of(torch.float32)
    teacher = inputs["teacher_text"]
    gathered = collectives.gather(inputs)
    soft = contrast.SoftTargets(
        rows=0 * teacher, columns=0 * teacher, scale=torch.tensor(14.0), taught=inputs["key"] != 0,
        weight=torch.tensor(0.0),
    )  # fmt: skip
    scale = torch.tensor(4.0)
    plain, taught = (
        contrast.grouped_info_nce(gathered, scale=scale, key="key", member="member", soft=each).loss
        for each in (None, soft)
    )
    torch.testing.assert_close(plain, taught)
