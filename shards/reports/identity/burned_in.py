"""Text burned into pixels: images with 35 or more recognised characters are dropped (bone_xray_french.md 6.1).

Dose reports and text pages saved as pictures are what this finds. Recognition needs an OCR engine, which is an optional
extra and off by default: nothing is imported until `rapidocr_reader` is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from shards.errors import ConfigError

CHARACTERS_MAX = 34  # one more and the image is dropped
CONFIDENCE_MIN = 0.3  # below it an engine sees letters in ribs
REASON = f"text in the pixels: more than {CHARACTERS_MAX} characters read"
PACKAGE = "rapidocr-onnxruntime"

# image [rows, columns] uint8 -> (text, confidence in 0..1) of every piece found
Reader = Callable[[np.ndarray], Iterable[tuple[str, float]]]


def recognised_characters(image: np.ndarray, reader: Reader) -> int:
    """Letters and digits that the engine is sure enough of. `image` is [rows, columns], 8 or 16 bit."""
    if image.ndim != 2:
        raise ValueError(f"image has shape {image.shape}, wanted [rows, columns]")
    return sum(
        sum(character.isalnum() for character in text)
        for text, confidence in reader(_eight_bit(image))
        if confidence >= CONFIDENCE_MIN
    )


def has_burned_in_text(image: np.ndarray, reader: Reader) -> bool:
    """Whether the image must be dropped."""
    return recognised_characters(image, reader) > CHARACTERS_MAX


def _eight_bit(image: np.ndarray) -> np.ndarray:
    """Grey levels spread over 0..255, since engines read 8-bit pictures."""
    if image.dtype == np.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return np.zeros(image.shape, dtype=np.uint8)
    return ((image.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)


def rapidocr_reader() -> Reader:
    """RapidOCR on one core; its models come with the package. Raises ConfigError without it."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise ConfigError(
            f"--refuse-burned-in-text: needs {PACKAGE}; pip install {PACKAGE}, or leave the option out"
        ) from None
    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL + 1)  # it tells of every image without text
    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def read(image: np.ndarray) -> list[tuple[str, float]]:
        found, _ = engine(image)
        return [(text, float(confidence)) for _, text, confidence in found or ()]

    return read


@dataclass(frozen=True)
class BurnedInText:
    """The check as a source holds it; goes to worker processes, where the engine is built once."""

    make_reader: Callable[[], Reader] = rapidocr_reader

    def __post_init__(self) -> None:
        _ = self._reader  # raises ConfigError before any image is read

    @cached_property
    def _reader(self) -> Reader:
        return self.make_reader()

    def __reduce__(self) -> tuple[Any, ...]:  # the engine stays behind
        return BurnedInText, (self.make_reader,)

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes which images are refused."""
        engine = version(PACKAGE) if self.make_reader is rapidocr_reader else self.make_reader.__name__
        return {"engine": engine, "characters_max": CHARACTERS_MAX, "confidence_min": CONFIDENCE_MIN}

    def refusal(self, image: np.ndarray) -> str | None:
        """Why an image [rows, columns] may not pass; None if it may."""
        return REASON if has_burned_in_text(image, self._reader) else None
