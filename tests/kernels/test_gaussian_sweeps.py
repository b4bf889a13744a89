"""The sweeps themselves, as a contrast spread over ranks calls them: groups, teachers, partial statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gaussian_similarity import sweep
from kernels.gaussian_similarity.problem import Gradients, Problem, Statistics, Teacher, positives, weights

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def problem(n: int, m: int, k: int, *, seed: int = 0, groups: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """Random logits of a few units; `groups` of uneven sizes, some with rows or columns alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    return Problem(
        rows=draw(n, k),
        columns=draw(m, k),
        row_bias=draw(n),
        column_bias=draw(m),
        scale=torch.tensor(0.7, dtype=dtype),
        row_keys=integers(n, 9),
        column_keys=integers(m, 9),
        row_groups=integers(n, groups).sort().values if groups else None,
        column_groups=integers(m, groups).sort().values if groups else None,
    )


def stored(one: Problem) -> tuple[Tensor, Tensor]:
    """Logits [N, M], -inf between groups, and which pairs are positives."""
    logits = one.scale * (one.rows @ one.columns.T + one.row_bias[:, None] + one.column_bias[None])
    positive = one.row_keys[:, None] == one.column_keys[None]
    if one.row_groups is not None and one.column_groups is not None:
        alike = one.row_groups[:, None] == one.column_groups[None]
        logits, positive = logits.masked_fill(~alike, -torch.inf), positive & alike
    return logits, positive


def teacher_of(one: Problem, k: int) -> Teacher:
    """Another's logits on the same pairs, 0.4 of its row softmax and 0.3 of its column softmax."""
    own = problem(len(one.rows), len(one.columns), k, seed=5, dtype=one.rows.dtype)
    own = replace(own, row_groups=one.row_groups, column_groups=one.column_groups)
    row_log_sum, column_log_sum = sweep.statistics(own).log_sum()
    return Teacher(problem=own, row_shift=-row_log_sum - 1.2, column_shift=-column_log_sum - 0.9)


def targets_of(teacher: Teacher) -> tuple[Tensor, Tensor]:
    logits, _ = stored(teacher.problem)
    by_row = torch.exp(logits + teacher.row_shift.nan_to_num(posinf=0)[:, None])
    return by_row, torch.exp(logits + teacher.column_shift.nan_to_num(posinf=0)[None])


CASES = [(37, 29, 5, 0), (600, 1100, 7, 0), (300, 280, 6, 12), (1, 5, 3, 0)]


@pytest.mark.parametrize(("n", "m", "k", "groups"), CASES)
def test_statistics_and_gradients_are_those_of_stored_logits(n: int, m: int, k: int, groups: int) -> None:
    one = problem(n, m, k, groups=groups)
    teacher = teacher_of(one, k + 2)
    teacher = replace(
        teacher,
        row_shift=teacher.row_shift.nan_to_num(posinf=-torch.inf, neginf=-torch.inf),
        column_shift=teacher.column_shift.nan_to_num(posinf=-torch.inf, neginf=-torch.inf),
    )
    by_row, by_column = targets_of(teacher)
    inputs = tuple(value.clone().requires_grad_() for value in (one.rows, one.columns, one.row_bias, one.column_bias))
    scale = one.scale.clone().requires_grad_()
    logits, positive = stored(
        replace(one, rows=inputs[0], columns=inputs[1], row_bias=inputs[2], column_bias=inputs[3], scale=scale)
    )
    finite = torch.where(logits.isinf(), 0.0, logits)

    found = sweep.statistics(one, teacher=teacher)
    row_log_sum, column_log_sum = found.log_sum()
    torch.testing.assert_close(row_log_sum, logits.detach().logsumexp(1), **EXACT)
    torch.testing.assert_close(column_log_sum, logits.detach().logsumexp(0), **EXACT)
    torch.testing.assert_close(found.row_positive, (finite * positive).sum(1).detach(), **EXACT)
    torch.testing.assert_close(found.column_positive, (finite * positive).sum(0).detach(), **EXACT)
    torch.testing.assert_close(found.row_teacher, (finite * by_row).sum(1).detach(), **EXACT)
    torch.testing.assert_close(found.column_teacher, (finite * by_column).sum(0).detach(), **EXACT)

    generator = torch.Generator().manual_seed(9)
    draw = lambda count: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    row_shift, column_shift = draw(n) - 3, draw(m) - 3
    row_shift[0] = -torch.inf
    row_target, column_target = draw(n), draw(m)
    seed = torch.exp(logits + row_shift[:, None]) + torch.exp(logits + column_shift[None])
    seed = seed - (row_target[:, None] + column_target[None]) * positive - by_row - by_column
    wanted = torch.autograd.grad((seed.detach() * finite).sum(), (*inputs, scale))
    got = sweep.gradients(
        one,
        row_shift=row_shift,
        column_shift=column_shift,
        row_target=row_target,
        column_target=column_target,
        teacher=teacher,
    )
    for name, expected in zip(("rows", "columns", "row_bias", "column_bias", "scale"), wanted, strict=True):
        torch.testing.assert_close(getattr(got, name), expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("n", "m", "k", "groups"), CASES)
def test_sigmoid_sweeps_are_those_of_stored_logits(n: int, m: int, k: int, groups: int) -> None:
    one = problem(n, m, k, groups=groups)
    bias = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    names = ("rows", "columns", "row_bias", "column_bias", "scale")
    inputs = {name: getattr(one, name).clone().requires_grad_() for name in names}
    logits, positive = stored(replace(one, **inputs))
    sign = 2.0 * positive - 1
    terms = torch.nn.functional.logsigmoid(sign * (torch.where(logits.isinf(), 0.0, logits) + bias))
    wanted = -torch.where(logits.isinf(), 0.0, terms).sum()
    torch.testing.assert_close(sweep.sigmoid_statistics(one, bias.detach()), wanted.detach(), **EXACT)
    expected = torch.autograd.grad(wanted, (*inputs.values(), bias))
    got = sweep.sigmoid_gradients(one, bias.detach())
    for name, each in zip((*names, "bias"), expected, strict=True):
        torch.testing.assert_close(getattr(got, name), each, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def cut(one: Problem, rows: slice, columns: slice) -> Problem:
    return replace(
        one,
        rows=one.rows[rows],
        columns=one.columns[columns],
        row_bias=one.row_bias[rows],
        column_bias=one.column_bias[columns],
        row_keys=one.row_keys[rows],
        column_keys=one.column_keys[columns],
    )


def test_partial_statistics_merge_into_the_whole() -> None:
    one = problem(40, 50, 4)
    one.rows[3] *= 400  # a maximum that only one part knows
    whole = sweep.statistics(one)
    parts = [slice(0, 0), slice(0, 11), slice(11, 11), slice(11, 50)]

    def walk(along: str) -> Statistics:
        blocks = [
            sweep.statistics(cut(one, *((slice(None), part) if along == "rows" else (part, slice(None)))))
            for part in (parts if along == "rows" else [slice(0, 0), slice(0, 7), slice(7, 40)])
        ]
        total = blocks[0]
        for block in blocks[1:]:
            total = total.merge_rows(block) if along == "rows" else total.merge_columns(block)
        return total

    of_rows, of_columns = walk("rows"), walk("columns")
    torch.testing.assert_close(of_rows.log_sum()[0], whole.log_sum()[0], **EXACT)
    torch.testing.assert_close(of_columns.log_sum()[1], whole.log_sum()[1], **EXACT)
    torch.testing.assert_close(of_rows.row_positive, whole.row_positive, **EXACT)
    torch.testing.assert_close(of_columns.column_positive, whole.column_positive, **EXACT)


@pytest.mark.parametrize(("n", "m"), [(0, 7), (7, 0), (0, 0)])
def test_a_side_without_rows_is_legal(n: int, m: int) -> None:
    one = problem(n, m, 3, dtype=torch.float32)
    found = sweep.statistics(one)
    assert [len(value) for value in found.log_sum()] == [n, m]
    assert all(bool(value.isneginf().all()) for value in found.log_sum())
    bias = torch.tensor(0.5)
    assert float(sweep.sigmoid_statistics(one, bias)) == 0
    zero = {"row_shift": torch.zeros(n), "column_shift": torch.zeros(m)}
    of_contrast = sweep.gradients(one, **zero, row_target=torch.zeros(n), column_target=torch.zeros(m))
    of_sigmoid: Gradients = sweep.sigmoid_gradients(one, bias)
    for got in (of_contrast, of_sigmoid):
        assert got.rows.shape == (n, 3) and got.columns.shape == (m, 3)
        assert not any(float(value.abs().sum()) for value in (got.rows, got.columns, got.scale))


def test_positives_and_weights_keep_groups_apart() -> None:
    rows, columns = torch.tensor([1, 2, 1, 3, 1]), torch.tensor([1, 1, 2, 1])
    row_groups, column_groups = torch.tensor([0, 0, 1, 1, 4]), torch.tensor([0, 1, 1, 3])
    assert positives(rows, columns).tolist() == [3, 1, 3, 0, 3]
    count = positives(rows, columns, row_groups, column_groups)
    assert count.tolist() == [1, 0, 1, 0, 0]
    assert weights(count, row_groups, dtype=torch.float64).tolist() == [0.5, 0, 0.5, 0, 0]
    assert weights(count, dtype=torch.float64).tolist() == [0.25, 0, 0.25, 0, 0]
