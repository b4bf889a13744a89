"""Contrast of radiographs and reports by the pairwise sigmoid loss (SigLIP, arXiv 2303.15343), keyed positives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.losses import contrast
from core.models.heads import LogitBias, LogitScale
from core.models.initialise import draw_weights
from core.tasks import Gathered, LossOutput, share_of_constant
from core.tasks.two_towers import TwoTowerTask


class SigLIP(TwoTowerTask):
    """Every pair of image and report is a yes-or-no question of its own; equal reports are positives of each other."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TwoTowerTask.Config):
        """Scale and bias start as in the paper: near "no pair matches", which most pairs do not."""

        scale_init: float = 10.0
        scale_max: float = 200.0
        bias_init: float = -10.0
        bias_bound: float = 40.0

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> SigLIP:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return SigLIP(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: SigLIP.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.config = config
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)
        self.logit_bias = LogitBias(config.bias_init, config.bias_bound)
        draw_weights(self, seed)

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        scale, bias = self.logit_scale(), self.logit_bias()
        loss = contrast.pairwise_sigmoid(gathered, scale=scale, bias=bias, precision=self.config.precision)
        return LossOutput(
            loss=loss,
            metrics={
                "loss/pairwise_sigmoid": loss.detach(),
                "optim/logit_scale": share_of_constant(scale, gathered),
                "optim/logit_bias": share_of_constant(bias, gathered),
            },
        )
