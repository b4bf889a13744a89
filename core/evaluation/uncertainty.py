"""Does a model know when it is wrong? Calibration, abstention, and whether its log-variance follows known degradation.

The uncertainty of an image or text is the mean of its log-variance over the dimensions of the embedding. A task without
distributions is measured by its baselines alone. What could not be measured is said in the report's `notes`.

Letters: n = studies, K = labels, E = dimensions of the embedding, r = bootstrap replicates, M = figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.evaluation.abstention import Selective, oracle, picture
from core.evaluation.calibration import Calibration, Decisions, sigmoid
from core.evaluation.corruption import KINDS, Words, corrupt_images, mask_words
from core.evaluation.embed import EmbeddedSplit, Encoders, GaussianTask
from core.evaluation.statistics import (
    Estimate,
    RankCorrelation,
    areas_under_curve,
    mean_of_defined,
    paired_difference,
    resampled,
)
from core.evaluation.zero_shot import Encode, Prompts, ZeroShot, scores_of
from shards import keyed
from shards.batch import UNCERTAIN, Batch

# Standard deviation over studies of the mean log-variance, below which it is called constant: the surest and the least
# sure study then differ in variance by less than a hundredth.
CONSTANT_SPREAD = 2e-3
RISK = "share of wrong decisions among the annotated labels of a study"
PICTURE = "risk_coverage"

# Embeds the studies of one fixed subset after a change of their batches, with the parts that are named.
Embed = Callable[[Callable[[Batch], Batch], set[str]], EmbeddedSplit]


class Uncertainty:
    """Figures with intervals by patient, and the risk-coverage curves as a picture.

    **Decisions.** A label is called present from the score on that maximises sensitivity plus specificity on validation
    patients; the risk of a study is the share of wrong decisions among its labels annotated 0 or 1. Where there is no
    validation split, each half of the patients is decided by what the other half chose.

    **Confidence** of a study, from the highest: `max_probability`, the mean over labels of max(q, 1 - q) with
    q = sigmoid(logit scale x (score - threshold)), so that it is least where the decision is on the brink (without the
    threshold it is worse than chance wherever a label's scores are not centred on 0); `fitted_probability`, the mean
    probability that the decision is right after a logistic regression on validation scores, the strongest rule if the
    fit holds; `logvar`, less uncertainty;
    `norm`, length of the embedding, or mean, before it is normalised, where it is not 1 by construction. All but
    `logvar` ask no distribution of a model.

    **Figures.** `area_<confidence>`: area under the risk-coverage curve, lower is better; `excess_<confidence>`: less
    the area of an oracle that leaves out the worst first; `gain` and `gain_over_fitted`: area of `max_probability`, or
    `fitted_probability`, less that of `logvar`, above 0 where the log-variance says more.
    `calibration_error`, `brier`: macro over labels, of the model's own p = sigmoid(logit scale x score); `_fitted`: of
    the fitted probability. The first has no interval, since the noise in bins of resampled studies only ever adds to
    it; `calibration_error_noise` is what a perfect model of such probabilities would show.
    `degraded_auc[_<confidence>][_normal|_abnormal]`: chance that a study known to be degraded is the less sure one;
    `grade_correlation`: rank correlation of image log-variance and grade of degradation; `corruption_<kind>`: of image
    log-variance and level of a corruption made here from studies not known to be degraded, over all studies and levels;
    `corruption_<kind>_within`: mean over studies of each one's own correlation, which content cannot blur.
    `masked_words`, `masked_words_within`: the same of text log-variance and share of masked words; `vague_auc`: chance
    that a report with an uncertain label or verdict is less sure than one without.
    `sampled_minus_mean`: macro AUC of zero-shot scores averaged over samples of the image's Gaussian, less that of its
    mean. `logvar_spread`, `text_logvar_spread`: standard deviation over studies.
    """

    protocol = "uncertainty"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`bins` of the calibration error; `samples` of each image; `levels` of corruption and `shares` of masking."""

        text_length: int = 128
        bins: int = 15
        samples: int = 5
        levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
        shares: tuple[float, ...] = (0.15, 0.3, 0.5, 0.75)
        replicates: int = 1000
        level: float = 0.95
        seed: int = 0

    def __init__(self, prompts: Prompts, config: Uncertainty.Config | None = None) -> None:
        """Raises ConfigError for prompts that cannot be used."""
        self.config = config or Uncertainty.Config()
        self._zero_shot = ZeroShot(prompts, ZeroShot.Config(text_length=self.config.text_length))
        self._found: dict[str, Estimate] = {}
        self._curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._report: dict[str, Any] = {}

    def run(
        self,
        task: Encoders,
        tokenizer: Encode,
        split: EmbeddedSplit,
        labels: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None = None,
        *,
        validation: EmbeddedSplit | None = None,
        with_text: EmbeddedSplit | None = None,
        embed: Embed | None = None,
        words: Words | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (figure, value) of those that are defined. `labels` name the columns of all splits.

        `validation` chooses thresholds; `with_text` are the studies with a report, with `text_logvar`; `embed` embeds
        changed studies, without it nothing is corrupted; `words` is needed to mask.

        Raises:
            ConfigError: no label has prompts. FloatingPointError: embeddings or log-variances are not finite, by name.
        """
        self._found, self._curves, notes = {}, {}, []
        gaussian = isinstance(task, GaussianTask)
        if not gaussian:
            notes.append(f"task {type(task).__name__} has no log-variance: baselines only")
        splits = [one for one in (split, validation, with_text) if one is not None]
        for one in splits:
            _check_finite(one)
        names = self._zero_shot.scored(labels)
        columns = [list(labels).index(name) for name in names]
        directions = self._zero_shot.directions(task, tokenizer, names, device, autocast)
        scores, truth = scores_of(split.need("image_embeds"), directions), split.labels[:, columns].numpy()
        if validation is None:
            notes.append("no validation split: thresholds and fits of each half of the patients are the other half's")
            chosen = _fit_on_other_half(scores, truth, split.patient_key.numpy(), self.config.seed)
        else:
            on_validation = scores_of(validation.need("image_embeds"), directions)
            fitted = Decisions.fit(on_validation, validation.labels[:, columns].numpy())
            chosen = _Decided(fitted.margin(scores), fitted.slope, fitted.probability(scores), fitted.known)
        scale = logit_scale(task)
        if scale is None:
            notes.append(f"task {type(task).__name__} has no logit scale: the fitted one takes its place")
        own = chosen.probability if scale is None else sigmoid(scale * scores)

        calibrated = self._calibrate({"": own, "_fitted": chosen.probability}, truth, split, names, chosen.known, notes)
        confidences = _confidences(scale, chosen, split)
        decided = self._abstain(confidences, chosen, truth, split, notes)
        self._degraded(confidences, truth, split, notes)
        if gaussian:
            self._vary(split, "image_logvar", "logvar_spread", notes)
            self._sample(split, directions, scores, truth, names)
            self._mark_vague(with_text, notes)
            self._corrupt(split, embed, words, notes)
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "studies_decided": decided,
            "level": self.config.level,
            "risk": RISK,
            "logit_scale": scale,
            "labels_decided": [name for name, known in zip(names, chosen.known, strict=True) if known],
            "figures": {name: estimate.to_json() for name, estimate in self._found.items()},
            "calibration_of_labels": calibrated,
            "curves": {
                name: {"coverage": coverage.tolist(), "risk": risk.tolist()}
                for name, (coverage, risk) in self._curves.items()
            },
            "notes": notes,
        }
        yield from ((name, found.value) for name, found in self._found.items() if math.isfinite(found.value))

    @property
    def passes(self) -> int:
        """How often at most `run` calls `embed`."""
        return len(KINDS) * (1 + len(self.config.levels)) + 1 + len(self.config.shares)

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: figures with intervals, curves, and notes on what was left out."""
        return self._report

    def pictures(self) -> dict[str, Tensor]:
        """Name -> image [3, H, W] in [0, 1]; none where nothing could be decided."""
        if not self._curves:
            return {}
        title = "the model answers the studies it is surest of"
        return {PICTURE: picture(self._curves, title=title, risk="risk: wrong label decisions")}

    # ---- the parts ----

    def _resample(
        self, names: Sequence[str], statistics: Callable[[np.ndarray], np.ndarray], patient_key: np.ndarray
    ) -> None:
        """Keep figures under their names; `statistics` [n, r] -> [M, r]."""
        config = self.config
        found = resampled(
            statistics, patient_key, seed=config.seed, replicates=config.replicates, level=config.level
        )  # fmt: skip
        self._found.update(zip(names, found, strict=True))

    def _calibrate(
        self,
        probabilities: Mapping[str, np.ndarray],
        truth: np.ndarray,
        split: EmbeddedSplit,
        names: Sequence[str],
        known: np.ndarray,
        notes: list[str],
    ) -> dict[str, dict[str, float]]:
        """Macro figures of each kind of probability [n, K]; returns those of the labels."""
        measured = [k for k in np.flatnonzero(known).tolist() if ((truth[:, k] == 0) | (truth[:, k] == 1)).any()]
        if not measured:
            notes.append("no label has annotated studies of both classes to choose by: no calibration, no abstention")
            return {}
        kept = [(k, (truth[:, k] == 0) | (truth[:, k] == 1)) for k in measured]
        found: dict[str, dict[str, float]] = {names[k]: {} for k in measured}
        for suffix, probability in probabilities.items():
            of_labels = [
                (rows, Calibration(probability[rows, k], truth[rows, k] == 1, self.config.bins)) for k, rows in kept
            ]

            def statistics(
                weights: np.ndarray, of_labels: list[tuple[np.ndarray, Calibration]] = of_labels
            ) -> np.ndarray:
                # A replicate may draw no annotated study of a label; it is left out of that replicate's mean.
                with np.errstate(invalid="ignore", divide="ignore"):
                    error = np.stack([one.error(weights[rows]) for rows, one in of_labels], axis=1)  # [r, K]
                    brier = np.stack([one.brier(weights[rows]) for rows, one in of_labels], axis=1)
                return np.stack([mean_of_defined(error), mean_of_defined(brier)])

            figures = (f"calibration_error{suffix}", f"brier{suffix}")
            self._resample(figures, statistics, split.patient_key.numpy())
            biased = self._found[figures[0]]
            self._found[figures[0]] = replace(biased, low=math.nan, high=math.nan)
            noise = float(np.mean([one.noise() for _, one in of_labels]))
            self._found[f"calibration_error_noise{suffix}"] = Estimate(value=noise, low=math.nan, high=math.nan)
            for k, (rows, one) in zip(measured, of_labels, strict=True):
                once = np.ones((int(rows.sum()), 1), dtype=np.float32)
                found[names[k]] |= dict(
                    zip(figures, (float(one.error(once)[0]), float(one.brier(once)[0])), strict=True)
                )
        return found

    def _abstain(
        self,
        confidences: Mapping[str, np.ndarray],
        chosen: _Decided,
        truth: np.ndarray,
        split: EmbeddedSplit,
        notes: list[str],
    ) -> int:
        """Risk-coverage figures and curves; returns the number of studies that have a risk."""
        annotated = ((truth == 0) | (truth == 1)) & chosen.known  # [n, K]
        rows = annotated.any(axis=1)
        if not rows.any():
            return 0
        wrong = annotated & (chosen.present != (truth == 1))
        risk = wrong[rows].sum(axis=1) / annotated[rows].sum(axis=1)
        if not rows.all():
            notes.append(f"{int((~rows).sum())} studies without an annotated label have no risk")
        best = oracle(risk)
        by = {name: Selective(confidence[rows], risk) for name, confidence in confidences.items()}
        names = ["risk", "area_oracle", *(f"{what}_{name}" for what in ("area", "excess") for name in by)]
        compared = {"max_probability": "gain", "fitted_probability": "gain_over_fitted"} if "logvar" in by else {}

        def statistics(weights: np.ndarray) -> np.ndarray:
            areas = {name: one.area(weights) for name, one in by.items()}
            least = best.area(weights)
            gains = [areas[name] - areas["logvar"] for name in compared]
            excess = [area - least for area in areas.values()]
            return np.stack([best.at(1.0, weights), least, *areas.values(), *excess, *gains])

        self._resample([*names, *compared.values()], statistics, split.patient_key.numpy()[rows])
        self._curves = {name: one.curve() for name, one in by.items()} | {"oracle": best.curve()}
        return int(rows.sum())

    def _degraded(
        self, confidences: Mapping[str, np.ndarray], truth: np.ndarray, split: EmbeddedSplit, notes: list[str]
    ) -> None:
        """Degraded above clean, where the records say which is which."""
        grade = np.full(len(split), -1.0) if split.degradation_grade is None else split.degradation_grade.numpy()
        known = grade >= 0
        if not (grade > 0).any() or not (grade == 0).any():
            notes.append("the records do not say which images are degraded and which are clean: no degraded_auc")
            return
        abnormal, normal = (truth == 1).any(axis=1), (truth == 0).any(axis=1) & (truth <= 0).all(axis=1)
        normal &= (truth != UNCERTAIN).all(axis=1)
        groups = {"": known, "_normal": known & normal, "_abnormal": known & abnormal}
        for name, confidence in confidences.items():
            for group, rows in groups.items():
                figure = f"degraded_auc{group}" if name == "logvar" else f"degraded_auc_{name}{group}"
                self._found[figure] = self._area(-confidence[rows], grade[rows] > 0, split.patient_key.numpy()[rows])
        if "logvar" in confidences:
            follows = RankCorrelation(-confidences["logvar"][known], grade[known])
            self._resample(
                ["grade_correlation"], lambda weights: follows(weights)[None], split.patient_key.numpy()[known]
            )

    def _area(self, scores: np.ndarray, truth: np.ndarray, patient_key: np.ndarray) -> Estimate:
        """AUC of one label, with the interval and the counts of AUCs everywhere."""
        config = self.config
        found = areas_under_curve(
            scores[:, None], truth[:, None].astype(np.int8), patient_key, ["one"],
            seed=config.seed, replicates=config.replicates, level=config.level,
        )  # fmt: skip
        return found.labels[0]

    def _vary(self, split: EmbeddedSplit, part: str, figure: str, notes: list[str]) -> None:
        """Whether the log-variance moves at all."""
        mean = of_study(split.need(part))

        def statistics(weights: np.ndarray) -> np.ndarray:
            total = weights.sum(axis=0, dtype=np.float64)
            centred = mean - mean.mean()  # so that the difference of squares below loses nothing
            return np.sqrt(np.maximum(centred**2 @ weights / total - (centred @ weights / total) ** 2, 0.0))[None]

        self._resample([figure], statistics, split.patient_key.numpy())
        if self._found[figure].value < CONSTANT_SPREAD:
            notes.append(
                f"FAILED: {figure}={self._found[figure].value:.2g} is below {CONSTANT_SPREAD:g}: the log-variance is "
                "constant and says nothing about any study, whatever the other figures"
            )

    def _sample(
        self, split: EmbeddedSplit, directions: Tensor, scores: np.ndarray, truth: np.ndarray, names: Sequence[str]
    ) -> None:
        """Zero-shot by the mean score of keyed samples z = mean + exp(logvar / 2) noise, against that of the mean."""
        mean, deviation = split.need("image_mean"), torch.exp(split.need("image_logvar") / 2)
        identifiers, sampled = split.sample_id.numpy(), np.zeros_like(scores)
        for number in range(self.config.samples):
            noise = keyed.normal(self.config.seed, "uncertainty: samples", identifiers, number, draws=mean.shape[1])
            sample = normalize(mean + deviation * torch.from_numpy(noise).float(), dim=-1)
            sampled += scores_of(sample, directions) / self.config.samples
        config = self.config
        difference = paired_difference(
            sampled, scores, truth, split.patient_key.numpy(), names,
            seed=config.seed, replicates=config.replicates, level=config.level,
        )  # fmt: skip
        self._found["sampled_minus_mean"] = difference.macro

    def _mark_vague(self, with_text: EmbeddedSplit | None, notes: list[str]) -> None:
        """Text log-variance of reports that are not sure, against those that are."""
        if with_text is None or with_text.text_logvar is None:
            notes.append("no reports: nothing about the log-variance of texts")
            return
        self._vary(with_text, "text_logvar", "text_logvar_spread", notes)
        vague = (with_text.labels == UNCERTAIN).any(dim=1).numpy()
        if with_text.uncertain_verdicts is not None:
            vague = vague | (with_text.uncertain_verdicts > 0).numpy()
        if not vague.any() or vague.all():
            notes.append("no report, or every one, has an uncertain label or verdict: no vague_auc")
            return
        self._found["vague_auc"] = self._area(
            of_study(with_text.need("text_logvar")), vague, with_text.patient_key.numpy()
        )

    def _corrupt(self, split: EmbeddedSplit, embed: Embed | None, words: Words | None, notes: list[str]) -> None:
        """Log-variance of images made worse here, and of reports with masked words, against the level."""
        if embed is None:
            notes.append("nothing was corrupted or masked on the fly")
            return
        seed = self.config.seed
        for kind in KINDS:
            changes = [
                partial(corrupt_images, kind=kind, level=level, seed=seed) for level in (0.0, *self.config.levels)
            ]
            self._follow(f"corruption_{kind}", (0.0, *self.config.levels), changes, "image_logvar", embed, notes)
        if words is None:
            notes.append("the tokenizer has no mask token: no masked_words")
            return
        shares = (0.0, *self.config.shares)
        masks = [partial(mask_words, share=share, words=words, seed=seed) for share in shares]
        self._follow("masked_words", shares, masks, "text_logvar", embed, notes)

    def _follow(
        self,
        figure: str,
        levels: Sequence[float],
        changes: Sequence[Callable[[Batch], Batch]],
        part: str,
        embed: Embed,
        notes: list[str],
    ) -> None:
        """`figure`, over all (study, level), and `<figure>_within`, the mean over studies of each one's correlation."""
        found = [embed(change, {part}) for change in changes]
        grade = found[0].degradation_grade
        # A study that was degraded before cannot serve as a clean one; a text does not mind.
        clean = torch.ones(len(found[0]), dtype=torch.bool)
        if part == "image_logvar" and grade is not None:
            clean = ~(grade > 0)
        if not clean.any():
            notes.append(f"no clean study: no {figure}")
            return
        for one in found:
            _check_finite(one)
        uncertainty = np.stack([of_study(one.rows(clean).need(part)) for one in found], axis=1)  # [n, levels]
        level = np.broadcast_to(np.asarray(levels), uncertainty.shape)
        patient_key = found[0].patient_key[clean].numpy()
        everywhere = RankCorrelation(uncertainty.ravel(), level.ravel())
        once = np.ones((len(levels), 1), dtype=np.float32)
        own = np.array([RankCorrelation(row, np.asarray(levels))(once)[0] for row in uncertainty])
        own = np.nan_to_num(own)  # a study whose uncertainty never moves follows nothing

        def statistics(weights: np.ndarray) -> np.ndarray:
            within = own @ weights / weights.sum(axis=0, dtype=np.float64)
            return np.stack([everywhere(np.repeat(weights, len(levels), axis=0)), within])

        self._resample([figure, f"{figure}_within"], statistics, patient_key)


@dataclass(frozen=True)
class _Decided:
    """`margin [n, K]` above the threshold; of the fit `slope`, [K] or [n, K], and `probability [n, K]`.

    `known [K]` bool: which labels could be decided.
    """

    margin: np.ndarray
    slope: np.ndarray
    probability: np.ndarray
    known: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """[n, K] bool."""
        return self.margin >= 0


def of_study(logvar: Tensor) -> np.ndarray:
    """[n, E] -> [n] float64: the mean log-variance, which is the uncertainty of a study."""
    mean: np.ndarray = logvar.double().mean(dim=1).numpy()
    return mean


def logit_scale(task: object) -> float | None:
    """Factor from a difference of cosines to log-odds, as the task was trained with; None where it has none."""
    scale = task.logit_scale() if callable(getattr(task, "logit_scale", None)) else None  # type: ignore[attr-defined]
    return None if scale is None else float(scale)


def _confidences(scale: float | None, chosen: _Decided, split: EmbeddedSplit) -> dict[str, np.ndarray]:
    """Name -> confidence [n], higher is surer."""
    found = {}
    if chosen.known.any():
        odds = np.abs((chosen.slope if scale is None else scale) * chosen.margin)[:, chosen.known]
        right = np.where(chosen.present, chosen.probability, 1.0 - chosen.probability)[:, chosen.known]
        found = {"max_probability": sigmoid(odds).mean(axis=1), "fitted_probability": right.mean(axis=1)}
    if split.image_logvar is not None:
        found["logvar"] = -of_study(split.image_logvar)
    norm = split.image_norm
    if norm is None and split.image_mean is not None:
        norm = split.image_mean.norm(dim=1)
    if norm is not None and float(norm.std(correction=0)) > 1e-5 * float(norm.mean()):  # not of unit-norm means
        found["norm"] = norm.double().numpy()
    return found


def _fit_on_other_half(scores: np.ndarray, truth: np.ndarray, patient_key: np.ndarray, seed: int) -> _Decided:
    """Every study decided by a threshold and a fit of patients of the other half."""
    first = keyed.uniform(seed, "uncertainty: half of the patients", patient_key)[:, 0] < 0.5
    margin, slope, probability = (np.full(scores.shape, np.nan) for _ in range(3))
    known = np.ones(scores.shape[1], dtype=bool)
    for half in (first, ~first):
        if half.any():
            fitted = Decisions.fit(scores[~half], truth[~half])
            margin[half], slope[half] = fitted.margin(scores[half]), fitted.slope
            probability[half] = fitted.probability(scores[half])
            known &= fitted.known
    return _Decided(margin, slope, probability, known)


def _check_finite(split: EmbeddedSplit) -> None:
    """Raises FloatingPointError naming the first value that is not finite."""
    for name in ("image_embeds", "image_mean", "image_logvar", "text_logvar", "image_norm"):
        values = getattr(split, name)
        if values is not None and not bool(torch.isfinite(values).all()):
            place = tuple((~torch.isfinite(values)).nonzero()[0].tolist())
            raise FloatingPointError(
                f"{name} of sample {int(split.sample_id[place[0]])} is {float(values[place])} at {place}; "
                "the model's outputs are not finite"
            )
