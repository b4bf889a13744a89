"""Losses over all pairs of the global batch: symmetric InfoNCE and the pairwise sigmoid, with keyed positives.

Each rank owns the rows and the columns of its studies and returns its SHARE of the loss: shares of all ranks add up to
it, and so do the gradients of the scale and the bias; embeddings get the whole of theirs (gaussian similarities, 5.4).
The pairs themselves are worked out by `kernels.gaussian_similarity`, tile by tile, and never held. Own rows meet the
columns of other ranks in one of two ways (core.losses.exchange):

    gather   all columns are held on every rank: one walk over tiles, then column statistics and gradients are reduced
    ring     one rank's columns at a time are here and travel on with what was found about them, W - 1 hops

A study may have several rows, each of another group (an anatomy): groups are contrasts of their own, worked out in one
sweep, and their losses add up (section 5.5). Targets may be softened by a teacher's similarities (section 5.6).

Void studies have no row, no column and no positive: they are left out by index, so ranks have different numbers of
rows, or none, and enter every exchange all the same. Values are not checked for being finite here, where one rank
would leave the others waiting: the engine sees the loss of all and names the samples.

Letters: W = ranks, b = own studies, n = own rows that count, N of all ranks, A = groups, E = embedding size,
K = size of the product.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core import collectives
from core.losses.exchange import (
    ColumnExchange,
    ColumnGradients,
    ColumnStatistics,
    Gather,
    NothingFound,
    OwnGradients,
    Places,
    Ring,
    places_of,
)
from core.tasks import Exchange, Gathered
from kernels.gaussian_similarity import expansion, sweep
from kernels.gaussian_similarity.expansion import Expansion, Precision
from kernels.gaussian_similarity.problem import (
    Problem,
    Statistics,
    Teacher,
    loss_of,
    positives,
    shift,
    weights,
)

log = logging.getLogger(__name__)

# Of unit-norm embeddings; of Gaussians: minus the squared 2-Wasserstein distance, minus the sampled distance (CSD).
Similarity = Literal["cosine", "wasserstein", "sampled"]
DEFAULT_PRECISION: dict[Similarity, Precision] = {"cosine": "fp32", "wasserstein": "bf16", "sampled": "bf16"}

# Bias that takes a pair out of a teacher's softmax: its exponential is 0 at any scale, and no sum overflows.
_OUT = -1e4


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
        chosen = _Chosen.studies(gathered, key)
        pairs, plan = _prepare(gathered, chosen, similarity, row, column, precision)
        shares = _InfoNCE.apply(*_inputs(pairs), scale.to(pairs.rows.dtype), plan, None)
    return InfoNCE(*shares)


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """What another model thinks of the same pairs; no gradient reaches it.

    `rows`, `columns` [b, A, E]: unit-norm embeddings; `scale` []: of their cosines t. `taught` [b, A] bool: whose
    targets are softened, by `weight` [], from 0 (not at all) to 1. With P = softmax of t, along each direction:

        added   [keys equal] + weight * P off the positives, then normalised; P is over the taught of the group alone
        mixed   (1 - weight) * [keys equal] / positives + weight * P; P is over all of the group
    """

    rows: Tensor
    columns: Tensor
    scale: Tensor
    taught: Tensor
    weight: Tensor
    how: Literal["added", "mixed"] = "added"


def grouped_info_nce(
    gathered: Gathered,
    *,
    scale: Tensor,
    similarity: Similarity = "cosine",
    row: str = "image",
    column: str = "text",
    key: str,
    member: str,
    soft: SoftTargets | None = None,
    precision: Precision | None = None,
) -> InfoNCE:
    """Sum over groups of the symmetric InfoNCE among the group's rows, each the mean over its own rows.

    Args:
        gathered: as for `info_nce`, with a second dimension: embeddings [b, A, E], key [b, A] int64. `member` [b, A]
            bool: which rows count; a group without any adds nothing. Keys are compared within their group.
        soft: targets beside the positives. Equal keys must have equal teacher's columns and rows (`added`).

    The excess comes sorted by group, then study.
    """
    with torch.autocast(scale.device.type, enabled=False):
        chosen = _Chosen.members(gathered, key, member)
        pairs, plan = _prepare(gathered, chosen, similarity, row, column, precision)
        taught = None if soft is None else _Soft.of(soft, chosen, pairs.rows.dtype)
        shares = _InfoNCE.apply(*_inputs(pairs), scale.to(pairs.rows.dtype), plan, taught)
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
        pairs, plan = _prepare(gathered, _Chosen.studies(gathered, key), similarity, row, column, precision)
        dtype = pairs.rows.dtype
        share: Tensor = _PairwiseSigmoid.apply(*_inputs(pairs), scale.to(dtype), bias.to(dtype), plan)
    return share


# ---- what is compared ----


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Which of a rank's rows count: `places [n]` among all of them, sorted by group; their keys and `groups [n]`."""

    places: Tensor
    keys: Tensor
    groups: Tensor | None
    dimensions: int  # that lead a tensor of rows: study, and group where there are any

    @staticmethod
    def studies(gathered: Gathered, key: str) -> _Chosen:
        keys, valid = gathered.own[key], gathered.own["valid"]
        _check_keys(key, keys, valid)
        places = valid.nonzero().squeeze(1)
        return _Chosen(places=places, keys=keys[places], groups=None, dimensions=1)

    @staticmethod
    def members(gathered: Gathered, key: str, member: str) -> _Chosen:
        keys, mask = gathered.own[key], gathered.own[member]
        _check_keys(key, keys, mask)
        groups, studies = mask.T.nonzero(as_tuple=True)
        return _Chosen(places=studies * mask.shape[1] + groups, keys=keys[studies, groups], groups=groups, dimensions=2)

    def rows_of(self, x: Tensor) -> Tensor:
        """Those of `x [b, ...]` or `[b, A, ...]`, in fp32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
        flat = x.flatten(0, self.dimensions - 1)
        whole = self.groups is None and len(self.places) == len(flat)
        return flat if whole else flat.index_select(0, self.places)


def _check_keys(name: str, keys: Tensor, mask: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.shape != mask.shape:
        raise ValueError(f"{name} is {keys.dtype} {tuple(keys.shape)}; int64 {tuple(mask.shape)} was expected")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every rank knows of the contrast: `keys [N]` of all rows that count, rank by rank, and `counts` per rank.

    `groups [N]`: within each rank not decreasing.
    """

    keys: Tensor
    groups: Tensor | None
    counts: tuple[int, ...]
    precision: Precision
    exchange: ColumnExchange

    @property
    def own(self) -> slice:
        """Own rows and columns among all."""
        return places_of(self.counts, collectives.rank())

    def packed(self, columns: Tensor) -> Tensor:
        """As they travel and are kept: bf16 values in two bytes, which loses nothing."""
        return columns.to(torch.bfloat16) if self.precision == "bf16" and len(self.counts) > 1 else columns

    def problem(
        self,
        rows: Tensor,
        row_bias: Tensor,
        scale: Tensor,
        columns: Sequence[Tensor],
        where: Places,
        precision: Precision | None = None,
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
            row_groups=None if self.groups is None else self.groups[self.own],
            column_groups=None if self.groups is None else self.groups[where],
            precision=precision or self.precision,
        )


def _prepare(
    gathered: Gathered, chosen: _Chosen, similarity: Similarity, row: str, column: str, precision: Precision | None
) -> tuple[Expansion, _Plan]:
    """Own rows and own columns [n, K] of the product, differentiable, and the plan that all ranks share."""
    own = gathered.own
    precision = precision or DEFAULT_PRECISION[similarity]
    parts = ("embeds",) if similarity == "cosine" else ("mean", "logvar")
    names = [f"{side}_{part}" for side in (row, column) for part in parts]
    if len({own[name].shape for name in names}) > 1:
        raise ValueError(f"{', '.join(f'{name} {tuple(own[name].shape)}' for name in names)}: must be alike")
    rows = [chosen.rows_of(own[name]) for name in names]
    if similarity == "cosine":
        pairs = expansion.inner_product(*rows, precision=precision)
    else:
        with_spread = similarity == "wasserstein"
        distance = expansion.squared_wasserstein if with_spread else expansion.sampled_distance
        pairs = distance(*rows, precision=precision, centre=_centre(*rows, with_spread=with_spread))
    counts = collectives.row_counts(len(chosen.places), pairs.rows.device)
    keys = collectives.gather_rows(chosen.keys, counts)
    groups = None if chosen.groups is None else collectives.gather_rows(chosen.groups, counts)
    ring = gathered.exchange == "ring" and len(counts) > 1
    exchange: ColumnExchange = Ring(counts) if ring else Gather(counts, groups)
    _say(gathered.exchange, len(counts))
    return pairs, _Plan(keys=keys, groups=groups, counts=counts, precision=precision, exchange=exchange)


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


@cache
def _say(exchange: Exchange, ranks: int) -> None:
    how = "alone" if ranks == 1 else f"by {exchange} over {ranks} ranks"
    log.info("contrast over the global batch: %s", how)


# ---- targets of a teacher ----


@dataclass(frozen=True, kw_only=True)
class _Soft:
    """`SoftTargets` of own rows that count: the teacher's pairs with their biases, and the `weight [n]` of each row."""

    rows: Tensor
    columns: Tensor
    bias: Tensor  # [n], of a row as of its column
    scale: Tensor
    weight: Tensor
    how: Literal["added", "mixed"]

    @staticmethod
    def of(soft: SoftTargets, chosen: _Chosen, dtype: torch.dtype) -> _Soft:
        rows, columns = (chosen.rows_of(side.detach()).to(dtype) for side in (soft.rows, soft.columns))
        taught = chosen.rows_of(soft.taught)
        alone = soft.how == "added"
        return _Soft(
            rows=rows,
            columns=columns,
            bias=torch.where(taught, 0.0, _OUT if alone else 0.0).to(dtype),
            scale=soft.scale.detach().to(dtype),
            weight=taught.to(dtype) * soft.weight.detach().to(dtype),
            how=soft.how,
        )

    def problem(self, plan: _Plan, columns: Sequence[Tensor], where: Places) -> Problem:
        return plan.problem(self.rows, self.bias, self.scale, columns, where, "fp32")

    def log_sums(self, plan: _Plan, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of the teacher's own rows and own columns, [n] each."""
        of_rows = _OverBlocks()

        def visit(block: Sequence[Tensor], where: Places) -> ColumnStatistics:
            return of_rows.add(sweep.statistics(self.problem(plan, block, where)))

        maximum, total, _ = plan.exchange.visit_all(held, visit)
        return of_rows.merged.log_sum()[0], maximum + total.log()

    def targets(self, log_sum: Tensor, weight: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """(target of each positive, shift of the teacher's logits), [n] each, of rows or of columns.

        `weight` [n] of each in the loss, `count` [n] of its positives.
        """
        if self.how == "mixed":
            return (1 - self.weight) * weight / count, shift(self.weight * weight, log_sum)
        own = self.scale * ((self.rows * self.columns).sum(1) + 2 * self.bias)
        of_positive = torch.exp(own - log_sum)  # of each: their texts are equal
        share = weight / (count + self.weight * (1 - count * of_positive))
        # The teacher's part of a positive is taken off again, so that a positive's target is 1 before it is normalised.
        return share * (1 - self.weight * of_positive), shift(self.weight * share, log_sum)


# ---- the two losses ----


class _OverBlocks:
    """Statistics of own rows, merged over the blocks of columns."""

    def __init__(self) -> None:
        self._of: Statistics | None = None

    def add(self, found: Statistics) -> ColumnStatistics:
        self._of = found if self._of is None else self._of.merge_rows(found)
        return ColumnStatistics(found)

    @property
    def merged(self) -> Statistics:
        assert self._of is not None
        return self._of


# What belongs to a column and travels with it: the student's column, its bias and target; with a teacher the teacher's
# column, its bias and shift; in the backward pass the student's shift, last.
_TAUGHT = slice(3, 6)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_bias: Tensor,
        column_bias: Tensor,
        scale: Tensor,
        plan: _Plan,
        soft: _Soft | None,
    ) -> tuple[Tensor, ...]:
        exchange, own = plan.exchange, plan.own
        # A row and its column have the same key and group, so they have as many positives.
        count = positives(plan.keys, plan.keys, plan.groups, plan.groups)
        weight = weights(count, plan.groups, dtype=rows.dtype)[own]
        count = count[own]
        row_target = column_target = weight / count
        row_teacher_shift, taught = None, []
        if soft is not None:
            held = exchange.hold([soft.columns, soft.bias])
            row_log_sum, column_log_sum = soft.log_sums(plan, held)
            row_target, row_teacher_shift = soft.targets(row_log_sum, weight, count)
            column_target, column_teacher_shift = soft.targets(column_log_sum, weight, count)
            taught = [*held, *exchange.hold([column_teacher_shift])]
        held = [*exchange.hold([plan.packed(columns), column_bias, column_target]), *taught]
        of_rows = _OverBlocks()

        def visit(block: Sequence[Tensor], where: Places) -> ColumnStatistics:
            problem = plan.problem(rows, row_bias, scale, block, where)
            return of_rows.add(
                sweep.statistics(problem, teacher=_teacher(plan, soft, row_teacher_shift, block[_TAUGHT], where))
            )

        maximum, total, column_positive, *column_taught = exchange.visit_all(held, visit)
        merged = of_rows.merged
        row_log_sum, column_log_sum = merged.log_sum()[0], maximum + total.log()
        ctx.save_for_backward(
            rows, row_bias, scale, row_target, shift(weight, row_log_sum), shift(weight, column_log_sum),
            row_teacher_shift, *held,
        )  # fmt: skip
        ctx.plan, ctx.soft = plan, soft
        of_row = loss_of(weight, row_log_sum, row_target, merged.row_positive)
        of_column = loss_of(weight, column_log_sum, column_target, column_positive)
        if merged.row_teacher is not None:
            of_row, of_column = of_row - merged.row_teacher.sum(), of_column - column_taught[0].sum()
        positive_count = count.to(rows.dtype)
        excess = (
            log_sum - positive / positive_count - positive_count.log()
            for log_sum, positive in ((row_log_sum, merged.row_positive), (column_log_sum, column_positive))
        )
        detached = (2 * of_row, 2 * of_column, *excess)
        ctx.mark_non_differentiable(*detached)
        return of_row + of_column, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_bias, scale, row_target, row_shift, column_shift, row_teacher_shift, *held = ctx.saved_tensors
        plan, soft, own = ctx.plan, ctx.soft, OwnGradients()

        def visit(block: Sequence[Tensor], where: Places) -> ColumnGradients:
            found = sweep.gradients(
                plan.problem(rows, row_bias, scale, block, where),
                row_shift=row_shift,
                column_shift=block[-1],
                row_target=row_target,
                column_target=block[2],
                teacher=_teacher(plan, soft, row_teacher_shift, block[_TAUGHT], where),
            )
            return own.add(found)

        columns, column_bias = plan.exchange.visit_all([*held, *plan.exchange.hold([column_shift])], visit)
        of_rows, of_row_bias, of_scale = own.of
        gradients = (of_rows, columns, of_row_bias, column_bias, of_scale)
        return (*(gradient * upstream for gradient in gradients), None, None)


def _teacher(
    plan: _Plan, soft: _Soft | None, row_shift: Tensor | None, columns: Sequence[Tensor], where: Places
) -> Teacher | None:
    """The teacher over own rows and the `columns`, their biases and shifts, of the places `where`."""
    if soft is None or row_shift is None:
        return None
    return Teacher(problem=soft.problem(plan, columns, where), row_shift=row_shift, column_shift=columns[2])


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

        def visit(block: Sequence[Tensor], where: Places) -> NothingFound:
            total.add_(sweep.sigmoid_statistics(plan.problem(rows, row_bias, scale, block, where), bias))
            return NothingFound()

        held = plan.exchange.hold([plan.packed(columns), column_bias])
        plan.exchange.visit_all(held, visit)
        ctx.save_for_backward(rows, row_bias, scale, bias, *held)
        ctx.plan = plan
        return total / max(1, len(plan.keys))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_bias, scale, bias, *held = ctx.saved_tensors
        plan, own = ctx.plan, OwnGradients()

        def visit(block: Sequence[Tensor], where: Places) -> ColumnGradients:
            return own.add(sweep.sigmoid_gradients(plan.problem(rows, row_bias, scale, block, where), bias))

        columns, column_bias = plan.exchange.visit_all(held, visit)
        of_rows, of_row_bias, of_scale, of_bias = own.of
        upstream = upstream / max(1, len(plan.keys))
        gradients = (of_rows, columns, of_row_bias, column_bias, of_scale, of_bias)
        return (*(gradient * upstream for gradient in gradients), None)
