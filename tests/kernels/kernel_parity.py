"""The Triton kernels against stored fp64 logits, without pytest: on a GPU, or on the CPU where Triton interprets.

    TRITON_INTERPRET=1 python -m tests.kernels.kernel_parity cpu
    python -m tests.kernels.kernel_parity cuda

Prints one JSON object, case -> null or what went wrong. Whatever a kernel should write is filled with NaN before it
runs, and slabs and strips are small, so that sizes that are no multiple of anything cross all of their borders.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels.gaussian_similarity import densities, expansion, kernel, op, reference, sweep
from kernels.gaussian_similarity.expansion import Precision
from kernels.gaussian_similarity.problem import Problem, Teacher, shift

Case = Callable[[str], None]
CASES: dict[str, Case] = {}

# Relative error of sums and of gradients; bf16 gradients are products of seeds that are rounded to bf16.
BOUNDS: dict[Precision, tuple[float, float]] = {
    "fp32": (1e-5, 2e-5),
    "tf32": (1e-5, 1e-3),  # values are rounded before the first product, seeds inside of the others
    "split": (1e-5, 5e-5),
    "bf16": (1e-5, 1e-2),
}


def problem(n: int, m: int, k: int, *, precision: Precision = "fp32", groups: int = 0, seed: int = 0) -> Problem:
    """Random fp64 logits of a few units, values as `precision` rounds them; `groups` of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    return Problem(
        rows=expansion.rounded(draw(n, k), precision),
        columns=expansion.rounded(draw(m, k), precision),
        row_bias=draw(n),
        column_bias=draw(m),
        scale=torch.tensor(0.4, dtype=torch.float64),
        row_keys=whole(n, 9),
        column_keys=whole(m, 9),
        row_groups=whole(n, groups).sort().values if groups else None,
        column_groups=whole(m, groups).sort().values if groups else None,
        precision=precision,
    )


def on(device: str, one: Any) -> Any:
    """The tensors of a Problem or a Teacher in fp32 on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Problem):
            return on(device, value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)

    return replace(one, **{field.name: moved(getattr(one, field.name)) for field in fields(one)})


def stored(one: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, M], which pairs exist, and which are positives."""
    logits = one.scale * (one.rows @ one.columns.T + one.row_bias[:, None] + one.column_bias[None])
    positive = one.row_keys[:, None] == one.column_keys[None]
    exist = torch.ones_like(positive)
    if one.row_groups is not None and one.column_groups is not None:
        exist = one.row_groups[:, None] == one.column_groups[None]
    return logits, exist, positive & exist


def near(name: str, got: Tensor | None, wanted: Tensor, bound: float) -> None:
    assert got is not None, f"{name} is missing"
    assert got.shape == wanted.shape, f"{name} is {tuple(got.shape)}, {tuple(wanted.shape)} was expected"
    wanted = wanted.detach()
    error = float((got.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error <= bound, f"{name} is off by {error:.2e} of its norm, {bound:.0e} is allowed"


def contrast(device: str, *, precision: Precision, groups: int, taught: bool) -> None:
    _contrast(device, problem(301, 171, 23, precision=precision, groups=groups), taught=taught)


def columns_alone(device: str) -> None:
    """Blocks of columns whose group comes after that of the last row, and has no row."""
    lonely = (torch.arange(400) >= 100).long()
    # Group numbers, as keys, may need more than 32 bits.
    groups = {"row_groups": torch.zeros(70, dtype=torch.int64), "column_groups": lonely << 40}
    _contrast(device, replace(problem(70, 400, 23), **groups), taught=False)


def _contrast(device: str, one: Problem, *, taught: bool) -> None:
    n, m, precision = len(one.rows), len(one.columns), one.precision
    bound, gradient_bound = BOUNDS[precision]
    names = ("rows", "columns", "row_bias", "column_bias", "scale")
    leaves = {name: getattr(one, name).clone().requires_grad_() for name in names}
    logits, exist, positive = stored(replace(one, **leaves))
    infinite = logits.masked_fill(~exist, -torch.inf)
    log_sums = infinite.detach().logsumexp(1), infinite.detach().logsumexp(0)
    share = torch.full((n,), 0.01, dtype=torch.float64), torch.full((m,), 0.02, dtype=torch.float64)
    share[0][7] = 0  # switched off
    shifts = [
        torch.where(log_sum.isfinite(), shift(weight, log_sum), -torch.inf)
        for weight, log_sum in zip(share, log_sums, strict=True)
    ]
    target = 0.1 * share[0], 0.2 * share[1]
    seed = torch.exp(infinite + shifts[0][:, None]) + torch.exp(infinite + shifts[1][None])
    seed = seed - (target[0][:, None] + target[1][None]) * positive
    teacher, by_row, by_column = None, torch.zeros_like(seed), torch.zeros_like(seed)
    if taught:
        other = replace(
            problem(n, m, 40, precision="fp32", seed=4), row_groups=one.row_groups, column_groups=one.column_groups
        )
        theirs = stored(other)[0].masked_fill(~exist, -torch.inf)
        its_shifts = [torch.where((sum_ := theirs.logsumexp(dim)).isfinite(), -4 - sum_, -torch.inf) for dim in (1, 0)]
        teacher = on(device, Teacher(problem=other, row_shift=its_shifts[0], column_shift=its_shifts[1]))
        by_row, by_column = torch.exp(theirs + its_shifts[0][:, None]), torch.exp(theirs + its_shifts[1][None])
        seed = seed - by_row - by_column

    ours = on(device, one)
    found = kernel.statistics(ours, teacher=teacher)
    for name, got, wanted in zip(("row", "column"), found.log_sum(), log_sums, strict=True):
        assert torch.equal(got.isneginf().cpu(), wanted.isneginf()), f"{name}: others without a pair"
        near(f"{name} log sum", got.masked_fill(got.isneginf(), 0), wanted.masked_fill(wanted.isneginf(), 0), bound)
    near("row positive", found.row_positive, (logits * positive).sum(1), bound)
    near("column positive", found.column_positive, (logits * positive).sum(0), bound)
    if taught:
        near("row teacher", found.row_teacher, (logits * by_row).sum(1), bound)
        near("column teacher", found.column_teacher, (logits * by_column).sum(0), bound)
    got = kernel.gradients(
        ours,
        row_shift=shifts[0].float().to(device),
        column_shift=shifts[1].float().to(device),
        row_target=target[0].float().to(device),
        column_target=target[1].float().to(device),
        teacher=teacher,
    )
    expected = torch.autograd.grad((seed.detach() * logits).sum(), list(leaves.values()))
    for name, wanted in zip(names, expected, strict=True):
        near(f"gradient of {name}", getattr(got, name), wanted, gradient_bound)


def sigmoid(device: str, *, precision: Precision, groups: int) -> None:
    one = problem(171, 301, 23, precision=precision, groups=groups)
    bound, gradient_bound = BOUNDS[precision]
    names = ("rows", "columns", "row_bias", "column_bias", "scale")
    leaves = {name: getattr(one, name).clone().requires_grad_() for name in names}
    bias = torch.tensor(-14.0, dtype=torch.float64, requires_grad=True)  # most losses are near the last digit of 1
    logits, exist, positive = stored(replace(one, **leaves))
    losses = -torch.nn.functional.logsigmoid((2.0 * positive - 1) * (logits + bias))
    wanted = (losses * exist).sum()
    ours, our_bias = on(device, one), bias.detach().float().to(device)
    near("loss", kernel.sigmoid_statistics(ours, our_bias), wanted, bound)
    near("losses of negatives", _negatives(ours, our_bias), (losses * (exist & ~positive)).sum(), 1e-4)
    got = kernel.sigmoid_gradients(ours, our_bias)
    expected = torch.autograd.grad(wanted, [*leaves.values(), bias])
    for name, gradient in zip((*names, "bias"), expected, strict=True):
        near(f"gradient of {name}", getattr(got, name), gradient, gradient_bound)


def _negatives(ours: Problem, bias: Tensor) -> Tensor:
    """Loss over pairs whose keys differ: that of all pairs as negatives, less that of the positives as negatives."""
    alone = replace(ours, row_keys=ours.row_keys * 0 - 1, column_keys=ours.column_keys * 0 - 2)
    logits, exist, positive = stored(ours)
    softplus = torch.nn.functional.softplus((logits + bias).double())
    return kernel.sigmoid_statistics(alone, bias).double() - (softplus * (exist & positive)).sum()


def nothing(device: str, *, n: int, m: int) -> None:
    one = on(device, problem(n, m, 5))
    assert [len(each) for each in kernel.statistics(one).log_sum()] == [n, m]
    got = kernel.sigmoid_gradients(one, torch.zeros((), device=device))
    assert got.rows.shape == (n, 5) and got.columns.shape == (m, 5) and float(got.scale) == 0


def gaussians(n: int, m: int, dimensions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mean_a, logvar_a, mean_b, logvar_b = (
        spread * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
        for count, spread in ((n, 1.0), (n, 0.5), (m, 1.0), (m, 0.5))
    )
    return mean_a, logvar_a, mean_b, logvar_b


def density(device: str, *, name: densities.Name) -> None:
    inputs = tuple(each.requires_grad_() for each in gaussians(70, 90, 13))
    wanted = densities.FORMULAS[name](*inputs)
    upstream = torch.randn(70, 90, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = tuple(each.detach().float().to(device) for each in inputs)
    near("value", kernel.density(name, ours), wanted, 1e-5)
    got = kernel.density_gradients(name, ours, upstream.float().to(device))
    expected = torch.autograd.grad((wanted * upstream).sum(), inputs)
    for label, gradient, each in zip(("mean", "logvar", "nu", "rho"), expected, got, strict=True):
        near(f"gradient of {label}", each, gradient, 2e-5)


def wasserstein(device: str, *, precision: Precision, value_bound: float, bound: float) -> None:
    """Means and log-variances through `op`: 7 classes, one of 300 rows where there are as many, and a singleton."""
    n = 1000 if device == "cuda" else 230
    generator = torch.Generator().manual_seed(3)
    row_keys, column_keys = (torch.randint(1, 7, (n,), generator=generator) for _ in range(2))
    row_keys[-(3 * n // 10) :] = column_keys[-(3 * n // 10) :] = 7
    row_keys[0] = column_keys[0] = 99
    exact = (*gaussians(n, n, 24), torch.tensor(0.07, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))
    leaves = tuple(each.requires_grad_() for each in exact)
    ours = tuple(each.detach().float().to(device).requires_grad_() for each in exact)
    keys = row_keys.to(device), column_keys.to(device)
    logits = -leaves[4] * reference.squared_wasserstein(*leaves[:4])
    pairs = expansion.squared_wasserstein(*ours[:4], precision=precision)
    for name, wanted, got in (
        (
            "info_nce",
            reference.info_nce(logits, row_keys, column_keys) + 0 * leaves[5],
            op.info_nce(pairs, ours[4], *keys, stored=False) + 0 * ours[5],
        ),
        (
            "pairwise_sigmoid",
            reference.pairwise_sigmoid(logits + leaves[5], row_keys, column_keys),
            op.pairwise_sigmoid(pairs, ours[4], ours[5], *keys, stored=False),
        ),
    ):
        near(name, got.detach(), wanted, value_bound)
        expected = torch.autograd.grad(wanted, leaves, retain_graph=True)
        for label, each, gradient in zip(
            ("mean", "logvar", "nu", "rho", "scale", "bias"),
            torch.autograd.grad(got, ours, retain_graph=True),
            expected,
            strict=True,
        ):
            near(f"{name}: gradient of {label}", each, gradient, bound)


def shifted_and_far(device: str) -> None:
    """One vector added to all means changes nothing in bf16; a row far from everything stays finite."""
    mean_a, logvar_a, mean_b, logvar_b = (each.float().to(device) for each in gaussians(150, 150, 20))
    keys, scale = torch.arange(150, device=device), torch.tensor(0.1, device=device)

    def loss(move: float) -> Tensor:
        pairs = expansion.squared_wasserstein(mean_a + move, logvar_a, mean_b + move, logvar_b)
        return op.info_nce(pairs, scale, keys, keys, stored=False)

    near("moved loss", loss(3.0), loss(0.0).cpu().double(), 1e-3)
    mean_a[17] += 1000
    inputs = tuple(each.clone().requires_grad_() for each in (mean_a, logvar_a, mean_b, logvar_b))
    far = op.info_nce(expansion.squared_wasserstein(*inputs), scale, keys, keys, stored=False)
    assert all(bool(each.isfinite().all()) for each in (far, *torch.autograd.grad(far, inputs))), "not finite"


def same_bits(device: str) -> None:
    ours = on(device, problem(301, 171, 23, precision="bf16"))
    zero = torch.zeros(301, device=device) - 9, torch.zeros(171, device=device) - 9
    arguments = {"row_shift": zero[0], "column_shift": zero[1], "row_target": -zero[0], "column_target": -zero[1]}
    runs = [(vars(kernel.statistics(ours)), vars(kernel.gradients(ours, **arguments))) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name, value in first.items():
            assert value is None or torch.equal(value, second[name]), f"{name} changed from run to run"


for _precision in BOUNDS:
    for _groups in (0, 6):
        for _taught in (False, True):
            CASES[f"contrast-{_precision}-{'groups' if _groups else 'one'}-{'teacher' if _taught else 'alone'}"] = (
                partial(contrast, precision=_precision, groups=_groups, taught=_taught)
            )
        CASES[f"sigmoid-{_precision}-{'groups' if _groups else 'one'}"] = partial(
            sigmoid, precision=_precision, groups=_groups
        )
CASES["columns_alone"] = columns_alone
for _n, _m in ((0, 7), (7, 0)):
    CASES[f"nothing-{_n}-{_m}"] = partial(nothing, n=_n, m=_m)
for _name in densities.FORMULAS:
    CASES[f"density-{_name}"] = partial(density, name=_name)
CASES["wasserstein-fp32"] = partial(wasserstein, precision="fp32", value_bound=1e-5, bound=1e-5)
CASES["wasserstein-bf16"] = partial(wasserstein, precision="bf16", value_bound=2e-3, bound=2e-2)
CASES["shifted_and_far"] = shifted_and_far
CASES["same_bits"] = same_bits


def run(device: str, names: list[str]) -> dict[str, str | None]:
    """Every case by name: None, or what went wrong."""

    def unwritten(like: Tensor, *sizes: int) -> Tensor:
        return torch.full(sizes, torch.nan, dtype=like.dtype, device=like.device)

    found: dict[str, str | None] = {}
    with (
        mock.patch.object(kernel, "_empty", unwritten),
        mock.patch.object(kernel, "SLAB_ROWS", 128),
        mock.patch.object(kernel, "STRIP_ELEMENTS", 128 * 256),
        mock.patch.object(kernel, "PROGRAMS", 5),
        mock.patch.object(sweep, "path_of", return_value=kernel),
    ):
        for name in names:
            try:
                CASES[name](device)
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    results = run(sys.argv[1], sys.argv[2:] or list(CASES))
    print(json.dumps(results))
    sys.exit(any(results.values()))
