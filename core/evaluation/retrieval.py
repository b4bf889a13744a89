"""Retrieval between images and reports of a split, where a report that reads the same counts as the right one.

Images and reports are compared by the cosine of their embeddings. Of a model of anatomies it is the mean of the cosines
of those anatomies that the image shows whole and the report speaks of or calls normal by its silence: an anatomy that
one of the two lacks says nothing for or against the pair. Two that share none are as far apart as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.abstention import Selective
from core.evaluation.embed import EmbeddedSplit
from core.evaluation.statistics import Estimate, means, resampled
from shards.errors import DataError

DIRECTIONS = {"image_to_text": ("image", "text"), "text_to_image": ("text", "image")}
Similarity = Callable[[Tensor, Tensor], Tensor]  # rows [r, D], [c, D] -> [r, c]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Studies of which both sides are known: `image` and `text` `[n, D]`, equal `key [n]` for equal reports."""

    split: EmbeddedSplit
    image: Tensor
    text: Tensor
    key: Tensor
    similarity: Similarity
    by: str

    @staticmethod
    def of(split: EmbeddedSplit) -> Compared:
        """Anatomy by anatomy, where the split has reports so; else whole."""
        if split.anatomy_text_embeds is None or split.anatomy_text_key is None:
            image, text = split.need("image_embeds"), split.need("text_embeds")
            return Compared(
                split=split, image=image, text=text, key=split.report_key, similarity=cosines, by="whole reports"
            )
        shared = (split.need("anatomy_present") * split.need("anatomy_said")).any(dim=1)
        split = split.rows(shared)
        texts, said = split.need("anatomy_text_key"), split.need("anatomy_said")
        _, key = torch.unique(texts * said.long(), dim=0, return_inverse=True)
        image = _packed(split.need("anatomy_embeds"), split.need("anatomy_present"))
        text = _packed(split.need("anatomy_text_embeds"), said)
        return Compared(
            split=split, image=image, text=text, key=key, similarity=_mean_over_shared(said.shape[1]), by="anatomies"
        )


def cosines(queries: Tensor, candidates: Tensor) -> Tensor:
    """Of rows of unit length."""
    return queries @ candidates.T


def _packed(embeds: Tensor, there: Tensor) -> Tensor:
    """`[n, A, E]`, `[n, A]` of 1 and 0 -> `[n, A * E + A]`: what is not there at 0, and what is there."""
    return torch.cat([(embeds * there[:, :, None]).flatten(1), there], dim=1)


def _mean_over_shared(anatomies: int) -> Similarity:
    def similarity(queries: Tensor, candidates: Tensor) -> Tensor:
        added = queries[:, :-anatomies] @ candidates[:, :-anatomies].T
        shared = queries[:, -anatomies:] @ candidates[:, -anatomies:].T
        return torch.where(shared > 0, added / shared.clamp(min=1.0), -1.0)

    return similarity


class Retrieval:
    """Recall at 1, 5, 10 and median rank in both directions, with intervals by patient for the recalls.

    A query's rank is one more than the number of wrong candidates at least as similar as its best right one. Ties count
    against the model, so embeddings that collapsed to a point do not look perfect.

    Where `coverages` are given, recalls also over the share of queries that the model is surest of: by the query's own
    mean log-variance, if the split has it, and by the baseline that any model offers, the margin in similarity between
    the best candidate and the best one with another report.
    """

    protocol = "retrieval"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """At most `block` x `block` similarities exist at a time. `coverages` in (0, 1]; none: no abstention."""

        recall_at: tuple[int, ...] = (1, 5, 10)
        coverages: tuple[float, ...] = ()
        block: int = 2048
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Retrieval.Config()
        self._report: dict[str, Any] = {}

    def run(self, split: EmbeddedSplit) -> Iterator[tuple[str, float]]:
        """Yields (`<direction>_r<k>`, recall) and (`<direction>_median_rank`, rank from 1).

        With abstention also (`<direction>_r1_at_<percent>_by_<logvar or margin>`, recall), the first of `recall_at`.
        """
        config = self.config
        compared = Compared.of(split)
        studies, split, key = len(split), compared.split, compared.key
        if not len(split):
            raise DataError("no study shows an anatomy that its report annotates; there is nothing to retrieve")
        patient_key = split.patient_key.numpy()
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "without_shared_anatomy": studies - len(split),
            "compared_by": compared.by,
            "distinct_reports": len(torch.unique(key)),
            "level": config.level,
            "directions": {},
            "abstention": {},
        }
        for direction, (query, candidate) in DIRECTIONS.items():
            rows = getattr(compared, query), getattr(compared, candidate)
            ranks = ranks_of_best_match(*rows, key, block=config.block, similarity=compared.similarity).numpy()
            hits = np.stack([ranks <= k for k in config.recall_at], axis=1)  # [n, M]
            recalls = means(hits, patient_key, seed=config.seed, replicates=config.replicates, level=config.level)
            median = float(np.median(ranks))
            found = {f"r{k}": estimate.to_json() for k, estimate in zip(config.recall_at, recalls, strict=True)}
            self._report["directions"][direction] = {**found, "median_rank": median}
            self._report["abstention"][direction] = {}
            for k, estimate in zip(config.recall_at, recalls, strict=True):
                yield f"{direction}_r{k}", estimate.value
            yield f"{direction}_median_rank", median
            for by, confidence in self._confidences(compared, query, candidate):
                kept = self._at_coverages(confidence, hits, patient_key)
                self._report["abstention"][direction][by] = {
                    percent: {name: estimate.to_json() for name, estimate in of.items()} for percent, of in kept.items()
                }
                first = f"r{config.recall_at[0]}"
                for percent, of in kept.items():
                    yield f"{direction}_{first}_at_{percent}_by_{by}", of[first].value

    def _confidences(self, compared: Compared, query: str, candidate: str) -> Iterator[tuple[str, np.ndarray]]:
        """(what it is made of, confidence [n]) of the queries."""
        if not self.config.coverages:
            return
        logvar = compared.split.image_logvar if query == "image" else compared.split.text_logvar
        if logvar is not None:
            yield "logvar", -logvar.double().mean(dim=1).numpy()
        rows = getattr(compared, query), getattr(compared, candidate)
        margin = margins(*rows, compared.key, block=self.config.block, similarity=compared.similarity)
        yield "margin", margin.numpy()

    def _at_coverages(
        self, confidence: np.ndarray, hits: np.ndarray, patient_key: np.ndarray
    ) -> dict[str, dict[str, Estimate]]:
        """Coverage in percent -> (`r<k>` -> recall) of the surest queries; `hits [n, M]`, one column a k."""
        config = self.config
        selective = [Selective(confidence, column) for column in hits.T]

        def statistics(weights: np.ndarray) -> np.ndarray:
            return np.stack([one.at(coverage, weights) for coverage in config.coverages for one in selective])

        found = iter(
            resampled(statistics, patient_key, seed=config.seed, replicates=config.replicates, level=config.level)
        )
        return {
            f"{100 * coverage:g}": {f"r{k}": next(found) for k in config.recall_at} for coverage in config.coverages
        }

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report


def ranks_of_best_match(
    queries: Tensor, candidates: Tensor, key: Tensor, block: int = 2048, similarity: Similarity = cosines
) -> Tensor:
    """[n] int64, from 1. `queries [n, E]`, `candidates [n, E]`; row i matches row j where `key [n]` is equal.

    Two sweeps over tiles of `block` x `block`: the best match of each query, then the wrong candidates not below it.
    """
    ranks = torch.ones(len(queries), dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):  # the caller's bf16 would make ties of near misses
        for rows in torch.arange(len(queries)).split(block):
            best = torch.full((len(rows),), -torch.inf)
            for near, same in _tiles(queries[rows], key[rows], candidates, key, block, similarity):
                best = torch.maximum(best, near.masked_fill(~same, -torch.inf).amax(dim=1))
            for near, same in _tiles(queries[rows], key[rows], candidates, key, block, similarity):
                ranks[rows] += ((near >= best[:, None]) & ~same).sum(dim=1)
    return ranks


def margins(
    queries: Tensor, candidates: Tensor, key: Tensor, block: int = 2048, similarity: Similarity = cosines
) -> Tensor:
    """[n]: similarity of a query's best candidate less that of its best one with another key, in [0, 2].

    Without regard to keys, a report that stands twice in the gallery would be its own rival. No other key: as if there
    were one at -1.
    """
    found = torch.empty(len(queries))
    with torch.autocast(queries.device.type, enabled=False):
        for rows in torch.arange(len(queries)).split(block):
            first, second = torch.full((len(rows),), -torch.inf), torch.full((len(rows),), -1.0)
            first_key = torch.zeros(len(rows), dtype=key.dtype)
            for near, columns in _columns(queries[rows], candidates, key, block, similarity):
                best, place = near.max(dim=1)
                best_key = columns[place]
                rival = near.masked_fill(columns[None, :] == best_key[:, None], -1.0).amax(dim=1)
                same, ahead = best_key == first_key, best > first
                of_others = torch.where(ahead, torch.maximum(first, rival), torch.maximum(best, second))
                second = torch.where(same, torch.maximum(second, rival), of_others)
                first, first_key = torch.maximum(first, best), torch.where(ahead, best_key, first_key)
            found[rows] = first - second
    return found


def _columns(
    queries: Tensor, candidates: Tensor, candidate_key: Tensor, block: int, similarity: Similarity
) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarity [rows, block], key [block]) over all candidates."""
    for columns, keys in zip(candidates.split(block), candidate_key.split(block), strict=True):
        yield similarity(queries, columns), keys


def _tiles(
    queries: Tensor, query_key: Tensor, candidates: Tensor, candidate_key: Tensor, block: int, similarity: Similarity
) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarity, same key) tiles [rows, block] over all candidates; equal arguments give equal bits both times."""
    for near, keys in _columns(queries, candidates, candidate_key, block, similarity):
        yield near, query_key[:, None] == keys[None, :]
