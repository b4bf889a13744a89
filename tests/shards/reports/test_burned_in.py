"""The 35-character rule, with an engine that returns what it is told."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from shards.errors import ConfigError
from shards.reports.identity.burned_in import easyocr_reader, has_burned_in_text, recognised_characters

IMAGE = np.zeros((8, 8), dtype=np.uint16)


@pytest.mark.parametrize(("count", "dropped"), [(34, False), (35, True)])
def test_thirty_five_characters_drop_an_image(count: int, dropped: bool) -> None:
    assert has_burned_in_text(IMAGE, lambda image: [("x" * (count - 1), 0.9), (" 7.", 0.9)]) is dropped


def test_doubtful_pieces_do_not_count_and_the_engine_sees_eight_bits() -> None:
    seen = []

    def reader(image: np.ndarray) -> list[tuple[str, float]]:
        seen.append(image)
        return [("ribs that look like letters, many of them", 0.1), ("L", 0.9)]

    image = np.arange(64, dtype=np.uint16).reshape(8, 8) * 900
    assert recognised_characters(image, reader) == 1
    assert seen[0].dtype == np.uint8
    assert (seen[0].min(), seen[0].max()) == (0, 255)


def test_colour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        recognised_characters(np.zeros((8, 8, 3), dtype=np.uint8), lambda image: [])


def test_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyocr", None)
    with pytest.raises(ConfigError, match="pip install easyocr"):
        easyocr_reader()
