"""Keyed numbers on tensors, the Gaussian encoder, sampling, and the losses on Gaussians against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.keyed import hash_keys, normal, uniform
from core.losses.masked import normalise_patches, patch_loss, word_loss
from core.losses.matching import draw_negatives, match_loss
from core.losses.per_study import PerStudy
from core.losses.variance import divergence, forecast_error, inclusion_score, kl_divergence, prior_kl, variance_floor
from core.models.gaussian import Gaussian, GaussianEncoder, sample
from core.models.initialise import draw_weights
from core.models.towers import mean_over_views
from shards.errors import ConfigError
from shards.keyed import hash_u64


def gaussian(rows: int, size: int, seed: int, spread: float = 0.6) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, rows, size, generator=generator, dtype=torch.float64)
    return Gaussian(mean=mean.requires_grad_(), logvar=(spread * logvar - 1).requires_grad_())


# ---- keyed numbers ----


def test_hashes_are_those_of_the_arrays() -> None:
    first, second = np.array([0, 5, 2**62 + 3, 2**63 - 1]), np.arange(3)
    expected = hash_u64(0, "word", first[:, None], second[None, :]).astype(np.int64)
    found = hash_keys("word", torch.from_numpy(first)[:, None], torch.from_numpy(second)[None, :])
    assert np.array_equal(found.numpy(), expected)
    assert not torch.equal(found, hash_keys("patch", torch.from_numpy(first)[:, None], torch.from_numpy(second)))


def test_normals_are_normal_and_independent() -> None:
    draws = normal(hash_keys("noise", torch.arange(4000)), 8).double()
    assert draws.shape == (4000, 8) and draws.isfinite().all()
    assert abs(draws.mean()) < 0.02 and abs(draws.var() - 1) < 0.02
    assert abs((draws**3).mean()) < 0.05 and abs((draws**4).mean() - 3) < 0.15
    assert abs((draws.abs() > 1.96).double().mean() - 0.05) < 0.005
    between_draws, between_keys = torch.corrcoef(draws.T), torch.corrcoef(draws[:100].reshape(100, -1))
    assert (between_draws - torch.eye(8)).abs().max() < 0.07 and abs(between_keys.triu(1).mean()) < 0.05
    squares = torch.corrcoef(draws.square().T)  # the two halves of a Box-Muller pair share their radius
    assert (squares - torch.eye(8)).abs().max() < 0.07


def test_uniforms_stay_inside_the_open_interval() -> None:
    draws = uniform(hash_keys("match", torch.arange(1 << 16)))
    assert draws.min() > 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.005
    assert (torch.histc(draws, 16, 0, 1) / len(draws) * 16 - 1).abs().max() < 0.08


# ---- samples ----


def test_samples_follow_their_keys_alone() -> None:
    whole = gaussian(50, 7, 1)
    keys = torch.arange(50) * 31
    drawn = sample(whole, 3, keys, "word")
    assert drawn.shape == (4, 50, 7) and torch.equal(drawn[0], whole.mean)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    for rows in (slice(0, 1), slice(13, 50), order):
        part = Gaussian(mean=whole.mean[rows], logvar=whole.logvar[rows])
        assert torch.equal(sample(part, 3, keys[rows], "word"), drawn[:, rows])
    assert not torch.equal(sample(whole, 3, keys, "patch")[1], drawn[1])
    assert torch.equal(sample(whole, 0, keys, "word"), whole.mean[None])
    assert sample(Gaussian(mean=whole.mean[:0], logvar=whole.logvar[:0]), 2, keys[:0], "word").shape == (3, 0, 7)


def test_samples_have_the_gaussians_moments_and_gradient() -> None:
    mean, logvar = torch.tensor([[0.5, -2.0]]).requires_grad_(), torch.tensor([[-1.0, 1.0]]).requires_grad_()
    drawn = sample(Gaussian(mean=mean, logvar=logvar), 20_000, torch.tensor([4]), "word")[1:, 0]
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.var(0), logvar[0].exp(), atol=0, rtol=0.04)
    of_mean, of_logvar = torch.autograd.grad(drawn[0].sum(), [mean, logvar])
    torch.testing.assert_close(of_mean, torch.ones(1, 2))
    torch.testing.assert_close(of_logvar[0], (drawn[0] - mean[0]).detach() / 2)


# ---- the encoder ----


def encoder(kind: str = "attention", width: int = 16, **settings: object) -> GaussianEncoder:
    config = GaussianEncoder.Config(kind=kind, heads=4, **settings)  # type: ignore[arg-type]
    built = GaussianEncoder(config, width)
    draw_weights(built, 3)
    return built


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_gaussian_encoder_starts_near_its_token_and_its_level(kind: str) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    for level, expected in ((-4.0, -4.0), (0.0, 0.0), (-10.0, -10 + math.log(2))):
        found = encoder(kind, logvar_init=level)(x)
        assert found.mean.shape == found.logvar.shape == (3, 16) and found.mean.dtype is torch.float32
        torch.testing.assert_close(found.mean, x[:, 0], atol=0.05, rtol=0)
        torch.testing.assert_close(found.logvar, torch.full((3, 16), expected), atol=0.3, rtol=0)
    assert not found.logvar.eq(found.logvar[0, 0]).all()


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_chosen_tokens_are_those_of_all(kind: str) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5)[None] < torch.tensor([[5], [2], [4]])
    built = encoder(kind)
    everything = built(x, torch.arange(15), key_mask=mask)
    rows = torch.tensor([0, 5, 10, 3, 11])
    some = built(x, rows, key_mask=mask)
    torch.testing.assert_close(some.mean, everything.mean[rows])
    torch.testing.assert_close(some.logvar, everything.logvar[rows])
    changed = x.masked_fill(~mask[:, :, None], 9.0)  # padding is seen by nobody
    torch.testing.assert_close(built(changed, rows, key_mask=mask).mean, some.mean)
    assert built(x, rows[:0]).mean.shape == (0, 16)
    first = built(x, key_mask=mask)
    torch.testing.assert_close(first.mean, everything.mean[::5])
    torch.testing.assert_close(first.logvar, everything.logvar[::5])


def test_first_half_of_heads_makes_the_mean() -> None:
    """Keys and values are rows head by head: what heads 3 and 4 of 4 see moves the log-variance only."""
    built, x = encoder(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    assert built.key_value.wide  # weight [in, out]
    of_heads = built.key_value.weight.detach().view(16, 2, 4, 4)
    before = built(x)
    of_heads[:, :, 2:] *= 30
    after = built(x)
    assert torch.equal(after.mean, before.mean) and not torch.allclose(after.logvar, before.logvar, rtol=1e-6)
    of_heads[:, :, :2] *= 30
    again = built(x)
    assert torch.equal(again.logvar, after.logvar) and not torch.allclose(again.mean, after.mean, rtol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_gradient_reaches_every_weight_and_detached_variance_its_own_alone(kind: str) -> None:
    for detached in (False, True):
        built = encoder(kind, detach_variance=detached)
        x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
        built(x).logvar.square().sum().backward()
        moved = {name for name, p in built.named_parameters() if p.grad is not None and p.grad.any()}
        own = {name for name, _ in built.named_parameters() if name.startswith("variance_")}
        shared = {"dense.weight", "query.weight", "key_value.weight", "norm.weight"} if kind == "attention" else set()
        assert moved >= own and (moved >= shared) is (not detached or not shared)
        assert (x.grad is not None and bool(x.grad.any())) is not detached
        if detached:
            assert moved == own


def test_encoder_output_is_fp32_under_autocast() -> None:
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4))
    built = encoder()
    plain = built(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = built(x.bfloat16())
    assert cast.mean.dtype is cast.logvar.dtype is torch.float32
    torch.testing.assert_close(cast.logvar, plain.logvar, atol=0.02, rtol=0)


def test_log_variances_beyond_the_range_are_bounded_and_counted() -> None:
    built, x = encoder("linear"), torch.zeros(1, 1, 16)
    with torch.no_grad():
        built.variance_out.bias.copy_(torch.tensor([-50.0, -10.1, -9.9, 0, 9.9, 10.1, 50.0] + [1.0] * 9))
    found = built(x)
    assert found.logvar.min() >= -10 and found.logvar.max() <= 10 and found.out_of_range().tolist() == [4]


def test_encoder_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="heads=3 must be even"):
        GaussianEncoder.Config(heads=3)
    with pytest.raises(ConfigError, match=r"width 20 .* 2 \* heads = 8"):
        encoder(width=20)
    with pytest.raises(ConfigError, match=r"logvar_init=12.0 must lie in \[-10, 10\)"):
        GaussianEncoder.Config(logvar_init=12.0)


# ---- losses of one study ----


def test_divergences_are_torchs() -> None:
    p, q = gaussian(4, 6, 5), gaussian(4, 6, 6)

    def normal_of(g: Gaussian) -> torch.distributions.Normal:
        return torch.distributions.Normal(g.mean, (g.logvar / 2).exp())

    expected = torch.distributions.kl_divergence(normal_of(p), normal_of(q)).mean(1)
    # The bound at -6 and 4 moves log-variances near -1 by less than 0.03.
    torch.testing.assert_close(kl_divergence(p, q), expected, rtol=0.05, atol=0.02)
    unit = torch.distributions.Normal(torch.zeros(4, 6).double(), torch.ones(4, 6).double())
    torch.testing.assert_close(
        prior_kl(p, with_mean=True), torch.distributions.kl_divergence(normal_of(p), unit).mean(1)
    )
    without = prior_kl(p, with_mean=True) - prior_kl(p, with_mean=False)
    torch.testing.assert_close(without, 0.5 * p.mean.square().mean(1))


def test_inclusion_is_the_difference_of_two_integrals() -> None:
    p, q = gaussian(3, 4, 7, spread=0.3), gaussian(3, 4, 8, spread=0.3)
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None, None]

    def density(g: Gaussian) -> torch.Tensor:
        return torch.exp(-0.5 * (grid - g.mean) ** 2 / g.logvar.exp()) / (2 * math.pi * g.logvar.exp()).sqrt()

    of_p, of_q = density(p), density(q)
    expected = (of_p**2 * of_q).sum(0).log() - (of_p * of_q**2).sum(0).log()
    torch.testing.assert_close(inclusion_score(p, q), expected, rtol=0.02, atol=0.02)
    narrow = Gaussian(mean=p.mean, logvar=p.logvar - 1)
    assert (inclusion_score(narrow, p) > 0).all() and (inclusion_score(p, narrow) < 0).all()


@pytest.mark.parametrize("form", ["consistency", "reversed", "prior", "both", "inclusion"])
def test_masked_view_alone_is_moved(form: str) -> None:
    masked, full = gaussian(4, 6, 9), gaussian(4, 6, 10)
    loss = divergence(form, masked, full, unit_norm=False)  # type: ignore[arg-type]
    assert loss.shape == (4,)
    loss.sum().backward()
    assert full.mean.grad is None and full.logvar.grad is None and masked.logvar.grad.any()


def best_logvar(form: str, apart: float) -> float:
    """The masked view's log-variance that the form is least at, its mean being off by `apart`; the full one's is -1."""
    logvar = torch.linspace(-4, 2, 1201)[:, None]
    masked = Gaussian(mean=torch.full_like(logvar, apart), logvar=logvar)
    full = Gaussian(mean=torch.zeros_like(logvar), logvar=torch.full_like(logvar, -1.0))
    return float(logvar[divergence(form, masked, full, unit_norm=True).argmin()])  # type: ignore[arg-type]


def test_only_some_forms_raise_the_variance_of_a_masked_view() -> None:
    assert best_logvar("consistency", 0.0) == pytest.approx(-1, abs=0.02)
    assert best_logvar("consistency", 1.0) == pytest.approx(-1, abs=0.02)
    assert best_logvar("reversed", 1.0) == pytest.approx(math.log(math.exp(-1) + 1), abs=0.05)
    assert best_logvar("inclusion", 0.0) > 0


def test_forecast_of_excess_is_best_at_its_mean() -> None:
    """A study of now 1, now 3 nats is forecast best by a variance of 2, whatever its dimensions say apart."""
    spread = torch.tensor([0.5, -0.5, 0.2, -0.2])
    levels = torch.linspace(-1.0, 2.0, 301)
    given = Gaussian(mean=torch.zeros(301, 4), logvar=levels[:, None] + spread)
    losses = 0.5 * (forecast_error(given, torch.ones(301), -0.5) + forecast_error(given, torch.full((301,), 3.0), -0.5))
    assert levels[losses.argmin()].item() == pytest.approx(math.log(2.0) - 0.5, abs=0.006)


def test_floor_is_of_log_variance_and_at_maps_level() -> None:
    """MAP's entropy of 300 nats at D = 768 is a mean log-variance of -2.06, sigma 0.36; not a log-std of -2.06."""
    size = 768
    at_level = torch.full((1, size), -2.06)
    entropy = torch.distributions.Normal(torch.zeros(size), (at_level[0] / 2).exp()).entropy().sum()
    assert float(entropy) == pytest.approx(300, abs=2)

    def loss(logvar: torch.Tensor) -> torch.Tensor:
        return variance_floor(Gaussian(mean=torch.zeros_like(logvar), logvar=logvar), -2.06)

    assert loss(at_level + 0.01).item() == 0
    below = (at_level - 0.5).requires_grad_()
    loss(below).sum().backward()
    assert loss(below).item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(below.grad, torch.full((1, size), -1 / size))


def test_masked_losses_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(3, 5, 9, generator=generator, dtype=torch.float64)
    words = torch.randint(0, 9, (5,), generator=generator)
    expected = torch.stack([-logits[:, r].log_softmax(-1)[:, words[r]].mean() for r in range(5)])
    torch.testing.assert_close(word_loss(logits, words), expected)
    assert word_loss(logits[:, :0], words[:0]).shape == (0,)
    patches = normalise_patches(torch.randn(2, 4, 16, generator=generator) * 3 + 1)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1, correction=0), torch.ones(2, 4))
    assert not normalise_patches(torch.full((1, 16), 0.3)).any()
    predicted = torch.randn(3, 2, 4, 16, generator=generator)
    expected = torch.stack([((predicted[:, v] - patches[v]) ** 2).mean() for v in range(2)])
    torch.testing.assert_close(patch_loss(predicted, patches), expected)


def test_means_by_study_leave_void_ones_out() -> None:
    out = PerStudy(torch.tensor([True, False, True]))
    out.add("kl", torch.tensor([1.0, 3.0, torch.nan, 4.0]), torch.tensor([0, 0, 1, 2]))
    out.add("kl", torch.tensor([4.0, 7.0, 0.0]))
    out.add("mlm", torch.tensor([5.0]), torch.tensor([2]))  # study 0 has no masked word
    means = out.means()
    assert means["mlm"].tolist() == [0.0, 0.0, 5.0]


def test_means_by_study_are_those_of_the_membership_matrix() -> None:
    """Rows of a study need not be neighbours: first tokens stand before masked ones."""
    generator = torch.Generator().manual_seed(13)
    study = torch.cat([torch.arange(9), torch.randint(0, 9, (200,), generator=generator).sort().values])
    study = study[study != 4]  # one study without a row
    values = torch.randn(len(study), generator=generator, requires_grad=True)
    out = PerStudy(torch.ones(9, dtype=torch.bool))
    out.add("kl", values, study)
    found, expected = out.means()["kl"], mean_over_views(values[:, None], study, 9)[:, 0]
    assert found[4] == 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = torch.arange(9.0)
    ours, theirs = (torch.autograd.grad((weights * means).sum(), values)[0] for means in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    nothing = PerStudy(torch.ones(2, dtype=torch.bool))
    nothing.add("mlm", values[:0], study[:0])
    assert nothing.means()["mlm"].tolist() == [0.0, 0.0]


# ---- matching ----


def test_negatives_are_valid_of_another_key_and_of_the_group() -> None:
    generator = torch.Generator().manual_seed(12)
    rows, group = 24, 6
    keys = torch.randint(0, 3, (rows,), generator=generator)
    keys[6:12] = 1  # a group of one key: nothing to draw
    valid = torch.rand(rows, generator=generator) < 0.8
    logits = torch.randn(rows, rows, generator=generator)
    for trial in range(50):
        draws = {"keys": keys, "valid": valid, "draw_key": torch.arange(rows) + 100 * trial}
        study, exists = draw_negatives(logits, group=group, **draws)
        assert not exists[6:12].any() and not exists[~valid].any()
        assert torch.equal(study[~exists], torch.arange(rows)[~exists])  # itself, whatever stands beside it
        i = exists.nonzero().squeeze(1)
        assert (keys[study[i]] != keys[i]).all() and valid[study[i]].all() and (study[i] // group == i // group).all()
        part = slice(12, 18)
        own = {name: value[part] for name, value in draws.items()}
        again, there = draw_negatives(logits[part, part], group=group, **own)
        assert torch.equal(there, exists[part]) and torch.equal(again + 12, study[part])


def test_negatives_are_drawn_in_proportion_to_the_softmax() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0]]).expand(4, 4)
    keys, valid = torch.tensor([0, 1, 2, 3]), torch.ones(4, dtype=torch.bool)
    counts = torch.zeros(4)
    for trial in range(1500):
        study, _ = draw_negatives(logits, keys=keys, valid=valid, draw_key=torch.arange(4) + 10 * trial, group=4)
        counts[study[0]] += 1
    expected = F.softmax(torch.tensor([-torch.inf, 0.0, 1.0, 2.0]), dim=0)
    torch.testing.assert_close(counts / 1500, expected, atol=0.04, rtol=0)


def test_match_loss_is_the_mean_cross_entropy() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(13))
    for matched in (True, False):
        target = torch.full((3, 5), float(matched))
        expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(0)
        torch.testing.assert_close(match_loss(logits, matched), expected)
