"""The part that tasks taught by labels alone share: one yes-or-no question a label, and its loss."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from core.models.transformer import Linear
from core.tasks import Encoded, Gathered, LossOutput, Task
from shards.batch import Batch
from shards.errors import ConfigError


def check_labels(labels: int) -> None:
    """Raises ConfigError where there is nothing to learn."""
    if labels < 1:
        raise ConfigError(f"labels={labels}: there is nothing to learn; use data with labels")


class LabelTask(Task):
    """One question a label of each study's features; its mean over the labels that the study is annotated for.

    An uncertain label is not asked.
    """

    fields = ("pixel_values", "study_index", "valid", "labels")

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.classifier = Linear(width, labels)

    @abstractmethod
    def image_features(self, batch: Batch) -> Tensor:
        """One vector a study, `[b, D]`."""

    def label_logits(self, batch: Batch) -> Tensor:
        """`[b, K]` fp32."""
        features = self.image_features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(features)
        return logits

    def encode(self, batch: Batch) -> Encoded:
        labels = batch["labels"]
        if labels.shape[1] != self.classifier.outputs:
            raise ConfigError(
                f"the data have {labels.shape[1]} labels, task.labels={self.classifier.outputs}; "
                f"set task.labels={labels.shape[1]}"
            )
        asked = ((labels == 0) | (labels == 1)) & batch["valid"][:, None]
        losses = F.binary_cross_entropy_with_logits(
            self.label_logits(batch), labels.clamp(min=0).float(), reduction="none"
        )
        mean = (losses * asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1)
        return Encoded(gather={"valid": batch["valid"]}, local={"labels": mean})

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        loss = local["labels"].sum() / gathered.all["valid"].sum().clamp(min=1)
        return LossOutput(loss=loss, metrics={"loss/labels": loss.detach()})
