"""One embedding for each anatomy of each volume: attention of the anatomy's query over its own tokens (fvlm.md, 2).

All (volume, anatomy) pairs are pooled at once. The attention weights are shared by all anatomies; queries and last
projections are not. Queries are zero at the start, so that an anatomy starts as the mean of its tokens.

One query asks thousands of tokens, so neither keys nor values of tokens are ever formed: the query is taken through the
key weights first, q . (W x) = (W^T q) . x, and tokens are averaged before they meet the value weights. A bias of keys
would cancel in the softmax. With four levels and four anatomies this is a fiftieth of the products of keys and values.

Where the encoder has a stem, the mean of its map over the anatomy's own voxels is added, through a projection of each
anatomy's own: a patch mixes a small organ with its neighbours, the stem's map much less.

Letters: V = volumes, A = anatomies, T = patches, L = levels, D = width, H = heads, K = D / H, E = embedding,
C = channels and F = places of the stem's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.transformer import LayerNorm, Linear
from core.models.volume import VolumeOutput
from shards.errors import ConfigError


class AnatomyPool(nn.Module):
    """Tokens of several levels and each anatomy's share of each patch -> embeddings before any norm."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`normalised`: levels pass a LayerNorm and get an embedding of their own each; the paper has neither, so one
        level may outweigh the others. `weighting`: `flag` takes all patches that hold a voxel of the anatomy alike, as
        the paper; `share` starts from the mean weighted by share, since a patch is wider than a small organ.
        """

        heads: int = 4
        normalised: bool = True
        weighting: Literal["flag", "share"] = "flag"

    def __init__(
        self, config: AnatomyPool.Config, *, anatomies: int, levels: int, width: int, embed_dim: int, stem: int = 0
    ) -> None:
        """`stem`: channels of the encoder's stem, 0 without one."""
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"pool.heads={config.heads} does not divide the encoder's width {width}; change one")
        if anatomies < 1:
            raise ConfigError("no anatomy to pool; name some in data.volume.anatomies")
        self.config, self.width = config, width
        self.norms = nn.ModuleList(LayerNorm(width, eps=1e-6) for _ in range(levels if config.normalised else 0))
        self.level_tokens = nn.Parameter(torch.zeros(levels, width)) if config.normalised else None
        self.query_tokens = nn.Parameter(torch.zeros(anatomies, width))
        self.key_weight = nn.Parameter(torch.zeros(width, width))  # [H * K, D]
        self.value_weight = nn.Parameter(torch.zeros(width, width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = Linear(width, width)
        self.projection = nn.Parameter(torch.zeros(anatomies, embed_dim, width))
        self.stem_norm = LayerNorm(stem, eps=1e-6) if stem else None
        self.stem_projection = nn.Parameter(torch.zeros(anatomies, embed_dim, stem)) if stem else None

    def first_std(self, name: str) -> float:
        """Standard deviation of the first values of a parameter of this module itself."""
        if name in ("query_tokens", "value_bias"):
            return 0.0
        if name == "stem_projection":
            assert self.stem_projection is not None
            return float(self.stem_projection.shape[2] ** -0.5)
        return 0.02 if name == "level_tokens" else self.width**-0.5

    def forward(self, seen: VolumeOutput, anatomy_share: Tensor, emphasis: Tensor | None = None) -> Tensor:
        """`anatomy_share [V, A, T]`, or `[V, A, F]` with a stem -> `[V, A, E]` fp32, 0 for an anatomy without any.

        `emphasis`, shaped as the shares, multiplies the weight that a place has in its anatomy: the slope of a score by
        it, at 1, says what the place does to the score.
        """
        stressed = anatomy_share if emphasis is None else anatomy_share * emphasis
        if seen.fine is None:
            return self._of_tokens(seen.levels, anatomy_share, stressed)
        of_patches = mean_of_patches(anatomy_share, seen)
        stressed_patches = of_patches if emphasis is None else mean_of_patches(stressed, seen)
        return self._of_tokens(seen.levels, of_patches, stressed_patches) + self._of_stem(seen.fine, stressed)

    def _of_tokens(self, levels: Sequence[Tensor], anatomy_share: Tensor, stressed: Tensor) -> Tensor:
        """`stressed`: the shares under an emphasis, itself without one."""
        volumes, anatomies, patches = anatomy_share.shape
        if anatomies != len(self.query_tokens) or levels[0].shape[:2] != (volumes, patches):
            raise ConfigError(
                f"anatomy_share {tuple(anatomy_share.shape)} does not fit {len(self.query_tokens)} anatomies and "
                f"{levels[0].shape[1]} patches of {levels[0].shape[0]} volumes; the data's patch size, crop and "
                "anatomies must be the model's"
            )
        tokens = self._tokens(levels)  # [V, L * T, D]
        member = anatomy_share > 0
        present = member.any(dim=2)  # [V, A]
        heads = self.config.heads
        with torch.autocast(tokens.device.type, enabled=False):
            asked = self._asked().to(tokens.dtype)  # [A * H, D]
            scores = (asked @ tokens.transpose(1, 2)).float()  # [V, A * H, L * T]
            scores = scores.view(volumes, anatomies, heads, len(levels), patches)
            if self.config.weighting == "share":
                scores = scores + stressed.float().clamp(min=1e-6).log()[:, :, None, None]
            elif stressed is not anatomy_share:
                emphasis = torch.where(member, stressed / anatomy_share.clamp(min=1e-6), 1.0)
                scores = scores + emphasis.float().log()[:, :, None, None]
            # An anatomy that is not there takes all patches, which is finite, and is left out below.
            hidden = ~member & present[:, :, None]
            scores = scores.masked_fill(hidden[:, :, None, None], -torch.inf)
            weight = scores.flatten(3).softmax(dim=3).flatten(1, 2).to(tokens.dtype)
            mean = (weight @ tokens).float().view(volumes, anatomies, heads, -1)  # [V, A, H, D]
            value = self.value_weight.float().view(heads, -1, self.width)
            mixed = torch.einsum("vahd,hkd->vahk", mean, value).flatten(2) + self.value_bias.float()
            mixed = self.out(mixed.flatten(0, 1)).view(volumes, anatomies, -1)
            embeds = torch.einsum("vad,aed->vae", mixed, self.projection.float())
        return embeds * present[:, :, None]

    def _of_stem(self, fine: Tensor, anatomy_share: Tensor) -> Tensor:
        """Projected mean of the map `[V, C, z, y, x]` over each anatomy, `[V, A, E]`; 0 for one without a voxel."""
        assert self.stem_norm is not None and self.stem_projection is not None
        whole = anatomy_share.sum(dim=2, keepdim=True)
        weight = (anatomy_share / whole.clamp(min=1e-6)).to(fine.dtype)
        with torch.autocast(fine.device.type, enabled=False):
            mean = self.stem_norm((weight @ fine.flatten(2).transpose(1, 2)).float())  # [V, A, C]
            embeds = torch.einsum("vac,aec->vae", mean, self.stem_projection.float())
        return embeds * (whole > 0)

    def _tokens(self, levels: Sequence[Tensor]) -> Tensor:
        if self.level_tokens is None:
            return torch.cat(list(levels), dim=1)
        normed = zip(levels, self.norms, self.level_tokens, strict=True)
        return torch.cat([norm(level) + token.to(level.dtype) for level, norm, token in normed], dim=1)

    def _asked(self) -> Tensor:
        """Queries in the space of tokens, scaled, `[A * H, D]`."""
        heads = self.config.heads
        queries = self.query_tokens.float().view(len(self.query_tokens), heads, -1)  # [A, H, K]
        keys = self.key_weight.float().view(heads, -1, self.width)  # [H, K, D]
        scale = (self.width // heads) ** -0.5
        return torch.einsum("ahk,hkd->ahd", queries * scale, keys).flatten(0, 1)


def mean_of_patches(anatomy_share: Tensor, seen: VolumeOutput) -> Tensor:
    """Shares of the places of the stem's map `[V, A, F]` -> of the patches `[V, A, T]`. ConfigError if they differ."""
    assert seen.fine is not None
    fine = seen.fine.shape[2:]
    if anatomy_share.shape[2] != fine.numel():
        raise ConfigError(
            f"anatomy_share {tuple(anatomy_share.shape)} does not fit the stem's map of {tuple(fine)}; "
            "the data's patch size must be the voxels that a value of the map stands for"
        )
    grid = anatomy_share.unflatten(2, fine)
    return F.avg_pool3d(grid, [side // patches for side, patches in zip(fine, seen.grid, strict=True)]).flatten(2)
