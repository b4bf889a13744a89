"""Zero-shot classification by anatomy (fvlm.md, 6.1 and 6.4): is an anatomy nearer to its disease than to normality?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core.evaluation.embed import EmbeddedSplit, Encoders
from core.evaluation.statistics import areas_under_curve
from core.evaluation.zero_shot import Encode, Prompts, ZeroShot, named_areas
from shards.batch import NOT_ANNOTATED
from shards.errors import ConfigError


class AnatomyZeroShot:
    """AUC per disease of the embedding of the disease's own anatomy, and macro AUC, with intervals by patient.

    Score = mean similarity to the positive prompts - mean similarity to the negative ones: with one of each it orders
    studies as the softmax over the two logits does. Where the anatomy is not in the volume, or cut by it, a study has
    no score and is left out; the share of annotated studies that have one is the coverage.
    """

    protocol = "anatomy"

    def __init__(self, prompts: Prompts, anatomy_of: Mapping[str, str], config: ZeroShot.Config | None = None) -> None:
        """`anatomy_of`: label -> anatomy. Raises ConfigError for prompts that cannot be used."""
        self._zero_shot = ZeroShot(prompts, config)
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
    ) -> Iterator[tuple[str, float]]:
        """Yields (label, AUC), ("macro", their mean), ("coverage", mean over labels).

        `labels` name the columns of `split.labels`, `anatomies` those of `split.anatomy_embeds`.

        Raises ConfigError when no label has both prompts and an anatomy that the model knows.
        """
        scored = [
            name for name in labels if name in self._zero_shot.prompts and self.anatomy_of.get(name) in set(anatomies)
        ]
        if not scored:
            raise ConfigError(
                f"no label of this data ({', '.join(labels) or 'none'}) has prompts and an anatomy of the model's "
                f"({', '.join(anatomies)}); set evaluation.anatomy_of and evaluation.prompts"
            )
        directions = self._zero_shot.directions(task, tokenizer, scored, device, autocast).double().numpy()  # [E, K]
        place = [list(anatomies).index(self.anatomy_of[name]) for name in scored]
        embeds = split.need("anatomy_embeds").numpy()[:, place].astype(np.float64)  # [n, K, E]
        scores = np.einsum("nke,ek->nk", embeds, directions)
        present = split.need("anatomy_present").numpy()[:, place] > 0
        truth = split.labels[:, [list(labels).index(name) for name in scored]].numpy()
        annotated = (truth == 0) | (truth == 1)
        coverage = (annotated & present).sum(0) / np.maximum(annotated.sum(0), 1)
        config = self._zero_shot.config
        areas = areas_under_curve(
            scores, np.where(present, truth, NOT_ANNOTATED), split.patient_key.numpy(), scored,
            seed=config.seed, replicates=config.replicates, level=config.level,
        )  # fmt: skip
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "level": config.level,
            "coverage": dict(zip(scored, coverage.tolist(), strict=True)),
            "anatomy_of": {name: self.anatomy_of[name] for name in scored},
            "labels_left_out": [name for name in labels if name not in scored],
            **areas.to_json(),
        }
        yield from named_areas(areas)
        yield "coverage", float(coverage.mean())

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report


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
