"""Drawings as images for TensorBoard and files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches, 100 pixels each."""
    # Imported here, since it takes a second that runs without pictures need not wait.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def as_image(figure: Any) -> Tensor:
    """[3, H, W] float32 in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # [H, W, 3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def as_png(image: Tensor) -> bytes:
    """Of an image [3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
