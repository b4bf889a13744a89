"""Encoders beside each other on the same patients: figures, paired differences from a reference, and subgroups.

A statistic takes whole weights of studies `[n, r]` to values `[r]`; the same resampled patients weigh every encoder, so
differences are paired. Letters: n = studies, K = labels, R = replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.evaluation.statistics import LEAST_PATIENTS, AreaRanking, Estimate, mean_of_defined, replicates_of

Statistic = Callable[[np.ndarray], np.ndarray]
Scored = Callable[[np.ndarray], "Statistic | None"]  # rows -> the statistic of them, None where it is not defined


@dataclass(frozen=True, kw_only=True)
class Areas:
    """Macro AUC, mean over seeds. `scores`: of each seed `[n, K]`; `truth [n, K]`: 1, 0, anything else is left out.

    Over the labels with LEAST_PATIENTS patients of either class among the rows, else those with both classes.
    """

    scores: Sequence[np.ndarray]
    truth: np.ndarray
    patient_key: np.ndarray

    def __call__(self, rows: np.ndarray) -> Statistic | None:
        truth, patients = self.truth[rows], self.patient_key[rows]
        counted = labels_told(truth, patients, LEAST_PATIENTS) or labels_told(truth, patients, 1)
        if not counted:
            return None
        known = {k: np.flatnonzero((truth[:, k] == 0) | (truth[:, k] == 1)) for k in counted}
        rankings = [
            (known[k], AreaRanking(scores[rows][known[k], k], truth[known[k], k] == 1))
            for scores in self.scores
            for k in counted
        ]

        def macro(weights: np.ndarray) -> np.ndarray:
            each = np.stack([ranking.areas(weights[of]) for of, ranking in rankings], axis=1)  # [r, seeds x K]
            return mean_of_defined(each)

        return macro


def labels_told(truth: np.ndarray, patient_key: np.ndarray, least: int) -> list[int]:
    """Columns of `truth [n, K]` that are present in `least` patients or more, and absent in as many."""
    return [
        k
        for k in range(truth.shape[1])
        if all(len(np.unique(patient_key[truth[:, k] == value])) >= least for value in (0, 1))
    ]


@dataclass(frozen=True, kw_only=True)
class Means:
    """Mean over studies, then seeds: `values` of each seed `[n]`, such as Dice averaged over structures."""

    values: Sequence[np.ndarray]

    def __call__(self, rows: np.ndarray) -> Statistic | None:
        if not len(rows):
            return None
        value = np.mean([one[rows] for one in self.values], axis=0)
        return lambda weights: value @ weights / weights.sum(axis=0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`figures`: encoder -> its figure; `differences`: encoder -> (that less the reference's, two-sided p)."""

    figures: dict[str, Estimate]
    differences: dict[str, tuple[Estimate, float]]
    reference: str

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "figures": {name: one.to_json() for name, one in self.figures.items()},
            "differences": {name: {**one.to_json(), "p": p} for name, (one, p) in self.differences.items()},
        }


def compare(
    encoders: Mapping[str, Scored],
    patient_key: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    seed: int = 0,
    replicates: int = 1000,
    level: float = 0.95,
) -> Comparison | None:
    """Every encoder, and its difference from the first, on all studies or `rows` only; None where nothing is defined.

    p: twice the share of replicates on the lesser side of 0, each side with one replicate more than was seen, so that
    it is never 0 (Davison and Hinkley 1997, section 4.2).
    """
    chosen = np.arange(len(patient_key)) if rows is None else rows
    names = list(encoders)
    statistics = [encoders[name](chosen) for name in names]
    defined = [one for one in statistics if one is not None]
    if len(defined) < len(names):
        return None

    def all_of(weights: np.ndarray) -> np.ndarray:
        each = np.stack([one(weights) for one in defined])  # [encoders, r]
        return np.concatenate([each, each[1:] - each[:1]])

    estimates, samples = replicates_of(all_of, patient_key[chosen], seed=seed, replicates=replicates, level=level)
    count = len(names)
    return Comparison(
        figures=dict(zip(names, estimates[:count], strict=True)),
        differences={
            name: (estimates[count + place], _two_sided(samples[:, count + place]))
            for place, name in enumerate(names[1:])
        },
        reference=names[0],
    )


def _two_sided(samples: np.ndarray) -> float:
    found = samples[np.isfinite(samples)]
    if not len(found):
        return math.nan
    lesser = min((found <= 0).sum(), (found >= 0).sum())
    return float(min(1.0, 2 * (lesser + 1) / (len(found) + 1)))


def by_subgroup(
    encoders: Mapping[str, Scored],
    patient_key: np.ndarray,
    groups: Mapping[str, Sequence[str | None]],
    *,
    seed: int = 0,
    replicates: int = 1000,
) -> dict[str, dict[str, dict[str, Any]]]:
    """attribute -> value -> how many studies and patients, and the comparison on them (None where not defined).

    Studies whose value is not known are a group of their own, so that every study is counted somewhere. An attribute
    with one value only is left out: its table would repeat the whole.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for attribute, values in groups.items():
        named = np.array(["unknown" if value is None else value for value in values])
        present = sorted(set(named.tolist()))
        if len(present) < 2:
            continue
        found[attribute] = {}
        for value in present:
            rows = np.flatnonzero(named == value)
            patients = len(np.unique(patient_key[rows]))
            enough = patients >= LEAST_PATIENTS
            of = compare(encoders, patient_key, rows, seed=seed, replicates=replicates) if enough else None
            found[attribute][value] = {
                "studies": len(rows), "patients": patients, "comparison": None if of is None else of.to_json(),
            }  # fmt: skip
    return found
