"""The part that all contrasts of one image and one report embedding share: the towers and what they send around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from core.models.text import TextEncoder
from core.models.towers import TwoTowers
from core.models.vision import VisionEncoder
from core.tasks import Encoded, Task
from kernels.gaussian_similarity.expansion import Precision
from shards.batch import Batch


class TwoTowerTask(Task):
    """Unit-norm embeddings of images and reports, gathered with the key of the report; a subclass adds the loss."""

    fields: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "study_index",
        "valid",
        "input_ids",
        "attention_mask",
        "report_key",
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Of the towers. `precision`: of the inputs of the product that compares all pairs; None: fp32."""

        vision: VisionEncoder.Config
        text: TextEncoder.Config
        embed_dim: int = 512
        precision: Precision | None = None

        def to_embed(self) -> TwoTowerTask.Config:
            """Of a task that only embeds."""
            return self

    def __init__(self, config: TwoTowerTask.Config, *, vocab_size: int | None = None) -> None:
        super().__init__()
        self.towers = TwoTowers(config.vision, config.text, config.embed_dim, vocab_size=vocab_size)

    def encode(self, batch: Batch) -> Encoded:
        return Encoded(
            gather={
                "image_embeds": self.embed_images(batch),
                "text_embeds": self.embed_texts(batch["input_ids"], batch["attention_mask"]),
                "report_key": batch["report_key"],
                "valid": batch["valid"],
            }
        )

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit-norm `[b, E]`; reads `pixel_values`, `study_index`, `valid`."""
        return self.towers.embed_images(batch)

    def image_norms(self, batch: Batch) -> Tensor:
        """Length of each study's embedding before it is normalised, `[b]`: a control of measures of uncertainty."""
        return self.towers.project_images(batch).norm(dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit-norm `[n, E]`."""
        return self.towers.embed_texts(input_ids, attention_mask)

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled, before the projection, `[b, D]`."""
        return self.towers.image_features(batch)
