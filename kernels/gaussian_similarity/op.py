"""Contrastive losses over all pairs of an `Expansion`, differentiable, never holding N x M; retrieval, re-ranking.

The forward pass keeps a few numbers a row, whatever the number of columns; the backward pass computes the logits again,
tile by tile (`sweep`). Small problems on the CPU take the stored form, which is faster there. Gradients reach rows,
columns, both biases, scale and bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gaussian_similarity import blocked, densities, sweep
from kernels.gaussian_similarity import stored as small
from kernels.gaussian_similarity.expansion import Expansion, named_gaussians, without_autocast
from kernels.gaussian_similarity.problem import Gradients, Problem, Teacher, loss_of, positives, shift, weights

# Below so many pairs the stored form is not slower and takes little memory.
STORED_PAIRS = 1 << 22
# Largest absolute log-variance of `pairwise` in fp32: the kernel multiplies four sums of two variances.
LARGEST_LOGVAR = 21.0


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Targets that are `1 - weight` of the positives' share and `weight` of a teacher's softmax, both ways.

    `pairs` are the student's pairs as the teacher sees them, with a K of their own; `scale` [] its logit scale. No
    gradient reaches either.
    """

    pairs: Expansion
    scale: Tensor
    weight: float


@without_autocast
def info_nce(
    pairs: Expansion,
    scale: Tensor,
    row_keys: Tensor,
    column_keys: Tensor,
    *,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
    teacher: SoftTargets | None = None,
    stored: bool | None = None,
) -> Tensor:
    """Symmetric InfoNCE of the logits `scale * similarity`; positives are the pairs of equal key. Scalar.

    A row or column without a positive is left out of its mean.

    Args:
        pairs: N rows, M columns, K dimensions.
        scale: scalar, above 0. A bias would cancel in both softmaxes, so there is none.
        row_keys, column_keys: int64 [N] and [M]. A row's positives share its target equally.
        row_groups, column_groups: int64 [N] and [M], not decreasing: each group is a contrast of its own, as if no
            other row existed; their losses add up.
        teacher: soft targets beside the positives.
        stored: True holds the logits, False never does, None chooses by size.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, values that are not finite, a scale of 0 or below.
    """
    _check(pairs, {"scale": scale}, row_keys, column_keys, row_groups, column_groups)
    if teacher is not None:
        _check_teacher(pairs, teacher)
    if stored and (row_groups is not None or teacher is not None):
        raise ValueError("stored=True holds one contrast with class targets; leave it out for groups or a teacher")
    holds = row_groups is None and teacher is None and _is_stored(pairs, stored)
    problem = Problem.of(pairs, scale, row_keys, column_keys, row_groups, column_groups)
    loss: Tensor = _InfoNCE.apply(*_inputs(pairs), scale, problem, teacher, holds)
    return loss


@without_autocast
def pairwise_sigmoid(
    pairs: Expansion,
    scale: Tensor,
    bias: Tensor,
    row_keys: Tensor,
    column_keys: Tensor,
    *,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
    stored: bool | None = None,
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343) of the logits `scale * similarity + bias`, over N. Scalar; as `info_nce`."""
    _check(pairs, {"scale": scale, "bias": bias}, row_keys, column_keys, row_groups, column_groups)
    if stored and row_groups is not None:
        raise ValueError("stored=True holds one contrast; leave it out for groups")
    holds = row_groups is None and _is_stored(pairs, stored)
    problem = Problem.of(pairs, scale, row_keys, column_keys, row_groups, column_groups)
    loss: Tensor = _PairwiseSigmoid.apply(*_inputs(pairs), scale, bias, problem, holds)
    return loss


@without_autocast
def top_k(pairs: Expansion | Iterable[Expansion], k: int) -> tuple[Tensor, Tensor]:
    """The `k` most similar columns of each row, most similar first: values [N, k] and places, int64 [N, k].

    Args:
        pairs: one expansion, or one after the other for a gallery that does not fit: the same rows against the next
            columns, with one `centre` for all. Places count on through them.
        k: at least 1; with fewer columns all of them are given. Equal values come in any order. No gradient.

    Raises:
        ValueError: as `info_nce`; k below 1, no expansion, another number of rows in a later one.
    """
    if k < 1:
        raise ValueError(f"k is {k}; ask for 1 at least")
    best, seen = None, 0
    with torch.no_grad():
        for chunk in [pairs] if isinstance(pairs, Expansion) else pairs:
            _check_pairs(chunk, {})
            values, places = blocked.top_k(chunk, k)
            if best is None:
                best = values, places
            elif len(values) != len(best[0]):
                raise ValueError(f"{len(values)} rows after chunks with {len(best[0])}; all need the same rows")
            else:
                best = blocked.merge_top(k, best, (values, places + seen))
            seen += len(chunk.columns)
    if best is None:
        raise ValueError("no expansion to search in")
    return best


@without_autocast
def pairwise(name: densities.Name, mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Similarity [N, M] of a kind that is no matrix product: minus the distance, or the log expected likelihood.

    Costs N x M x D, and holds N x M and small tiles: for a shortlist. Differentiable; tiles are computed again.

    Raises:
        ValueError: an unknown name, shapes, dtypes or devices that do not fit, values that are not finite, in float32
            log-variances beyond 21 either way.
    """
    if name not in densities.FORMULAS:
        raise ValueError(f"similarity {name!r} is unknown; there are {', '.join(densities.FORMULAS)}")
    named = named_gaussians(mean_a, logvar_a, mean_b, logvar_b)
    if mean_a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"row mean is {mean_a.dtype}; all must be float32, or all float64")
    _check_finite(named)
    if mean_a.dtype == torch.float32:
        _check_range({side: named[side] for side in ("row logvar", "column logvar")})
    similarity: Tensor = _Pairwise.apply(mean_a, logvar_a, mean_b, logvar_b, name)
    return similarity


def _inputs(pairs: Expansion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pairs.rows, pairs.columns, pairs.row_bias, pairs.column_bias


def _is_stored(pairs: Expansion, stored: bool | None) -> bool:
    if stored is not None:
        return stored
    return pairs.rows.device.type == "cpu" and len(pairs.rows) * len(pairs.columns) <= STORED_PAIRS


def _check(
    pairs: Expansion,
    scalars: dict[str, Tensor],
    row_keys: Tensor,
    column_keys: Tensor,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
) -> None:
    """Raises ValueError naming the tensor."""
    _check_pairs(pairs, scalars)
    rows, columns = pairs.rows, pairs.columns
    if (row_groups is None) != (column_groups is None):
        raise ValueError("groups of one side only: give both row_groups and column_groups, or neither")
    whole_numbers = [("row_keys", row_keys, rows), ("column_keys", column_keys, columns)]
    if row_groups is not None and column_groups is not None:
        whole_numbers += [("row_groups", row_groups, rows), ("column_groups", column_groups, columns)]
    for name, value, of in whole_numbers:
        if value.dtype != torch.int64 or tuple(value.shape) != (len(of),):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, int64 ({len(of)},) was expected")
        if value.device != rows.device:
            raise ValueError(f"{name} is on {value.device}, rows on {rows.device}")
    for name, groups in (("row_groups", row_groups), ("column_groups", column_groups)):
        if groups is not None and bool((groups.diff() < 0).any()):
            place = int((groups.diff() < 0).nonzero()[0]) + 1
            raise ValueError(f"{name} decreases at {place}; sort rows by group first")


def _check_pairs(pairs: Expansion, scalars: dict[str, Tensor]) -> None:
    rows, columns = pairs.rows, pairs.columns
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1] or rows.shape[1] == 0:
        raise ValueError(
            f"rows {tuple(rows.shape)} and columns {tuple(columns.shape)} must be [N, K] and [M, K] with K above 0"
        )
    if 0 in (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns: a contrast needs one of each at least")
    shapes = {"row_bias": (len(rows),), "column_bias": (len(columns),), **dict.fromkeys(scalars, ())}
    tensors = {"rows": rows, "columns": columns, "row_bias": pairs.row_bias, "column_bias": pairs.column_bias}
    tensors |= scalars
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != rows.dtype:
            raise ValueError(f"{name} is {value.dtype}, rows are {rows.dtype}; all must be float32, or all float64")
        if value.device != rows.device:
            raise ValueError(f"{name} is on {value.device}, rows on {rows.device}")
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"{name} is {tuple(value.shape)}, {shapes[name]} was expected")
    # Rows too large for their dtype, of sources that are not, show in the biases, or else are sources themselves.
    read = {*pairs.sources, *tensors.keys() - {"rows", "columns"}} if pairs.sources else tensors
    _check_finite({**pairs.sources, **tensors}, read)
    if "scale" in scalars and not scalars["scale"].detach() > 0:
        raise ValueError(f"scale is {scalars['scale'].item()}; it must be above 0")


def _check_finite(tensors: Mapping[str, Tensor], read: Iterable[str] | None = None) -> None:
    """The first of `tensors` that is not finite is named; only those of `read` are looked at where all is well."""
    # A value that is not finite shows in a sum over all: one pass and one answer instead of one for each tensor.
    with torch.no_grad():
        sums = [value.sum() for name, value in tensors.items() if read is None or name in read]
        if math.isfinite(float(torch.stack(sums).sum())):
            return
    for name, value in tensors.items():
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            first = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name} holds {float(value[first])} at {first}")


def _check_range(logvars: Mapping[str, Tensor]) -> None:
    for name, value in logvars.items():
        outside = value.abs() > LARGEST_LOGVAR
        if bool(outside.any()):
            first = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"{name} holds {float(value[first])} at {first}, beyond {LARGEST_LOGVAR}: bound it, or use float64"
            )


def _check_teacher(pairs: Expansion, teacher: SoftTargets) -> None:
    if not 0 <= teacher.weight <= 1:
        raise ValueError(f"teacher weight {teacher.weight} is not in [0, 1]")
    try:
        _check_pairs(teacher.pairs, {"scale": teacher.scale})
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from None
    ours, theirs = pairs.rows, teacher.pairs.rows
    sizes = (len(ours), len(pairs.columns)), (len(theirs), len(teacher.pairs.columns))
    if sizes[0] != sizes[1] or (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        raise ValueError(
            f"teacher has {sizes[1][0]} x {sizes[1][1]} pairs in {theirs.dtype} on {theirs.device}, "
            f"the student {sizes[0][0]} x {sizes[0][1]} in {ours.dtype} on {ours.device}"
        )


def _of_inputs(found: Gradients, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of rows, columns, row_bias, column_bias and scale, in the memory of `found`."""
    inputs = (found.rows, found.columns, found.row_bias, found.column_bias, found.scale)
    return tuple(each.mul_(upstream) for each in inputs)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem, soft, holds = arguments[-3:]
        dtype = problem.rows.dtype
        row_keys, column_keys, groups = problem.row_keys, problem.column_keys, problem.row_groups
        row_count = positives(row_keys, column_keys, groups, problem.column_groups)
        column_count = positives(column_keys, row_keys, problem.column_groups, groups)
        row_weight = weights(row_count, groups, dtype=dtype)
        column_weight = weights(column_count, problem.column_groups, dtype=dtype)
        share = 1.0 if soft is None else 1 - soft.weight
        targets = {
            "row_target": share * row_weight / row_count.clamp_min(1),
            "column_target": share * column_weight / column_count.clamp_min(1),
        }
        ctx.problem, ctx.teacher, ctx.seed, ctx.held = problem, None, targets, None
        if holds:
            sweep.log_once("small problems with stored logits")
            loss, *held = small.info_nce(problem, row_weight=row_weight, column_weight=column_weight, **targets)
            ctx.held = held
            return loss
        if soft is not None:
            ctx.teacher = _teacher(problem, soft, row_weight, column_weight)
        found = sweep.statistics(problem, teacher=ctx.teacher)
        row_log_sum, column_log_sum = found.log_sum()
        ctx.seed["row_shift"] = shift(row_weight, row_log_sum)
        ctx.seed["column_shift"] = shift(column_weight, column_log_sum)
        loss = loss_of(row_weight, row_log_sum, targets["row_target"], found.row_positive)
        loss += loss_of(column_weight, column_log_sum, targets["column_target"], found.column_positive)
        if found.row_teacher is not None and found.column_teacher is not None:
            loss -= found.row_teacher.sum() + found.column_teacher.sum()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.held is not None:
            found = small.gradients(ctx.problem, *ctx.held)
        else:
            found = sweep.gradients(ctx.problem, teacher=ctx.teacher, **ctx.seed)
        return (*_of_inputs(found, upstream), None, None, None)


def _teacher(problem: Problem, soft: SoftTargets, row_weight: Tensor, column_weight: Tensor) -> Teacher:
    """The teacher's targets, weights of the loss included."""
    keys = problem.row_keys, problem.column_keys
    own = Problem.of(soft.pairs, soft.scale, *keys, problem.row_groups, problem.column_groups)
    row_log_sum, column_log_sum = sweep.statistics(own).log_sum()
    return Teacher(
        problem=own,
        row_shift=shift(soft.weight * row_weight, row_log_sum),
        column_shift=shift(soft.weight * column_weight, column_log_sum),
    )


class _PairwiseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        bias, problem, holds = arguments[-3:]
        ctx.problem, ctx.bias, ctx.held = problem, bias.detach(), None
        if holds:
            sweep.log_once("small problems with stored logits")
            total, *ctx.held = small.pairwise_sigmoid(problem, ctx.bias)
        else:
            total = sweep.sigmoid_statistics(problem, ctx.bias)
        return total / len(problem.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.held is not None:
            found = small.gradients(ctx.problem, *ctx.held, with_bias=True)
        else:
            found = sweep.sigmoid_gradients(ctx.problem, ctx.bias)
        assert found.bias is not None
        upstream = upstream / len(ctx.problem.rows)
        return (*_of_inputs(found, upstream), found.bias * upstream, None, None)


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *gaussians, ctx.name = arguments
        ctx.save_for_backward(*gaussians)
        return sweep.density(ctx.name, tuple(each.detach() for each in gaussians))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*sweep.density_gradients(ctx.name, ctx.saved_tensors, upstream), None)
