"""Losses known by token or by image, averaged to one number a study: the `local` part of a task's `Encoded`."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from core.models.attention import pick_rows


class PerStudy:
    """Named terms `[b]` of a (micro-)batch of b studies. A name's terms are averaged; void studies hold 0."""

    def __init__(self, valid: Tensor) -> None:
        self._valid = valid  # [b]
        self._terms: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor, study: Tensor | None = None) -> None:
        """`values [b]`, or `[R]` with the `study [R]` each belongs to, of which the mean over each study is taken."""
        if study is not None:
            values = _mean_by_study(values, study, len(self._valid))
        self._terms[name].append(values)

    def means(self) -> dict[str, Tensor]:
        """Name -> `[b]` fp32."""
        found = {}
        for name, terms in self._terms.items():
            mean = torch.stack(terms).mean(dim=0)
            found[name] = torch.where(self._valid, mean, torch.zeros_like(mean))
        return found


def _mean_by_study(values: Tensor, study: Tensor, studies: int) -> Tensor:
    """`values [R]` fp32 of `study [R]`, in any order -> `[studies]`, 0 where there is no row.

    There are as many rows as tokens, too many for the membership matrix of `mean_over_views`; sums over neighbouring
    rows have a fixed order too.
    """
    study, order = study.sort(stable=True)
    counts = torch.searchsorted(study, torch.arange(studies + 1, device=study.device)).diff()
    total: Tensor = torch.segment_reduce(pick_rows(values, order), "sum", lengths=counts, unsafe=True)
    return total / counts.clamp(min=1)
