"""Linear probe: what a logistic regression can read from frozen image features, one per label."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from core.evaluation.anatomy import LabelsByAnatomy
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
        features = [split.need("features").numpy() for split in (train, validation, test)]
        everyone = np.ones(len(train), dtype=bool)
        column = Column(train=features[0], validation=features[1], test=features[2]).standardised(everyone)
        fits = fit_probes(
            [column] * len(labels),
            train.labels.numpy(), validation.labels.numpy(), self.config, on_fit,
        )  # fmt: skip
        if not fits.fitted:
            raise _no_labels(train)
        names = [labels[k] for k in fits.fitted]
        areas = areas_under_curve(
            fits.scores[:, fits.fitted], test.labels[:, fits.fitted].numpy(), test.patient_key.numpy(), names,
            seed=self.config.seed, replicates=self.config.replicates, level=self.config.level,
        )  # fmt: skip
        self._report = {
            "protocol": self.protocol,
            "studies": {"train": len(train), "validation": len(validation), "test": len(test)},
            "features": features[0].shape[1],
            "level": self.config.level,
            **fits.to_json(),
            "labels_not_fitted": [name for name in labels if name not in names],
            **areas.to_json(),
        }
        yield from named_areas(areas)

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: intervals and counts per label, the strength chosen and why."""
        return self._report


class AnatomyProbe:
    """AUC per label of a logistic regression on the frozen embedding of its own anatomy, as labels get fewer.

    Each of `label_shares` takes that share of the patients for fitting and of those for the choice of the strength, the
    smaller shares within the larger. A label that a share leaves with one class cannot be told: its scores are constant
    and its AUC 0.5, so that macro averages are over the same labels at every share. Studies that do not show an anatomy
    are left out for its labels, in fitting and testing.
    """

    protocol = "anatomy_probe"

    def __init__(
        self,
        anatomy_of: Mapping[str, str],
        config: LinearProbe.Config | None = None,
        label_shares: Sequence[float] = (0.01, 0.1, 1.0),
    ) -> None:
        """`anatomy_of`: label -> anatomy."""
        self.anatomy_of, self.config, self.label_shares = dict(anatomy_of), config or LinearProbe.Config(), label_shares
        self._report: dict[str, Any] = {}

    def run(
        self,
        train: EmbeddedSplit,
        validation: EmbeddedSplit | None,
        test: EmbeddedSplit,
        labels: Sequence[str],
        anatomies: Sequence[str],
        on_fit: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (`<label>_at_<percent>`, AUC) and (`macro_at_<percent>`, macro AUC). Splits as `LinearProbe.run`'s.

        `labels` name the columns of all splits' labels, `anatomies` those of their embeddings. `on_fit` is told of
        shares done.

        Raises ConfigError where no label has an anatomy of the model's, or both classes in the training split.
        """
        config = self.config
        asked = LabelsByAnatomy(labels, self.anatomy_of, anatomies)
        if validation is None:
            train, validation = _part_by_patient(train, config.seed)
        self._report = {
            "protocol": self.protocol,
            "level": config.level,
            "anatomy_of": {name: self.anatomy_of[name] for name in asked.names},
            "shares": {},
        }
        for number, share in enumerate(self.label_shares, start=1):
            some, chosen_on = (_share_of_patients(split, share, config.seed) for split in (train, validation))
            features = (asked.embeds(split).swapaxes(0, 1) for split in (some, chosen_on, test))  # [K, n, E] each
            columns = [
                Column(train=a, validation=b, test=c).standardised(shown)
                for a, b, c, shown in zip(*features, asked.present(some).T, strict=True)
            ]
            fits = fit_probes(columns, asked.truth(some), asked.truth(chosen_on), config)
            on_fit(number, len(self.label_shares))
            if share == max(self.label_shares) and not fits.fitted:
                raise _no_labels(train)
            areas = areas_under_curve(
                fits.scores, asked.truth(test), test.patient_key.numpy(), asked.names,
                seed=config.seed, replicates=config.replicates, level=config.level,
            )  # fmt: skip
            percent = f"{100 * share:g}"
            self._report["shares"][percent] = {
                "studies": {"train": len(some), "validation": len(chosen_on), "test": len(test)},
                **fits.to_json(),
                "labels_not_fitted": [name for k, name in enumerate(asked.names) if k not in fits.fitted],
                **areas.to_json(),
            }
            for name, value in named_areas(areas):
                yield f"{name}_at_{percent}", value

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: for each share of labels what a linear probe reports."""
        return self._report


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one label is read from, in each split: features [n, D]."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def standardised(self, train_rows: np.ndarray) -> Column:
        """By mean and deviation of these rows of the training split; as it is, where there are none."""
        if not train_rows.any():
            return self
        x = self.train[train_rows].astype(np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        # A feature that never moves says nothing; dividing by its rounding error would make it shout.
        deviation = np.where(deviation > 1e-6 * np.abs(mean) + 1e-12, deviation, np.inf)
        each = ((one.astype(np.float64) - mean) / deviation for one in (self.train, self.validation, self.test))
        return Column(**dict(zip(("train", "validation", "test"), each, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Fits:
    """`scores [n, K]` of the test split at the `strength` chosen, 0 for a label that is not among the `fitted`."""

    scores: np.ndarray
    fitted: list[int]
    strength: float
    validation_macro: dict[str, float | None]
    stopped_early: int

    def to_json(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "validation_macro": self.validation_macro,
            "fits_stopped_early": self.stopped_early,
        }


def fit_probes(
    columns: Sequence[Column],
    train_truth: np.ndarray,
    validation_truth: np.ndarray,
    config: LinearProbe.Config,
    on_fit: Callable[[int, int], None] = lambda done, total: None,
) -> Fits:
    """One regression a label and strength; truths [n, K] are 1, 0, or something else where a study is left out."""
    asked = (train_truth == 0) | (train_truth == 1)
    fitted = [k for k in range(len(columns)) if {0, 1} <= set(train_truth[asked[:, k], k].tolist())]
    strengths = config.strengths
    on_validation = np.full((len(strengths), len(fitted)), np.nan)
    scores = np.zeros((len(strengths), len(columns[0].test), len(columns)))
    stopped_early = 0
    for place, k in enumerate(fitted):
        column = columns[k]
        known = (validation_truth[:, k] == 0) | (validation_truth[:, k] == 1)
        model = LogisticRegression(max_iter=config.max_iterations, warm_start=True)
        for row, strength in enumerate(strengths):
            model.set_params(C=strength)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                model.fit(column.train[asked[:, k]], train_truth[asked[:, k], k])
            stopped_early += any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            found = model.decision_function(column.validation[known]) if known.any() else np.zeros(0)
            on_validation[row, place] = area_under_curve(found, validation_truth[known, k] == 1)
            scores[row, :, k] = model.decision_function(column.test)
            on_fit(place * len(strengths) + row + 1, len(fitted) * len(strengths))
    defined = np.isfinite(on_validation).all(axis=0)
    if defined.any():
        chosen = int(np.argmax(on_validation[:, defined].mean(axis=1).round(6)))
    else:  # a validation split without any positive cannot choose
        chosen = len(strengths) // 2
    macro = {
        f"{strength:g}": None if math.isnan(value) else value
        for strength, value in zip(strengths, _row_means(on_validation), strict=True)
    }
    return Fits(
        scores=scores[chosen], fitted=fitted, strength=strengths[chosen], validation_macro=macro,
        stopped_early=stopped_early,
    )  # fmt: skip


def _no_labels(train: EmbeddedSplit) -> ConfigError:
    return ConfigError(
        f"no label has both a present and an absent study among {len(train)} training studies; "
        "a probe needs labels, give a manifest that has them with --data"
    )


def _share_of_patients(split: EmbeddedSplit, share: float, seed: int) -> EmbeddedSplit:
    """The studies of this share of the patients; those of a smaller share are among them."""
    u = keyed.uniform(seed, "probe: share of labels", split.patient_key.numpy())[:, 0]
    return split.rows(torch.from_numpy(u < share))


def _part_by_patient(train: EmbeddedSplit, seed: int) -> tuple[EmbeddedSplit, EmbeddedSplit]:
    """Four fifths and one fifth of the patients."""
    held = keyed.uniform(seed, "probe: validation patients", train.patient_key.numpy())[:, 0] < 0.2
    held_out = torch.from_numpy(held)
    return train.rows(~held_out), train.rows(held_out)


def _row_means(areas: np.ndarray) -> list[float]:
    return [float(np.mean(row[np.isfinite(row)])) if np.isfinite(row).any() else math.nan for row in areas]
