"""Vision transformer for CT volumes: anisotropic patches, any volume size, tokens of several depths (fvlm.md, 2).

Patches are cut by a reshape and projected by one matrix product. There is no class token: anatomies pool their own
tokens (core.models.anatomy_pool). Positions are learned on one grid and interpolated to any other, in training too.

A stem of a few convolutions may come before the patches (after Xiao et al. 2021, arXiv 2106.14881): a lesion looks
alike wherever it lies in a patch, which a matrix over all voxels of a patch has to learn place by place. The stem's
last map is given out beside the tokens, since a patch is wider than a small organ and mixes it with its neighbours.

Letters: V = volumes, C = channels (HU windows, or the stem's), T = patches of a volume, D = width; axes are (z, y, x).
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
    """`levels`: tokens `[V, T, D]` after the blocks that the config names, patches in rows of z, y, x.

    `grid`: patches along z, y, x. `fine`: the stem's last map `[V, C, z, y, x]`, None without a stem.
    """

    levels: list[Tensor]
    grid: Size
    fine: Tensor | None = None

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


class Stem(nn.Module):
    """Convolutions of 3 x 3 x 3 voxels, each halving every side: `[V, C, D, H, W]` -> `[V, C', D / 2^n, ...]`."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = (channels, *widths)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(before, after, kernel_size=3, stride=2, padding=1)
            for before, after in zip(inputs, widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths)

    def forward(self, volumes: Tensor) -> Tensor:
        x = volumes.contiguous(memory_format=torch.channels_last_3d)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return x


class VolumeEncoder(nn.Module):
    """ViT-3D. Weights of 2D encoders are inflated by `initialise.load_weights`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes in voxels (z, y, x). `levels`: blocks, counted from 1, whose tokens are given; those of the last block
        come after the final norm, others as they are. `stem`: channels of its convolutions, none: no stem.
        """

        volume_size: Size = (112, 256, 352)
        patch_size: Size = (16, 16, 32)
        channels: int = 1
        stem: tuple[int, ...] = ()
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
            if min(self.stem, default=1) < 1 or any(patch % 2 ** len(self.stem) for patch in self.patch_size):
                raise ConfigError(
                    f"stem={self.stem}: {len(self.stem)} convolutions halve patch_size={self.patch_size} as often; "
                    "give fewer, of at least 1 channel, or larger patches"
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

        @property
        def fine_size(self) -> Size:
            """Voxels that an anatomy's share is counted in: what a value of the stem's map stands for, or a patch."""
            return (2 ** len(self.stem),) * 3 if self.stem else self.patch_size

    def __init__(self, config: VolumeEncoder.Config) -> None:
        super().__init__()
        self.config = config
        z, y, x = config.grid
        self.stem = Stem(config.channels, config.stem) if config.stem else None
        depth, height, width = self._cut = tuple(side // 2 ** len(config.stem) for side in config.patch_size)
        channels = config.stem[-1] if config.stem else config.channels
        self.patch = nn.Linear(channels * depth * height * width, config.width)
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

    def patches(self, values: Tensor) -> Tensor:
        """Voxels, or the stem's map, `[V, C, D, H, W]` -> `[V, T, C * values of a patch]`."""
        depth, height, width = self._cut
        volumes, channels = values.shape[:2]
        z, y, x = values.shape[2] // depth, values.shape[3] // height, values.shape[4] // width
        cut = values.reshape(volumes, channels, z, depth, y, height, x, width)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(volumes, z * y * x, -1)

    def forward(self, pixel_values: Tensor) -> VolumeOutput:
        """`pixel_values [V, C, D, H, W]`, of any size that the patches divide."""
        grid = self.grid_of(pixel_values)
        positions = resize_positions(self.positions, self.config.grid, grid)
        dtype = compute_dtype(self.patch.weight)
        values = pixel_values.to(dtype)
        fine = None if self.stem is None else self.stem(values)
        x = self.patch(self.patches(values if fine is None else fine)) + positions.to(dtype)  # [V, T, D]
        volumes, length, _ = x.shape
        levels = []
        states = self.transformer.states(x.flatten(0, 1), DenseLayout(volumes, length))
        for block, state in enumerate(states, start=1):
            if block in self.config.levels:
                last = block == self.config.depth
                levels.append((self.norm(state) if last else state).view(volumes, length, -1))
        return VolumeOutput(levels=levels, grid=grid, fine=fine)


def vit_b_volume() -> VolumeEncoder.Config:
    """ViT-B on fVLM's chest volumes: 112 x 256 x 352 voxels, patches of 16 x 16 x 32, 1,232 tokens."""
    return VolumeEncoder.Config()


def vit_tiny_volume() -> VolumeEncoder.Config:
    """Under a million weights on 48 x 64 x 64 voxels, 384 tokens: for tests and two CPU cores."""
    return VolumeEncoder.Config(
        volume_size=(48, 64, 64), patch_size=(8, 8, 8), width=128, depth=4, heads=4, levels=(2, 3, 4)
    )
