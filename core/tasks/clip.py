"""Contrast of radiographs and reports by symmetric InfoNCE with keyed positives (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.losses import contrast
from core.models.heads import LogitScale
from core.models.initialise import draw_weights
from core.tasks import Gathered, LossOutput, share_of_constant
from core.tasks.two_towers import TwoTowerTask


class CLIP(TwoTowerTask):
    """Each image picks its report out of the batch, each report its image; equal reports are no negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TwoTowerTask.Config):
        """The logit scale starts at `scale_init` (CLIP's 1 / 0.07) and stays smoothly below `scale_max`."""

        scale_init: float = 1 / 0.07
        scale_max: float = 100.0

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> CLIP:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return CLIP(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: CLIP.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.config = config
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)
        draw_weights(self, seed)

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        scale = self.logit_scale()
        shares = contrast.info_nce(gathered, scale=scale, precision=self.config.precision)
        return LossOutput(
            loss=shares.loss,
            metrics={
                "loss/image_to_text": shares.row_to_column,
                "loss/text_to_image": shares.column_to_row,
                "optim/logit_scale": share_of_constant(scale, gathered),
            },
        )
