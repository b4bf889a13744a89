"""Labels predicted from CT volumes without any text: the supervised baseline of fVLM (fvlm.md, 6.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.models.initialise import draw_weights
from core.models.towers import mean_over_views
from core.models.transformer import Linear
from core.models.volume import VolumeEncoder
from core.tasks import Encoded, Gathered, LossOutput, Task
from shards.batch import Batch
from shards.errors import ConfigError


class Supervised(Task):
    """One yes-or-no question a label, asked of the mean token; each study's mean over the labels it is annotated for.

    An uncertain label is not asked.
    """

    fields = ("pixel_values", "study_index", "valid", "labels")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`labels`: how many the data have, in the manifest's order."""

        vision: VolumeEncoder.Config
        labels: int

        def __post_init__(self) -> None:
            if self.labels < 1:
                raise ConfigError(f"labels={self.labels}: there is nothing to learn; use data with labels")

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> Supervised:
            """The task with weights drawn from `seed`; it reads no text."""
            return Supervised(self, seed=seed)

    def __init__(self, config: Supervised.Config, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vision = VolumeEncoder(config.vision)
        self.classifier = Linear(config.vision.width, config.labels)
        draw_weights(self, seed)

    def image_features(self, batch: Batch) -> Tensor:
        """Mean token of the last level, over views, `[b, D]`."""
        return mean_over_views(self.vision(batch["pixel_values"]).pooled, batch["study_index"], len(batch["valid"]))

    def label_logits(self, batch: Batch) -> Tensor:
        """`[b, K]` fp32."""
        features = self.image_features(batch)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.classifier(features)
        return logits

    def encode(self, batch: Batch) -> Encoded:
        labels = batch["labels"]
        if labels.shape[1] != self.config.labels:
            raise ConfigError(
                f"the data have {labels.shape[1]} labels, task.labels={self.config.labels}; "
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
