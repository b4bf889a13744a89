"""How the columns of all ranks meet a rank's own rows: gathered, or one rank's at a time round a ring.

What own rows find out about columns (statistics, gradients) is summed over ranks and comes back to the rank that owns
the columns. Ranks may have different numbers of rows, none included, and enter every exchange all the same. No loss is
known here.

Letters: W = ranks, n = own rows and columns, N of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from core import collectives
from kernels.gaussian_similarity.problem import Gradients, Statistics

# Messages of a ring that are under way together.
_COLUMNS_TAG, _FOUND_TAG = 0, 16

# Places of a block of columns among all ranks' ones, rank by rank.
Places = slice | Tensor


def places_of(counts: Sequence[int], rank: int) -> slice:
    """Those of one rank's rows."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


class Found(Protocol):
    """What own rows have to say about columns, on its way to the rank that owns them."""

    def parts(self) -> tuple[Tensor, ...]:
        """Tensors [columns, ...] that travel."""
        ...

    def merged(self, parts: Sequence[Tensor]) -> Found:
        """With what other rows said of the same columns."""
        ...

    def over_ranks(self, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Own rows' `parts` about all columns, rank by rank, merged with all ranks' -> those of own columns."""
        ...


# (columns and what belongs to them, their places among all) -> what own rows say about them.
Visit = Callable[[Sequence[Tensor], Places], Found]


class ColumnExchange(Protocol):
    """One of the two ways."""

    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Own columns [n, ...] in the form to keep from the forward to the backward pass."""
        ...

    def visit_all(self, held: Sequence[Tensor], visit: Visit) -> tuple[Tensor, ...]:
        """Show own rows all columns, block by block; what all ranks' rows found about own columns."""
        ...


class Gather:
    """All columns on every rank, as one block: rank by rank, or by `groups [N]` where there are any."""

    def __init__(self, counts: tuple[int, ...], groups: Tensor | None = None) -> None:
        self._counts = counts
        self._order = None if groups is None or len(counts) == 1 else groups.argsort(stable=True)
        self._back = None if self._order is None else self._order.argsort()

    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        gathered = [collectives.gather_rows(tensor, self._counts) for tensor in own]
        return gathered if self._order is None else [tensor[self._order] for tensor in gathered]

    def visit_all(self, held: Sequence[Tensor], visit: Visit) -> tuple[Tensor, ...]:
        found = visit(held, slice(0, sum(self._counts)) if self._order is None else self._order)
        parts = [part if self._back is None else part[self._back] for part in found.parts()]
        return found.over_ranks(parts, self._counts)


class Ring:
    """One rank's columns at a time. The next ones come, and what was found goes, while the present ones are visited."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts, self._most = counts, max(1, *counts)

    def hold(self, own: Sequence[Tensor]) -> list[Tensor]:
        return [collectives.padded(tensor, self._most) for tensor in own]

    def visit_all(self, held: Sequence[Tensor], visit: Visit) -> tuple[Tensor, ...]:
        ranks, rank = len(self._counts), collectives.rank()
        block, found_before = list(held), None
        for hop in range(ranks):
            owner = (rank - hop) % ranks
            count = self._counts[owner]
            coming = collectives.pass_on(block, tag=_COLUMNS_TAG) if hop < ranks - 1 else None
            found = visit([tensor[:count] for tensor in block], places_of(self._counts, owner))
            if found_before is not None:
                found = found.merged([tensor[:count] for tensor in found_before()])
            sent = [collectives.padded(tensor, self._most) for tensor in found.parts()]
            found_before = collectives.pass_on(sent, tag=_FOUND_TAG)
            block = coming() if coming is not None else block
        assert found_before is not None
        return tuple(tensor[: self._counts[rank]] for tensor in found_before())


@dataclass(frozen=True)
class ColumnStatistics:
    """Maximum, sum of exponentials, sum over positives and, with a teacher, over its targets."""

    of: Statistics

    def parts(self) -> tuple[Tensor, ...]:
        taught = () if self.of.column_teacher is None else (self.of.column_teacher,)
        return self.of.column_maximum, self.of.column_sum, self.of.column_positive, *taught

    def merged(self, parts: Sequence[Tensor]) -> ColumnStatistics:
        maximum, total, positive, *taught = parts
        others = replace(self.of, column_maximum=maximum, column_sum=total, column_positive=positive)
        if taught:
            others = replace(others, column_teacher=taught[0])
        return ColumnStatistics(self.of.merge_columns(others))

    def over_ranks(self, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        own = places_of(counts, collectives.rank())
        maximum, total, *sums = parts
        if len(counts) > 1 and len(maximum):
            local, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
            # A rank without rows has -inf. No column is without any row: its own study has one.
            total, *sums = collectives.sum_over_ranks(torch.stack([total * torch.exp(local - maximum), *sums]))
        return maximum[own], total[own], *(part[own] for part in sums)


@dataclass(frozen=True)
class ColumnGradients:
    """Of the columns and of their biases."""

    of: Gradients

    def parts(self) -> tuple[Tensor, ...]:
        return self.of.columns, self.of.column_bias

    def merged(self, parts: Sequence[Tensor]) -> ColumnGradients:
        columns, column_bias = parts
        return ColumnGradients(
            replace(self.of, columns=self.of.columns + columns, column_bias=self.of.column_bias + column_bias)
        )

    def over_ranks(self, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(collectives.sum_to_owners(part, counts) for part in parts)


class NothingFound:
    """Where the forward pass needs no word about columns."""

    def parts(self) -> tuple[Tensor, ...]:
        return ()

    def merged(self, parts: Sequence[Tensor]) -> NothingFound:
        return self

    def over_ranks(self, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        return ()


class OwnGradients:
    """Gradients of own rows and of what all ranks share, summed over the blocks of columns."""

    def __init__(self) -> None:
        self.of: list[Tensor] = []  # rows, row_bias, scale, and bias where there is one

    def add(self, found: Gradients) -> ColumnGradients:
        parts = [found.rows, found.row_bias, found.scale, *([] if found.bias is None else [found.bias])]
        self.of = [old.add_(new) for old, new in zip(self.of, parts, strict=True)] if self.of else parts
        return ColumnGradients(found)
