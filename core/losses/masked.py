"""Masked prediction of words and patches from sampled tokens (MAP's D-MLM; MAE's target for patches, arXiv 2111.06377).

The loss of each sample is taken first and then averaged: an upper bound on the loss of the averaged prediction.

Letters: K = samples, the mean among them; R = masked words; V = images; M = masked patches; P = pixels of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """`logits [K, R, vocabulary]`, `words [R]` int64 -> cross-entropy `[R]`, mean over samples."""
    samples, count, vocabulary = logits.shape
    target = words.expand(samples, count).flatten()
    return F.cross_entropy(logits.reshape(-1, vocabulary), target, reduction="none").view(samples, count).mean(dim=0)


def normalise_patches(patches: Tensor) -> Tensor:
    """`[..., P]` pixels -> mean 0 and variance 1 within each patch, fp32; a flat patch becomes zeros."""
    wide = patches.float()
    variance, mean = torch.var_mean(wide, dim=-1, keepdim=True, correction=0)
    return (wide - mean) / (variance + 1e-6).sqrt()


def patch_loss(predicted: Tensor, patches: Tensor) -> Tensor:
    """`predicted [K, V, M, P]`, `patches [V, M, P]` -> mean squared error `[V]` over samples, patches and pixels."""
    return (predicted - patches).square().mean(dim=(0, 2, 3))
