"""Segmentation from a transferred encoder: a decoder on its patches, per-image Dice (ecamp.md, section 8).

Two decoders: `progressive`, which upsamples the last map only, and `unetr`, which joins maps of several depths
(after UNETR, arXiv 2103.10504). Masks of different structures may overlap: each is a channel of its own.

Letters: n = images, M = structures, S = pixels a side, D = width, h x w = patches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluation.embed import precision
from core.evaluation.fitting import FitConfig, drawn, fit
from core.evaluation.images import ImageSplit, patch_map, patch_maps
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

WIDEST = 512  # channels after the first stage; ecamp.md's decoder of a ViT-B


def stage_widths(width: int, patch_size: int) -> list[int]:
    """Channels after each doubling of the map, patch by patch to about pixels: 512, 256, 128, 64 for ViT-B/16."""
    first = min(WIDEST, 2 ** math.floor(math.log2(width)))
    return [max(8, first >> stage) for stage in range(max(1, round(math.log2(patch_size))))]


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class ProgressiveDecoder(nn.Module):
    """A linear layer on patches, then stages of convolution, norm, ReLU and a doubling: `[b, D, h, w]` -> logits."""

    def __init__(self, encoder: VisionEncoder.Config, structures: int) -> None:
        super().__init__()
        widths = stage_widths(encoder.width, encoder.patch_size)
        self.patch = nn.Conv2d(encoder.width, encoder.width, 1)
        self.stages = nn.ModuleList(map(_stage, [encoder.width, *widths], widths))
        self.out = nn.Conv2d(widths[-1], structures, 3, padding=1)

    def forward(self, maps: list[Tensor], pixel_values: Tensor) -> Tensor:
        """`maps`: the last is read. `[b, M, S, S]`."""
        x = self.patch(maps[-1].float())
        for stage in self.stages:
            x = _doubled(stage(x))
        return _to_pixels(self.out(x), pixel_values)


class UnetrDecoder(nn.Module):
    """The last map upsampled stage by stage, joined at each with an earlier one, and at the end with the pixels."""

    def __init__(self, encoder: VisionEncoder.Config, structures: int) -> None:
        super().__init__()
        widths = stage_widths(encoder.width, encoder.patch_size)
        self.patch = nn.Conv2d(encoder.width, encoder.width, 1)
        self.skips = nn.ModuleList(nn.Conv2d(encoder.width, width, 1) for width in widths)
        self.stages = nn.ModuleList(map(_stage, [encoder.width, *widths], widths))
        self.joins = nn.ModuleList(_stage(2 * width, width) for width in widths)
        self.pixels = _stage(1, widths[-1])
        self.out = nn.Conv2d(2 * widths[-1], structures, 3, padding=1)

    def forward(self, maps: list[Tensor], pixel_values: Tensor) -> Tensor:
        """`maps`: of depths from early to last; deep ones join first. `[b, M, S, S]`."""
        x = self.patch(maps[-1].float())
        earlier = maps[-2::-1] or maps
        for number, (stage, skip, join) in enumerate(zip(self.stages, self.skips, self.joins, strict=True)):
            x = _doubled(stage(x))
            other = skip(earlier[min(number, len(earlier) - 1)].float())
            x = join(torch.cat([x, F.interpolate(other, size=x.shape[2:], mode="bilinear", align_corners=False)], 1))
        return self.out(torch.cat([_to_pixels(x, pixel_values), self.pixels(pixel_values[:, :1].float())], 1))


def _to_pixels(x: Tensor, pixel_values: Tensor) -> Tensor:
    if x.shape[2:] == pixel_values.shape[2:]:
        return x
    return F.interpolate(x, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)


DECODERS: dict[str, type[ProgressiveDecoder] | type[UnetrDecoder]] = {
    "progressive": ProgressiveDecoder,
    "unetr": UnetrDecoder,
}


def depths_of(decoder: str, depth: int) -> list[int]:
    """Numbers of the blocks, from 1, whose maps a decoder reads: the last, or four spread over the encoder."""
    return [depth] if decoder == "progressive" else sorted({max(1, round(depth * part / 4)) for part in (1, 2, 3, 4)})


def maps_at(encoder: VisionEncoder, pixel_values: Tensor, depths: list[int]) -> list[Tensor]:
    """Maps `[b, D, h, w]` after these blocks; the last block's with the encoder's final norm."""
    found: dict[int, Tensor] = {}
    blocks = encoder.transformer.blocks
    prefix = sum(len(token) for token in (encoder.class_token, encoder.registers) if token is not None)

    def keep(number: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(block: nn.Module, inputs: object, stream: Tensor) -> None:
            found[number] = stream.view(len(pixel_values), -1, stream.shape[-1])[:, prefix:]

        return hook

    inner = [number for number in depths if number < len(blocks)]
    handles = [blocks[number - 1].register_forward_hook(keep(number)) for number in inner]
    try:
        found[len(blocks)] = encoder(pixel_values).tokens
    finally:
        for handle in handles:
            handle.remove()
    return [patch_map(encoder, found[number], pixel_values) for number in depths]


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """10 x focal loss (gamma 2) - log of the soft Dice over the flattened batch, smooth 1; both `[b, M, S, S]`."""
    truth = masks.to(logits.dtype)
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focal = ((1 - torch.exp(-cross)) ** 2 * cross).mean()
    chance = torch.sigmoid(logits)
    both, either = ((chance * truth).sum(dim=(0, 2, 3)), (chance + truth).sum(dim=(0, 2, 3)))
    dice = (2 * both + 1) / (either + 1)  # [M]
    return 10 * focal - dice.log().mean()


def dice_per_image(predicted: Tensor, truth: Tensor) -> Tensor:
    """`[n, M, S, S]` bool both -> `[n, M]`. An empty truth scores 1 for an empty prediction, 0 for any other."""
    both = (predicted & truth).sum(dim=(2, 3)).double()
    total = predicted.sum(dim=(2, 3)).double() + truth.sum(dim=(2, 3)).double()
    return torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0)


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """`fine_tune`: the encoder learns too, else it is frozen and run once over every image."""

    decoder: Literal["progressive", "unetr"] = "progressive"
    fine_tune: bool = False
    threshold: float = 0.5
    fit: FitConfig = field(default_factory=lambda: FitConfig(batch_size=16))

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder={self.decoder!r} is unknown; use {' or '.join(DECODERS)}")


def segment(
    encoder: VisionEncoder,
    train: ImageSplit,
    test: ImageSplit,
    config: SegmentationConfig,
    *,
    rows: Tensor | None = None,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Dice of each test image and structure `[n, M]` after a decoder was taught with `train`, or its `rows` only.

    `encoder` itself is never changed: what is fine-tuned is a copy. Raises ConfigError where a split has no masks.
    """
    masks, truth = train.need_masks(), test.need_masks()
    if rows is not None:
        train, masks = train.rows(rows), masks[rows]
    device = encoder.patch.weight.device
    depths = depths_of(config.decoder, encoder.config.depth)
    decoder = drawn(lambda: DECODERS[config.decoder](encoder.config, masks.shape[1]), config.fit.seed).to(device)
    learner = copy.deepcopy(encoder).requires_grad_(True) if config.fine_tune else None
    model = learner or encoder
    kept = None
    if learner is None and config.decoder == "progressive":  # several depths of all images would fill the memory
        kept = patch_maps(encoder, train, autocast=autocast)

    def logits_of(pixels: Tensor, at: Tensor | None = None) -> Tensor:
        if kept is not None and at is not None:
            maps = [kept[at].to(device)]
        else:
            with torch.set_grad_enabled(learner is not None and torch.is_grad_enabled()), precision(device, autocast):
                maps = maps_at(model, pixels, depths)
        found: Tensor = decoder(maps, pixels)
        return found

    def loss_of(at: Tensor) -> Tensor:
        return segmentation_loss(logits_of(train.pixel_values[at].to(device), at), masks[at].to(device))

    fit(decoder, learner, len(train), loss_of, config.fit, on_step)
    found = []
    with torch.no_grad():
        for pixels, shown in zip(test.pixel_values.split(32), truth.split(32), strict=True):
            chance = torch.sigmoid(logits_of(pixels.to(device))).cpu()
            found.append(dice_per_image(chance > config.threshold, shown))
    return torch.cat(found).numpy()
