"""Small changes of images in memory, as positioning and exposure make them: for encoders that are fine-tuned on few.

No mirroring and no turning over: the side of a finding stays where it is.

Letters: b = images, S = pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shards import keyed

SHIFT = 0.05  # of the side, at most
SCALE = 0.1  # larger or smaller by this share, at most
BRIGHTNESS = 0.1  # of the image's own standard deviation, at most
CONTRAST = 0.1  # factor on the distance from the image's own mean, at most this far from 1


def moved(pixel_values: Tensor, seed: int, step: int, ids: Sequence[int]) -> Tensor:
    """`[b, C, S, S]` shifted, scaled and exposed anew, as (seed, step, id) have it; edges go on outwards.

    Brightness and contrast are told in the image's own mean and deviation, so that it does not matter how an encoder
    has its pixels normalised.
    """
    draws = keyed.uniform(seed, "transfer: augmentation", step, list(ids), draws=5)  # [b, 5]
    x, y, scale, brightness, contrast = (
        torch.from_numpy(2 * draws - 1).to(pixel_values) * torch.tensor([SHIFT, SHIFT, SCALE, BRIGHTNESS, CONTRAST])
    ).T
    still = torch.zeros_like(x)
    # Places of the output, -1 to 1 from edge to edge, in places of the input: a shift by a side is 2.
    rows = [torch.stack([1 + scale, still, 2 * x], 1), torch.stack([still, 1 + scale, 2 * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixel_values.shape), align_corners=False)
    found = F.grid_sample(pixel_values, grid, padding_mode="border", align_corners=False)
    mean = found.mean(dim=(1, 2, 3), keepdim=True)
    deviation = found.std(dim=(1, 2, 3), keepdim=True)
    brightness, contrast = (one[:, None, None, None] for one in (brightness, contrast))
    return mean + (1 + contrast) * (found - mean) + brightness * deviation
