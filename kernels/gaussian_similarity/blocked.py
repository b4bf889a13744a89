"""The sweeps in PyTorch, tile by tile: nothing of N x M is held, values or gradients.

One walk over tiles serves the row statistics and, from the same tile, the column statistics. Gradients compute each
tile again. Pairs of different groups lie in no tile. Everything after the product is fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kernels.gaussian_similarity.expansion import Expansion
from kernels.gaussian_similarity.problem import Gradients, Problem, Statistics, Teacher

# Elements of a tile: a few of its copies stay in the second-level cache of a core while it is worked on.
TILE_ROWS, TILE_COLUMNS = 512, 1024
TOP_COLUMNS = 8192  # of a retrieval tile: few selections


def statistics(problem: Problem, *, teacher: Teacher | None = None) -> Statistics:
    """Of the logits of every row and column, in one walk."""
    n, m = len(problem.rows), len(problem.columns)
    new_full = problem.rows.new_full
    row_maximum, column_maximum = new_full((n,), -torch.inf), new_full((m,), -torch.inf)
    row_sum, row_positive, column_sum, column_positive = (new_full((count,), 0.0) for count in (n, n, m, m))
    row_teacher = None if teacher is None else torch.zeros_like(row_sum)
    column_teacher = None if teacher is None else torch.zeros_like(column_sum)
    with products_of(problem):
        for i, j in tiles(problem):
            logits, positive = logits_of(problem, i, j), positive_pairs(problem, i, j)
            if positive is not None:
                of_row, of_column = positive_sums(logits, positive)
                row_positive[i] += of_row
                column_positive[j] += of_column
            if teacher is not None and row_teacher is not None and column_teacher is not None:
                by_row, by_column = _targets(teacher, i, j)
                row_teacher[i] += by_row.mul_(logits).sum(1)
                column_teacher[j] += by_column.mul_(logits).sum(0)
            _take(row_maximum[i], row_sum[i], logits, 1)
            _take(column_maximum[j], column_sum[j], logits, 0)
    return Statistics(
        row_maximum=row_maximum,
        row_sum=row_sum,
        row_positive=row_positive,
        column_maximum=column_maximum,
        column_sum=column_sum,
        column_positive=column_positive,
        row_teacher=row_teacher,
        column_teacher=column_teacher,
    )


def gradients(
    problem: Problem,
    *,
    row_shift: Tensor,
    column_shift: Tensor,
    row_target: Tensor,
    column_target: Tensor,
    teacher: Teacher | None = None,
) -> Gradients:
    """Of `sum(seed * logit)`; the seed is made of exponentials, class targets and the teacher's, in its tile."""
    found = Accumulator(problem)
    with products_of(problem):
        for i, j in tiles(problem):
            logits, positive = logits_of(problem, i, j), positive_pairs(problem, i, j)
            seed = (logits + row_shift[i, None]).exp_()
            seed += (logits + column_shift[None, j]).exp_()
            if positive is not None:
                seed[positive] -= row_target[i][positive[0]] + column_target[j][positive[1]]
            if teacher is not None:
                for targets in _targets(teacher, i, j):
                    seed -= targets
            found.add(i, j, seed, logits)
    return found.gradients()


def sigmoid_statistics(problem: Problem, bias: Tensor) -> Tensor:
    """`-sum(log sigmoid(y * (logit + bias)))` [], y = 1 for positives and -1 for all others."""
    total = problem.rows.new_zeros(())
    with products_of(problem):
        for i, j in tiles(problem):
            logits, positive = logits_of(problem, i, j).add_(bias), positive_pairs(problem, i, j)
            total += softplus(logits).sum()  # -log sigmoid(-z); that of z is less by z
            if positive is not None:
                total -= logits[positive].sum()
    return total


def sigmoid_gradients(problem: Problem, bias: Tensor) -> Gradients:
    """Of `sigmoid_statistics`."""
    found = Accumulator(problem)
    with products_of(problem):
        for i, j in tiles(problem):
            logits, positive = logits_of(problem, i, j), positive_pairs(problem, i, j)
            seed = (logits + bias).sigmoid_()  # sigmoid(z) - [positive] = -y * sigmoid(-y * z)
            if positive is not None:
                seed[positive] -= 1
            found.add(i, j, seed, logits)
    return found.gradients(with_bias=True)


def top_k(pairs: Expansion, k: int) -> tuple[Tensor, Tensor]:
    """The `k` most similar columns of each row, or all where there are fewer: values and places [N, k], falling."""
    n, m = len(pairs.rows), len(pairs.columns)
    values, places = pairs.rows.new_empty(n, min(k, m)), torch.empty(n, min(k, m), dtype=torch.int64)
    places = places.to(pairs.rows.device)
    with products_of(pairs):
        for i in _slices(slice(0, n), TILE_ROWS):
            best = values[i, :0], places[i, :0]
            for j in _slices(slice(0, m), TOP_COLUMNS):
                tile = torch.addmm(pairs.column_bias[None, j], pairs.rows[i], pairs.columns[j].T)
                found, where = tile.topk(min(k, j.stop - j.start), dim=1)
                best = merge_top(k, best, (found, where + j.start))
            values[i], places[i] = best[0] + pairs.row_bias[i, None], best[1]
    return values, places


def merge_top(k: int, *parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The `k` best of several (values, places), falling."""
    values, places = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    best, at = values.topk(min(k, values.shape[1]), dim=1)
    return best, places.gather(1, at)


def tiles(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile that holds pairs, group by group."""
    for rows, columns in _groups(problem):
        for i in _slices(rows, TILE_ROWS):
            for j in _slices(columns, TILE_COLUMNS):
                yield i, j


def _groups(problem: Problem) -> list[tuple[slice, slice]]:
    """Rows and columns of every group that has both."""
    if problem.row_groups is None or problem.column_groups is None:
        return [(slice(0, len(problem.rows)), slice(0, len(problem.columns)))]
    groups = torch.unique(problem.row_groups)
    edges = [
        torch.searchsorted(own, groups, right=right).tolist()
        for own in (problem.row_groups, problem.column_groups)
        for right in (False, True)
    ]
    return [
        (slice(row_start, row_end), slice(start, end)) for row_start, row_end, start, end in zip(*edges, strict=True)
    ]


def _slices(whole: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def logits_of(problem: Problem, i: slice, j: slice) -> Tensor:
    """A tile [I, J], the caller's own."""
    scale = float(problem.scale)
    bias = scale * problem.column_bias[None, j]
    product = torch.addmm(bias, problem.rows[i], problem.columns[j].T, alpha=scale)
    return product.add_(problem.row_bias[i, None], alpha=scale)


def positive_pairs(problem: Problem, i: slice, j: slice) -> tuple[Tensor, Tensor] | None:
    """Places in a tile of the pairs that share a key: their rows and their columns. None if no pair does."""
    row_keys, column_keys = problem.row_keys[i], problem.column_keys[j]
    # Most tiles have none, and to look for one costs far less than to compare all pairs.
    if not torch.isin(row_keys, column_keys).any():
        return None
    rows, columns = (row_keys[:, None] == column_keys[None, :]).nonzero(as_tuple=True)
    return rows, columns


def positive_sums(logits: Tensor, positive: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the positives of every row and of every column of a tile."""
    of_positive = logits[positive]
    if logits.is_cuda:  # where index_add_ is atomic, so that its last digits would change from run to run
        alone = torch.zeros_like(logits)
        alone[positive] = of_positive
        return alone.sum(1), alone.sum(0)
    n, m = logits.shape
    of_row = logits.new_zeros(n).index_add_(0, positive[0], of_positive)
    return of_row, logits.new_zeros(m).index_add_(0, positive[1], of_positive)


def _targets(teacher: Teacher, i: slice, j: slice) -> tuple[Tensor, Tensor]:
    """The teacher's targets of rows and of columns in a tile, both [I, J]."""
    with products_of(teacher.problem):
        logits = logits_of(teacher.problem, i, j)
    by_row = (logits + teacher.row_shift[i, None]).exp_()
    return by_row, logits.add_(teacher.column_shift[None, j]).exp_()


def _take(maximum: Tensor, total: Tensor, logits: Tensor, dim: int) -> None:
    """Running maximum and sum of exp(logit - maximum) along `dim`, in place."""
    new = torch.maximum(maximum, logits.amax(dim))
    total.mul_((maximum - new).exp_()).add_((logits - new.unsqueeze(dim)).exp_().sum(dim))
    maximum.copy_(new)


@contextmanager
def products_of(pairs: Problem | Expansion) -> Iterator[None]:
    """fp32 products in bf16 with fp32 sums, where the rows are bf16 values already: nothing is lost by it.

    Those of tf32 values run in tf32 where a GPU does. Split values have no such form here: their product is fp32.
    Autocast, which a backward pass may run under, is off.
    """
    on_cpu = pairs.rows.device.type == "cpu"
    products: Any = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    coarse = {"bf16": "bf16"} if on_cpu else {"bf16": "tf32", "tf32": "tf32"}  # a bf16 number is a tf32 one
    products.fp32_precision = coarse.get(pairs.precision, "ieee")
    try:
        with torch.autocast(pairs.rows.device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = before


class Accumulator:
    """What a loss says of each logit, tile by tile, summed into gradients of the inputs."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rows, self._columns = torch.zeros_like(problem.rows), torch.zeros_like(problem.columns)
        self._of_row, self._of_column = torch.zeros_like(problem.row_bias), torch.zeros_like(problem.column_bias)
        self._of_logits = problem.rows.new_zeros(())  # sum of seed * logit

    def add(self, i: slice, j: slice, seed: Tensor, logits: Tensor) -> None:
        """`seed` [I, J]: derivative of the loss by each logit of the tile."""
        self._rows[i].addmm_(seed, self._problem.columns[j])
        self._columns[j].addmm_(seed.T, self._problem.rows[i])
        self._of_row[i] += seed.sum(1)
        self._of_column[j] += seed.sum(0)
        self._of_logits += torch.dot(logits.view(-1), seed.view(-1))

    def gradients(self, *, with_bias: bool = False) -> Gradients:
        scale = self._problem.scale
        return Gradients(
            rows=self._rows.mul_(scale),
            columns=self._columns.mul_(scale),
            row_bias=self._of_row * scale,
            column_bias=self._of_column * scale,
            scale=self._of_logits / scale,
            bias=self._of_row.sum() if with_bias else None,
        )
