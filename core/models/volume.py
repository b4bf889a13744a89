"""Vision transformer for CT volumes: anisotropic patches, any volume size, tokens of several depths (fvlm.md, 2).

Patches are cut by a reshape and projected by one matrix product. There is no class token: anatomies pool their own
tokens (core.models.anatomy_pool). Positions are learned on one grid and interpolated to any other, in training too.

Letters: V = volumes, C = channels (HU windows), T = patches of a volume, D = width; axes are (z, y, x).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout
from core.models.transformer import Activation, LayerNorm, Transformer, TransformerConfig, compute_dtype
from shards.errors import ConfigError

Size = tuple[int, int, int]  # slices, rows, columns


@dataclass(frozen=True, kw_only=True)
class VolumeOutput:
    """`levels`: tokens `[V, T, D]` after the blocks that the config names, patches in rows of z, y, x."""

    levels: list[Tensor]

    @property
    def pooled(self) -> Tensor:
        """Mean of the last level, `[V, D]` fp32."""
        return self.levels[-1].float().mean(dim=1)


def resize_positions(positions: Tensor, old_grid: Size, new_grid: Size) -> Tensor:
    """Learned positions of one grid of patches `[T, D]` at the places of another, trilinear."""
    if old_grid == new_grid:
        return positions
    grid = positions.float().reshape(1, *old_grid, -1).permute(0, 4, 1, 2, 3)  # [1, D, z, y, x]
    grid = F.interpolate(grid, size=new_grid, mode="trilinear", align_corners=False)
    return grid.permute(0, 2, 3, 4, 1).flatten(0, 3).to(positions.dtype)


class VolumeEncoder(nn.Module):
    """ViT-3D. Weights of 2D encoders are inflated by `initialise.load_weights`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes in voxels (z, y, x). `levels`: blocks, counted from 1, whose tokens are given; those of the last block
        come after the final norm, others as they are.
        """

        volume_size: Size = (112, 256, 352)
        patch_size: Size = (16, 16, 32)
        channels: int = 1
        width: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4.0
        levels: tuple[int, ...] = (4, 7, 10, 12)
        activation: Activation = "gelu"
        norm_epsilon: float = 1e-6
        checkpoint_activations: bool = False

        def __post_init__(self) -> None:
            if any(size % patch for size, patch in zip(self.volume_size, self.patch_size, strict=True)):
                fit = tuple(
                    max(1, size // patch) * patch for size, patch in zip(self.volume_size, self.patch_size, strict=True)
                )
                raise ConfigError(
                    f"volume_size={self.volume_size} is not divisible by patch_size={self.patch_size}; use {fit}"
                )
            rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
            if not self.levels or not rising or self.levels[0] < 1 or self.levels[-1] != self.depth:
                raise ConfigError(
                    f"levels={self.levels} must rise from 1 at least and end with the last block, depth={self.depth}"
                )

        @property
        def grid(self) -> Size:
            """Patches along z, y, x at `volume_size`."""
            z, y, x = (size // patch for size, patch in zip(self.volume_size, self.patch_size, strict=True))
            return z, y, x

    def __init__(self, config: VolumeEncoder.Config) -> None:
        super().__init__()
        self.config = config
        z, y, x = config.grid
        depth, height, width = config.patch_size
        self.patch = nn.Linear(config.channels * depth * height * width, config.width)
        self.positions = nn.Parameter(torch.zeros(z * y * x, config.width))
        self.transformer = Transformer(
            TransformerConfig(
                width=config.width,
                depth=config.depth,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                activation=config.activation,
                norm_epsilon=config.norm_epsilon,
                checkpoint_activations=config.checkpoint_activations,
            )
        )
        self.norm = LayerNorm(config.width, eps=config.norm_epsilon)

    def grid_of(self, pixel_values: Tensor) -> Size:
        """Patches along z, y, x of volumes `[V, C, D, H, W]`. ConfigError where they do not fit."""
        config, sizes = self.config, tuple(pixel_values.shape[2:])
        fits = len(sizes) == 3 and not any(size % patch for size, patch in zip(sizes, config.patch_size, strict=True))
        if not fits or pixel_values.shape[1] != config.channels:
            raise ConfigError(
                f"pixel_values {tuple(pixel_values.shape)} do not fit channels={config.channels}, "
                f"patch_size={config.patch_size}; volumes are [V, C, D, H, W]"
            )
        z, y, x = (size // patch for size, patch in zip(sizes, config.patch_size, strict=True))
        return z, y, x

    def patches(self, pixel_values: Tensor) -> Tensor:
        """`[V, C, D, H, W]` -> `[V, T, C * voxels of a patch]`."""
        z, y, x = self.grid_of(pixel_values)
        depth, height, width = self.config.patch_size
        volumes, channels = pixel_values.shape[:2]
        cut = pixel_values.reshape(volumes, channels, z, depth, y, height, x, width)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(volumes, z * y * x, -1)

    def forward(self, pixel_values: Tensor) -> VolumeOutput:
        """`pixel_values [V, C, D, H, W]`, of any size that the patches divide."""
        positions = resize_positions(self.positions, self.config.grid, self.grid_of(pixel_values))
        dtype = compute_dtype(self.patch.weight)
        x = self.patch(self.patches(pixel_values).to(dtype)) + positions.to(dtype)  # [V, T, D]
        volumes, length, _ = x.shape
        levels = []
        states = self.transformer.states(x.flatten(0, 1), DenseLayout(volumes, length))
        for block, state in enumerate(states, start=1):
            if block in self.config.levels:
                last = block == self.config.depth
                levels.append((self.norm(state) if last else state).view(volumes, length, -1))
        return VolumeOutput(levels=levels)


def vit_b_volume() -> VolumeEncoder.Config:
    """ViT-B on fVLM's chest volumes: 112 x 256 x 352 voxels, patches of 16 x 16 x 32, 1,232 tokens."""
    return VolumeEncoder.Config()


def vit_tiny_volume() -> VolumeEncoder.Config:
    """Under a million weights on 48 x 64 x 64 voxels, 384 tokens: for tests and two CPU cores."""
    return VolumeEncoder.Config(
        volume_size=(48, 64, 64), patch_size=(8, 8, 8), width=128, depth=4, heads=4, levels=(2, 3, 4)
    )
