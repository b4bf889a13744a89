"""Vision transformer for radiographs: one or three channels, any image size, all patches or only the visible ones.

Patches are cut by a reshape and projected by one matrix product, so `keep` drops masked patches before any work is done
on them. Positions belong to patches only; a checkpoint's class position is folded into the class token on loading.

A stem of convolutions may come before the patches (after Xiao et al. 2021, arXiv 2106.14881): a thin line looks alike
wherever it lies in a patch, which a matrix over all pixels of a patch has to learn place by place. Patches to be left
out are blanked before it, so that it shows nothing of them.

Letters: V = images, C = channels, P = patch side, N = patches of an image, M = kept patches, R = registers, D = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout
from core.models.transformer import Activation, LayerNorm, Transformer, TransformerConfig, compute_dtype
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VisionOutput:
    """`tokens [V, M, D]` patches in the order of `keep` (all N without it), `prefix [V, 1 + R, D]`, `pooled [V, D]`."""

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor


def sincos_positions(rows: int, columns: int, width: int, *, base_rows: int, base_columns: int) -> Tensor:
    """Fixed 2D positions of MAE (arXiv 2111.06377), `[rows * columns, width]` fp32: columns' half first, then rows'.

    Coordinates are those of the base grid: another image size samples the same waves more or less densely.
    """
    if width % 4:
        raise ConfigError(f"sin-cos positions need a width divisible by 4, not {width}; use positions='learned'")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # [D / 4]
    row = (torch.arange(rows, dtype=torch.float64) + 0.5) * (base_rows / rows) - 0.5
    column = (torch.arange(columns, dtype=torch.float64) + 0.5) * (base_columns / columns) - 0.5

    def waves(coordinate: Tensor) -> Tensor:
        angle = coordinate[:, None] * omega[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # [n, D / 2]

    across = waves(column)[None, :, :].expand(rows, -1, -1)
    down = waves(row)[:, None, :].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2).reshape(rows * columns, width).float()


def resize_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Learned positions `[old rows * old columns, D]` -> `[new rows * new columns, D]`, bicubic and antialiased."""
    if old_grid == new_grid:
        return positions
    grid = positions.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(new_grid[0] * new_grid[1], -1).to(positions.dtype)


def resize_patches(kernel: Tensor, patch_size: int) -> Tensor:
    """Patch kernel `[D, C, P, P]` -> `[D, C, patch_size, patch_size]` that answers to resized patches as before.

    With R the matrix of a bilinear resize of a patch, w' = pinv(R^T) w: the token of a larger patch R x is that of x,
    exactly; of a smaller patch it is the least-squares answer (FlexiViT, arXiv 2212.08013).
    """
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    basis = torch.eye(old * old, dtype=torch.float64, device=kernel.device).view(old * old, 1, old, old)
    resized = F.interpolate(
        basis, size=(patch_size, patch_size), mode="bilinear", align_corners=False, antialias=True
    ).flatten(1)  # [P P, new new], the transpose of R
    solved = kernel.flatten(2).double() @ torch.linalg.pinv(resized).T  # [D, C, new new]
    return solved.view(*kernel.shape[:2], patch_size, patch_size).to(kernel.dtype)


def cut_patches(values: Tensor, side: int) -> Tensor:
    """`[V, C, H, W]` -> `[V, N, C * side * side]`, row-major."""
    images, channels, height, width = values.shape
    cut = values.reshape(images, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(images, -1, channels * side * side)


def patches_as_image(keep: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """1 in the pixels of the patches `keep [V, M]` of a grid, else 0: `[V, 1, rows * side, columns * side]` fp32."""
    shown = torch.zeros(len(keep), rows * columns, device=keep.device).scatter(1, keep, 1.0)
    return shown.view(-1, 1, rows, columns).repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


class PlaceNorm(nn.GroupNorm):
    """Each channel of an image by its mean and variance over places (arXiv 1607.08022), of those shown where told."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, eps=1e-6)

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """`x [V, C, H, W]`, `shown [V, 1, H, W]` 1 or 0; statistics of the shown are fp32."""
        if shown is None:
            return super().forward(x)
        values = x.float()
        count = shown.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
        centred = values - (values * shown).sum(dim=(2, 3), keepdim=True) / count
        variance = (centred.square() * shown).sum(dim=(2, 3), keepdim=True) / count
        normed = centred * (variance + self.eps).rsqrt()
        weight, bias = (values.view(1, -1, 1, 1) for values in (self.weight, self.bias))
        return (normed * weight + bias).to(x.dtype)


class VisionStem(nn.Module):
    """Stages that halve both sides: `[V, C, H, W]` -> `[V, C', H / 2^n, W / 2^n]`.

    A stage is two convolutions of 3 x 3 pixels, the first with a stride of two, each channel normed over the places of
    its image, so that a line keeps its strength beside the noise around it. Blanked places do not count and stay blank,
    as if the image ended there.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = (channels, *widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(given, width, kernel_size=3, stride=stride, padding=1)
            for before, width in zip(inputs, widths, strict=False)
            for given, stride in ((before, 2), (width, 1))
        )
        self.norms = nn.ModuleList(PlaceNorm(width) for width in widths for _ in range(2))

    def forward(self, images: Tensor, shown: Tensor | None = None) -> Tensor:
        """`shown [V, 1, H, W]`: 1 where `images` are not blanked, in whole patches."""
        x = images.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x, here = convolution(x), None
            if shown is not None:
                stride = shown.shape[2] // x.shape[2]
                here = shown[:, :, ::stride, ::stride]
            x = F.relu(norm(x, here))
            if here is not None:
                x = x * here.to(x.dtype)
        return x


class VisionEncoder(nn.Module):
    """Own ViT. Weights of timm, MAE, DINOv2, Hugging Face and open_clip key names load through `initialise`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`pool`: the class token, or the mean or maximum of patch tokens, the latter for findings of a single patch.

        `input_norm`: CLIP's LayerNorm before the blocks. `stem`: channels of its stages, none: no stem.
        """

        image_size: int = 224
        patch_size: int = 16
        channels: int = 1
        stem: tuple[int, ...] = ()
        width: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4.0
        class_token: bool = True
        registers: int = 0
        pool: Literal["class", "mean", "max"] = "class"
        positions: Literal["learned", "sincos"] = "learned"
        patch_bias: bool = True
        input_norm: bool = False
        activation: Activation = "gelu"
        norm_epsilon: float = 1e-6
        layer_scale: float | None = None
        checkpoint_activations: bool = False

        def __post_init__(self) -> None:
            if self.image_size % self.patch_size:
                fit = max(1, self.image_size // self.patch_size) * self.patch_size
                raise ConfigError(
                    f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; use {fit}"
                )
            if self.pool == "class" and not self.class_token:
                raise ConfigError("pool='class' needs class_token=True; use pool='mean'")
            if min(self.stem, default=1) < 1 or self.patch_size % 2 ** len(self.stem):
                raise ConfigError(
                    f"stem={self.stem}: {len(self.stem)} stages halve patch_size={self.patch_size} as often; "
                    "give fewer, of at least 1 channel, or larger patches"
                )
            if self.channels not in (1, 3):
                raise ConfigError(f"channels={self.channels}: an encoder takes 1 (grey) or 3")

        @property
        def grid(self) -> tuple[int, int]:
            """Patches down and across at `image_size`."""
            return (self.image_size // self.patch_size,) * 2

    def __init__(self, config: VisionEncoder.Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = VisionStem(config.channels, config.stem) if config.stem else None
        side = config.patch_size // 2 ** len(config.stem)
        self.patch = nn.Linear((config.channels, *config.stem)[-1] * side**2, width, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, width)) if config.class_token else None
        self.registers = nn.Parameter(torch.zeros(config.registers, width)) if config.registers else None
        rows, columns = config.grid
        self.positions = nn.Parameter(torch.zeros(rows * columns, width)) if config.positions == "learned" else None
        self.input_norm: nn.Module = LayerNorm(width, eps=config.norm_epsilon) if config.input_norm else nn.Identity()
        self.transformer = Transformer(
            TransformerConfig(
                width=width,
                depth=config.depth,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                activation=config.activation,
                norm_epsilon=config.norm_epsilon,
                layer_scale=config.layer_scale,
                checkpoint_activations=config.checkpoint_activations,
            )
        )
        self.norm = LayerNorm(width, eps=config.norm_epsilon)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """`[V, C, H, W]` -> `[V, N, C * P * P]`, row-major; a grey image is repeated for a three-channel encoder."""
        return cut_patches(self._of_channels(pixel_values), self.config.patch_size)

    def _of_channels(self, pixel_values: Tensor) -> Tensor:
        config = self.config
        if pixel_values.shape[1] == 1 and config.channels == 3:
            pixel_values = pixel_values.expand(-1, 3, -1, -1)
        channels, height, width = pixel_values.shape[1:]
        if channels != config.channels or height % config.patch_size or width % config.patch_size:
            raise ConfigError(
                f"pixel_values {tuple(pixel_values.shape)} do not fit channels={config.channels}, "
                f"patch_size={config.patch_size}"
            )
        return pixel_values

    def _shown(self, pixel_values: Tensor, keep: Tensor | None) -> Tensor:
        """What is projected: the kept patches' pixels, or the stem's map of them alone, `[V, M, ...]`."""
        side = self.config.patch_size
        values = self._of_channels(pixel_values)
        if self.stem is not None:
            shown = None
            if keep is not None:
                shown = patches_as_image(keep, values.shape[2] // side, values.shape[3] // side, side)
                values = values * shown
            values = self.stem(values.to(compute_dtype(self.patch.weight)), shown)
            side //= 2 ** len(self.config.stem)
        patches = cut_patches(values, side)
        return patches if keep is None else patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))

    def positions_for(self, height: int, width: int) -> Tensor:
        """Positions of the patches of an image of this size, `[N, D]`."""
        config = self.config
        grid = (height // config.patch_size, width // config.patch_size)
        if self.positions is None:
            base = config.grid
            table = sincos_positions(*grid, config.width, base_rows=base[0], base_columns=base[1])
            return table.to(self.patch.weight.device)
        return resize_positions(self.positions, config.grid, grid)

    def forward(self, pixel_values: Tensor, keep: Tensor | None = None) -> VisionOutput:
        """`pixel_values [V, C, H, W]`; `keep [V, M]` int64, indices of the patches to encode, else all N of them."""
        shown = self._shown(pixel_values, keep)
        positions = self.positions_for(*pixel_values.shape[2:])
        if keep is not None:
            positions = positions[keep]  # [V, M, D]
        dtype = compute_dtype(self.patch.weight)
        x = self.patch(shown.to(dtype)) + positions.to(dtype)  # [V, M, D]
        prefix = [token for token in (self.class_token, self.registers) if token is not None]
        if prefix:
            x = torch.cat([*(t.to(dtype).expand(x.shape[0], -1, -1) for t in prefix), x], dim=1)
        images, length, _ = x.shape
        x = self.input_norm(x).flatten(0, 1)  # [V * (1 + R + M), D]
        x = self.norm(self.transformer(x, DenseLayout(images, length))).view(images, length, -1)
        first_patch = sum(token.shape[0] for token in prefix)
        tokens = x[:, first_patch:]
        if self.config.pool == "class":
            pooled = x[:, 0]
        elif self.config.pool == "mean":
            pooled = tokens.float().mean(dim=1)
        else:
            pooled = tokens.float().amax(dim=1)
        return VisionOutput(tokens=tokens, prefix=x[:, :first_patch], pooled=pooled)


def vit_b16() -> VisionEncoder.Config:
    """ViT-B/16 at 224 px, one channel, class token."""
    return VisionEncoder.Config()


def vit_tiny() -> VisionEncoder.Config:
    """A few hundred thousand weights at 64 px: for tests and the demo's CPU."""
    return VisionEncoder.Config(image_size=64, patch_size=8, width=128, depth=4, heads=4, pool="mean")
