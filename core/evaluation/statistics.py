"""How sure an evaluation figure is: AUC and means with percentile bootstrap intervals, resampled by patient.

Studies of one patient look alike, so patients and not studies are drawn with replacement (cluster bootstrap; Efron and
Tibshirani 1993, chapter 8). A replicate is a vector of patient multiplicities keyed by a seed; every statistic of a
replicate uses the same vector, so differences of two models and macro averages are paired by construction.

Letters: n = studies, K = labels, R = replicates, P = patients, M = statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from shards import keyed

# Elements of the largest temporary array, replicates x studies in float32: 16 MB.
BLOCK_ELEMENTS = 4 << 20
# With fewer patients of a class an AUC is an anecdote and its bootstrap interval too narrow.
LEAST_PATIENTS = 5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its interval. `low` and `high` are NaN where too few replicates were defined.

    `positives`, `negatives`: annotated studies; `patients`: distinct patients among them; `replicates`: those in which
    the figure was defined (a replicate may draw no positive of a rare label).
    """

    value: float
    low: float
    high: float
    positives: int = 0
    negatives: int = 0
    patients: int = 0
    replicates: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, with None for NaN, which JSON has no word for."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class AreasUnderCurve:
    """AUC of several labels: `labels[k]` its estimate, `macro` the mean over the labels `macro_over`.

    `samples [R, K]` holds the bootstrap replicates, NaN where undefined.
    """

    names: tuple[str, ...]
    labels: tuple[Estimate, ...]
    macro: Estimate
    macro_over: tuple[str, ...]
    samples: np.ndarray

    def to_json(self) -> dict[str, Any]:
        labels = {name: estimate.to_json() for name, estimate in zip(self.names, self.labels, strict=True)}
        return {"macro": self.macro.to_json(), "macro_over": list(self.macro_over), "labels": labels}


def area_under_curve(scores: np.ndarray, truth: np.ndarray) -> float:
    """Chance that a positive outscores a negative, ties counting half; NaN with one class. Both arguments [n]."""
    ranking = AreaRanking(np.asarray(scores), np.asarray(truth, dtype=bool))
    return float(ranking.areas(np.ones((len(scores), 1), dtype=np.float32))[0])


def areas_under_curve(
    scores: np.ndarray,
    truth: np.ndarray,
    patient_key: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> AreasUnderCurve:
    """AUC per label and macro average. `scores [n, K]`; `truth [n, K]`: 1, 0, anything else is left out.

    The macro average is over the labels with LEAST_PATIENTS patients of either class (over all that have both classes,
    where none has so many); the others are given without interval. A label that a replicate leaves without positives is
    left out of that replicate's average.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    assert scores.shape == truth.shape == (len(patient_key), len(names)), (scores.shape, truth.shape, len(names))
    if not np.isfinite(scores).all():
        raise FloatingPointError("scores hold NaN or infinity; the model's embeddings are not finite")
    annotated = (truth == 0) | (truth == 1)  # [n, K]
    patients, patient = np.unique(patient_key, return_inverse=True)
    rankings = [AreaRanking(scores[rows, k], truth[rows, k] == 1) for k, rows in enumerate(annotated.T)]
    patient_of = [patient[rows] for rows in annotated.T]
    values = np.array([
        ranking.areas(np.ones((len(members), 1), dtype=np.float32))[0]
        for ranking, members in zip(rankings, patient_of, strict=True)
    ])  # fmt: skip
    samples = np.full((replicates, len(names)), np.nan)
    for block, counts in _multiplicities(len(patients), replicates, len(patient), seed):
        for k in np.flatnonzero(np.isfinite(values)).tolist():
            samples[block, k] = rankings[k].areas(counts[patient_of[k]])
    estimates = []
    for k, members in enumerate(patient_of):
        fewest = min(len(np.unique(members[rows])) for rows in (rankings[k].positive, rankings[k].negative))
        positives = len(rankings[k].positive)
        estimate = _estimate(
            values[k], samples[:, k], level,
            positives=positives, negatives=len(members) - positives, patients=len(np.unique(members)),
        )  # fmt: skip
        estimates.append(estimate if fewest >= LEAST_PATIENTS else replace(estimate, low=math.nan, high=math.nan))
    counted = np.array([math.isfinite(estimate.low) for estimate in estimates])
    if not counted.any():
        counted = np.isfinite(values)
    macro = float(values[counted].mean()) if counted.any() else math.nan
    return AreasUnderCurve(
        names=tuple(names),
        labels=tuple(estimates),
        macro=_estimate(macro, mean_of_defined(samples[:, counted]), level, patients=len(patients)),
        macro_over=tuple(name for name, counts in zip(names, counted, strict=True) if counts),
        samples=samples,
    )


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    truth: np.ndarray,
    patient_key: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> AreasUnderCurve:
    """AUC of scores `first [n, K]` less that of `second [n, K]` on the same studies, with paired intervals."""
    options = {"seed": seed, "replicates": replicates, "level": level}
    a = areas_under_curve(first, truth, patient_key, names, **options)  # type: ignore[arg-type]
    b = areas_under_curve(second, truth, patient_key, names, **options)  # type: ignore[arg-type]
    samples = a.samples - b.samples
    counted = [name in a.macro_over for name in a.names]
    labels = []
    for k, (one, two) in enumerate(zip(a.labels, b.labels, strict=True)):
        estimate = _estimate(
            one.value - two.value, samples[:, k], level,
            positives=one.positives, negatives=one.negatives, patients=one.patients,
        )  # fmt: skip
        labels.append(estimate if math.isfinite(one.low) else replace(estimate, low=math.nan, high=math.nan))
    macro = _estimate(
        a.macro.value - b.macro.value, mean_of_defined(samples[:, counted]), level, patients=a.macro.patients
    )
    return AreasUnderCurve(names=a.names, labels=tuple(labels), macro=macro, macro_over=a.macro_over, samples=samples)


def means(
    values: np.ndarray, patient_key: np.ndarray, *, seed: int, replicates: int = 1000, level: float = 0.95
) -> list[Estimate]:
    """Mean over studies of each column of `values [n, M]`, resampled by patient."""
    values = np.asarray(values, dtype=np.float64)
    patients, patient = np.unique(patient_key, return_inverse=True)
    # Sums per patient first: replicates then cost R x P x M however many studies a patient has.
    sums = np.zeros((len(patients), values.shape[1]))
    np.add.at(sums, patient, values)
    studies = np.bincount(patient, minlength=len(patients)).astype(np.float64)
    samples = np.empty((replicates, values.shape[1]))
    for block, counts in _multiplicities(len(patients), replicates, len(patients), seed):
        samples[block] = (counts.T @ sums) / (counts.T @ studies)[:, None]
    center = values.mean(axis=0)
    return [_estimate(float(center[m]), samples[:, m], level, patients=len(patients)) for m in range(len(center))]


def resampled(
    statistics: Callable[[np.ndarray], np.ndarray],
    patient_key: np.ndarray,
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> list[Estimate]:
    """Any statistics with their intervals: `statistics` turns whole weights of studies [n, r] into values [M, r].

    All M of a replicate see the same patients, so a difference that is one of them is paired.
    """
    return replicates_of(statistics, patient_key, seed=seed, replicates=replicates, level=level)[0]


def replicates_of(
    statistics: Callable[[np.ndarray], np.ndarray],
    patient_key: np.ndarray,
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> tuple[list[Estimate], np.ndarray]:
    """As `resampled`, with the values of every replicate [R, M]."""
    patients, patient = np.unique(patient_key, return_inverse=True)
    center = statistics(np.ones((len(patient), 1), dtype=np.float32))[:, 0]
    samples = np.empty((replicates, len(center)))
    for block, counts in _multiplicities(len(patients), replicates, len(patient), seed):
        samples[block] = statistics(counts[patient]).T
    estimates = [_estimate(float(center[m]), samples[:, m], level, patients=len(patients)) for m in range(len(center))]
    return estimates, samples


class TiedOrder:
    """Studies sorted by `values [n]` once, equal ones in one group: what rank statistics of resampled studies need.

    G = groups of equal value, from the lowest.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = np.asarray(values)[self.order]
        fresh = np.concatenate([[True], ordered[1:] != ordered[:-1]])
        self.starts = np.flatnonzero(fresh)  # [G], where each group begins in `order`
        self.group = np.empty(len(ordered), dtype=np.int64)  # of each study
        self.group[self.order] = np.cumsum(fresh) - 1

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [G, r] float64, sums of each group."""
        return np.add.reduceat(weights[self.order].astype(np.float64), self.starts, axis=0)


class RankCorrelation:
    """Spearman's rank correlation of `x [n]` and `y [n]` under whole weights; ties share the mean of their ranks."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._x, self._y = TiedOrder(x), TiedOrder(y)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [r]; NaN where x or y is constant."""
        x, y = self._ranks(self._x, weights), self._ranks(self._y, weights)
        total = weights.sum(axis=0, dtype=np.float64)
        x -= np.einsum("nr,nr->r", x, weights) / total
        y -= np.einsum("nr,nr->r", y, weights) / total
        together, alone_x, alone_y = (
            np.einsum("nr,nr,nr->r", a, b, weights, dtype=np.float64) for a, b in ((x, y), (x, x), (y, y))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((alone_x > 0) & (alone_y > 0), together / np.sqrt(alone_x * alone_y), np.nan)

    @staticmethod
    def _ranks(order: TiedOrder, weights: np.ndarray) -> np.ndarray:
        """[n, r]: half of a group's weight above all that is below it."""
        sums = order.sums(weights)
        ranks: np.ndarray = (np.cumsum(sums, axis=0) - sums / 2)[order.group]
        return ranks


def mean_of_defined(samples: np.ndarray) -> np.ndarray:
    """[R, K] -> [R], over the labels that are not NaN."""
    defined = np.isfinite(samples)
    with np.errstate(invalid="ignore"):
        return np.where(defined, samples, 0.0).sum(axis=1) / defined.sum(axis=1)


def _multiplicities(patients: int, replicates: int, width: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of replicates: (which, how often each patient was drawn [P, r] float32), with r * `width` bounded."""
    block = max(1, BLOCK_ELEMENTS // max(1, width, patients))
    for start in range(0, replicates, block):
        which = np.arange(start, min(start + block, replicates))
        drawn = keyed.integers(0, patients, seed, "bootstrap: patients", which, draws=patients)  # [r, P]
        flat = (drawn * len(which) + np.arange(len(which))[:, None]).ravel()
        counts = np.bincount(flat, minlength=len(which) * patients).reshape(patients, len(which))
        yield slice(start, start + len(which)), counts.astype(np.float32)


class AreaRanking:
    """One label's scores sorted once, so that a replicate costs one cumulative sum. `scores [n]`, `truth [n]` bool."""

    def __init__(self, scores: np.ndarray, truth: np.ndarray) -> None:
        positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
        self.positive, self.negative = positive, negative[np.argsort(scores[negative], kind="stable")]
        ordered = scores[self.negative]
        self.below = np.searchsorted(ordered, scores[positive], "left")
        self.below_or_equal = np.searchsorted(ordered, scores[positive], "right")

    def areas(self, weights: np.ndarray) -> np.ndarray:
        """AUC [r] under each column of integer `weights [n, r]` float32; NaN where a class has no weight."""
        replicates = weights.shape[1]
        if not len(self.positive) or not len(self.negative):
            return np.full(replicates, np.nan)
        cumulative = np.zeros((len(self.negative) + 1, replicates), dtype=np.float32)
        np.cumsum(weights[self.negative], axis=0, out=cumulative[1:])  # exact: whole numbers below 2^24
        positive = weights[self.positive]
        wins = cumulative[self.below] + cumulative[self.below_or_equal]  # twice: ties count half
        pairs = 2.0 * positive.sum(axis=0, dtype=np.float64) * cumulative[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, np.einsum("nr,nr->r", positive, wins, dtype=np.float64) / pairs, np.nan)


def _estimate(value: float, samples: np.ndarray, level: float, **counts: int) -> Estimate:
    finite = samples[np.isfinite(samples)]
    low, high = math.nan, math.nan
    # With half of the replicates undefined, what is left over-represents the luckier half.
    if len(finite) > len(samples) // 2:
        tail = 50.0 * (1.0 - level)
        low, high = (float(bound) for bound in np.percentile(finite, [tail, 100.0 - tail]))
    return Estimate(value=float(value), low=low, high=high, replicates=len(finite), **counts)
