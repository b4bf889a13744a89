"""CLIP on CT volumes: the whole volume against the whole report, what fVLM is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.models.towers import first_views, mean_over_views
from core.models.volume import VolumeEncoder, VolumeOutput
from core.tasks.clip import CLIP
from shards.batch import Batch


class VolumeCLIP(CLIP):
    """A volume is the mean of its last tokens; everything else is CLIP's."""

    @dataclass(frozen=True, kw_only=True)
    class Config(CLIP.Config):
        """As CLIP's, with an encoder of volumes."""

        vision: VolumeEncoder.Config  # type: ignore[assignment]

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> VolumeCLIP:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return VolumeCLIP(self, vocab_size=vocab_size, seed=seed)

    def embed_patches(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As FVLM's, of one anatomy that is the whole volume: its pooled tokens `[b, 1, D]`, and tokens `[b, T, D]`."""
        out = self.towers.vision(batch["pixel_values"])
        assert isinstance(out, VolumeOutput)
        present = batch["valid"][:, None]
        pooled = mean_over_views(out.pooled, batch["study_index"], len(present))
        tokens = out.levels[-1][first_views(batch)]
        member = present[:, :, None].expand(-1, -1, tokens.shape[1])
        return torch.nn.functional.normalize(pooled, dim=-1)[:, None], present, tokens, member
