"""Downstream tasks by name: what one encoder, share of labels and seed give, and how that is scored.

`learn` is the expensive part and returns plain arrays, which a caller may keep; `scored` makes them a statistic that
`core.evaluation.comparison` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from core.evaluation.classification import Features, fine_tune_at_share, probe_at_share
from core.evaluation.comparison import Areas, Means, Scored, Statistic
from core.evaluation.detection import AveragePrecision, DetectionConfig, Detections, detect, not_asked
from core.evaluation.fitting import FitConfig
from core.evaluation.images import ImageSplit, share_of_patients
from core.evaluation.probe import LinearProbe
from core.evaluation.segmentation import SegmentationConfig, segment
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

Outputs = dict[str, np.ndarray]

# Name -> figure.
TASKS = {
    "linear_probe": "macro AUC",
    "fine_tune": "macro AUC",
    "segmentation": "Dice",
    "segmentation_fine_tune": "Dice",
    "detection": "mAP",
    "detection_fine_tune": "mAP",
}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Images as one encoder wants them; `features` once they are made, for the probes of all shares and seeds."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    features: Features | None = None


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """`fit`: of every head; its seed is replaced by that of the run."""

    fit: FitConfig = field(default_factory=FitConfig)
    decoder: Literal["progressive", "unetr"] = "progressive"
    strengths: tuple[float, ...] = LinearProbe.Config.strengths


def learn(
    task: str,
    encoder: VisionEncoder,
    splits: Splits,
    share: float,
    seed: int,
    config: TransferConfig,
    *,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Outputs:
    """What a head says of the test images after learning from a share of the training patients' labels."""
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; use {', '.join(TASKS)}")
    fit, train, test = replace(config.fit, seed=seed), splits.train, splits.test
    if task == "linear_probe":
        features = splits.features or Features.of(encoder, train, splits.validation, test, autocast=autocast)
        probe = LinearProbe.Config(strengths=config.strengths)
        return {"scores": probe_at_share(features, train, splits.validation, share, seed, probe).scores}
    if task == "fine_tune":
        scores = fine_tune_at_share(
            encoder, train, splits.validation, test, share, fit, autocast=autocast, on_step=on_step
        )
        return {"scores": scores}
    rows, fine_tune = share_of_patients(train, share, seed), task.endswith("fine_tune")
    if task.startswith("segmentation"):
        segmentation = SegmentationConfig(decoder=config.decoder, fine_tune=fine_tune, fit=fit)
        return {"dice": segment(encoder, train, test, segmentation, rows=rows, autocast=autocast, on_step=on_step)}
    detection = DetectionConfig(fine_tune=fine_tune, fit=fit)
    found = detect(encoder, train, test, detection, rows=rows, autocast=autocast, on_step=on_step)
    return {
        "image": np.repeat(np.arange(len(found)), [len(one.scores) for one in found]),
        "boxes": torch.cat([one.boxes for one in found]).numpy(),
        "scores": torch.cat([one.scores for one in found]).numpy(),
        "labels": torch.cat([one.labels for one in found]).numpy(),
    }


def scored(task: str, seeds: Sequence[Outputs], splits: Splits) -> Scored:
    """The figure of a task, mean over seeds, as a statistic of any studies; Dice is a mean over structures, too."""
    test = splits.test
    if task in ("linear_probe", "fine_tune"):
        return Areas(
            scores=[one["scores"] for one in seeds], truth=test.labels.numpy(), patient_key=test.patient_key.numpy()
        )
    if task.startswith("segmentation"):
        return Means(values=[one["dice"].mean(axis=1) for one in seeds])
    names = splits.train.box_names
    return _Precisions([AveragePrecision(_detections(one, len(test)), test, names) for one in seeds], len(test))


def not_asked_of(task: str, splits: Splits) -> dict[str, int]:
    """Cause -> how much of the test images' truth is in no figure of the task, beside what was skipped in reading."""
    found = not_asked(splits.test, splits.train.box_names) if task.startswith("detection") else {}
    return {cause: count for cause, count in found.items() if count}


class _Precisions:
    """mAP, mean over seeds, of rows: images outside of them weigh nothing."""

    def __init__(self, seeds: Sequence[AveragePrecision], images: int) -> None:
        self._seeds, self._images = seeds, images

    def __call__(self, rows: np.ndarray) -> Statistic | None:
        def precision(weights: np.ndarray) -> np.ndarray:
            everyone = np.zeros((self._images, weights.shape[1]), dtype=weights.dtype)
            everyone[rows] = weights
            return np.mean([one(everyone) for one in self._seeds], axis=0)

        return precision


def _detections(outputs: Outputs, images: int) -> list[Detections]:
    ends = np.searchsorted(outputs["image"], np.arange(1, images))
    boxes, scores, labels = (np.split(outputs[name], ends) for name in ("boxes", "scores", "labels"))
    return [
        Detections(boxes=torch.from_numpy(a), scores=torch.from_numpy(b), labels=torch.from_numpy(c))
        for a, b, c in zip(boxes, scores, labels, strict=True)
    ]
