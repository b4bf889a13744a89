"""What is asked of a study: a label, an ordinal grade or a number; heads on frozen features, and figures of them.

Heads are small and have one answer: logistic regression, proportional odds (McCullagh 1980), ridge regression. Their
strength is chosen by cross-validation among the patients who teach. Letters: n = studies, D = width, G = grades,
r = replicates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from core.evaluation.comparison import Areas, Means, Scored, Statistic
from core.evaluation.statistics import TiedOrder
from core.evaluation.studies import StudySplit
from shards.errors import ConfigError

Kind = Literal["label", "grade", "number"]
Outputs = dict[str, np.ndarray]
MOST_GRADES = 10  # a measurement of whole values up to this many is a grade, any other a number
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse regularisation, as scikit-learn's C
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Target:
    """`grades`: how many a grade has, 0 of other kinds."""

    name: str
    kind: Kind
    grades: int = 0

    def truth(self, split: StudySplit) -> np.ndarray:
        """`[n]` float64, NaN where it is not known: not annotated, uncertain, or not measured."""
        if self.kind == "label":
            if self.name not in split.label_names:
                return np.full(len(split), np.nan)
            labels = split.labels[:, split.label_names.index(self.name)].numpy().astype(np.float64)
            return np.where((labels == 0) | (labels == 1), labels, np.nan)
        found = split.measurements.get(self.name)
        return np.full(len(split), np.nan) if found is None else found

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what it is judged by, the first one first of all."""
        of: dict[Kind, tuple[str, ...]] = {
            "label": ("AUROC", "AUPRC"), "grade": ("quadratic kappa", "accuracy", "AUROC"), "number": ("MAE",),
        }  # fmt: skip
        return of[self.kind]


def target_named(name: str, train: StudySplit) -> Target:
    """A label or measurement of the training split. Raises ConfigError where it knows none of that name."""
    if name in train.label_names:
        return Target(name=name, kind="label")
    if name not in train.measurements:
        known = ", ".join([*train.label_names, *train.measurements])
        raise ConfigError(f"target {name!r}: the data have no such label or measurement; there is {known or 'none'}")
    values = train.measurements[name]
    known_values = values[np.isfinite(values)]
    whole = bool(len(known_values)) and bool((known_values == np.round(known_values)).all() and known_values.min() >= 0)
    if whole and known_values.max() < MOST_GRADES:
        return Target(name=name, kind="grade", grades=int(known_values.max()) + 1)
    return Target(name=name, kind="number")


def probe_target(
    target: Target,
    features: Mapping[str, np.ndarray],
    splits: Mapping[str, StudySplit],
    rows: np.ndarray,
    *,
    with_sex: bool = False,
) -> Outputs:
    """What a head says of all studies of the split "test", taught on `rows` of "train".

    Its strength is the one that tells best of patients left out of these rows: a share of the labels that leaves a
    handful of validation studies would choose by chance. `features`: split -> `[n, D]`. `with_sex`: two more inputs, F
    and M. Outputs: `score [n]` of a label or grade, `value [n]` of a grade or number; constant where the rows cannot
    teach (one class, no study).
    """
    train, test = (_inputs(features[name], splits[name], with_sex) for name in ("train", "test"))
    truth, patients = target.truth(splits["train"])[rows], splits["train"].patient_key.numpy()[rows]
    if len(np.unique(truth)) < 2:
        return constant(target, truth, len(test))
    scaler = StandardScaler().fit(train[rows])
    taught = scaler.transform(train[rows])
    found = [_goodness(target, _left_out(target, taught, truth, patients, one), truth) for one in STRENGTHS]
    best = next(place for place, value in enumerate(found) if value >= max(found) - 1e-6)  # the strictest of equals
    return _fitted(target, taught, truth, STRENGTHS[best])(scaler.transform(test))


def constant(target: Target, taught: np.ndarray, count: int) -> Outputs:
    """What one says who has seen one value, or none."""
    value = float(np.median(taught)) if len(taught) else 0.0
    return {"score": np.zeros(count)} | ({} if target.kind == "label" else {"value": np.full(count, value)})


def _inputs(features: np.ndarray, split: StudySplit, with_sex: bool) -> np.ndarray:
    if not with_sex:
        return features
    sex = np.array([[one == "F", one == "M"] for one in split.sex], dtype=np.float64).reshape(len(split), 2)
    return np.concatenate([features, sex], axis=1)


def _left_out(target: Target, x: np.ndarray, truth: np.ndarray, patients: np.ndarray, strength: float) -> Outputs:
    """What is said of each study by a head that was taught the other folds' patients; constant of a lone patient."""
    folds = min(FOLDS, len(np.unique(patients)))
    said = constant(target, truth, len(truth))
    for taught, held in GroupKFold(folds).split(x, groups=patients) if folds > 1 else ():
        if len(np.unique(truth[taught])) < 2:
            outputs = constant(target, truth[taught], len(held))
        else:
            outputs = _fitted(target, x[taught], truth[taught], strength)(x[held])
        for name, values in outputs.items():
            said[name][held] = values
    return said


def _fitted(target: Target, x: np.ndarray, truth: np.ndarray, strength: float) -> Callable[[np.ndarray], Outputs]:
    """A head: features `[n, D]` -> outputs."""
    if target.kind == "label":
        model = LogisticRegression(C=strength, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, truth)
        return lambda of: {"score": model.decision_function(of)}
    if target.kind == "number":
        ridge = Ridge(alpha=1.0 / strength).fit(x, truth)
        return lambda of: {"value": ridge.predict(of)}
    return ProportionalOdds.fit(x, truth.astype(np.int64), target.grades, strength).outputs


def _goodness(target: Target, outputs: Outputs, truth: np.ndarray) -> float:
    """Higher is better: log-likelihood of a label, less error of a grade or number."""
    if target.kind == "number":
        return -float(np.abs(outputs["value"] - truth).mean())
    if target.kind == "grade":
        return -float(np.square(outputs["value"] - truth).mean())
    return -float(np.logaddexp(0, np.where(truth == 1, -1, 1) * outputs["score"]).mean())


@dataclass(frozen=True, kw_only=True)
class ProportionalOdds:
    """P(grade > k) = sigmoid(w x - b_k), b ascending: one direction of the features for all grades."""

    weight: np.ndarray  # [D]
    bounds: np.ndarray  # [G - 1], ascending

    @classmethod
    def fit(cls, x: np.ndarray, grade: np.ndarray, grades: int, strength: float) -> ProportionalOdds:
        """Maximum likelihood with a penalty of 1 / (2 strength) on squared weights, by L-BFGS."""
        inputs, wanted = torch.from_numpy(x).double(), torch.from_numpy(grade)
        weight = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
        raw = torch.cat([torch.tensor([-1.0]), torch.zeros(grades - 2)]).double().requires_grad_()
        optimizer = torch.optim.LBFGS([weight, raw], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = ordinal_loss(inputs @ weight, ascending(raw), wanted).sum() + weight.square().sum() / (2 * strength)
            # A grade that nobody taught has no likelihood to hold its bounds; this keeps them near.
            loss = loss + 1e-3 * raw.square().sum()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        return cls(weight=weight.detach().numpy(), bounds=ascending(raw).detach().numpy())

    def outputs(self, x: np.ndarray) -> Outputs:
        """`score [n]`, and `value [n]`: the median grade."""
        score = x @ self.weight
        return {"score": score, "value": (score[:, None] > self.bounds).sum(axis=1).astype(np.float64)}


def ascending(raw: Tensor) -> Tensor:
    """`[G - 1]` free numbers -> as many in ascending order."""
    return torch.cat([raw[:1], raw[:1] + F.softplus(raw[1:]).cumsum(0)])


def ordinal_loss(score: Tensor, bounds: Tensor, grade: Tensor) -> Tensor:
    """-log P(grade) `[n]` of proportional odds: `score [n]`, `bounds [G - 1]` ascending, `grade [n]` int64."""
    ends = F.pad(bounds, (1, 1), value=torch.inf)
    ends = torch.cat([-ends[:1], ends[1:]])
    above, below = score - ends[grade], score - ends[grade + 1]  # below < above
    # sigmoid(above) - sigmoid(below) = sigmoid(above) sigmoid(-below) (1 - exp(below - above)), without cancelling
    width = (above - below).clamp(min=1e-6)
    return -(F.logsigmoid(above) + F.logsigmoid(-below) + torch.log1p(-torch.exp(-width)))


def scored_by(figure: str, target: Target, seeds: Sequence[Outputs], truth: np.ndarray, patients: np.ndarray) -> Scored:
    """One of the target's figures, mean over seeds, of test studies that have a `truth [n]`."""
    if figure == "MAE":
        return Means(values=[np.abs(one["value"] - truth) for one in seeds])
    if figure == "accuracy":
        return Means(values=[(one["value"] == truth).astype(np.float64) for one in seeds])
    if figure == "quadratic kappa":
        return _MeanOf([_Kappa(one["value"], truth) for one in seeds])
    if figure == "AUPRC":
        return _MeanOf([_AveragePrecision(one["score"], truth == 1) for one in seeds])
    if target.kind == "label":
        columns = truth[:, None]
    else:  # of each "this grade or more"
        columns = (truth[:, None] >= np.arange(1, target.grades)).astype(np.float64)
    scores = [np.repeat(one["score"][:, None], columns.shape[1], axis=1) for one in seeds]
    return Areas(scores=scores, truth=columns, patient_key=patients)


@dataclass(frozen=True)
class _MeanOf:
    each: Sequence[_Kappa | _AveragePrecision]

    def __call__(self, rows: np.ndarray) -> Statistic | None:
        if not len(rows):
            return None
        statistics = [one.of(rows) for one in self.each]
        return lambda weights: np.mean([one(weights) for one in statistics], axis=0)


@dataclass(frozen=True)
class _Kappa:
    """Cohen's kappa with quadratic weights: 1 - E (a - b)^2 / E (a - b)^2 of independent a and b."""

    value: np.ndarray
    truth: np.ndarray

    def of(self, rows: np.ndarray) -> Statistic:
        a, b = self.value[rows], self.truth[rows]

        def kappa(weights: np.ndarray) -> np.ndarray:
            total = weights.sum(axis=0)
            apart = np.square(a - b) @ weights / total
            alone = (np.square(a) + np.square(b)) @ weights / total - 2 * (a @ weights) * (b @ weights) / total**2
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(alone > 1e-12, 1 - apart / alone, np.nan)

        return kappa


@dataclass(frozen=True)
class _AveragePrecision:
    """Area under precision over recall, in steps, equal scores together: scikit-learn's average_precision_score."""

    score: np.ndarray
    truth: np.ndarray

    def of(self, rows: np.ndarray) -> Statistic:
        order, positive = TiedOrder(-self.score[rows]), self.truth[rows].astype(np.float64)[:, None]

        def area(weights: np.ndarray) -> np.ndarray:
            hits = order.sums(weights * positive)
            found, asked = hits.cumsum(axis=0), order.sums(weights).cumsum(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                precision = np.where(asked > 0, found / asked, 0.0)
                return (hits * precision).sum(axis=0) / found[-1]

        return area
