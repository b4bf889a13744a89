"""Text burned into pixels: images with 35 or more recognised characters are dropped (bone_xray_french.md 6.1).

Dose reports and text pages saved as pictures are what this finds. Recognition needs an OCR engine, which is an optional
extra and off by default: nothing here is imported until `easyocr_reader` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from shards.errors import ConfigError

CHARACTERS_MAX = 34  # one more and the image is dropped
CONFIDENCE_MIN = 0.3  # below it an engine sees letters in ribs

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


def easyocr_reader(languages: tuple[str, ...] = ("fr", "en"), model_folder: str | None = None) -> Reader:
    """EasyOCR on the CPU; its models lie in `model_folder` and are never downloaded. Raises ConfigError without it."""
    try:
        import easyocr
    except ImportError:
        raise ConfigError(
            "burned-in text detection needs easyocr; pip install easyocr, or leave the check out"
        ) from None
    engine = easyocr.Reader(list(languages), gpu=False, model_storage_directory=model_folder, download_enabled=False)
    return lambda image: [(text, float(confidence)) for _, text, confidence in engine.readtext(image)]
