"""Contrastive losses over all pairs of an `Expansion`, without ever holding N x M: tiles, statistics, recompute.

The forward pass walks once over tiles of the logits and keeps a running maximum and sum for every row and every column
at the same time. The backward pass computes each tile again and turns it into gradients at once. Five numbers a row are
kept between the two, whatever the number of columns. Small problems take the stored form, which is faster there.

Everything after the product is fp32 (fp64 for fp64 input). Gradients reach rows, columns, both biases, scale and bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from kernels.gaussian_similarity import reference
from kernels.gaussian_similarity.expansion import Expansion

# Elements of a tile: a few of its copies stay in the second-level cache of a core while it is worked on.
TILE_ROWS, TILE_COLUMNS = 512, 1024
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
    inputs = (pairs.rows, pairs.columns, pairs.row_bias, pairs.column_bias, scale)
    loss: Tensor = _InfoNCE.apply(*inputs, row_keys, column_keys, pairs.precision)
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
    loss: Tensor = _PairwiseSigmoid.apply(
        pairs.rows,
        pairs.columns,
        pairs.row_bias,
        pairs.column_bias,
        scale,
        bias,
        row_keys,
        column_keys,
        pairs.precision,
    )
    return loss


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


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def _product_of(precision: str, dtype: torch.dtype) -> Iterator[None]:
    """fp32 products on the CPU in bf16 with fp32 sums, where the rows are bf16 values already: nothing is lost."""
    if precision != "bf16" or dtype != torch.float32:
        yield
        return
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class _Tiles:
    """Logits of a problem and its positives, tile by tile."""

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        row_bias: Tensor,
        column_bias: Tensor,
        scale: Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
    ) -> None:
        self.rows, self.columns, self.row_keys, self.column_keys = rows, columns, row_keys, column_keys
        self.scale = float(scale)
        self.row_bias, self.column_bias = self.scale * row_bias[:, None], self.scale * column_bias[None, :]

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Rows i and columns j of a tile, `scale * similarity` [I, J], and which pairs share a key, None if none do."""
        for i in _slices(len(self.rows), TILE_ROWS):
            for j in _slices(len(self.columns), TILE_COLUMNS):
                logits = torch.addmm(self.column_bias[:, j], self.rows[i], self.columns[j].T, alpha=self.scale)
                yield i, j, logits.add_(self.row_bias[i]), self._positives(self.row_keys[i], self.column_keys[j])

    @staticmethod
    def _positives(row_keys: Tensor, column_keys: Tensor) -> Tensor | None:
        # Most tiles have none, and to look for one costs far less than to compare all pairs.
        if not torch.isin(row_keys, column_keys).any():
            return None
        return row_keys[:, None] == column_keys[None, :]


class _Gradients:
    """What a loss says of each logit, tile by tile, summed into gradients of the inputs."""

    def __init__(self, tiles: _Tiles) -> None:
        self._tiles = tiles
        self.rows, self.columns = torch.zeros_like(tiles.rows), torch.zeros_like(tiles.columns)
        self.of_row = tiles.rows.new_zeros(len(tiles.rows))
        self.of_column = tiles.rows.new_zeros(len(tiles.columns))
        self.of_logits = tiles.rows.new_zeros(())  # sum of seed * logit

    def add(self, i: slice, j: slice, seed: Tensor, logits: Tensor) -> None:
        """`seed` [I, J]: derivative of the loss by each logit of the tile; `logits` may be destroyed."""
        self.rows[i].addmm_(seed, self._tiles.columns[j])
        self.columns[j].addmm_(seed.T, self._tiles.rows[i])
        self.of_row[i] += seed.sum(1)
        self.of_column[j] += seed.sum(0)
        self.of_logits += logits.mul_(seed).sum()

    def inputs(self, upstream: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of rows, columns, row_bias, column_bias and scale. `of_logits` is of logits without a bias."""
        factor = upstream * scale
        return (
            self.rows * factor,
            self.columns * factor,
            self.of_row * factor,
            self.of_column * factor,
            self.of_logits * upstream / scale,
        )


def _positives(own_keys: Tensor, other_keys: Tensor) -> Tensor:
    """How many of `other_keys` equal each of `own_keys` [N], int64."""
    unique, place = torch.unique(torch.cat([own_keys, other_keys]), return_inverse=True)
    counts = torch.bincount(place[len(own_keys) :], minlength=len(unique))
    return counts[place[: len(own_keys)]]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_bias: Tensor,
        column_bias: Tensor,
        scale: Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
        precision: str,
    ) -> Tensor:
        tiles = _Tiles(rows, columns, row_bias, column_bias, scale, row_keys, column_keys)
        row_maximum, row_sum = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows))
        column_maximum, column_sum = rows.new_full((len(columns),), -torch.inf), rows.new_zeros(len(columns))
        positive_sum_of_row, positive_sum_of_column = torch.zeros_like(row_sum), torch.zeros_like(column_sum)
        with _product_of(precision, rows.dtype):
            for i, j, logits, positive in tiles:
                if positive is not None:
                    of_positive = logits * positive
                    positive_sum_of_row[i] += of_positive.sum(1)
                    positive_sum_of_column[j] += of_positive.sum(0)
                _take(row_maximum[i], row_sum[i], logits, 1)
                _take(column_maximum[j], column_sum[j], logits, 0)
        row_log_sum, column_log_sum = row_maximum + row_sum.log(), column_maximum + column_sum.log()
        row_count, column_count = _positives(row_keys, column_keys), _positives(column_keys, row_keys)
        row_weight, column_weight = _weights(row_count, rows.dtype), _weights(column_count, rows.dtype)
        ctx.save_for_backward(
            rows, columns, row_bias, column_bias, scale, row_keys, column_keys, row_log_sum, column_log_sum,
            row_weight, column_weight, row_count, column_count,
        )  # fmt: skip
        ctx.precision = precision
        of_rows = row_weight * (row_log_sum - positive_sum_of_row / row_count.clamp_min(1))
        of_columns = column_weight * (column_log_sum - positive_sum_of_column / column_count.clamp_min(1))
        return of_rows.sum() + of_columns.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (
            rows, columns, row_bias, column_bias, scale, row_keys, column_keys, row_log_sum, column_log_sum,
            row_weight, column_weight, row_count, column_count,
        ) = ctx.saved_tensors  # fmt: skip
        tiles = _Tiles(rows, columns, row_bias, column_bias, scale, row_keys, column_keys)
        gradients = _Gradients(tiles)
        # weight * exp(logit - log_sum) as one exponential each.
        row_shift = (row_weight.log() - row_log_sum)[:, None]
        column_shift = (column_weight.log() - column_log_sum)[None, :]
        row_target = (row_weight / row_count.clamp_min(1))[:, None]
        column_target = (column_weight / column_count.clamp_min(1))[None, :]
        with _product_of(ctx.precision, rows.dtype):
            for i, j, logits, positive in tiles:
                seed = (logits + row_shift[i]).exp_()
                seed += (logits + column_shift[:, j]).exp_()
                if positive is not None:
                    seed -= (row_target[i] + column_target[:, j]) * positive
                gradients.add(i, j, seed, logits)
        return (*gradients.inputs(upstream, scale), None, None, None)


def _weights(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's share of the loss: half of one over the rows that have a positive; 0 without one."""
    has = (count > 0).to(dtype)
    return 0.5 * has / has.sum().clamp_min(1)


def _take(maximum: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Running maximum and sum of exp(logit - maximum) along `dim`, in place."""
    new = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - new).exp_()).add_((logits - new.unsqueeze(dim)).exp_().sum(dim))
    maximum.copy_(new)


class _PairwiseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_bias: Tensor,
        column_bias: Tensor,
        scale: Tensor,
        bias: Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
        precision: str,
    ) -> Tensor:
        tiles = _Tiles(rows, columns, row_bias, column_bias, scale, row_keys, column_keys)
        total = rows.new_zeros(())
        with _product_of(precision, rows.dtype):
            for _, _, logits, positive in tiles:
                logits.add_(bias)
                signed = -logits if positive is None else torch.where(positive, logits, -logits)
                total -= logsigmoid(signed).sum()
        ctx.save_for_backward(rows, columns, row_bias, column_bias, scale, bias, row_keys, column_keys)
        ctx.precision = precision
        return total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, row_bias, column_bias, scale, bias, row_keys, column_keys = ctx.saved_tensors
        tiles = _Tiles(rows, columns, row_bias, column_bias, scale, row_keys, column_keys)
        gradients = _Gradients(tiles)
        with _product_of(ctx.precision, rows.dtype):
            for i, j, logits, positive in tiles:
                seed = (logits + bias).sigmoid_()  # sigmoid(z) - [positive] = -sign * sigmoid(-sign * z)
                if positive is not None:
                    seed -= positive.to(seed.dtype)
                gradients.add(i, j, seed.div_(len(rows)), logits)
        of_bias = gradients.of_row.sum() * upstream
        return (*gradients.inputs(upstream, scale), of_bias, None, None, None)
