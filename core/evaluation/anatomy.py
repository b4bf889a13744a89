"""Zero-shot classification by anatomy (fvlm.md, 6.1 and 6.4): is an anatomy nearer to its disease than to normality?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core.evaluation.decisions import decision_figures, thresholds
from core.evaluation.embed import EmbeddedSplit, Encoders
from core.evaluation.statistics import areas_under_curve
from core.evaluation.zero_shot import Encode, Prompts, ZeroShot, named_areas
from shards.batch import NOT_ANNOTATED
from shards.errors import ConfigError


class LabelsByAnatomy:
    """Which labels are looked for in which anatomy: `names`, and of a split their embeddings, truth and presence."""

    def __init__(self, labels: Sequence[str], anatomy_of: Mapping[str, str], anatomies: Sequence[str]) -> None:
        """`labels` name the columns of a split's labels, `anatomies` those of its embeddings.

        Raises ConfigError where no label has an anatomy that the model knows.
        """
        self.names = [name for name in labels if anatomy_of.get(name) in set(anatomies)]
        if not self.names:
            raise ConfigError(
                f"no label of this data ({', '.join(labels) or 'none'}) has prompts and an anatomy of the model's "
                f"({', '.join(anatomies)}); set evaluation.anatomy_of and evaluation.prompts"
            )
        self.place = [list(anatomies).index(anatomy_of[name]) for name in self.names]
        self._columns = [list(labels).index(name) for name in self.names]

    def embeds(self, split: EmbeddedSplit) -> np.ndarray:
        """[n, K, E] float64, of each label's anatomy."""
        return np.asarray(split.need("anatomy_embeds").numpy()[:, self.place], dtype=np.float64)

    def present(self, split: EmbeddedSplit) -> np.ndarray:
        """[n, K] bool: is the anatomy there to be judged."""
        return np.asarray(split.need("anatomy_present").numpy()[:, self.place] > 0)

    def stated(self, split: EmbeddedSplit) -> np.ndarray:
        """[n, K]: the labels, whether the anatomy is there or not."""
        return np.asarray(split.labels[:, self._columns].numpy())

    def truth(self, split: EmbeddedSplit) -> np.ndarray:
        """[n, K]: the labels, NOT_ANNOTATED where the anatomy is not there."""
        return np.where(self.present(split), self.stated(split), NOT_ANNOTATED)

    def coverage(self, split: EmbeddedSplit) -> np.ndarray:
        """[K]: share of the annotated studies that show the anatomy."""
        annotated = np.isin(self.stated(split), (0, 1))
        shown = (annotated & self.present(split)).sum(0) / np.maximum(annotated.sum(0), 1)
        return np.asarray(shown)


class AnatomyZeroShot:
    """AUC per disease of the embedding of the disease's own anatomy, and macro AUC, with intervals by patient.

    Score = mean similarity to the positive prompts - mean similarity to the negative ones: with one of each it orders
    studies as the softmax over the two logits does. Where the anatomy is not in the volume, or cut by it, a study has
    no score and is left out; the share of annotated studies that have one is the coverage.

    Beside it how far the figure hangs on the words: macro AUC with each of the `paraphrases` in place of the prompts.
    With held-out training patients also decisions at thresholds chosen on them.
    """

    protocol = "anatomy"

    def __init__(
        self,
        prompts: Prompts,
        anatomy_of: Mapping[str, str],
        config: ZeroShot.Config | None = None,
        paraphrases: Sequence[Prompts] = (),
    ) -> None:
        """`anatomy_of`: label -> anatomy. Raises ConfigError for prompts that cannot be used."""
        self._zero_shot = ZeroShot(prompts, config)
        self._paraphrases = [ZeroShot(other, config) for other in paraphrases]
        self.anatomy_of = dict(anatomy_of)
        self._report: dict[str, Any] = {}

    def run(
        self,
        task: Encoders,
        tokenizer: Encode,
        split: EmbeddedSplit,
        labels: Sequence[str],
        anatomies: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None = None,
        *,
        validation: EmbeddedSplit | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (label, AUC), ("macro", their mean), ("coverage", mean over labels), ("macro_paraphrased", mean).

        `labels` name the columns of the splits' labels, `anatomies` those of `split.anatomy_embeds`; `validation`:
        held-out training patients, for thresholds.

        Raises ConfigError when no label has both prompts and an anatomy that the model knows.
        """
        self._report = {}
        asked = self.asked(labels, anatomies)
        config = self._zero_shot.config
        directions = self._zero_shot.directions(task, tokenizer, asked.names, device, autocast)
        scores, truth = _scores(asked.embeds(split), directions), asked.truth(split)
        intervals: dict[str, Any] = {"seed": config.seed, "replicates": config.replicates, "level": config.level}
        areas = areas_under_curve(scores, truth, split.patient_key.numpy(), asked.names, **intervals)
        coverage = asked.coverage(split)
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "level": config.level,
            "coverage": dict(zip(asked.names, coverage.tolist(), strict=True)),
            "anatomy_of": {name: self.anatomy_of[name] for name in asked.names},
            "labels_left_out": [name for name in labels if name not in asked.names],
            **areas.to_json(),
        }
        yield from named_areas(areas)
        yield "coverage", float(coverage.mean())
        if self._paraphrases:
            every = [
                _scores(asked.embeds(split), one.directions(task, tokenizer, asked.names, device, autocast))
                for one in self._paraphrases
            ]
            self._report["paraphrases"] = self._spread(every, truth, split.patient_key.numpy(), asked.names)
            if self._report["paraphrases"]["macro"]["mean"] is not None:
                yield "macro_paraphrased", self._report["paraphrases"]["macro"]["mean"]
        if validation is not None:
            cuts = thresholds(_scores(asked.embeds(validation), directions), asked.truth(validation))
            decisions = decision_figures(scores, truth, cuts, split.patient_key.numpy(), asked.names, **intervals)
            self._report["decisions"] = {"validation_studies": len(validation), **decisions}

    def asked(self, labels: Sequence[str], anatomies: Sequence[str]) -> LabelsByAnatomy:
        """The labels that have prompts of every wording, and an anatomy. Raises ConfigError when there are none."""
        worded = [self._zero_shot, *self._paraphrases]
        anatomy_of = {
            name: anatomy
            for name, anatomy in self.anatomy_of.items()
            if name in labels and all(name in one.prompts for one in worded)
        }
        return LabelsByAnatomy(labels, anatomy_of, anatomies)

    def directions(
        self,
        task: Encoders,
        tokenizer: Encode,
        names: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> torch.Tensor:
        """[E, K]: what the similarity to a label's prompts grows along."""
        return self._zero_shot.directions(task, tokenizer, names, device, autocast)

    def _spread(
        self, every: Sequence[np.ndarray], truth: np.ndarray, patient_key: np.ndarray, names: Sequence[str]
    ) -> dict[str, Any]:
        """AUC with each wording: all of them, mean and standard deviation, of the macro average and of each label."""
        seed = self._zero_shot.config.seed
        areas = [areas_under_curve(scores, truth, patient_key, names, seed=seed, replicates=1) for scores in every]

        def over(values: Sequence[float]) -> dict[str, Any]:
            if not np.isfinite(values).all():
                return {"each": None, "mean": None, "deviation": None}
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            return {"each": list(values), "mean": float(np.mean(values)), "deviation": deviation}

        return {
            "macro": over([one.macro.value for one in areas]),
            "labels": {name: over([one.labels[k].value for one in areas]) for k, name in enumerate(names)},
        }

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report


def _scores(embeds: np.ndarray, directions: torch.Tensor) -> np.ndarray:
    """[n, K, E], [E, K] -> [n, K]."""
    return np.asarray(np.einsum("nke,ek->nk", embeds, directions.double().numpy()))


class LabelAreas:
    """AUC per label, and macro AUC, of a task that was taught the labels themselves."""

    protocol = "supervised"

    def __init__(self, config: ZeroShot.Config | None = None) -> None:
        self.config = config or ZeroShot.Config()
        self._report: dict[str, Any] = {}

    def run(self, split: EmbeddedSplit, labels: Sequence[str]) -> Iterator[tuple[str, float]]:
        """Yields (label, AUC), then ("macro", their mean)."""
        config = self.config
        areas = areas_under_curve(
            split.need("label_logits").numpy(), split.labels.numpy(), split.patient_key.numpy(), list(labels),
            seed=config.seed, replicates=config.replicates, level=config.level,
        )  # fmt: skip
        self._report = {
            "protocol": self.protocol, "studies": len(split), "level": config.level, **areas.to_json(),
        }  # fmt: skip
        yield from named_areas(areas)

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report
