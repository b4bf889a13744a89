"""Similarities that are a matrix product: Gaussians to rows and columns whose product, with two biases, is the value.

    similarity[i, j] = rows[i] . columns[j] + row_bias[i] + column_bias[j]

Distances come with a minus sign, so that larger is closer. Everything here costs N x D and is differentiated by
autograd; what is quadratic in N lies in `op`. A difference of means is blind to a shift of all means, so a common
centre is taken off before values are rounded, and the biases are those of the rounded values: with either left out
bf16 loses ten times the precision (README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

Precision = Literal["bf16", "tf32", "split", "fp32"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function` with autocast off: it would take its products and norms in bf16 whatever `precision` says."""

    @wraps(function)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return outside


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """rows [N, K], columns [M, K], row_bias [N], column_bias [M]; `precision` of the inputs of their product.

    `sources` are the tensors it was made of, under the names that an error should call them by: `rows` and `columns`
    are among them where values too large for their dtype do not show in the biases.
    """

    rows: Tensor
    columns: Tensor
    row_bias: Tensor
    column_bias: Tensor
    precision: Precision = "fp32"
    sources: Mapping[str, Tensor] = field(default_factory=dict)

    @without_autocast
    def similarity(self) -> Tensor:
        """All pairs [N, M], stored: for tests and small sets."""
        return self.rows @ self.columns.transpose(0, 1) + self.row_bias[:, None] + self.column_bias[None, :]


@without_autocast
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
    sources = named_gaussians(mean_a, logvar_a, mean_b, logvar_b)
    a = torch.cat([mean_a, torch.exp(logvar_a / 2)], dim=1)
    b = torch.cat([mean_b, torch.exp(logvar_b / 2)], dim=1)
    return _euclidean(a, b, precision, centre, sources)


@without_autocast
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
    sources = named_gaussians(mean_a, logvar_a, mean_b, logvar_b)
    euclidean = _euclidean(mean_a, mean_b, precision, centre, sources)
    return replace(
        euclidean,
        row_bias=euclidean.row_bias - logvar_a.exp().sum(1),
        column_bias=euclidean.column_bias - logvar_b.exp().sum(1),
    )


@without_autocast
def kl_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Expansion:
    """Minus KL(a_i || b_j), K = 2D; fp32 only: its terms are far larger than their sum."""
    sources = named_gaussians(mean_a, logvar_a, mean_b, logvar_b)
    precise_b = torch.exp(-logvar_b)
    rows = torch.cat([logvar_a.exp() + mean_a**2, mean_a], dim=1)
    columns = torch.cat([-0.5 * precise_b, mean_b * precise_b], dim=1)
    return Expansion(
        rows=rows,
        columns=columns,
        row_bias=0.5 * (logvar_a.sum(1) + mean_a.shape[1]),
        column_bias=-0.5 * (mean_b**2 * precise_b + logvar_b).sum(1),
        sources=sources | {"rows": rows, "columns": columns},
    )


@without_autocast
def jeffreys_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Expansion:
    """Minus KL(a_i || b_j) + KL(b_j || a_i), K = 4D; fp32 only."""
    sources = named_gaussians(mean_a, logvar_a, mean_b, logvar_b)
    precise_a, precise_b = torch.exp(-logvar_a), torch.exp(-logvar_b)
    rows = torch.cat([logvar_a.exp() + mean_a**2, precise_a, mean_a, mean_a * precise_a], dim=1)
    columns = torch.cat([-0.5 * precise_b, -0.5 * (logvar_b.exp() + mean_b**2), mean_b * precise_b, mean_b], dim=1)
    return Expansion(
        rows=rows,
        columns=columns,
        row_bias=mean_a.shape[1] - 0.5 * (mean_a**2 * precise_a).sum(1),
        column_bias=-0.5 * (mean_b**2 * precise_b).sum(1),
        sources=sources | {"rows": rows, "columns": columns},
    )


@without_autocast
def cosine(a: Tensor, b: Tensor, *, precision: Precision = "bf16") -> Expansion:
    """Cosine of embeddings [N, D] and [M, D] that are no distributions: CLIP's similarity."""
    return inner_product(normalize(a, dim=1), normalize(b, dim=1), precision=precision)


@without_autocast
def inner_product(a: Tensor, b: Tensor, *, precision: Precision = "bf16") -> Expansion:
    """Of vectors [N, D] and [M, D] as they come: the cosine of those that have length 1 already."""
    rows, columns = _straight_through(a, precision), _straight_through(b, precision)
    return Expansion(
        rows=rows,
        columns=columns,
        row_bias=rows.new_zeros(len(rows)),
        column_bias=columns.new_zeros(len(columns)),
        precision=precision,
        sources={"row embeddings": a, "column embeddings": b},
    )


def named_gaussians(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> dict[str, Tensor]:
    """The four under the names of messages. Raises ValueError: no two sets in D dimensions of one dtype and device."""
    named = {"row mean": mean_a, "row logvar": logvar_a, "column mean": mean_b, "column logvar": logvar_b}
    for name, value in named.items():
        of = mean_a if name.startswith("row") else mean_b
        if value.ndim != 2 or value.shape != of.shape or value.shape[1] != mean_a.shape[1] or value.shape[1] == 0:
            shapes = ", ".join(f"{each} {tuple(tensor.shape)}" for each, tensor in named.items())
            raise ValueError(f"{shapes}: must be [N, D] twice and [M, D] twice, D above 0")
        if (value.dtype, value.device) != (mean_a.dtype, mean_a.device):
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}, row mean {mean_a.dtype} on {mean_a.device}; "
                "all four must be alike"
            )
    return named


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
        value = rounded(x - centre, precision).mul_(factor)
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
    return x if precision == "fp32" else x + (rounded(x.detach(), precision) - x.detach())


def rounded(value: Tensor, precision: Precision) -> Tensor:
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
    nearest = ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(value.dtype)
    return torch.where(torch.isfinite(value), nearest, value)  # the bits of some that are no number would become 0
