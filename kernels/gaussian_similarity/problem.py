"""What a sweep over all pairs is asked for and what it gives back; no arithmetic on pairs lives here.

N rows, M columns, K dimensions of the product. Tensors carry no gradient: `op` wraps the sweeps in autograd, and code
that spreads a contrast over ranks calls them as they are. Zero rows or columns are legal and give empty outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.gaussian_similarity.expansion import Expansion, Precision

Side = Literal["row", "column"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`logits[i, j] = scale * (rows[i] . columns[j] + row_bias[i] + column_bias[j])`, all float32 or all float64.

    `rows` [N, K], `columns` [M, K], `row_bias` [N], `column_bias` [M], `scale` [], above 0. `row_keys` [N] and
    `column_keys` [M], int64: equal keys are positives. `row_groups` and `column_groups`, int64, not decreasing: pairs
    of different groups do not exist; None: one group. `precision` of the inputs of the product.
    """

    rows: Tensor
    columns: Tensor
    row_bias: Tensor
    column_bias: Tensor
    scale: Tensor
    row_keys: Tensor
    column_keys: Tensor
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    precision: Precision = "fp32"

    @staticmethod
    def of(
        pairs: Expansion,
        scale: Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
        row_groups: Tensor | None = None,
        column_groups: Tensor | None = None,
    ) -> Problem:
        """The problem of an expansion, detached."""
        return Problem(
            rows=pairs.rows.detach(),
            columns=pairs.columns.detach(),
            row_bias=pairs.row_bias.detach(),
            column_bias=pairs.column_bias.detach(),
            scale=scale.detach(),
            row_keys=row_keys,
            column_keys=column_keys,
            row_groups=row_groups,
            column_groups=column_groups,
            precision=pairs.precision,
        )


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Soft targets `exp(t_ij + row_shift_i)` of rows and `exp(t_ij + column_shift_j)` of columns, t another's logits.

    With a shift of `log(weight) - log_sum` a row's targets sum to its weight; -inf: the row has none. The pairs of
    `problem` are those of the student, its K and its precision are its own; its keys are not read.
    """

    problem: Problem
    row_shift: Tensor
    column_shift: Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of every row [N] and every column [M], over the pairs that were seen.

    `maximum` of the logits (-inf without a pair), `sum` of exp(logit - maximum), `positive`: sum of the logits of
    positives, `teacher`: sum of the logits weighted with the teacher's targets, None without a teacher.
    """

    row_maximum: Tensor
    row_sum: Tensor
    row_positive: Tensor
    column_maximum: Tensor
    column_sum: Tensor
    column_positive: Tensor
    row_teacher: Tensor | None = None
    column_teacher: Tensor | None = None

    def log_sum(self) -> tuple[Tensor, Tensor]:
        """Logarithm of the sum of exp(logit) of each row [N] and column [M]; -inf without a pair."""
        return self.row_maximum + self.row_sum.log(), self.column_maximum + self.column_sum.log()

    def merge_rows(self, other: Statistics) -> Statistics:
        """Rows over the columns of both; the columns stay this one's."""
        return self._merged(other, "row")

    def merge_columns(self, other: Statistics) -> Statistics:
        """Columns over the rows of both; the rows stay this one's."""
        return self._merged(other, "column")

    def _merged(self, other: Statistics, side: Side) -> Statistics:
        mine, others = vars(self), vars(other)
        maximum = torch.maximum(mine[f"{side}_maximum"], others[f"{side}_maximum"])
        reference = torch.where(maximum.isneginf(), 0.0, maximum)  # exp(-inf - -inf) would not be a number
        total = sum(each[f"{side}_sum"] * torch.exp(each[f"{side}_maximum"] - reference) for each in (mine, others))
        changed = {f"{side}_maximum": maximum, f"{side}_sum": total}
        for name in (f"{side}_positive", f"{side}_teacher"):
            changed[name] = None if mine[name] is None else mine[name] + others[name]
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of `sum(seed * logit)` by each input of a problem; `bias` where the loss has one."""

    rows: Tensor
    columns: Tensor
    row_bias: Tensor
    column_bias: Tensor
    scale: Tensor
    bias: Tensor | None = None


def positives(
    own_keys: Tensor, other_keys: Tensor, own_groups: Tensor | None = None, other_groups: Tensor | None = None
) -> Tensor:
    """How many of `other_keys`, of the same group, equal each of `own_keys` [N], int64."""
    ids = joint_ids(own_keys, other_keys, own_groups, other_groups)
    own, other = ids[: len(own_keys)], ids[len(own_keys) :]
    return torch.bincount(other, minlength=len(ids))[own]


def joint_ids(
    own_keys: Tensor, other_keys: Tensor, own_groups: Tensor | None = None, other_groups: Tensor | None = None
) -> Tensor:
    """Small numbers [N + M], int64: equal where both key and group are, below N + M."""
    unique, place = torch.unique(torch.cat([own_keys, other_keys]), return_inverse=True)
    if own_groups is not None and other_groups is not None:
        _, group = torch.unique(torch.cat([own_groups, other_groups]), return_inverse=True)
        _, place = torch.unique(group * len(unique) + place, return_inverse=True)
    return place


def weights(count: Tensor, groups: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """Each row's share of the loss [N]: half of one over the rows of its group that have a positive; 0 without one.

    `count` [N] of positives. Groups are contrasts of their own whose losses add up.
    """
    has = (count > 0).to(dtype)
    if groups is None:
        return 0.5 * has / has.sum().clamp_min(1)
    unique, place = torch.unique(groups, return_inverse=True)
    with_positive = has.new_zeros(len(unique)).index_add_(0, place, has)
    return 0.5 * has / with_positive.clamp_min(1)[place]


def shift(weight: Tensor, log_sum: Tensor) -> Tensor:
    """`log(weight) - log_sum`: weight * softmax as one exponential; -inf where there is no weight."""
    return torch.where(weight > 0, weight.log() - log_sum, -torch.inf)


def loss_of(weight: Tensor, log_sum: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """`sum(weight * log_sum - target * positive)` [] over the rows with a weight; all others may have log_sum -inf."""
    return torch.where(weight > 0, weight * log_sum - target * positive, 0.0).sum()
