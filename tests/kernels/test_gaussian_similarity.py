"""The streaming losses against the formulas: values, every gradient, precision, and what must not be held."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gaussian_similarity import blocked, densities, expansion, op, reference
from kernels.gaussian_similarity.expansion import Expansion

Gaussians = tuple[Tensor, Tensor, Tensor, Tensor]  # mean and logvar of [N, D], mean and logvar of [M, D]

EXPANDED: dict[str, tuple[Callable[..., Expansion], Callable[..., Tensor]]] = {
    "squared_wasserstein": (
        lambda *four: expansion.squared_wasserstein(*four, precision="fp32"),
        reference.squared_wasserstein,
    ),
    "sampled_distance": (
        lambda *four: expansion.sampled_distance(*four, precision="fp32"),
        reference.sampled_distance,
    ),
    "kl_divergence": (expansion.kl_divergence, reference.kl_divergence),
    "jeffreys_divergence": (expansion.jeffreys_divergence, reference.jeffreys_divergence),
}
OTHERS = (reference.bhattacharyya_distance, reference.squared_hellinger, reference.log_expected_likelihood)


def gaussians(n: int, m: int, dimensions: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, scale: float) -> Tensor:
        return (scale * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)).to(dtype)

    return draw(n, 1.0), draw(n, 0.5), draw(m, 1.0), draw(m, 0.5)


def cone(n: int, m: int, dimensions: int) -> Gaussians:
    """Unit-norm means in a narrow cone, pair i of both sides close, sigma about 0.135: as trained encoders give."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    own = torch.randn(max(n, m), dimensions, generator=generator, dtype=torch.float64)

    def side(count: int) -> Tensor:
        noise = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(3 * shared + own[:count] + 0.3 * noise, dim=1)

    def logvar(count: int) -> Tensor:
        return -4 + 0.3 * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)

    return side(n), logvar(n), side(m), logvar(m)


def keys(n: int, m: int, *, largest: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Seven classes, one of `largest` rows, and row 0 and column 0 alone in theirs."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 7, (n,), generator=generator), torch.randint(1, 7, (m,), generator=generator)
    rows[-largest:], columns[-largest:] = 7, 7
    rows[0], columns[0] = 99, 99
    return rows, columns


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def value_of(loss: Tensor) -> float:
    return loss.detach().item()


def leaves(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.detach().clone().requires_grad_() for value in values)


@pytest.mark.parametrize("formula", [*(pair[1] for pair in EXPANDED.values()), *OTHERS])
def test_gradients_of_the_formulas_are_those_of_finite_differences(formula: Callable[..., Tensor]) -> None:
    inputs = leaves(gaussians(4, 3, 5))
    assert torch.autograd.gradcheck(formula, inputs, atol=1e-7, rtol=1e-7)


def test_closed_form_gradients_of_the_squared_wasserstein_distance() -> None:
    inputs = leaves(gaussians(1, 1, 5))
    mean_a, logvar_a, mean_b, logvar_b = inputs
    of_mean, of_logvar, _, _ = gradients(reference.squared_wasserstein(*inputs).sum(), inputs)
    sigma, rho = torch.exp(logvar_a / 2), torch.exp(logvar_b / 2)
    torch.testing.assert_close(of_mean, 2 * (mean_a - mean_b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_logvar, (sigma - rho) * sigma, rtol=1e-12, atol=1e-12)


def test_formulas_agree_with_torch_and_with_each_other() -> None:
    from torch.distributions import Independent, Normal, kl_divergence

    four = gaussians(3, 4, 6)
    a = Independent(Normal(four[0][:, None], torch.exp(four[1][:, None] / 2)), 1)
    b = Independent(Normal(four[2][None], torch.exp(four[3][None] / 2)), 1)
    torch.testing.assert_close(reference.kl_divergence(*four), kl_divergence(a, b), rtol=1e-12, atol=1e-12)
    density = Independent(Normal(four[2][None], torch.sqrt(four[1][:, None].exp() + four[3][None].exp())), 1)
    likelihood = density.log_prob(four[0][:, None])
    torch.testing.assert_close(reference.log_expected_likelihood(*four), likelihood, rtol=1e-12, atol=1e-12)
    same = (*four[:2], *four[:2])
    for formula in (*OTHERS[:2], *(pair[1] for name, pair in EXPANDED.items() if name != "sampled_distance")):
        torch.testing.assert_close(formula(*same).diagonal(), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXPANDED)
def test_expansion_is_the_formula(name: str) -> None:
    expand, formula = EXPANDED[name]
    inputs = leaves(gaussians(13, 7, 11))
    expanded, direct = expand(*inputs).similarity(), -formula(*inputs)
    torch.testing.assert_close(expanded, direct, rtol=1e-12, atol=1e-11)
    seed = torch.randn(13, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for ours, theirs in zip(
        gradients((expanded * seed).sum(), inputs), gradients((direct * seed).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (1300, 517), (5, 1100)])
@pytest.mark.parametrize("loss", ["info_nce", "pairwise_sigmoid"])
def test_streaming_is_the_stored_reference(loss: str, n: int, m: int) -> None:
    largest = min(300, n // 2, m // 2)
    row_keys, column_keys = keys(n, m, largest=largest)
    scalars = (torch.tensor(0.07, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64))
    exact = leaves((*gaussians(n, m, 24), *scalars))
    logits = -exact[4] * reference.squared_wasserstein(*exact[:4])
    wanted = (
        reference.info_nce(logits, row_keys, column_keys) + 0 * exact[5]
        if loss == "info_nce"
        else reference.pairwise_sigmoid(logits + exact[5], row_keys, column_keys)
    )
    expected = gradients(wanted, exact)
    for dtype, precision, value_bound, gradient_bound in (
        (torch.float64, "fp32", 1e-12, 1e-10),
        (torch.float32, "fp32", 1e-5, 1e-5),
        (torch.float32, "split", 1e-5, 1e-3),
        (torch.float32, "tf32", 1e-3, 4e-3),
        (torch.float32, "bf16", 2e-3, 2e-2),
    ):
        inputs = leaves(tuple(value.to(dtype) for value in exact))
        pairs = expansion.squared_wasserstein(*inputs[:4], precision=precision)  # type: ignore[arg-type]
        got = (
            op.info_nce(pairs, inputs[4], row_keys, column_keys, stored=False) + 0 * inputs[5]
            if loss == "info_nce"
            else op.pairwise_sigmoid(pairs, inputs[4], inputs[5], row_keys, column_keys, stored=False)
        )
        assert value_of(got) == pytest.approx(value_of(wanted), rel=value_bound)
        for name, ours, theirs in zip(
            ("mean", "logvar", "nu", "rho", "scale", "bias"), gradients(got, inputs), expected, strict=True
        ):
            error = float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-300))
            assert error < gradient_bound or float(theirs.norm()) == 0, (precision, name, error)


def test_stored_path_is_the_streaming_one() -> None:
    row_keys, column_keys = keys(700, 650, largest=100)
    inputs = leaves((*gaussians(700, 650, 16), *torch.tensor([0.2, -3.0], dtype=torch.float64)))
    row_keys[3] = 1_000  # without a positive
    pairs = expansion.squared_wasserstein(*inputs[:4], precision="fp32")
    for loss in (
        lambda stored: op.info_nce(pairs, inputs[4], row_keys, column_keys, stored=stored) + 0 * inputs[5],
        lambda stored: op.pairwise_sigmoid(pairs, inputs[4], inputs[5], row_keys, column_keys, stored=stored),
    ):
        stored, streamed = loss(True), loss(False)
        torch.testing.assert_close(stored, streamed, rtol=1e-12, atol=0)
        for ours, theirs in zip(
            torch.autograd.grad(stored, inputs, retain_graph=True),
            torch.autograd.grad(streamed, inputs, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_groups_are_contrasts_of_their_own() -> None:
    four = leaves(gaussians(90, 80, 6))
    row_keys, column_keys = keys(90, 80, largest=20)
    scale = torch.tensor(0.2, dtype=torch.float64)
    edges = ((0, 0, 0, 7), (0, 33, 7, 50), (33, 40, 50, 50), (40, 90, 50, 80))  # one without rows, one without columns
    row_groups = torch.cat([torch.full((end - start,), place) for place, (start, end, _, _) in enumerate(edges)])
    column_groups = torch.cat([torch.full((end - start,), place) for place, (_, _, start, end) in enumerate(edges)])
    pairs = expansion.squared_wasserstein(*four, precision="fp32")
    together = op.info_nce(pairs, scale, row_keys, column_keys, row_groups=row_groups, column_groups=column_groups)
    apart = torch.zeros((), dtype=torch.float64)
    for start, end, left, right in (edges[1], edges[3]):
        parts = four[0][start:end], four[1][start:end], four[2][left:right], four[3][left:right]
        own = expansion.squared_wasserstein(*parts, precision="fp32")
        apart = apart + op.info_nce(own, scale, row_keys[start:end], column_keys[left:right])
    assert value_of(together) == pytest.approx(value_of(apart), rel=1e-12)
    for ours, theirs in zip(gradients(together, four), gradients(apart, four), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_soft_targets_of_a_teacher(weight: float) -> None:
    row_keys, column_keys = keys(60, 50, largest=9)
    row_keys[4] = 1_000  # without a positive: left out, whatever the teacher says
    inputs = leaves((*gaussians(60, 50, 6), torch.tensor(0.3, dtype=torch.float64)))
    logits = -inputs[4] * reference.squared_wasserstein(*inputs[:4])
    other = gaussians(60, 50, 4, seed=8)
    theirs = -0.5 * reference.sampled_distance(*other)
    wanted = torch.zeros((), dtype=torch.float64)
    for student, guide, own, opposite in (
        (logits, theirs, row_keys, column_keys),
        (logits.T, theirs.T, column_keys, row_keys),
    ):
        positive = (own[:, None] == opposite[None]).double()
        count = positive.sum(1)
        target = (1 - weight) * positive / count.clamp_min(1)[:, None] + weight * guide.softmax(1)
        entropy = -(target * student.log_softmax(1)).sum(1)
        wanted = wanted + 0.5 * entropy[count > 0].mean()
    pairs = expansion.squared_wasserstein(*inputs[:4], precision="fp32")
    soft = op.SoftTargets(
        pairs=expansion.sampled_distance(*other, precision="fp32"),
        scale=torch.tensor(0.5, dtype=torch.float64),
        weight=weight,
    )
    got = op.info_nce(pairs, inputs[4], row_keys, column_keys, teacher=soft)
    assert value_of(got) == pytest.approx(value_of(wanted), rel=1e-12)
    for ours, expected in zip(gradients(got, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", densities.FORMULAS)
def test_pairwise_is_the_formula(name: densities.Name) -> None:
    inputs = leaves(gaussians(37, 70, 5))
    direct = densities.FORMULAS[name](*inputs)
    seed = torch.randn(37, 70, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = op.pairwise(name, *inputs)
    torch.testing.assert_close(got, direct, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(
        gradients((got * seed).sum(), inputs), gradients((direct * seed).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 5000])
def test_top_k_over_a_gallery_in_chunks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TOP_COLUMNS", 50)
    mean_a, logvar_a, mean_b, logvar_b = gaussians(530, 333, 6)
    centre = torch.zeros(12, dtype=torch.float64)
    whole = -reference.squared_wasserstein(mean_a, logvar_a, mean_b, logvar_b)
    expected, places = whole.topk(min(k, 333), dim=1)
    chunks = (
        expansion.squared_wasserstein(mean_a, logvar_a, part, spread, precision="fp32", centre=centre)
        for part, spread in zip(mean_b.split(100), logvar_b.split(100), strict=True)
    )
    at_once = expansion.squared_wasserstein(mean_a, logvar_a, mean_b, logvar_b, precision="fp32")
    for pairs in (chunks, at_once):
        values, where = op.top_k(pairs, k)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-11)
        assert torch.equal(where, places)


def test_a_shift_of_all_means_changes_nothing_in_bf16() -> None:
    four = tuple(value.float() for value in cone(600, 600, 64))
    row_keys = column_keys = torch.arange(600)
    scale = torch.tensor(50.0)

    def loss(shift: float) -> float:
        mean_a, logvar_a, mean_b, logvar_b = four
        pairs = expansion.squared_wasserstein(mean_a + shift, logvar_a, mean_b + shift, logvar_b)
        return float(op.info_nce(pairs, scale, row_keys, column_keys, stored=False))

    assert loss(1.0) == pytest.approx(loss(0.0), rel=1e-3)


def test_centred_bf16_with_norms_of_rounded_values_is_near_the_exact_loss() -> None:
    exact = cone(512, 512, 128)
    row_keys = column_keys = torch.arange(512)
    wanted = reference.info_nce(-50.0 * reference.squared_wasserstein(*exact), row_keys, column_keys)
    pairs = expansion.squared_wasserstein(*(value.float() for value in exact), precision="bf16")
    got = op.info_nce(pairs, torch.tensor(50.0), row_keys, column_keys, stored=False)
    assert value_of(got) == pytest.approx(value_of(wanted), rel=5e-3)


def test_a_row_far_from_everything_stays_finite() -> None:
    mean_a, logvar_a, mean_b, logvar_b = gaussians(600, 600, 8, dtype=torch.float32)
    mean_a[17] += 1000.0
    inputs = leaves((mean_a, logvar_a, mean_b, logvar_b, torch.tensor(1.0)))
    pairs = expansion.squared_wasserstein(*inputs[:4], precision="fp32")
    loss = op.info_nce(pairs, inputs[4], torch.arange(600), torch.arange(600), stored=False)
    assert all(bool(torch.isfinite(value).all()) for value in (loss, *gradients(loss, inputs)))


@pytest.mark.parametrize("stored", [True, False])
def test_a_shift_of_all_logits_moves_the_sigmoid_alone(stored: bool) -> None:
    (shift,) = leaves((torch.tensor(0.3, dtype=torch.float64),))
    row_keys, column_keys = keys(60, 50, largest=9)
    scale, bias = torch.tensor(0.2, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    pairs = expansion.squared_wasserstein(*gaussians(60, 50, 6), precision="fp32")
    moved = replace(pairs, row_bias=pairs.row_bias + shift)
    (of_contrast,) = gradients(op.info_nce(moved, scale, row_keys, column_keys, stored=stored), (shift,))
    (of_sigmoid,) = gradients(op.pairwise_sigmoid(moved, scale, bias, row_keys, column_keys, stored=stored), (shift,))
    assert abs(float(of_contrast)) < 1e-12 and abs(float(of_sigmoid)) > 1e-3


def test_rows_without_a_positive_are_left_out() -> None:
    row_keys, column_keys = torch.arange(700), torch.arange(700)
    four = gaussians(700, 700, 8)
    scale = torch.tensor(0.3, dtype=torch.float64)
    pairs = expansion.squared_wasserstein(*four, precision="fp32")
    row_keys[5], column_keys[9] = 10_000, 20_000
    stored = op.info_nce(pairs, scale, row_keys, column_keys, stored=True)
    assert float(op.info_nce(pairs, scale, row_keys, column_keys, stored=False)) == pytest.approx(float(stored))
    assert float(op.info_nce(pairs, scale, row_keys, column_keys + 50_000, stored=False)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.full((4, 3), float("nan"))}, r"rows holds nan at \(0, 0\)"),
        ({"row_bias": torch.tensor([0.0, 1.0, float("inf"), 0.0])}, r"row_bias holds inf at \(2,\)"),
        ({"rows": torch.zeros(0, 3), "row_bias": torch.zeros(0)}, "0 rows and 5 columns"),
        ({"columns": torch.zeros(5, 2)}, r"\[N, K\] and \[M, K\]"),
        ({"columns": torch.zeros(5, 3, dtype=torch.float64)}, "columns is torch.float64, rows are torch.float32"),
        ({"column_bias": torch.zeros(4)}, r"column_bias is \(4,\), \(5,\) was expected"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {"rows": torch.zeros(4, 3), "columns": torch.zeros(5, 3), "row_bias": torch.zeros(4)}
    pairs = Expansion(**{**good, "column_bias": torch.zeros(5), **change})
    row_keys = torch.zeros(len(pairs.rows), dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        op.info_nce(pairs, torch.tensor(1.0), row_keys, torch.zeros(5, dtype=torch.int64))


def test_bad_gaussians_are_named_before_what_was_made_of_them() -> None:
    four = list(gaussians(4, 5, 3, dtype=torch.float32))
    row_keys, column_keys, scale = (
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.tensor(1.0),
    )
    four[3][2, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"column logvar holds -inf at \(2, 1\)"):
        op.info_nce(expansion.sampled_distance(*four), scale, row_keys, column_keys)
    four[3][2, 1], four[0][1, 2] = 0, torch.nan
    with pytest.raises(ValueError, match=r"row mean holds nan at \(1, 2\)"):
        op.info_nce(expansion.squared_wasserstein(*four), scale, row_keys, column_keys)
    with pytest.raises(ValueError, match=r"row mean holds nan at \(1, 2\)"):
        op.pairwise("bhattacharyya", *four)
    with pytest.raises(ValueError, match=r"must be \[N, D\] twice"):
        expansion.squared_wasserstein(four[0], four[1][:, :2], four[2], four[3])
    with pytest.raises(ValueError, match=r"column mean is torch\.float64 on cpu, row mean torch\.float32"):
        expansion.kl_divergence(four[0], four[1], four[2].double(), four[3])
    with pytest.raises(ValueError, match="similarity 'euclid' is unknown"):
        op.pairwise("euclid", *four)  # type: ignore[arg-type]


def test_bad_groups_teachers_and_k_are_refused() -> None:
    pairs = expansion.cosine(torch.randn(4, 3), torch.randn(5, 3))
    scale, four, five = torch.tensor(1.0), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="row_groups decreases at 2"):
        op.info_nce(pairs, scale, four, five, row_groups=torch.tensor([0, 1, 0, 1]), column_groups=five)
    with pytest.raises(ValueError, match="groups of one side only"):
        op.info_nce(pairs, scale, four, five, row_groups=four)
    soft = op.SoftTargets(pairs=expansion.cosine(torch.randn(4, 3), torch.randn(6, 3)), scale=scale, weight=0.5)
    with pytest.raises(ValueError, match="teacher has 4 x 6 pairs"):
        op.info_nce(pairs, scale, four, five, teacher=soft)
    with pytest.raises(ValueError, match=r"teacher weight 1.5 is not in"):
        op.info_nce(pairs, scale, four, five, teacher=replace(soft, weight=1.5))
    with pytest.raises(ValueError, match="k is 0"):
        op.top_k(pairs, 0)


def test_keys_of_another_type_are_refused() -> None:
    pairs = expansion.cosine(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"column_keys is torch.int32"):
        op.info_nce(pairs, torch.tensor(1.0), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int32))


def test_values_and_scales_out_of_range_are_named() -> None:
    four = list(gaussians(4, 5, 3, dtype=torch.float32))
    row_keys, column_keys = torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"scale is {scale}; it must be above 0"):
            op.info_nce(expansion.sampled_distance(*four), torch.tensor(scale), row_keys, column_keys)
    four[1][2, 1] = 95  # the variance has no fp32, the biases have
    for builder in (expansion.kl_divergence, expansion.jeffreys_divergence):
        with pytest.raises(ValueError, match=r"rows holds inf at \(2, 1\)"):
            op.info_nce(builder(*four), torch.tensor(1.0), row_keys, column_keys)
    four[1][2, 1], four[3][1, 2] = 0, -21.5
    with pytest.raises(ValueError, match=r"column logvar holds -21\.5 at \(1, 2\), beyond 21"):
        op.pairwise("bhattacharyya", *four)
    assert bool(op.pairwise("bhattacharyya", *(each.double() for each in four)).isfinite().all())


@pytest.mark.parametrize("stored", [True, False])
def test_autocast_changes_nothing(stored: bool) -> None:
    four = gaussians(90, 80, 16, dtype=torch.float32)
    row_keys, column_keys = keys(90, 80, largest=20)

    def found() -> list[Tensor]:
        inputs = leaves((*four, torch.tensor(0.2)))
        pairs = expansion.squared_wasserstein(*inputs[:4], precision="fp32")
        loss = op.info_nce(pairs, inputs[4], row_keys, column_keys, stored=stored)
        return [loss, *gradients(loss, inputs), *op.top_k(pairs, 3), op.pairwise("bhattacharyya", *four)]

    alone = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = found()
    for ours, theirs in zip(within, alone, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@pytest.mark.parametrize("precision", ["bf16", "tf32", "split", "fp32"])
def test_what_is_not_finite_stays_so_when_rounded(precision: expansion.Precision) -> None:
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)
    got = expansion.rounded(odd, precision)
    assert bool(got[:2].isnan().all()) and not bool(got[2:].isfinite().any())


def test_memory_grows_with_rows_and_not_with_pairs() -> None:
    program = (
        "import resource, sys, torch\n"
        "from kernels.gaussian_similarity import expansion, op\n"
        "torch.set_num_threads(1)\n"
        "def step(n):\n"
        "    four = [torch.randn(n, 16).requires_grad_() for _ in range(4)]\n"
        "    pairs = expansion.squared_wasserstein(*four)\n"
        "    op.info_nce(pairs, torch.tensor(0.1), torch.arange(n), torch.arange(n), stored=False).backward()\n"
        "step(2048)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "step(8192)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    grown_mb = float(done.stdout)
    assert grown_mb < 40, f"{grown_mb:.0f} MB more; the logits alone would be 256"
