"""Similarities of pairs that are no matrix product, worked out dimension by dimension in small tiles.

Larger is closer: distances come with a minus sign. N x M is held, as it is the result; N x M x D never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from kernels.gaussian_similarity import reference

Name = Literal["bhattacharyya", "hellinger", "expected_likelihood"]
Gaussians = tuple[Tensor, Tensor, Tensor, Tensor]  # mean and logvar [N, D], mean and logvar [M, D]

FORMULAS: dict[Name, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "bhattacharyya": lambda *four: -reference.bhattacharyya_distance(*four),
    "hellinger": lambda *four: -reference.squared_hellinger(*four),
    "expected_likelihood": reference.log_expected_likelihood,
}

TILE_ROWS = TILE_COLUMNS = 32  # times D elements stay in a core's second-level cache


def density(name: Name, gaussians: Gaussians) -> Tensor:
    """Similarity [N, M] of every pair."""
    n, m = len(gaussians[0]), len(gaussians[2])
    found = gaussians[0].new_empty(n, m)
    for i, j in _tiles(n, m):
        found[i, j] = FORMULAS[name](*_cut(gaussians, i, j))
    return found


def density_gradients(name: Name, gaussians: Gaussians, upstream: Tensor) -> Gaussians:
    """Of `sum(upstream * density)` by the four, upstream [N, M]; each tile is computed again."""
    mean_a, logvar_a, mean_b, logvar_b = (torch.zeros_like(each) for each in gaussians)
    totals = (mean_a, logvar_a, mean_b, logvar_b)
    for i, j in _tiles(*upstream.shape):
        with torch.enable_grad():
            leaves = tuple(each.detach().requires_grad_() for each in _cut(gaussians, i, j))
            parts = torch.autograd.grad(FORMULAS[name](*leaves), leaves, upstream[i, j])
        for total, part in zip(_cut(totals, i, j), parts, strict=True):
            total += part
    return totals


def _tiles(n: int, m: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, n, TILE_ROWS):
        for j in range(0, m, TILE_COLUMNS):
            yield slice(i, i + TILE_ROWS), slice(j, j + TILE_COLUMNS)


def _cut(four: Gaussians, i: slice, j: slice) -> Gaussians:
    return four[0][i], four[1][i], four[2][j], four[3][j]
