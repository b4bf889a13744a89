"""Losses known by token or by image, averaged to one number a study: the `local` part of a task's `Encoded`."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from core.models.towers import mean_over_views


class PerStudy:
    """Named terms `[b]` of a (micro-)batch of b studies. A name's terms are averaged; void studies hold 0."""

    def __init__(self, valid: Tensor) -> None:
        self._valid = valid  # [b]
        self._terms: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor, study: Tensor | None = None) -> None:
        """`values [b]`, or `[R]` with the `study [R]` each belongs to, of which the mean over each study is taken."""
        if study is not None:
            values = mean_over_views(values[:, None], study, len(self._valid))[:, 0]
        self._terms[name].append(values)

    def means(self) -> dict[str, Tensor]:
        """Name -> `[b]` fp32."""
        found = {}
        for name, terms in self._terms.items():
            mean = torch.stack(terms).mean(dim=0)
            found[name] = torch.where(self._valid, mean, torch.zeros_like(mean))
        return found
