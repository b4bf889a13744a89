"""Labels predicted from radiographs without any text: the supervised baseline of contrasts of images and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.models.initialise import draw_weights
from core.models.towers import mean_over_views
from core.models.vision import VisionEncoder
from core.tasks.label_task import LabelTask, check_labels
from shards.batch import Batch


class SupervisedImages(LabelTask):
    """Asked of the pooled image, mean over views."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`labels`: how many the data have, in the manifest's order."""

        vision: VisionEncoder.Config
        labels: int

        def __post_init__(self) -> None:
            check_labels(self.labels)

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> SupervisedImages:
            """The task with weights drawn from `seed`; it reads no text."""
            return SupervisedImages(self, seed=seed)

    def __init__(self, config: SupervisedImages.Config, *, seed: int = 0) -> None:
        super().__init__(config.vision.width, config.labels)
        self.config = config
        self.vision = VisionEncoder(config.vision)
        draw_weights(self, seed)

    def image_features(self, batch: Batch) -> Tensor:
        """`[b, D]` fp32."""
        pooled = self.vision(batch["pixel_values"]).pooled.float()
        return mean_over_views(pooled, batch["study_index"], len(batch["valid"]))
