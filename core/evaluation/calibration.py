"""Whether a probability means what it says, and what it takes to make it so: calibration error, Brier score, a fit.

Letters: n = studies, K = labels, b = bins, r = bootstrap replicates (columns of whole weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) at any size of x. SciPy's would cost every start of a training 0.4 s of imports."""
    found: np.ndarray = 0.5 * (1.0 + np.tanh(0.5 * scores))
    return found


class Calibration:
    """Of `probability [n]` against `truth [n]` bool, one label.

    Expected calibration error (Naeini et al. 2015) with equal-mass bins (Nguyen and O'Connor 2015): borders are the
    quantiles of the probabilities, equal probabilities share a bin, and the error is the mean over studies of
    |mean probability - share present| of their bin. Equal-width bins, as in torchmetrics, would leave most bins empty,
    since zero-shot probabilities crowd together. Few studies make it large even for a perfect model: see `noise`.
    """

    def __init__(self, probability: np.ndarray, truth: np.ndarray, bins: int) -> None:
        borders = np.quantile(probability, np.linspace(0.0, 1.0, bins + 1)[1:-1])
        self._bin = np.searchsorted(np.unique(borders), probability)  # a border belongs to the bin below it
        self._excess = probability - truth
        self._variance = probability * (1.0 - probability)
        self._member = self._bin[:, None] == np.arange(self._bin.max() + 1)  # [n, b]

    def error(self, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [r]: the expected calibration error. The bins are those of all studies in every replicate."""
        apart = self._member.T.astype(np.float64) @ (self._excess[:, None] * weights)  # [b, r]
        total: np.ndarray = np.abs(apart).sum(axis=0) / weights.sum(axis=0, dtype=np.float64)
        return total

    def noise(self) -> float:
        """Error to expect if every probability were right: mean absolute deviation of the bins' binomial counts."""
        deviation = np.sqrt(2.0 / np.pi * (self._member.T @ self._variance))  # [b], of normal approximations
        return float(deviation.sum() / len(self._bin))

    def brier(self, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [r]: mean squared difference of probability and truth."""
        total: np.ndarray = (self._excess**2) @ weights / weights.sum(axis=0, dtype=np.float64)
        return total


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How scores of a label become a decision and a probability, chosen on other patients than those it is used on.

    `threshold [K]`: where sensitivity plus specificity is greatest; a score from it on is called present. `slope [K]`
    and `intercept [K]`: a logistic regression on the score (Platt 1999). NaN where the fitting studies lack a class.
    """

    threshold: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(cls, scores: np.ndarray, truth: np.ndarray) -> Decisions:
        """`scores [n, K]`; `truth [n, K]`: 1, 0, anything else is left out."""
        from sklearn.linear_model import LogisticRegression  # seconds to import, which every start would take
        from sklearn.metrics import roc_curve

        found = np.full((3, scores.shape[1]), np.nan)
        for k in range(scores.shape[1]):
            rows = (truth[:, k] == 0) | (truth[:, k] == 1)
            score, present = scores[rows, k], truth[rows, k] == 1
            if present.all() or not present.any():
                continue
            wrong, right, thresholds = roc_curve(present, score, drop_intermediate=False)
            # A constant score has no scale; any will do.
            scale = score.std() or 1.0
            model = LogisticRegression(C=1e3).fit(score[:, None] / scale, present)
            best = 1 + np.argmax((right - wrong)[1:])  # the first threshold is infinite: nothing present
            found[:, k] = thresholds[best], model.coef_[0, 0] / scale, model.intercept_[0]
        return cls(threshold=found[0], slope=found[1], intercept=found[2])

    @property
    def known(self) -> np.ndarray:
        """[K] bool: labels that can be decided."""
        return np.isfinite(self.slope)

    def margin(self, scores: np.ndarray) -> np.ndarray:
        """[n, K]: how far a score lies above its threshold; called present from 0 on."""
        return scores - self.threshold

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """[n, K], of being present."""
        probability: np.ndarray = sigmoid(scores * self.slope + self.intercept)
        return probability
