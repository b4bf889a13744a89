"""Labels predicted from CT volumes without any text: the supervised baseline of fVLM (fvlm.md, 6.2).

`core.tasks.supervised_images` is the same of radiographs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.models.initialise import draw_weights
from core.models.towers import mean_over_views
from core.models.volume import VolumeEncoder
from core.tasks.label_task import LabelTask, check_labels
from shards.batch import Batch


class Supervised(LabelTask):
    """Asked of the mean token of the last level, over views."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`labels`: how many the data have, in the manifest's order."""

        vision: VolumeEncoder.Config
        labels: int

        def __post_init__(self) -> None:
            check_labels(self.labels)

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> Supervised:
            """The task with weights drawn from `seed`; it reads no text."""
            return Supervised(self, seed=seed)

    def __init__(self, config: Supervised.Config, *, seed: int = 0) -> None:
        super().__init__(config.vision.width, config.labels)
        self.config = config
        self.vision = VolumeEncoder(config.vision)
        draw_weights(self, seed)

    def image_features(self, batch: Batch) -> Tensor:
        """Mean token of the last level, over views, `[b, D]`."""
        return mean_over_views(self.vision(batch["pixel_values"]).pooled, batch["study_index"], len(batch["valid"]))
