"""Terms on the Gaussians of one study: divergences of a masked view from the full one, and the level of the variance.

Nothing here needs another study. Every term is a mean over dimensions, so its size does not depend on how many there
are; all arithmetic is fp32. What compares two Gaussians bounds their log-variances to DIVERGENCE_RANGE before it
exponentiates them with either sign: at -10 a mean off by 0.1 would weigh 110 nats a dimension. `prior_kl` and
`forecast_error` divide by no variance and take log-variances as the encoder bounds them, to `gaussian.LOGVAR_RANGE`.

Letters: R = rows, D = dimensions; v and w are the variances of `of` and `to`, d the difference of their means.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.models.gaussian import Gaussian
from core.models.heads import soft_bound

DIVERGENCE_RANGE = (-6.0, 4.0)
# Slope of the inclusion loss: at equal means 0.69 at equal variances, 0.09 where the outer one is twice the inner one.
INCLUSION_SHARPNESS = 10.0

Divergence = Literal["consistency", "reversed", "prior", "both", "inclusion"]


def divergence(form: Divergence, masked: Gaussian, full: Gaussian, *, unit_norm: bool) -> Tensor:
    """What the masked view's Gaussian `[R, D]` is held to, `[R]`; the full view's is a constant target.

    `consistency`: KL(masked || full), least at equal variances whatever the error of the mean. `reversed`:
    KL(full || masked), least where the masked variance is the full one plus that error squared. `prior`: KL to
    N(0, I), of the variance alone where means have unit norm. `both`: consistency and prior. `inclusion`: the masked
    view should contain the full one.
    """
    full = full.detach()
    if form == "reversed":
        return kl_divergence(full, masked)
    if form == "inclusion":
        return inclusion_loss(full, masked)
    loss = masked.mean.new_zeros(len(masked.mean))
    if form in ("consistency", "both"):
        loss = loss + kl_divergence(masked, full)
    if form in ("prior", "both"):
        loss = loss + prior_kl(masked, with_mean=not unit_norm)
    return loss


def kl_divergence(of: Gaussian, to: Gaussian) -> Tensor:
    """KL(of || to) over D, `[R]`: mean of 0.5 (v / w + d^2 / w - 1 + ln w - ln v)."""
    s, t = _bounded(of), _bounded(to)
    apart = (of.mean - to.mean).square()
    return 0.5 * ((s - t).exp() + apart * (-t).exp() - 1 + t - s).mean(dim=-1)


def prior_kl(gaussian: Gaussian, *, with_mean: bool) -> Tensor:
    """KL to N(0, I) over D, `[R]`: mean of 0.5 (mean^2 + v - 1 - ln v); without the mean's part for unit-norm means."""
    s = gaussian.logvar
    level = 0.5 * (s.exp() - 1 - s).mean(dim=-1)
    return level + 0.5 * gaussian.mean.square().mean(dim=-1) if with_mean else level


def inclusion_score(inner: Gaussian, outer: Gaussian) -> Tensor:
    """ProLIP's test (arXiv 2410.18857) by dimension, `[R, D]`: above 0 where `inner` lies within `outer`.

    log of the integral of p^2 q less that of p q^2, p = `inner`, q = `outer`. p^2 is a Gaussian of half the variance
    times (4 pi v)^-1/2, hence 0.5 [ln w - ln v + ln(v + w/2) - ln(v/2 + w) + d^2 / (v + w/2) - d^2 / (v/2 + w)].
    """
    s, t = _bounded(inner), _bounded(outer)
    half = torch.log(torch.tensor(2.0, device=s.device, dtype=s.dtype))
    narrow, wide = torch.logaddexp(s, t - half), torch.logaddexp(s - half, t)  # ln(v + w/2), ln(v/2 + w)
    apart = (inner.mean - outer.mean).square()
    return 0.5 * (t - s + narrow - wide + apart * ((-narrow).exp() - (-wide).exp()))


def inclusion_loss(inner: Gaussian, outer: Gaussian) -> Tensor:
    """-log sigmoid(sharpness * `inclusion_score`), mean over D, `[R]`."""
    return -F.logsigmoid(INCLUSION_SHARPNESS * inclusion_score(inner, outer)).mean(dim=-1)


def forecast_error(gaussian: Gaussian, excess: Tensor, level: float) -> Tensor:
    """Squared error of exp(mean log-variance - level) as a forecast of `excess [R]`, nats of a contrast, `[R]`.

    Least where a study's log-variance says how much worse than its positives allow it is told from all others: what is
    told apart badly, because it is ambiguous or was taken badly, gets the larger variance. A mean log-variance of
    `level` stands for one nat. `excess` is a constant. (Our own: a loss forecast, Yoo and Kweon 2019, as a variance.)
    """
    return (torch.exp(gaussian.uncertainty() - level) - excess.detach()).square()


def variance_floor(gaussian: Gaussian, floor: float) -> Tensor:
    """How far the mean log-variance lies below `floor`, `[R]`: MAP's entropy floor, whatever D.

    MAP asks for an entropy of 300 nats at D = 768, which a mean log-variance of -2.06 has.
    """
    return F.relu(floor - gaussian.logvar.mean(dim=-1))


def _bounded(gaussian: Gaussian) -> Tensor:
    return soft_bound(gaussian.logvar, *DIVERGENCE_RANGE)
