"""Similarities of two sets of diagonal Gaussians and the losses on them, as the formulas stand: the specification.

Every pair is worked out dimension by dimension in [N, M, D], in the dtype that comes in, fp64 included. For tests,
figures and small sets; `op` gives the same values and never holds N x M.

A set of Gaussians is `mean` and `logvar`, both [N, D]: the natural logarithm of the variance, never of the standard
deviation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LOG_2PI = math.log(2 * math.pi)


def squared_wasserstein(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance [N, M]: sum of (mu - nu)^2 + (sigma - rho)^2."""
    spread = _differences(torch.exp(logvar_a / 2), torch.exp(logvar_b / 2))
    return (_differences(mean_a, mean_b) ** 2 + spread**2).sum(-1)


def sampled_distance(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Closed-form sampled distance (CSD) [N, M], what two samples are expected to lie apart, squared (PCME++)."""
    variance = logvar_a.exp().sum(-1)[:, None] + logvar_b.exp().sum(-1)[None, :]
    return (_differences(mean_a, mean_b) ** 2).sum(-1) + variance


def kl_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """KL(a_i || b_j) [N, M] in nats."""
    log_ratio = _differences(logvar_a, logvar_b)
    apart = _differences(mean_a, mean_b) ** 2 * torch.exp(-logvar_b)
    return 0.5 * (log_ratio.exp() + apart - 1 - log_ratio).sum(-1)


def jeffreys_divergence(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """KL(a_i || b_j) + KL(b_j || a_i) [N, M] in nats."""
    back = kl_divergence(mean_b, logvar_b, mean_a, logvar_a)
    return kl_divergence(mean_a, logvar_a, mean_b, logvar_b) + back.transpose(0, 1)


def bhattacharyya_distance(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Minus the logarithm of the overlap of two densities [N, M]; ln cosh and ln (v + w) without overflow."""
    half = _differences(logvar_a, logvar_b).abs() / 2
    log_cosh = half + torch.log1p(torch.exp(-2 * half)) - math.log(2)
    apart = _differences(mean_a, mean_b) ** 2 * torch.exp(-_log_summed_variance(logvar_a, logvar_b))
    return (apart / 4 + log_cosh / 2).sum(-1)


def squared_hellinger(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Squared Hellinger distance [N, M], in [0, 1]; its gradient vanishes for hundreds of dimensions."""
    return -torch.expm1(-bhattacharyya_distance(mean_a, logvar_a, mean_b, logvar_b))


def log_expected_likelihood(mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor) -> Tensor:
    """Logarithm of the integral of the product of two densities [N, M]: a similarity, the larger the closer."""
    summed = _log_summed_variance(logvar_a, logvar_b)
    return -0.5 * (_LOG_2PI + summed + _differences(mean_a, mean_b) ** 2 * torch.exp(-summed)).sum(-1)


def info_nce(logits: Tensor, row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """Symmetric InfoNCE on stored logits [N, M]; positives are the pairs of equal key. Scalar.

    A row's positives share its target equally, and so do a column's. A row or column without any positive is left out
    of its mean.
    """
    positive = (row_keys[:, None] == column_keys[None, :]).to(logits.dtype)
    return 0.5 * (_directed(logits, positive) + _directed(logits.transpose(0, 1), positive.transpose(0, 1)))


def pairwise_sigmoid(logits: Tensor, row_keys: Tensor, column_keys: Tensor) -> Tensor:
    """SigLIP's loss on stored logits [N, M], summed over columns and averaged over rows. Scalar."""
    sign = 2.0 * (row_keys[:, None] == column_keys[None, :]).to(logits.dtype) - 1
    return -logsigmoid(sign * logits).sum() / logits.shape[0]


def _differences(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None, :] - b[None, :, :]


def _log_summed_variance(logvar_a: Tensor, logvar_b: Tensor) -> Tensor:
    return torch.logaddexp(logvar_a[:, None, :], logvar_b[None, :, :])


def _directed(logits: Tensor, positive: Tensor) -> Tensor:
    count = positive.sum(1)
    has = count > 0
    mean_positive = (positive * logits).sum(1) / count.clamp_min(1)
    return torch.where(has, torch.logsumexp(logits, 1) - mean_positive, 0.0).sum() / has.sum().clamp_min(1)
