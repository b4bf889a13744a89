"""What a model gains by leaving its least sure cases to a person: values over coverage, their area, their picture.

Cases are sorted by a confidence, highest first. At coverage c the model answers the share c of them it is surest of.
Cases of equal confidence are taken as in random order, in expectation: each counts with the mean of its group, so that
a constant confidence gives the value of all cases at every coverage, whatever the order of the data.

Letters: n = cases, G = groups of equal confidence, r = bootstrap replicates (columns of whole weights).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from core.evaluation.pictures import as_image, new_figure
from core.evaluation.statistics import TiedOrder

POINTS = 100  # of a drawn curve


class Selective:
    """`values [n]` (a risk, or hits) of the cases that are kept when the least sure are left out."""

    def __init__(self, confidence: np.ndarray, values: np.ndarray) -> None:
        """Raises FloatingPointError where one of them is not finite."""
        for name, given in (("confidence", confidence), ("values", values)):
            if not np.isfinite(given).all():
                row = int(np.flatnonzero(~np.isfinite(given))[0])
                raise FloatingPointError(f"{name} of case {row} is {given[row]}; the model's outputs are not finite")
        self._values = np.asarray(values, dtype=np.float64)
        self._order = TiedOrder(-np.asarray(confidence))

    def area(self, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [r]: mean over i = 1 .. W of the mean value of the i surest (area under the risk-coverage curve).

        Geifman and El-Yaniv 2017, with a case of weight w standing w times among its equals. Within a group that
        follows W' cases of sum V' with mean value m, the i-th case gives (V' + m i) / (W' + i); their sum over the
        group's w cases is m w + (V' - m W') (H(W' + w) - H(W')), with H the harmonic numbers.
        """
        kept, total = self._sums(weights)  # [G + 1, r]
        group_weight, group_total = np.diff(kept, axis=0), np.diff(total, axis=0)
        mean = group_total / np.maximum(group_weight, 1.0)
        harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(kept[-1].max()) + 1))])
        places = np.rint(kept).astype(np.int64)
        area = group_total + (total[:-1] - mean * kept[:-1]) * np.diff(harmonic[places], axis=0)
        result: np.ndarray = area.sum(axis=0) / kept[-1]
        return result

    def at(self, coverage: float, weights: np.ndarray) -> np.ndarray:
        """[n, r] -> [r]: mean value of the share `coverage`, in (0, 1], that is surest; parts count."""
        kept, total = self._sums(weights)
        wanted = coverage * kept[-1]
        group = np.minimum((kept[1:] < wanted).sum(axis=0), len(kept) - 2)[None]
        before, after = (np.take_along_axis(kept, group + step, axis=0)[0] for step in (0, 1))
        low, high = (np.take_along_axis(total, group + step, axis=0)[0] for step in (0, 1))
        part = (wanted - before) / np.where(after > before, after - before, 1.0)
        result: np.ndarray = (low + part * (high - low)) / wanted
        return result

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(coverage, mean value) at up to POINTS coverages, the last of which is 1."""
        everyone = np.ones((len(self._values), 1), dtype=np.float32)
        coverage = np.arange(1, POINTS + 1) / POINTS
        coverage = coverage[coverage * len(self._values) >= 1.0]
        return coverage, np.array([self.at(c, everyone)[0] for c in coverage.tolist()])

    def _sums(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight and weighted value of the surest groups together, [G + 1, r], from nothing to all."""
        nothing = np.zeros((1, weights.shape[1]))
        sums = (self._order.sums(weights), self._order.sums(weights * self._values[:, None]))
        kept, total = (np.concatenate([nothing, np.cumsum(part, axis=0)]) for part in sums)
        return kept, total


def oracle(values: np.ndarray) -> Selective:
    """Abstention that knows the truth: the lowest values first."""
    return Selective(-np.asarray(values), values)


def picture(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str, risk: str) -> Tensor:
    """Curves by name -> image [3, H, W] float32 in [0, 1] for TensorBoard; `risk` names the vertical axis."""
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    for name, (coverage, values) in curves.items():
        axes.plot(100 * coverage, values, label=name, linestyle="--" if name == "oracle" else "-")
    axes.set(title=title, xlabel="coverage, % of studies", ylabel=risk, xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return as_image(figure)
