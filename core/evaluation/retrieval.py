"""Retrieval between images and reports of a split, where a report that reads the same counts as the right one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import EmbeddedSplit
from core.evaluation.statistics import means

DIRECTIONS = {"image_to_text": ("image_embeds", "text_embeds"), "text_to_image": ("text_embeds", "image_embeds")}


class Retrieval:
    """Recall at 1, 5, 10 and median rank in both directions, with intervals by patient for the recalls.

    A query's rank is one more than the number of wrong candidates at least as similar as its best right one. Ties count
    against the model, so embeddings that collapsed to a point do not look perfect.
    """

    protocol = "retrieval"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """At most `block` x `block` similarities exist at a time."""

        recall_at: tuple[int, ...] = (1, 5, 10)
        block: int = 2048
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Retrieval.Config()
        self._report: dict[str, Any] = {}

    def run(self, split: EmbeddedSplit) -> Iterator[tuple[str, float]]:
        """Yields (`<direction>_r<k>`, recall) and (`<direction>_median_rank`, rank from 1)."""
        config = self.config
        key, patient_key = split.report_key, split.patient_key.numpy()
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "distinct_reports": len(torch.unique(key)),
            "level": config.level,
            "directions": {},
        }
        for direction, (query, candidate) in DIRECTIONS.items():
            ranks = ranks_of_best_match(split.need(query), split.need(candidate), key, block=config.block).numpy()
            hits = np.stack([ranks <= k for k in config.recall_at], axis=1)  # [n, M]
            recalls = means(hits, patient_key, seed=config.seed, replicates=config.replicates, level=config.level)
            median = float(np.median(ranks))
            found = {f"r{k}": estimate.to_json() for k, estimate in zip(config.recall_at, recalls, strict=True)}
            self._report["directions"][direction] = {**found, "median_rank": median}
            for k, estimate in zip(config.recall_at, recalls, strict=True):
                yield f"{direction}_r{k}", estimate.value
            yield f"{direction}_median_rank", median

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report


def ranks_of_best_match(queries: Tensor, candidates: Tensor, key: Tensor, block: int = 2048) -> Tensor:
    """[n] int64, from 1. `queries [n, E]`, `candidates [n, E]`; row i matches row j where `key [n]` is equal.

    Two sweeps over tiles of `block` x `block`: the best match of each query, then the wrong candidates not below it.
    """
    ranks = torch.ones(len(queries), dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):  # the caller's bf16 would make ties of near misses
        for rows in torch.arange(len(queries)).split(block):
            best = torch.full((len(rows),), -torch.inf)
            for similarity, same in _tiles(queries[rows], key[rows], candidates, key, block):
                best = torch.maximum(best, similarity.masked_fill(~same, -torch.inf).amax(dim=1))
            for similarity, same in _tiles(queries[rows], key[rows], candidates, key, block):
                ranks[rows] += ((similarity >= best[:, None]) & ~same).sum(dim=1)
    return ranks


def _tiles(
    queries: Tensor, query_key: Tensor, candidates: Tensor, candidate_key: Tensor, block: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarity, same key) tiles [rows, block] over all candidates; equal arguments give equal bits both times."""
    for columns, keys in zip(candidates.split(block), candidate_key.split(block), strict=True):
        yield queries @ columns.T, query_key[:, None] == keys[None, :]
