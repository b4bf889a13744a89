"""Contrastive losses over all pairs of an `Expansion`, differentiable, without ever holding N x M.

The forward pass keeps a few numbers a row, whatever the number of columns; the backward pass computes the logits again,
tile by tile (`sweep`). Small problems take the stored form, which is faster there. Gradients reach rows, columns, both
biases, scale and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.gaussian_similarity import reference, sweep
from kernels.gaussian_similarity.expansion import Expansion
from kernels.gaussian_similarity.problem import Gradients, Problem, loss_of, positives, shift, weights

# Below so many pairs the stored form is not slower and takes little memory.
STORED_PAIRS = 1 << 21


def info_nce(
    pairs: Expansion, scale: Tensor, row_keys: Tensor, column_keys: Tensor, *, stored: bool | None = None
) -> Tensor:
    """Symmetric InfoNCE of the logits `scale * similarity`; positives are the pairs of equal key. Scalar.

    Args:
        pairs: N rows, M columns, K dimensions.
        scale: scalar, above 0. A bias would cancel in both softmaxes, so there is none.
        row_keys, column_keys: int64 [N] and [M]. A row's positives share its target equally.
        stored: True holds the logits, False never does, None chooses by size.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, values that are not finite.
    """
    _check(pairs, {"scale": scale}, row_keys, column_keys)
    if _is_stored(pairs, stored):
        return reference.info_nce(_stored_logits(pairs, scale), row_keys, column_keys)
    loss: Tensor = _InfoNCE.apply(*_inputs(pairs), scale, pairs, row_keys, column_keys)
    return loss


def pairwise_sigmoid(
    pairs: Expansion,
    scale: Tensor,
    bias: Tensor,
    row_keys: Tensor,
    column_keys: Tensor,
    *,
    stored: bool | None = None,
) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343) of the logits `scale * similarity + bias`, over N. Scalar; as `info_nce`."""
    _check(pairs, {"scale": scale, "bias": bias}, row_keys, column_keys)
    if _is_stored(pairs, stored):
        return reference.pairwise_sigmoid(_stored_logits(pairs, scale) + bias, row_keys, column_keys)
    loss: Tensor = _PairwiseSigmoid.apply(*_inputs(pairs), scale, bias, pairs, row_keys, column_keys)
    return loss


def _inputs(pairs: Expansion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pairs.rows, pairs.columns, pairs.row_bias, pairs.column_bias


def _is_stored(pairs: Expansion, stored: bool | None) -> bool:
    return len(pairs.rows) * len(pairs.columns) <= STORED_PAIRS if stored is None else stored


def _stored_logits(pairs: Expansion, scale: Tensor) -> Tensor:
    return scale * pairs.similarity()


def _check(pairs: Expansion, scalars: dict[str, Tensor], row_keys: Tensor, column_keys: Tensor) -> None:
    """Raises ValueError naming the tensor."""
    rows, columns = pairs.rows, pairs.columns
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"rows {tuple(rows.shape)} and columns {tuple(columns.shape)} must be [N, K] and [M, K]")
    if 0 in (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns: a contrast needs one of each at least")
    shapes = {"row_bias": (len(rows),), "column_bias": (len(columns),), **dict.fromkeys(scalars, ())}
    tensors = {
        "rows": rows,
        "columns": columns,
        "row_bias": pairs.row_bias,
        "column_bias": pairs.column_bias,
        **scalars,
    }
    for name, value in tensors.items():
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != rows.dtype:
            raise ValueError(f"{name} is {value.dtype}, rows are {rows.dtype}; all must be float32, or all float64")
        if value.device != rows.device:
            raise ValueError(f"{name} is on {value.device}, rows on {rows.device}")
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"{name} is {tuple(value.shape)}, {shapes[name]} was expected")
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            first = tuple((~finite).nonzero()[0].tolist())
            raise ValueError(f"{name} holds {float(value[first])} at {first}")
    for name, keys, count in (("row_keys", row_keys, len(rows)), ("column_keys", column_keys, len(columns))):
        if keys.dtype != torch.int64 or tuple(keys.shape) != (count,):
            raise ValueError(f"{name} is {keys.dtype} {tuple(keys.shape)}, int64 ({count},) was expected")
        if keys.device != rows.device:
            raise ValueError(f"{name} is on {keys.device}, rows on {rows.device}")


def _of_inputs(found: Gradients, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of rows, columns, row_bias, column_bias and scale."""
    inputs = (found.rows, found.columns, found.row_bias, found.column_bias, found.scale)
    return tuple(each * upstream for each in inputs)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *_, scale, pairs, row_keys, column_keys = arguments
        problem = Problem.of(pairs, scale, row_keys, column_keys)
        found = sweep.statistics(problem)
        row_log_sum, column_log_sum = found.log_sum()
        row_count, column_count = positives(row_keys, column_keys), positives(column_keys, row_keys)
        row_weight = weights(row_count, dtype=scale.dtype)
        column_weight = weights(column_count, dtype=scale.dtype)
        row_target, column_target = row_weight / row_count.clamp_min(1), column_weight / column_count.clamp_min(1)
        ctx.problem = problem
        ctx.seed = {
            "row_shift": shift(row_weight, row_log_sum),
            "column_shift": shift(column_weight, column_log_sum),
            "row_target": row_target,
            "column_target": column_target,
        }
        return loss_of(row_weight, row_log_sum, row_target, found.row_positive) + loss_of(
            column_weight, column_log_sum, column_target, found.column_positive
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_of_inputs(sweep.gradients(ctx.problem, **ctx.seed), upstream), None, None, None)


class _PairwiseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *_, scale, bias, pairs, row_keys, column_keys = arguments
        ctx.problem, ctx.bias = Problem.of(pairs, scale, row_keys, column_keys), bias.detach()
        return sweep.sigmoid_statistics(ctx.problem, ctx.bias) / len(pairs.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = sweep.sigmoid_gradients(ctx.problem, ctx.bias)
        assert found.bias is not None
        upstream = upstream / len(ctx.problem.rows)
        return (*_of_inputs(found, upstream), found.bias * upstream, None, None, None)
