"""Masks and boxes of an image, in the frame that the decoder gives its pixels: the same crop, padding and scale.

Nothing here is random: downstream tasks see images as evaluation does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.batch import Box
from shards.decode import Decoder
from shards.errors import BadSampleError


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The part of an image that is shown: rows from `top`, columns from `left`, of `height` and `width` pixels.

    It may reach beyond the image, where pixels are black. `size`: pixels a side of what is shown; `image_size`: height
    and width of the image itself.
    """

    top: float
    left: float
    height: float
    width: float
    size: int
    image_size: tuple[int, int]

    @classmethod
    def of(cls, height: int, width: int, config: Decoder.Config) -> Frame:
        """As `shards.decode` fits an image of this height and width."""
        side = min(height, width) if config.fit == "crop" else max(height, width)
        shown = (height, width) if config.fit == "stretch" else (side, side)
        return cls(
            top=(height - shown[0]) / 2, left=(width - shown[1]) / 2, height=shown[0], width=shown[1],
            size=config.image_size, image_size=(height, width),
        )  # fmt: skip

    def masks(self, label_maps: Sequence[bytes | memoryview], ids: Sequence[int]) -> np.ndarray:
        """[len(ids), size, size] bool: where a label map, an encoded image, holds each id; the nearest pixel counts.

        Raises BadSampleError without a place where one does not decode or has not the image's height and width.
        """
        found = np.zeros((len(ids), self.size, self.size), dtype=bool)
        centre = (np.arange(self.size) + 0.5) / self.size
        rows = np.floor(self.top + centre * self.height).astype(np.int64)
        columns = np.floor(self.left + centre * self.width).astype(np.int64)
        for encoded in label_maps:
            try:
                stored = np.asarray(Image.open(io.BytesIO(encoded)))
            except (OSError, ValueError) as error:
                raise BadSampleError("", "", f"label map: does not decode ({type(error).__name__})") from None
            if stored.shape != self.image_size:
                raise BadSampleError("", "", "label map: not of its image's size, or not of one channel")
            inside_rows = (rows >= 0) & (rows < stored.shape[0])
            inside_columns = (columns >= 0) & (columns < stored.shape[1])
            shown = stored[rows.clip(0, stored.shape[0] - 1)][:, columns.clip(0, stored.shape[1] - 1)]
            inside = inside_rows[:, None] & inside_columns[None, :]
            for place, number in enumerate(ids):
                found[place] |= (shown == number) & inside
        return found

    def box(self, box: Box) -> tuple[float, float, float, float] | str:
        """(left, top, right, bottom) in pixels of what is shown, or why there is no such box.

        A box must have an extent and lie in its image, or it is a mistake of the table; what
        the crop leaves of it must be a pixel wide and high.
        """
        if (fault := box.fault(*self.image_size)) is not None:
            return fault
        across, down = self.size / self.width, self.size / self.height
        left, right = ((x - self.left) * across for x in (box.left, box.left + box.width))
        top, bottom = ((y - self.top) * down for y in (box.top, box.top + box.height))
        left, right, top, bottom = (min(max(side, 0.0), float(self.size)) for side in (left, right, top, bottom))
        if right - left < 1 or bottom - top < 1:
            return "box: outside the crop"
        return left, top, right, bottom
