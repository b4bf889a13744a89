import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.transforms import pixels


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_resize_is_within_a_level_of_pillow(data):
    """Any image, any part of it, any output: up, down, odd and narrow."""
    height, width = (data.draw(st.integers(1, 90)) for _ in range(2))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    out_height, out_width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    image = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (height, width), dtype=np.uint8)
    before = image.copy()
    ours = pixels.resize(image, (top, left, bottom, right), out_height, out_width)
    part = Image.fromarray(image[top:bottom, left:right])
    theirs = np.asarray(part.resize((out_width, out_height), Image.Resampling.BILINEAR))
    assert ours.shape == (out_height, out_width) and ours.dtype == np.uint8
    # Both round to levels between the two passes, which they make in different order.
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    assert np.array_equal(image, before)


def test_resize_of_the_same_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (24, 36), dtype=np.uint8)
    assert np.array_equal(pixels.resize(image, (0, 0, 24, 36), 24, 36), image)
    assert np.array_equal(pixels.resize(image, (3, 5, 20, 30), 17, 25), image[3:20, 5:30])


def test_tone_table():
    table = pixels.tone_table(2 / 255, -0.5, 1.0)
    assert table.dtype == np.float32 and table.shape == (256,)
    assert table[0] == 0 and table[255] == 1 and table[100] == pytest.approx(200 / 255 - 0.5)
    assert pixels.tone_table(1 / 255, 0.0, 2.0)[51] == pytest.approx(0.04)


def test_warp():
    image = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    shift = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])  # output (x, y) shows input (x + 2, y - 1)
    shifted = pixels.warp(image, shift)
    assert shifted[1:, :-2] == pytest.approx(image[:-1, 2:], abs=1e-5)
    assert shifted[0] == pytest.approx(0, abs=1e-5) and shifted[:, -2:] == pytest.approx(0, abs=1e-5)
    half = pixels.warp(image, np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    assert half[:, :-1] == pytest.approx((image[:, :-1] + image[:, 1:]) / 2, abs=1e-5)
