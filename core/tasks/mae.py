"""Masked autoencoder (MAE, arXiv 2111.06377): three quarters of an image from the rest; the image part of ECAMP."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from core.losses.per_study import PerStudy
from core.models.initialise import draw_weights
from core.models.masked_image import DecoderConfig, MaskedImageModel
from core.models.towers import mean_over_views
from core.models.vision import VisionEncoder
from core.tasks import Encoded, Gathered, LossOutput, Task
from shards.batch import Batch


class MAE(Task):
    """Pixels of masked patches, not normalised by patch, as ECAMP has them."""

    fields = ("pixel_values", "study_index", "valid", "patch_mask")

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Encoder and decoder."""

        vision: VisionEncoder.Config
        decoder: DecoderConfig = field(default_factory=DecoderConfig)

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> MAE:
            """The task with weights drawn from `seed`; it reads no text."""
            return MAE(self, seed=seed)

    def __init__(self, config: MAE.Config, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.image = MaskedImageModel(config.vision, config.decoder)
        draw_weights(self, seed)

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled features of the whole image, mean over views, `[b, D]` fp32."""
        pooled = self.image.vision(self.image.small(batch["pixel_values"])).pooled.float()
        return mean_over_views(pooled, batch["study_index"], len(batch["valid"]))

    def encode(self, batch: Batch) -> Encoded:
        local = PerStudy(batch["valid"])
        losses = self.image(batch["pixel_values"], batch["patch_mask"], None).losses
        local.add("mim", losses["mim"], batch["study_index"])
        return Encoded(gather={"valid": batch["valid"]}, local=local.means())

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        loss = local["mim"].sum() / gathered.all["valid"].sum().clamp(min=1)
        return LossOutput(loss=loss, metrics={"loss/mim": loss.detach()})
