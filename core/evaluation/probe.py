"""Linear probe: what a logistic regression can read from frozen image features, one per label."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from core.evaluation.embed import EmbeddedSplit
from core.evaluation.statistics import area_under_curve, areas_under_curve
from core.evaluation.zero_shot import named_areas
from shards import keyed
from shards.errors import ConfigError


class LinearProbe:
    """AUC per label and macro AUC on the test split, with intervals by patient.

    Features are standardised by the training split's mean and deviation. One strength of regularisation for all labels
    is chosen by macro AUC on validation: a choice per label would fit the noise of rare ones. The regression that is
    tested was fitted on the training split only.
    """

    protocol = "linear_probe"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`strengths`: inverse regularisation (scikit-learn's C), tried in this order; of equal ones the first wins."""

        strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        max_iterations: int = 300
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or LinearProbe.Config()
        self._report: dict[str, Any] = {}

    def run(
        self,
        train: EmbeddedSplit,
        validation: EmbeddedSplit | None,
        test: EmbeddedSplit,
        labels: Sequence[str],
        on_fit: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (label, AUC) and ("macro", macro AUC). `labels` name the columns of all splits.

        Without `validation`, a keyed fifth of the training patients serves. `on_fit(done, total)` is told of progress.
        Raises ConfigError when no label has both classes in the training split.
        """
        if validation is None:
            train, validation = _part_by_patient(train, self.config.seed)
        x = train.need("features").numpy().astype(np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        # A feature that never moves says nothing; dividing by its rounding error would make it shout.
        deviation = np.where(deviation > 1e-6 * np.abs(mean) + 1e-12, deviation, np.inf)
        x_train, x_validation, x_test = (
            (split.need("features").numpy().astype(np.float64) - mean) / deviation
            for split in (train, validation, test)
        )
        truth = train.labels.numpy()
        fitted = [k for k in range(len(labels)) if {0, 1} <= set(truth[:, k].tolist())]
        if not fitted:
            raise ConfigError(
                f"no label has both a present and an absent study among {len(train)} training studies; "
                "a probe needs labels, give a manifest that has them with --data"
            )
        strengths = self.config.strengths
        on_validation = np.full((len(strengths), len(fitted)), np.nan)
        scores = np.zeros((len(strengths), len(test), len(fitted)))
        unfinished = 0
        for column, k in enumerate(fitted):
            rows = (truth[:, k] == 0) | (truth[:, k] == 1)
            model = LogisticRegression(max_iter=self.config.max_iterations, warm_start=True)
            for row, strength in enumerate(strengths):
                model.set_params(C=strength)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", ConvergenceWarning)
                    model.fit(x_train[rows], truth[rows, k])
                unfinished += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
                known = validation.labels[:, k].numpy()
                asked = (known == 0) | (known == 1)
                on_validation[row, column] = area_under_curve(
                    model.decision_function(x_validation)[asked] if asked.any() else np.zeros(0), known[asked] == 1
                )
                scores[row, :, column] = model.decision_function(x_test)
                on_fit(column * len(strengths) + row + 1, len(fitted) * len(strengths))
        defined = np.isfinite(on_validation).all(axis=0)
        if defined.any():
            chosen = int(np.argmax(on_validation[:, defined].mean(axis=1).round(6)))
        else:  # a validation split without any positive cannot choose
            chosen = len(strengths) // 2
        names = [labels[k] for k in fitted]
        areas = areas_under_curve(
            scores[chosen], test.labels[:, fitted].numpy(), test.patient_key.numpy(), names,
            seed=self.config.seed, replicates=self.config.replicates, level=self.config.level,
        )  # fmt: skip
        self._report = {
            "protocol": self.protocol,
            "studies": {"train": len(train), "validation": len(validation), "test": len(test)},
            "features": x.shape[1],
            "level": self.config.level,
            "strength": strengths[chosen],
            "validation_macro": {
                f"{strength:g}": None if math.isnan(value) else value
                for strength, value in zip(strengths, _row_means(on_validation), strict=True)
            },
            "fits_stopped_early": unfinished,
            "labels_not_fitted": [name for name in labels if name not in names],
            **areas.to_json(),
        }
        yield from named_areas(areas)

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: intervals and counts per label, the strength chosen and why."""
        return self._report


def _part_by_patient(train: EmbeddedSplit, seed: int) -> tuple[EmbeddedSplit, EmbeddedSplit]:
    """Four fifths and one fifth of the patients."""
    held = keyed.uniform(seed, "probe: validation patients", train.patient_key.numpy())[:, 0] < 0.2
    held_out = torch.from_numpy(held)
    return train.rows(~held_out), train.rows(held_out)


def _row_means(areas: np.ndarray) -> list[float]:
    return [float(np.mean(row[np.isfinite(row)])) if np.isfinite(row).any() else math.nan for row in areas]
