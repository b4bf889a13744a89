"""Studies as points on a picture: t-SNE of frozen features, coloured by what is known of each, and its measure.

Letters: n = studies, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from core.evaluation.pictures import as_image, new_figure
from shards.errors import DataError

UNKNOWN = "unknown"
COLOURS = 10  # values of an attribute that get one of their own; the rarest share the last


class LatentMap:
    """t-SNE of features (van der Maaten and Hinton 2008), and how alike neighbours are before it.

    The figure of an attribute is the share of the `neighbours` nearest studies, by cosine of the features themselves,
    that have a study's own value; other studies of the same patient do not count. `by_chance` says what strangers
    would have.
    """

    protocol = "map"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`perplexity`: less where there are few studies."""

        perplexity: float = 30.0
        neighbours: int = 10
        seed: int = 0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or LatentMap.Config()
        self._pictures: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {}

    def run(
        self, features: np.ndarray, attributes: Mapping[str, Sequence[str | None]], patient_key: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        """Yields (attribute, share of like neighbours). `features [n, D]`; an attribute of one value is left out.

        Raises DataError for fewer than four studies.
        """
        if len(features) < 4:
            raise DataError(f"a map of {len(features)} studies shows nothing; give a split of more")
        features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
        points = TSNE(
            init="pca", perplexity=min(self.config.perplexity, (len(features) - 1) / 3), random_state=self.config.seed
        ).fit_transform(features)
        near = self._neighbours(features, patient_key)
        figures: dict[str, Any] = {}
        by_chance: dict[str, float] = {}
        for name, values in attributes.items():
            known = {value for value in values if value is not None}
            if len(known) < 2:
                continue
            self._pictures[name] = _drawn(points, name, values)
            share, chance = _alike(near, values, patient_key)
            figures[name] = {"value": None if np.isnan(share) else share, "low": None, "high": None}
            by_chance[name] = chance
            yield name, share
        self._report = {
            "protocol": self.protocol, "studies": len(features), "neighbours": self.config.neighbours,
            "figures": figures, "by_chance": by_chance,
        }  # fmt: skip

    def pictures(self) -> dict[str, Tensor]:
        """Attribute -> picture [3, H, W] of the last run."""
        return self._pictures

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report

    def _neighbours(self, features: np.ndarray, patient_key: np.ndarray) -> list[np.ndarray]:
        """Of each study: the nearest ones of other patients."""
        most = np.unique(patient_key, return_counts=True)[1].max()
        wanted = min(len(features), self.config.neighbours + int(most))
        places = NearestNeighbors(n_neighbors=wanted).fit(features).kneighbors(return_distance=True, X=features)[1]
        return [row[patient_key[row] != patient_key[study]][: self.config.neighbours]
                for study, row in enumerate(places)]  # fmt: skip


def _alike(near: Sequence[np.ndarray], values: Sequence[str | None], patient_key: np.ndarray) -> tuple[float, float]:
    """Share of like neighbours among those whose value is known, and of like pairs of patients."""
    found = np.array([UNKNOWN if value is None else value for value in values])
    known = np.array([value is not None for value in values])
    shares, pairs = [], []
    for study in np.flatnonzero(known).tolist():
        rows = near[study][known[near[study]]]
        strangers = known & (patient_key != patient_key[study])
        if len(rows):
            shares.append(float((found[rows] == found[study]).mean()))
            pairs.append(float((found[strangers] == found[study]).mean()))
    return (float(np.mean(shares)), float(np.mean(pairs))) if shares else (float("nan"), float("nan"))


def _drawn(points: np.ndarray, name: str, values: Sequence[str | None]) -> Tensor:
    counts: dict[str, int] = {}
    for value in values:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    often = sorted(counts, key=lambda value: (-counts[value], value))
    shown = sorted(often[:COLOURS] if len(often) <= COLOURS else often[: COLOURS - 1])
    figure = new_figure(6.4, 5.6)
    axes = figure.add_subplot()
    rest = np.array([value is None or value not in shown for value in values])
    if rest.any():
        label = UNKNOWN if len(often) <= COLOURS else f"{UNKNOWN} or other"
        axes.scatter(*points[rest].T, s=6, color="0.85", label=label, linewidths=0)
    for number, value in enumerate(shown):
        rows = np.array([one == value for one in values])
        axes.scatter(*points[rows].T, s=9, color=f"C{number}", label=f"{value} ({counts[value]})", linewidths=0)
    axes.set_title(f"t-SNE of image features: {name}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=7, markerscale=2, loc="best", framealpha=0.7)
    return as_image(figure)
