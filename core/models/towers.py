"""Two encoders and their projections into one space: what contrastive tasks of image and report share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from core.models.heads import Projection, unit_norm
from core.models.text import TextEncoder
from core.models.vision import VisionEncoder
from shards.batch import Batch


class TwoTowers(nn.Module):
    """Image and text encoder, each with a projection to `embed_dim`. V = images, B = studies, E = embed_dim."""

    def __init__(
        self, vision: VisionEncoder.Config, text: TextEncoder.Config, embed_dim: int, *, vocab_size: int | None = None
    ) -> None:
        super().__init__()
        if vocab_size is not None:
            text = replace(text, vocab_size=vocab_size)
        self.vision = VisionEncoder(vision)
        self.text = TextEncoder(text)
        self.vision_projection = Projection(vision.width, embed_dim)
        self.text_projection = Projection(text.width, embed_dim)

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit-norm `[B, E]` fp32: the mean over a study's views of their projections, then normalised."""
        return unit_norm(self.project_images(batch))

    def project_images(self, batch: Batch) -> Tensor:
        """`[B, E]` fp32: what `embed_images` normalises."""
        projected = self.vision_projection(self.vision(batch["pixel_values"]).pooled)
        return mean_over_views(projected, batch["study_index"], batch["valid"].shape[0])

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit-norm `[n, E]` fp32."""
        return unit_norm(self.text_projection(self.text(input_ids, attention_mask).pooled))

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled features before the projection, mean over views, `[B, D]` fp32: what probes are trained on."""
        pooled = self.vision(batch["pixel_values"]).pooled.float()
        return mean_over_views(pooled, batch["study_index"], batch["valid"].shape[0])


def mean_over_views(x: Tensor, study_index: Tensor, studies: int) -> Tensor:
    """`x [V, E]` fp32 -> `[studies, E]`; zero for a study without views.

    A product with the membership matrix, not a scatter: its order of summation is fixed on every device.
    """
    with torch.autocast(x.device.type, enabled=False):
        member = (study_index[None, :] == torch.arange(studies, device=x.device)[:, None]).to(x.dtype)  # [B, V]
        return (member / member.sum(dim=1, keepdim=True).clamp(min=1.0)) @ x
