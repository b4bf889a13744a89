"""Batches made worse on purpose, by a known amount: what a measure of uncertainty should notice on any data set.

Every change is keyed by (seed, study), so that it does not depend on ranks, batches or order, and levels are nested:
the words that are masked at one share are among those masked at a higher one, the noise differs by its factor only.

V = images, B = studies, L = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards import keyed
from shards.batch import Batch

Kind = Literal["blur", "noise", "crop"]
KINDS: tuple[Kind, ...] = ("blur", "noise", "crop")

BLUR_OF_HEIGHT = 0.03  # standard deviation of the blur at level 1, in heights of the image: 6.7 px of 224
NOISE_OF_SPREAD = 1.0  # standard deviation of the noise at level 1, in those of the image
CROP_OF_SIDE = 0.5  # of either side that is cut away at level 1; the rest is stretched to the image's size


@dataclass(frozen=True, kw_only=True)
class Words:
    """What masking needs of a tokenizer. `mask_id`; `special_ids`: never masked, whole words are masked together.

    `continues [vocabulary]` bool: the token goes on with the word that the token before it is part of.
    """

    mask_id: int
    special_ids: frozenset[int]
    continues: Tensor


def corrupt_images(batch: Batch, *, kind: Kind, level: float, seed: int) -> Batch:
    """The batch with each of its images blurred, noisy or cropped; `level` in [0, 1], 0 changes nothing."""
    assert 0.0 <= level <= 1.0, level
    if level == 0.0:
        return batch
    images = batch["pixel_values"]
    study = batch["sample_id"][batch["study_index"].cpu()].cpu().numpy()  # [V]
    # Images of one study differ: the n-th image of a study has the number n.
    _, first, row = np.unique(batch["study_index"].cpu().numpy(), return_index=True, return_inverse=True)
    number = np.arange(len(study)) - first[row]
    if kind == "blur":
        changed = _blur(images, BLUR_OF_HEIGHT * level * images.shape[-2])
    elif kind == "noise":
        spread = images.flatten(1).std(dim=1, correction=0)[:, None, None, None]  # 0 in void slots: they stay empty
        height, width = images.shape[-2:]
        noise = keyed.normal(seed, "corruption: noise", study, number, draws=height * width)
        grey = torch.from_numpy(noise).to(images).view(-1, 1, height, width)  # alike in all channels
        changed = images + NOISE_OF_SPREAD * level * spread * grey
    else:
        place = keyed.uniform(seed, "corruption: crop", study, number, draws=2)  # [V, 2]
        changed = _crop(images, 1.0 - CROP_OF_SIDE * level, torch.from_numpy(place).to(images))
    return {**batch, "pixel_values": changed}


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, standard deviation in pixels; the border is repeated outwards."""
    reach = max(1, min(round(3 * sigma), min(images.shape[-2:]) - 1))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = taps / taps.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _crop(images: Tensor, side: float, place: Tensor) -> Tensor:
    """The share `side` of each side, at `place [V, 2]` (x, y) in [0, 1], stretched to the image's own size."""
    centre = (2 * place - 1) * (1 - side)
    turn = torch.diag_embed(torch.full_like(centre, side))  # [V, 2, 2]
    grid = F.affine_grid(torch.cat([turn, centre[:, :, None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mask_words(batch: Batch, *, share: float, words: Words, seed: int) -> Batch:
    """The batch with `share` of the words of each report masked, rounded to whole words."""
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu()
    special = torch.isin(ids, torch.tensor(sorted(words.special_ids))) | ~mask
    starts = ~special & ~(words.continues[ids] & ~torch.roll(special, 1, dims=1))
    starts[:, 0] = ~special[:, 0]
    word = torch.where(special, -1, starts.long().cumsum(dim=1) - 1)  # [B, L], number in its report
    count = max(1, int(word.max()) + 1)
    draws = keyed.uniform(seed, "corruption: words", batch["sample_id"].cpu().numpy(), draws=count)
    exists = np.arange(count) < (word.amax(dim=1).numpy()[:, None] + 1)  # [B, count]
    rank = np.argsort(np.argsort(np.where(exists, draws, 2.0), axis=1), axis=1)
    chosen = torch.from_numpy((rank < np.rint(share * exists.sum(axis=1, keepdims=True))) & exists)
    masked = chosen.gather(1, word.clamp(min=0)) & ~special
    return {**batch, "input_ids": ids.masked_fill(masked, words.mask_id)}
