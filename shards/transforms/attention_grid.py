"""Where a report's words look in an image: a grid over the whole fitted region, carried through the image's crop.

Stored as an 8-bit grey PNG of G x G pixels beside its view (`<key>.<view>.attention.png`). Read here, and cut and
turned by the very parameters that cut and turn the pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from shards.transforms.augment import ViewParameters

SIDE_MAX = 256
_POINTS = 4  # along each side of a cell, at which the grid is read


def encode(grid: np.ndarray) -> bytes:
    """[G, G] of values from 0, the largest of which becomes 255. Raises ValueError where a value is not from 0."""
    top = float(grid.max(initial=0.0))
    if not np.isfinite(grid).all() or float(grid.min(initial=0.0)) < 0:
        raise ValueError("an attention grid holds numbers from 0")
    levels = np.rint(grid * (255.0 / top if top else 0.0)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def decode(data: bytes | memoryview) -> np.ndarray:
    """[G, G] float32 of 0 to 1. Raises ValueError where the member is no such grid."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            size, mode = image.size, image.mode
            if mode != "L" or size[0] != size[1] or size[0] > SIDE_MAX:
                raise ValueError(f"attention grid: {size[0]} x {size[1]} {mode}, needs a square of 8-bit grey")
            return np.asarray(image, dtype=np.float32) / np.float32(255.0)
    except OSError as error:
        raise ValueError(f"attention grid: not a PNG ({type(error).__name__})") from None


def carry(grids: Sequence[np.ndarray | None], parameters: ViewParameters, side: int) -> np.ndarray:
    """[V, side * side] float32, mean 1 an image: what of each image's grid lies in each cell of its crop.

    Cells count in rows from top left. An image without a grid, or whose grid is 0 all over the crop, has 1 everywhere;
    outside of the fitted region there is 0. Each cell is the mean of bilinear readings at points spread evenly over it.
    """
    result = np.ones((len(grids), side * side), dtype=np.float32)
    points = (np.arange(side * _POINTS) + 0.5) / (side * _POINTS) - 0.5  # from the centre, as shares of the crop
    down, across = np.meshgrid(points, points, indexing="ij")
    for row, grid in enumerate(grids):
        if grid is None:
            continue
        left, top, width, height = parameters.crop[row]
        turn = np.deg2rad(parameters.angle_degrees[row])
        # The rotation is of the square output, before it is stretched back to the crop (shards.decode).
        x = left + width * (0.5 + np.cos(turn) * across - np.sin(turn) * down)
        y = top + height * (0.5 + np.sin(turn) * across + np.cos(turn) * down)
        inside = np.abs(across * np.cos(turn) - down * np.sin(turn)) <= 0.5
        inside &= np.abs(across * np.sin(turn) + down * np.cos(turn)) <= 0.5
        read = np.where(inside, _bilinear(grid, y, x), 0.0)
        cells = read.reshape(side, _POINTS, side, _POINTS).mean(axis=(1, 3))
        if cells.mean() > 0:
            result[row] = (cells / cells.mean()).ravel()
    return result


def _bilinear(grid: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Readings at shares (y, x) of the grid's height and width; cells hold their value at their centre."""
    rows, columns = grid.shape
    r = np.clip(y * rows - 0.5, 0.0, rows - 1.0)
    c = np.clip(x * columns - 0.5, 0.0, columns - 1.0)
    r0, c0 = np.floor(r).astype(np.int64), np.floor(c).astype(np.int64)
    r1, c1 = np.minimum(r0 + 1, rows - 1), np.minimum(c0 + 1, columns - 1)
    fr, fc = r - r0, c - c0
    upper = grid[r0, c0] * (1 - fc) + grid[r0, c1] * fc
    lower = grid[r1, c0] * (1 - fc) + grid[r1, c1] * fc
    return np.asarray(upper * (1 - fr) + lower * fr)
