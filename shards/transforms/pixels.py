"""Pixels of one 8-bit grey image on the CPU: resize, tone, rotation. `shards.decode` uses it behind DALI's decoder.

DALI's own operators for one channel on the CPU are scalar: `python -m ci.bench loader` prints what that costs. Every
function looks at one image alone, so its pixels depend on nothing else, and runs in the thread that calls it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch.nn.functional import grid_sample, interpolate


def resize(image: np.ndarray, region: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """`region` (top, left, bottom, right) of a uint8 image [h, w] -> uint8 [height, width].

    Antialiased bilinear filter (a triangle as wide as the scale), within one level of Pillow's: integer arithmetic,
    rounded after each of the two passes.
    """
    top, left, bottom, right = region
    rows, columns = bottom - top, right - left
    # torch's vector code wants four channels, so a grey image is shown to it as four without moving a byte: for the
    # vertical pass as four neighbouring columns, for the horizontal one as four bands of rows. Views are NumPy's: every
    # call of torch gives the interpreter's lock away, and getting it back takes longer than the call.
    if columns == image.shape[1] and columns % 4 == 0 and image.flags.c_contiguous:
        part = image[top:bottom]
    else:
        part = np.empty((rows, -(-columns // 4) * 4), dtype=np.uint8)
        part[:, :columns] = image[top:bottom, left:right]
        part[:, columns:] = 0  # columns do not mix in the vertical pass
    wide = part.shape[1]
    # Channels last, the stride of the single image included: torch takes its fast way for nothing else.
    by_column = as_strided(part, (1, 4, rows, wide // 4), (part.size, 1, wide, 4))
    low = _interpolate(by_column, height, wide // 4)[0].transpose(1, 2, 0).reshape(height, wide)[:, :columns]
    bands = 1 if height % 4 else 4
    by_band = low.reshape(1, bands, height // bands, columns)
    return _interpolate(by_band, height // bands, width).reshape(height, width)


def _interpolate(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[1, C, h, w] -> [1, C, height, width]; a dimension that stays is not touched."""
    return interpolate(torch.from_numpy(image), size=(height, width), mode="bilinear", antialias=True).numpy()


def tone_table(gain: float, shift: float, gamma: float) -> np.ndarray:
    """[256] float32: clip(gain * level + shift, 0, 1) ** gamma of every level."""
    value = np.clip(gain * np.arange(256) + shift, 0.0, 1.0)
    return np.asarray(value if gamma == 1 else value**gamma, dtype=np.float32)


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """float32 [S, S] -> [S, S]: `matrix` [2, 3] takes output to input pixels (x, y); bilinear, 0 outside.

    Pixel centres lie at half numbers.
    """
    side = image.shape[0]
    # grid_sample counts from -1 to 1: x_in = 2 / S * (m00 * x + m01 * y + m02) - 1 with x = column + 0.5.
    centre = np.arange(side, dtype=np.float64) + 0.5
    scaled = np.asarray(matrix, dtype=np.float64) * (2 / side)
    grid = np.empty((side, side, 2), dtype=np.float32)
    for axis in (0, 1):
        along_x = (scaled[axis, 0] * centre + (scaled[axis, 2] - 1)).astype(np.float32)
        np.add.outer((scaled[axis, 1] * centre).astype(np.float32), along_x, out=grid[..., axis])
    warped = grid_sample(torch.from_numpy(image)[None, None], torch.from_numpy(grid)[None], align_corners=False)
    return np.asarray(warped[0, 0].numpy())
