"""Similarities that are a matrix product: Gaussians to rows and columns whose product, with two biases, is the value.

    similarity[i, j] = rows[i] . columns[j] + row_bias[i] + column_bias[j]

Distances come with a minus sign, so that larger is closer. Everything here costs N x D and is differentiated by
autograd; what is quadratic in N lies in `op`. A difference of means is blind to a shift of all means, so a common
centre is taken off before values are rounded, and the biases are those of the rounded values: with either left out
bf16 loses ten times the precision (README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Precision = Literal["bf16", "tf32", "split", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """rows [N, K], columns [M, K], row_bias [N], column_bias [M]; `precision` of the inputs of their product.

    `sources` are the tensors it was made of, under the names that an error should call them by.
    """

    rows: Tensor
    columns: Tensor
    row_bias: Tensor
    column_bias: Tensor
    precision: Precision = "fp32"
    sources: Mapping[str, Tensor] = field(default_factory=dict)

    def similarity(self) -> Tensor:
        """All pairs [N, M], stored: for tests and small sets."""
        return self.rows @ self.columns.transpose(0, 1) + self.row_bias[:, None] + self.column_bias[None, :]


def squared_wasserstein(
    mean_a: Tensor,
    logvar_a: Tensor,
    mean_b: Tensor,
    logvar_b: Tensor,
    *,
    precision: Precision = "bf16",
    centre: Tensor | None = None,
) -> Expansion:
    """Minus the squared 2-Wasserstein distance: a Euclidean one of [mean; sigma], K = 2D.

    `centre` [2D], alike on all ranks; None: midway between the means of both sides, of these rows.
    """
    a = torch.cat([mean_a, torch.exp(logvar_a / 2)], dim=1)
    b = torch.cat([mean_b, torch.exp(logvar_b / 2)], dim=1)
    return _euclidean(a, b, precision, centre, _sources(mean_a, logvar_a, mean_b, logvar_b))


def sampled_distance(
    mean_a: Tensor,
    logvar_a: Tensor,
    mean_b: Tensor,
    logvar_b: Tensor,
    *,
    precision: Precision = "bf16",
    centre: Tensor | None = None,
) -> Expansion:
    """Minus the closed-form sampled distance (CSD), K = D: variances enter the biases alone. `centre` [D]."""
    sources = _sources(mean_a, logvar_a, mean_b, logvar_b)
    euclidean = _euclidean(mean_a, mean_b, precision, centre, sources)
    return replace(
        euclidean,
        row_bias=euclidean.row_bias - logvar_a.exp().sum(1),
        column_bias=euclidean.column_bias - logvar_b.exp().sum(1),
    )


def kl_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Expansion:
    """Minus KL(a_i || b_j), K = 2D; fp32 only: its terms are far larger than their sum."""
    precise_b = torch.exp(-logvar_b)
    return Expansion(
        rows=torch.cat([logvar_a.exp() + mean_a**2, mean_a], dim=1),
        columns=torch.cat([-0.5 * precise_b, mean_b * precise_b], dim=1),
        row_bias=0.5 * (logvar_a.sum(1) + mean_a.shape[1]),
        column_bias=-0.5 * (mean_b**2 * precise_b + logvar_b).sum(1),
        sources=_sources(mean_a, logvar_a, mean_b, logvar_b),
    )


def jeffreys_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Expansion:
    """Minus KL(a_i || b_j) + KL(b_j || a_i), K = 4D; fp32 only."""
    precise_a, precise_b = torch.exp(-logvar_a), torch.exp(-logvar_b)
    return Expansion(
        rows=torch.cat([logvar_a.exp() + mean_a**2, precise_a, mean_a, mean_a * precise_a], dim=1),
        columns=torch.cat([-0.5 * precise_b, -0.5 * (logvar_b.exp() + mean_b**2), mean_b * precise_b, mean_b], dim=1),
        row_bias=mean_a.shape[1] - 0.5 * (mean_a**2 * precise_a).sum(1),
        column_bias=-0.5 * (mean_b**2 * precise_b).sum(1),
        sources=_sources(mean_a, logvar_a, mean_b, logvar_b),
    )


def cosine(a: Tensor, b: Tensor, *, precision: Precision = "bf16") -> Expansion:
    """Cosine of embeddings [N, D] and [M, D] that are no distributions: CLIP's similarity."""
    rows, columns = (_straight_through(normalize(each, dim=1), precision) for each in (a, b))
    return Expansion(
        rows=rows,
        columns=columns,
        row_bias=rows.new_zeros(len(rows)),
        column_bias=columns.new_zeros(len(columns)),
        precision=precision,
        sources={"row embeddings": a, "column embeddings": b},
    )


def _sources(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> dict[str, Tensor]:
    return {"row mean": mean_a, "row logvar": logvar_a, "column mean": mean_b, "column logvar": logvar_b}


def _euclidean(
    a: Tensor, b: Tensor, precision: Precision, centre: Tensor | None, sources: dict[str, Tensor]
) -> Expansion:
    """Minus the squared distance of a [N, K] and b [M, K]."""
    if centre is None:
        centre = 0.5 * (a.detach().mean(0) + b.detach().mean(0))
    centre = centre.detach()
    rows, row_bias = _Centred.apply(a, centre, 2.0, precision)  # twice a bf16 number is one
    columns, column_bias = _Centred.apply(b, centre, 1.0, precision)
    return Expansion(
        rows=rows,
        columns=columns,
        row_bias=row_bias,
        column_bias=column_bias,
        precision=precision,
        sources=sources,
    )


class _Centred(torch.autograd.Function):
    """`factor` times `x - centre` as it enters the product, and minus the squared norm of that without the factor.

    The gradient passes as if nothing was rounded. One function, as a chain of small ones takes longer than the
    product of a small batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor, factor: float, precision: Precision) -> tuple[Tensor, Tensor]:
        value = _rounded(x - centre, precision).mul_(factor)
        ctx.save_for_backward(value)
        ctx.factor = factor
        return value, torch.linalg.vecdot(value, value).mul_(-(factor**-2))

    @staticmethod
    def backward(ctx: Any, of_value: Tensor, of_norm: Tensor) -> tuple[Tensor, None, None, None]:
        (value,) = ctx.saved_tensors
        gradient = torch.addcmul(of_value, value, of_norm[:, None], value=-2 * ctx.factor**-2)
        return gradient.mul_(ctx.factor), None, None, None


def _straight_through(x: Tensor, precision: Precision) -> Tensor:
    """`x` rounded; the gradient passes as if it was not."""
    return x if precision == "fp32" else x + (_rounded(x.detach(), precision) - x.detach())


def _rounded(value: Tensor, precision: Precision) -> Tensor:
    """The values that enter the product, in the dtype of `value`, which has no gradient."""
    if precision == "fp32":
        return value
    if precision == "tf32":
        return _tf32(value)
    rounded = value.to(torch.bfloat16).to(value.dtype)
    if precision == "split":  # two bf16 numbers: their sum
        rounded += (value - rounded).to(torch.bfloat16)
    return rounded


def _tf32(value: Tensor) -> Tensor:
    """`value` with 10 bits of mantissa, to nearest: what tensor cores read of an fp32 number."""
    bits = value.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(value.dtype)
