"""Yes or no from scores: thresholds chosen on held-out training patients, and how often they are right on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.evaluation.statistics import mean_of_defined, resampled

FIGURES = ("accuracy", "weighted_f1", "precision", "sensitivity", "specificity")


def thresholds(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[K]: the score from which a label is called present: its ROC curve is nearest to (0, 1) there (fvlm.md, 6.1).

    `scores [n, K]`; `truth [n, K]`: 1, 0, anything else is left out. NaN for a label without both classes.
    """
    from sklearn.metrics import roc_curve  # seconds to import, which every start of a training would take

    found = np.full(scores.shape[1], np.nan)
    for k, column in enumerate(np.asarray(truth).T):
        asked = (column == 0) | (column == 1)
        if {0, 1} <= set(column[asked].tolist()):
            wrong, right, cuts = roc_curve(column[asked], scores[asked, k], drop_intermediate=False)
            # The first threshold is infinite: nothing present.
            found[k] = cuts[1 + np.argmin((wrong**2 + (1 - right) ** 2)[1:])]
    return found


def decision_figures(
    scores: np.ndarray,
    truth: np.ndarray,
    cuts: np.ndarray,
    patient_key: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    replicates: int,
    level: float,
) -> dict[str, Any]:
    """FIGURES of each label that has a threshold in `cuts [K]`, and their means over labels, with intervals by patient.

    The F1 of present and of absent are weighted by how many studies are so; a figure whose share has nothing to be a
    share of is 0 for precision and F1, and not defined for sensitivity and specificity.
    """
    chosen = np.flatnonzero(np.isfinite(cuts)).tolist()
    if not chosen:
        return {"labels": {}, "without_threshold": list(names)}
    truth, called = np.asarray(truth)[:, chosen], scores[:, chosen] >= cuts[chosen]
    kinds = [(truth == value) & (called == call) for value, call in ((1, True), (0, True), (1, False), (0, False))]

    def statistics(weights: np.ndarray) -> np.ndarray:
        true_positive, false_positive, missed, cleared = (kind.T.astype(np.float64) @ weights for kind in kinds)
        present, absent = true_positive + missed, false_positive + cleared
        f1_present = _share(2 * true_positive, 2 * true_positive + false_positive + missed, 0.0)
        f1_absent = _share(2 * cleared, 2 * cleared + false_positive + missed, 0.0)
        figures = np.stack(
            [
                _share(true_positive + cleared, present + absent, np.nan),
                _share(present * f1_present + absent * f1_absent, present + absent, np.nan),
                _share(true_positive, true_positive + false_positive, 0.0),
                _share(true_positive, present, np.nan),
                _share(cleared, absent, np.nan),
            ]
        )  # [figures, K, r]
        means = np.stack([mean_of_defined(each.T) for each in figures])  # [figures, r]
        return np.concatenate([figures.reshape(-1, weights.shape[1]), means])

    found = iter(resampled(statistics, patient_key, seed=seed, replicates=replicates, level=level))
    by_label: dict[str, dict[str, Any]] = {names[k]: {"threshold": float(cuts[k])} for k in chosen}
    for figure in FIGURES:
        for k in chosen:
            by_label[names[k]][figure] = next(found).to_json()
    return {
        "labels": by_label,
        "macro": {figure: next(found).to_json() for figure in FIGURES},
        "without_threshold": [name for name in names if name not in by_label],
    }


def _share(part: np.ndarray, whole: np.ndarray, undefined: float) -> np.ndarray:
    return np.asarray(np.divide(part, whole, out=np.full_like(part, undefined), where=whole > 0))
