"""Two encoders and their projections into one space: what contrastive tasks of image and report share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from core.models.heads import Projection, unit_norm
from core.models.text import TextEncoder
from core.models.vision import VisionEncoder
from core.models.volume import VolumeEncoder
from shards.batch import Batch

VisionConfig = VisionEncoder.Config | VolumeEncoder.Config


class Encoders(nn.Module):
    """Image and text encoder. V = images, B = studies, N = patches, L = text tokens, D = width of the encoder."""

    def __init__(self, vision: VisionConfig, text: TextEncoder.Config, *, vocab_size: int | None = None) -> None:
        super().__init__()
        if vocab_size is not None:
            text = replace(text, vocab_size=vocab_size)
        self.vision = VisionEncoder(vision) if isinstance(vision, VisionEncoder.Config) else VolumeEncoder(vision)
        self.text = TextEncoder(text)

    def image_tokens(self, pixel_values: Tensor, keep: Tensor | None = None) -> Tensor:
        """`[V, 1 + M, D]`: the pooled image as its first, global token, then the patches of `keep [V, M]`, else all."""
        assert isinstance(self.vision, VisionEncoder), "volumes have no global token"
        out = self.vision(pixel_values, keep)
        return torch.cat([out.pooled[:, None].to(out.tokens.dtype), out.tokens], dim=1)

    def text_tokens(
        self, input_ids: Tensor, attention_mask: Tensor, *, hidden: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`[B, L, D]`, the pooled report in its first token's place; `hidden` as the encoder takes it."""
        out = self.text(input_ids, attention_mask, hidden=hidden)
        return torch.cat([out.pooled[:, None].to(out.tokens.dtype), out.tokens[:, 1:]], dim=1)

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled features, mean over views, `[B, D]` fp32: what probes are trained on."""
        pooled = self.vision(batch["pixel_values"]).pooled.float()
        return mean_over_views(pooled, batch["study_index"], batch["valid"].shape[0])


class TwoTowers(Encoders):
    """The encoders, each with a projection to `embed_dim`. E = embed_dim."""

    def __init__(
        self, vision: VisionConfig, text: TextEncoder.Config, embed_dim: int, *, vocab_size: int | None = None
    ) -> None:
        super().__init__(vision, text, vocab_size=vocab_size)
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


def first_views(batch: Batch) -> Tensor:
    """The row of each study's first view, `[B]`; every study has one, if only a void one."""
    studies = torch.arange(len(batch["valid"]), device=batch["valid"].device)
    return torch.searchsorted(batch["study_index"], studies)


def mean_over_views(x: Tensor, study_index: Tensor, studies: int) -> Tensor:
    """`x [V, E]` fp32 -> `[studies, E]`; zero for a study without views.

    A product with the membership matrix, not a scatter: its order of summation is fixed on every device.
    """
    with torch.autocast(x.device.type, enabled=False):
        member = (study_index[None, :] == torch.arange(studies, device=x.device)[:, None]).to(x.dtype)  # [B, V]
        return (member / member.sum(dim=1, keepdim=True).clamp(min=1.0)) @ x


def mean_over_present_views(x: Tensor, present: Tensor, study_index: Tensor, studies: int) -> Tensor:
    """`x [V, A, E]` fp32 of the anatomies that are `present [V, A]` in each view -> `[studies, A, E]`, 0 where in none.

    As `mean_over_views`, anatomy by anatomy.
    """
    member = study_index[None, :] == torch.arange(studies, device=x.device)[:, None]  # [B, V]
    weight = (member[:, :, None] & present[None]).to(x.dtype)  # [B, V, A]
    return torch.einsum("bva,vae->bae", weight / weight.sum(dim=1, keepdim=True).clamp(min=1.0), x)
