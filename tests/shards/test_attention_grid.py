"""The grid that the pixels' own parameters carry is the grid of the pixels that the decoder shows."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.decode import Decoder
from shards.transforms.attention_grid import carry, decode, encode
from shards.transforms.augment import ViewParameters, identity

SIDE = 224
DECODER = Decoder(Decoder.Config(image_size=SIDE, mean=0.0, std=1.0))


def shown(pixels: np.ndarray, parameters: ViewParameters) -> np.ndarray:
    """[SIDE, SIDE] as the decoder shows an image of 0 to 1."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).save(buffer, "PNG")
    decoded, ok = DECODER.decode([buffer.getvalue()], parameters, np.array([[0.0, 255.0]]), np.array([8]))
    assert ok.all()
    return decoded[0, 0].numpy()


def pooled(pixels: np.ndarray, cells: int) -> np.ndarray:
    side = len(pixels) // cells
    return pixels.reshape(cells, side, cells, side).mean(axis=(1, 3))


@settings(deadline=None, max_examples=12)
@given(
    st.floats(0.4, 1.0), st.floats(0.4, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(-20.0, 20.0),
    st.floats(0.2, 0.8), st.floats(0.2, 0.8),
)  # fmt: skip
def test_a_grid_goes_where_the_pixels_go(
    width: float, height: float, x: float, y: float, angle: float, spot_x: float, spot_y: float
) -> None:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    image = 0.1 + 0.9 * np.exp(-((columns - spot_x) ** 2 + (rows - spot_y) ** 2) / 0.04)
    one = np.ones(1)
    crop = np.array([[x * (1 - width), y * (1 - height), width, height]])
    parameters = ViewParameters(crop=crop, angle_degrees=angle * one, brightness=one, contrast=one, gamma=one)
    wanted = pooled(shown(image, parameters), 14)
    found = carry([pooled(image, 14).astype(np.float32)], parameters, 14).reshape(14, 14)
    np.testing.assert_allclose(found.mean(), 1.0, rtol=1e-5)
    # Cells that the turned border cuts are as dark as the share of them outside, read at 16 points.
    np.testing.assert_allclose(found, wanted / wanted.mean(), atol=0.2 * wanted.max() / wanted.mean())


def test_without_a_grid_every_cell_counts_alike() -> None:
    both = carry([None, np.zeros((14, 14), np.float32)], identity(2), 4)
    np.testing.assert_array_equal(both, np.ones((2, 16)))


def test_members_are_read_back_and_others_refused() -> None:
    grid = np.linspace(0, 3, 196, dtype=np.float32).reshape(14, 14)
    np.testing.assert_allclose(decode(encode(grid)), grid / 3, atol=0.002)
    with pytest.raises(ValueError, match="numbers from 0"):
        encode(grid - 1)
    with pytest.raises(ValueError, match="not a PNG"):
        decode(b"GIF89a")
    buffer = io.BytesIO()
    Image.new("RGB", (14, 14)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="needs a square of 8-bit grey"):
        decode(buffer.getvalue())
