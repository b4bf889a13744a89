"""Losses over all pairs of the global batch: symmetric InfoNCE and the pairwise sigmoid, with keyed positives.

Each rank owns the rows and the columns of its studies and returns its SHARE of the loss: shares of all ranks add up to
it, and so do the gradients of the scale and the bias; embeddings get the whole of theirs (gaussian similarities, 5.4).
The pairs themselves are worked out by `kernels.gaussian_similarity`, tile by tile, and never held. Own rows meet the
columns of other ranks in one of two ways:

    gather   all columns are held on every rank: one walk over tiles, then column statistics and gradients are reduced
    ring     one rank's columns at a time are here and travel on with what was found about them, W - 1 hops

Void studies have no row, no column and no positive: they are left out by index, so ranks have different numbers of
rows, or none, and enter every exchange all the same. Values are not checked for being finite here, where one rank
would leave the others waiting: the engine sees the loss of all and names the samples.

Letters: W = ranks, n = own valid studies, N of all ranks, E = embedding size, K = size of the product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from core import collectives
from core.tasks import Exchange, Gathered
from kernels.gaussian_similarity import expansion, sweep
from kernels.gaussian_similarity.expansion import Expansion, Precision
from kernels.gaussian_similarity.problem import Gradients, Problem, Statistics, loss_of, positives, shift, weights

log = logging.getLogger(__name__)

# Of unit-norm embeddings; of Gaussians: minus the squared 2-Wasserstein distance, minus the sampled distance (CSD).
Similarity = Literal["cosine", "wasserstein", "sampled"]
DEFAULT_PRECISION: dict[Similarity, Precision] = {"cosine": "fp32", "wasserstein": "bf16", "sampled": "bf16"}

# Messages of a ring that are under way together.
_COLUMNS_TAG, _FOUND_TAG = 0, 16


class InfoNCE(NamedTuple):
    """This rank's shares. `loss`: half of each direction; the directions themselves, detached, are for metrics.

    `row_excess`, `column_excess` [n], detached: by how many nats each own valid study's cross-entropy lies above the
    least that its keys allow, which is the logarithm of its number of positives. In order of the batch.
    """

    loss: Tensor
    row_to_column: Tensor
    column_to_row: Tensor
    row_excess: Tensor
    column_excess: Tensor


def info_nce(
    gathered: Gathered,
    *,
    scale: Tensor,
    similarity: Similarity = "cosine",
    row: str = "image",
    column: str = "text",
    key: str = "report_key",
    precision: Precision | None = None,
) -> InfoNCE:
    """Symmetric InfoNCE of `scale * similarity` between the studies' `row` and `column` sides.

    Args:
        gathered: holds unit-norm `<side>_embeds [b, E]` for cosine, `<side>_mean` and `<side>_logvar [b, E]` for the
            others, `valid [b]` bool and the key [b] int64: studies of equal key are positives of each other.
        scale: [], above 0.
        precision: of the product's inputs; None: fp32 for cosine, centred bf16 for distances.

    Without any valid study the loss is 0 with zero gradients. The loss must meet the same factor on all ranks.

    Raises:
        ValueError: keys that are not int64, sides of different sizes: on all ranks alike.
    """
    with torch.autocast(scale.device.type, enabled=False):
        pairs, plan = _prepare(gathered, similarity, row, column, key, precision)
        shares = _InfoNCE.apply(*_inputs(pairs), scale.to(pairs.rows.dtype), plan)
    return InfoNCE(*shares)


def pairwise_sigmoid(
    gathered: Gathered,
    *,
    scale: Tensor,
    bias: Tensor,
    similarity: Similarity = "cosine",
    row: str = "image",
    column: str = "text",
    key: str = "report_key",
    precision: Precision | None = None,
) -> Tensor:
    """SigLIP's loss of `scale * similarity + bias` over the number of valid studies, this rank's share []; as above."""
    with torch.autocast(scale.device.type, enabled=False):
        pairs, plan = _prepare(gathered, similarity, row, column, key, precision)
        dtype = pairs.rows.dtype
        share: Tensor = _PairwiseSigmoid.apply(*_inputs(pairs), scale.to(dtype), bias.to(dtype), plan)
    return share


# ---- what is compared ----


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every rank knows of the contrast: `keys [N]` of all valid studies, rank by rank, and `counts` per rank."""

    keys: Tensor
    counts: tuple[int, ...]
    precision: Precision
    exchange: _Exchange

    @property
    def own(self) -> slice:
        """Own rows and columns among all."""
        return _places(self.counts, collectives.rank())

    def packed(self, columns: Tensor) -> Tensor:
        """As they travel and are kept: bf16 values in two bytes, which loses nothing."""
        return columns.to(torch.bfloat16) if self.precision == "bf16" and len(self.counts) > 1 else columns

    def problem(
        self, rows: Tensor, row_bias: Tensor, scale: Tensor, columns: Sequence[Tensor], where: slice
    ) -> Problem:
        """Own rows against the columns and their biases that have the places `where` among all."""
        return Problem(
            rows=rows,
            columns=columns[0].to(rows.dtype),
            row_bias=row_bias,
            column_bias=columns[1],
            scale=scale,
            row_keys=self.keys[self.own],
            column_keys=self.keys[where],
            precision=self.precision,
        )


def _prepare(
    gathered: Gathered, similarity: Similarity, row: str, column: str, key: str, precision: Precision | None
) -> tuple[Expansion, _Plan]:
    """Own rows and own columns [n, K] of the product, differentiable, and the plan that all ranks share."""
    own = gathered.own
    if own[key].dtype != torch.int64 or own[key].shape != own["valid"].shape:
        found, wanted = tuple(own[key].shape), tuple(own["valid"].shape)
        raise ValueError(f"{key} is {own[key].dtype} {found}; int64 {wanted} was expected")
    kept = own["valid"].nonzero().squeeze(1)
    precision = precision or DEFAULT_PRECISION[similarity]

    def valid_rows(name: str) -> Tensor:
        wide = own[name].to(torch.promote_types(own[name].dtype, torch.float32))
        return wide if len(kept) == len(wide) else wide.index_select(0, kept)

    parts = ("embeds",) if similarity == "cosine" else ("mean", "logvar")
    names = [f"{side}_{part}" for side in (row, column) for part in parts]
    if len({own[name].shape for name in names}) > 1:
        raise ValueError(f"{', '.join(f'{name} {tuple(own[name].shape)}' for name in names)}: must be alike")
    rows = [valid_rows(name) for name in names]
    if similarity == "cosine":
        pairs = expansion.inner_product(*rows, precision=precision)
    else:
        with_spread = similarity == "wasserstein"
        distance = expansion.squared_wasserstein if with_spread else expansion.sampled_distance
        pairs = distance(*rows, precision=precision, centre=_centre(*rows, with_spread=with_spread))
    counts = collectives.row_counts(len(kept), pairs.rows.device)
    keys = collectives.gather_rows(own[key][kept], counts)
    exchange: _Exchange = _Ring(counts) if gathered.exchange == "ring" and len(counts) > 1 else _Gather(counts)
    _say(gathered.exchange, len(counts))
    return pairs, _Plan(keys=keys, counts=counts, precision=precision, exchange=exchange)


def _inputs(pairs: Expansion) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pairs.rows, pairs.columns, pairs.row_bias, pairs.column_bias


@torch.no_grad()
def _centre(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor, *, with_spread: bool) -> Tensor:
    """Mean of both sides over all ranks: of [mean; sigma] or of the means. One value for all, as rounding needs.

    Summed in fp64, so that the number of ranks does not show in it.
    """
    sides = [mean_a, mean_b]
    if with_spread:
        sides = [
            torch.cat([mean, torch.exp(logvar / 2)], 1) for mean, logvar in ((mean_a, logvar_a), (mean_b, logvar_b))
        ]
    total = torch.stack([side.sum(0, dtype=torch.float64) for side in sides]).sum(0)
    total = collectives.sum_over_ranks(torch.cat([total, total.new_tensor([2.0 * len(mean_a)])]))
    return (total[:-1] / total[-1].clamp_min(1)).to(mean_a.dtype)


def _places(counts: Sequence[int], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


@cache
def _say(exchange: Exchange, ranks: int) -> None:
    how = "alone" if ranks == 1 else f"by {exchange} over {ranks} ranks"
    log.info("contrast over the global batch: %s", how)


# ---- how columns meet rows ----


class _Found(Protocol):
    """What own rows have to say about columns, on its way to the rank that owns them."""

    def parts(self) -> tuple[Tensor, ...]:
        """Tensors [columns, ...] that travel."""
        ...

    def merged(self, parts: Sequence[Tensor]) -> _Found:
        """With what other rows said of the same columns."""
        ...

    def over_ranks(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """All ranks' parts about all columns, merged -> those of own columns."""
        ...


# (columns and what belongs to them, their places among all) -> what own rows say about them.
_Visit = Callable[[Sequence[Tensor], slice], _Found]


class _Exchange(Protocol):
    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Own columns [n, ...] in the form to keep from the forward to the backward pass."""
        ...

    def visit_all(self, held: Sequence[Tensor], visit: _Visit) -> tuple[Tensor, ...]:
        """Show own rows all columns, block by block; what all ranks' rows found about own columns."""
        ...


class _Gather:
    """All columns on every rank, as one block."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = counts

    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        return [collectives.gather_rows(tensor, self._counts) for tensor in own]

    def visit_all(self, held: Sequence[Tensor], visit: _Visit) -> tuple[Tensor, ...]:
        return visit(held, slice(0, sum(self._counts))).over_ranks(self._counts)


class _Ring:
    """One rank's columns at a time. The next ones come, and what was found goes, while the present ones are visited."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts, self._most = counts, max(1, *counts)

    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        return [collectives.padded(tensor, self._most) for tensor in own]

    def visit_all(self, held: Sequence[Tensor], visit: _Visit) -> tuple[Tensor, ...]:
        ranks, rank = len(self._counts), collectives.rank()
        block, found_before = list(held), None
        for hop in range(ranks):
            owner = (rank - hop) % ranks
            count = self._counts[owner]
            coming = collectives.pass_on(block, tag=_COLUMNS_TAG) if hop < ranks - 1 else None
            found = visit([tensor[:count] for tensor in block], _places(self._counts, owner))
            if found_before is not None:
                found = found.merged([tensor[:count] for tensor in found_before()])
            sent = [collectives.padded(tensor, self._most) for tensor in found.parts()]
            found_before = collectives.pass_on(sent, tag=_FOUND_TAG)
            block = coming() if coming is not None else block
        assert found_before is not None
        return tuple(tensor[: self._counts[rank]] for tensor in found_before())


@dataclass(frozen=True)
class _ColumnStatistics:
    of: Statistics

    def parts(self) -> tuple[Tensor, ...]:
        return self.of.column_maximum, self.of.column_sum, self.of.column_positive

    def merged(self, parts: Sequence[Tensor]) -> _ColumnStatistics:
        maximum, total, positive = parts
        others = replace(self.of, column_maximum=maximum, column_sum=total, column_positive=positive)
        return _ColumnStatistics(self.of.merge_columns(others))

    def over_ranks(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        own = _places(counts, collectives.rank())
        maximum, total, positive = self.parts()
        if len(counts) > 1 and len(maximum):
            local, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
            # A rank without rows has -inf. No column is without any row: its own study has one.
            total, positive = collectives.sum_over_ranks(torch.stack([total * torch.exp(local - maximum), positive]))
        return maximum[own], total[own], positive[own]


@dataclass(frozen=True)
class _ColumnGradients:
    of: Gradients

    def parts(self) -> tuple[Tensor, ...]:
        return self.of.columns, self.of.column_bias

    def merged(self, parts: Sequence[Tensor]) -> _ColumnGradients:
        columns, column_bias = parts
        return _ColumnGradients(
            replace(self.of, columns=self.of.columns + columns, column_bias=self.of.column_bias + column_bias)
        )

    def over_ranks(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(collectives.sum_to_owners(part, counts) for part in self.parts())


class _NothingFound:
    """Where the forward pass needs no word about columns."""

    def parts(self) -> tuple[Tensor, ...]:
        return ()

    def merged(self, parts: Sequence[Tensor]) -> _NothingFound:
        return self

    def over_ranks(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        return ()


class _OwnGradients:
    """Gradients of own rows and of what all ranks share, summed over the blocks of columns."""

    def __init__(self) -> None:
        self.of: list[Tensor] = []  # rows, row_bias, scale, and bias where there is one

    def add(self, found: Gradients) -> _ColumnGradients:
        parts = [found.rows, found.row_bias, found.scale, *([] if found.bias is None else [found.bias])]
        self.of = [old.add_(new) for old, new in zip(self.of, parts, strict=True)] if self.of else parts
        return _ColumnGradients(found)


# ---- the two losses ----


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, row_bias: Tensor, column_bias: Tensor, scale: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        of_rows: Statistics | None = None

        def visit(block: Sequence[Tensor], where: slice) -> _ColumnStatistics:
            nonlocal of_rows
            found = sweep.statistics(plan.problem(rows, row_bias, scale, block, where))
            of_rows = found if of_rows is None else of_rows.merge_rows(found)
            return _ColumnStatistics(found)

        held = plan.exchange.hold([plan.packed(columns), column_bias])
        maximum, total, column_positive = plan.exchange.visit_all(held, visit)
        assert of_rows is not None
        row_log_sum, column_log_sum = of_rows.log_sum()[0], maximum + total.log()
        count = positives(plan.keys, plan.keys)  # a study's row and its column have the same key
        weight = weights(count, dtype=rows.dtype)
        target = weight / count
        own = plan.own
        ctx.save_for_backward(
            rows, row_bias, scale, target, shift(weight[own], row_log_sum), shift(weight[own], column_log_sum), *held
        )
        ctx.plan = plan
        of_row = loss_of(weight[own], row_log_sum, target[own], of_rows.row_positive)
        of_column = loss_of(weight[own], column_log_sum, target[own], column_positive)
        own_count = count[own].to(rows.dtype)
        excess = (
            log_sum - positive / own_count - own_count.log()
            for log_sum, positive in ((row_log_sum, of_rows.row_positive), (column_log_sum, column_positive))
        )
        detached = (2 * of_row, 2 * of_column, *excess)
        ctx.mark_non_differentiable(*detached)
        return of_row + of_column, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_bias, scale, target, row_shift, column_shift, *held = ctx.saved_tensors
        plan, own = ctx.plan, _OwnGradients()

        def visit(block: Sequence[Tensor], where: slice) -> _ColumnGradients:
            found = sweep.gradients(
                plan.problem(rows, row_bias, scale, block, where),
                row_shift=row_shift,
                column_shift=block[2],
                row_target=target[plan.own],
                column_target=target[where],
            )
            return own.add(found)

        columns, column_bias = plan.exchange.visit_all([*held, *plan.exchange.hold([column_shift])], visit)
        of_rows, of_row_bias, of_scale = own.of
        gradients = (of_rows, columns, of_row_bias, column_bias, of_scale)
        return (*(gradient * upstream for gradient in gradients), None)


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
        plan: _Plan,
    ) -> Tensor:
        total = rows.new_zeros(())

        def visit(block: Sequence[Tensor], where: slice) -> _NothingFound:
            total.add_(sweep.sigmoid_statistics(plan.problem(rows, row_bias, scale, block, where), bias))
            return _NothingFound()

        held = plan.exchange.hold([plan.packed(columns), column_bias])
        plan.exchange.visit_all(held, visit)
        ctx.save_for_backward(rows, row_bias, scale, bias, *held)
        ctx.plan = plan
        return total / max(1, len(plan.keys))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_bias, scale, bias, *held = ctx.saved_tensors
        plan, own = ctx.plan, _OwnGradients()

        def visit(block: Sequence[Tensor], where: slice) -> _ColumnGradients:
            return own.add(sweep.sigmoid_gradients(plan.problem(rows, row_bias, scale, block, where), bias))

        columns, column_bias = plan.exchange.visit_all(held, visit)
        of_rows, of_row_bias, of_scale, of_bias = own.of
        upstream = upstream / max(1, len(plan.keys))
        gradients = (of_rows, columns, of_row_bias, column_bias, of_scale, of_bias)
        return (*(gradient * upstream for gradient in gradients), None)
