"""Masked images: an encoder of the visible patches alone, a decoder of all, and twice the size out of what it shows.

(MAE, arXiv 2111.06377; the super-resolution head of ECAMP, arXiv 2312.13316.) Both losses divide by all pixels, the
masked and attended ones or not, as ECAMP's do.

Letters: V = images, C = channels, P = patch side, N = patches of an image, M = visible ones, G = patches a side,
D = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout
from core.models.fused import PatchSplit
from core.models.fusion import PatchHead
from core.models.transformer import LayerNorm, Linear, Transformer, TransformerConfig
from core.models.vision import VisionEncoder, sincos_positions
from shards.errors import ConfigError

SuperResolution = Literal["none", "residual", "original"]
FEATURES = 16  # channels of the residual
WINDOW_MARGIN = 2  # cells by which the released window is smaller than the grid


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of the image decoder."""

    width: int = 512
    depth: int = 4
    heads: int = 16
    mlp_ratio: float = 4.0


class ImageDecoder(nn.Module):
    """Tokens of the visible patches -> pixels of all, `[V, N, C * P * P]` fp32, in rows from top left."""

    def __init__(self, config: DecoderConfig, vision: VisionEncoder.Config) -> None:
        super().__init__()
        self.config, self.grid = config, vision.grid
        self.embed = Linear(vision.width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, config.width))
        self.transformer = Transformer(
            TransformerConfig(
                width=config.width, depth=config.depth, heads=config.heads, mlp_ratio=config.mlp_ratio,
                checkpoint_activations=vision.checkpoint_activations,
            )
        )  # fmt: skip
        self.norm = LayerNorm(config.width, eps=vision.norm_epsilon)
        self.head = PatchHead(config.width, vision.channels * vision.patch_size**2)

    def forward(self, prefix: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
        """`prefix [V, R, D]` (class token, registers), `tokens [V, M, D]` of the patches `keep [V, M]`."""
        images, first = prefix.shape[:2]
        rows, columns = self.grid
        x = self.embed(torch.cat([prefix, tokens], dim=1).flatten(0, 1)).view(images, -1, self.config.width)
        masked = self.mask_token.to(x.dtype).expand(images, rows * columns, -1)
        patches = masked.scatter(1, keep[:, :, None].expand(-1, -1, x.shape[2]), x[:, first:])
        positions = sincos_positions(rows, columns, self.config.width, base_rows=rows, base_columns=columns)
        patches = patches + positions.to(x)
        x = torch.cat([x[:, :first], patches], dim=1)
        length = x.shape[1]
        x = self.norm(self.transformer(x.flatten(0, 1), DenseLayout(images, length))).view(images, length, -1)
        pixels: Tensor = self.head(x[:, first:])
        return pixels


class SuperResolver(nn.Module):
    """An image -> the same at twice the size: the bilinear one and a correction, `[V, C, H, W]` -> `[V, C, 2 H, 2 W]`.

    `residual` corrects from FEATURES features of the small image. `original` does so on the channels of the large one
    and cuts what comes out at 0, though black is below 0 in a normalised image.
    """

    def __init__(self, channels: int, kind: Literal["residual", "original"]) -> None:
        super().__init__()
        self.original = kind == "original"
        between, out = (channels, channels) if self.original else (FEATURES, 4 * channels)
        self.first = nn.Conv2d(channels, between, 3, padding=1)
        self.last = nn.Conv2d(between, out, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        large = F.interpolate(image, scale_factor=2.0, mode="bilinear", align_corners=False)
        if self.original:
            return F.relu(self.last(F.relu(self.first(large))) + large)
        corrected: Tensor = F.pixel_shuffle(self.last(F.gelu(self.first(image))), 2) + large
        return corrected


@dataclass(frozen=True, kw_only=True)
class MaskedImages:
    """`tokens [V, M, D]` of the visible patches; losses `[V]` fp32: `mim`, and `sr` where that head is."""

    tokens: Tensor
    losses: dict[str, Tensor]


class MaskedImageModel(nn.Module):
    """Encoder, decoder and, unless `super_resolution` is none, the head for twice the encoder's size."""

    def __init__(
        self,
        vision: VisionEncoder.Config,
        decoder: DecoderConfig,
        super_resolution: SuperResolution = "none",
        attention_floor: float = 0.0,
    ) -> None:
        """`attention_floor`: weight, of 1 on average, that every part of the large image has whatever is looked at."""
        super().__init__()
        self.kind, self.attention_floor = super_resolution, attention_floor
        self.vision = VisionEncoder(vision)
        self.decoder = ImageDecoder(decoder, vision)
        self.super_resolver = SuperResolver(vision.channels, super_resolution) if super_resolution != "none" else None

    def small(self, pixel_values: Tensor) -> Tensor:
        """Images at the encoder's size: as they are, or bicubic from twice that. ConfigError for any other size."""
        size = self.vision.config.image_size
        if pixel_values.shape[-1] == size:
            return pixel_values
        if pixel_values.shape[-1] != 2 * size:
            raise ConfigError(f"images of {pixel_values.shape[-1]} px; the encoder takes {size} px or twice that")
        return F.interpolate(
            pixel_values.float(), size=(size, size), mode="bicubic", align_corners=False, antialias=True
        )

    def forward(self, pixel_values: Tensor, patch_mask: Tensor, attention_grid: Tensor | None) -> MaskedImages:
        """`pixel_values [V, C, H, W]`, twice the encoder's size where there is a head for that; `patch_mask [V, N]`.

        `attention_grid [V, N]`, mean 1: how much each part of the large image counts.
        """
        small = self.small(pixel_values)
        keep = PatchSplit.of(patch_mask).keep
        seen = self.vision(small, keep)
        shown = self.decoder(seen.prefix, seen.tokens, keep)  # [V, N, C * P * P]
        error = (shown - self.vision.patches(small).float()).square().mean(dim=2)  # [V, N]
        losses = {"mim": (error * patch_mask).mean(dim=1)}
        if self.super_resolver is not None:
            assert attention_grid is not None
            losses["sr"] = self._super_resolution_loss(shown, pixel_values, attention_grid)
        return MaskedImages(tokens=seen.tokens, losses=losses)

    def _super_resolution_loss(self, shown: Tensor, pixel_values: Tensor, attention_grid: Tensor) -> Tensor:
        """`[V]`; pixels of the patches as the decoder shows them, masked or not, against the large image."""
        assert self.super_resolver is not None
        config = self.vision.config
        side, (rows, columns), channels = config.patch_size, config.grid, config.channels
        if pixel_values.shape[-1] != 2 * config.image_size:
            raise ConfigError(
                f"images of {pixel_values.shape[-1]} px, super-resolution learns from {2 * config.image_size} px; set "
                f"data.decode.image_size={2 * config.image_size}"
            )
        cut = shown.view(-1, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        large = self.super_resolver(cut.reshape(-1, channels, rows * side, columns * side)).float()
        error = (large - pixel_values).square().view(-1, channels, rows, 2 * side, columns, 2 * side)
        cells = error.mean(dim=(1, 3, 5)).flatten(1)  # [V, N]
        if self.kind == "original":
            weight = attended_window(attention_grid.view(-1, rows, columns)).flatten(1)
        else:
            weight = self.attention_floor + (1 - self.attention_floor) * attention_grid
        return (cells * weight).mean(dim=1)


def attended_window(grid: Tensor) -> Tensor:
    """`[V, G, G]` -> 1 in the window of G - 2 cells a side in which most is attended to, else 0; of an even grid the
    window in the middle."""
    _, rows, columns = grid.shape
    size = (max(1, rows - WINDOW_MARGIN), max(1, columns - WINDOW_MARGIN))
    sums = F.avg_pool2d(grid[:, None].float(), size, stride=1)[:, 0]  # [V, g, g]
    across = sums.shape[2]
    best = sums.flatten(1).argmax(dim=1)
    even = sums.flatten(1).amax(dim=1) - sums.flatten(1).amin(dim=1) < 1e-6
    best = torch.where(even, sums.shape[1] // 2 * across + across // 2, best)
    top, left = (best // across)[:, None], (best % across)[:, None]
    row, column = (torch.arange(n, device=grid.device)[None] for n in (rows, columns))
    down = (row >= top) & (row < top + size[0])
    return (down[:, :, None] & ((column >= left) & (column < left + size[1]))[:, None, :]).to(grid.dtype)
