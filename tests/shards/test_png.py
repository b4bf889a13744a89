"""PNG as we write it is what every reader takes for the same pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.ingest.image_file import strip_png
from shards.ingest.png import encode_grey


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([np.uint8, np.uint16]), st.integers(0, 2**32 - 1),
    st.booleans(),
)  # fmt: skip
def test_pixels_come_back(rows: int, columns: int, kind: type[np.unsignedinteger], seed: int, turned: bool) -> None:
    top = int(np.iinfo(kind).max)
    pixels = np.random.default_rng(seed).integers(0, top, (columns, rows) if turned else (rows, columns), kind, True)
    pixels = pixels.T if turned else pixels  # not contiguous
    data = encode_grey(pixels)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG" and image.mode == ("L" if kind is np.uint8 else "I;16")
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert strip_png(data) == data, "nothing but header, pixels and end"


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_what_repeats_takes_little(kind: type[np.unsignedinteger]) -> None:
    gradient = np.tile(np.arange(512, dtype=kind), (512, 1))
    assert len(encode_grey(gradient)) < gradient.nbytes / 50
