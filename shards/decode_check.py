"""How far apart two decoders are on the same images: the GPU's and the CPU's before a run, two ways of one in tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from shards.decode import Decoder
from shards.transforms.augment import ViewParameters

LEVELS = 255
SIDES = (311, 262)  # rows and columns of the images in pixels, no multiple of a block of JPEG


def levels_apart(a: Decoder, b: Decoder) -> dict[str, float]:
    """Mean distance of their pixels in grey levels of 8 bits, by kind of image; infinite where one does not decode.

    Smooth random images as JPEG, 8 and 16 bit PNG, plain and cut, turned and exposed. Both decoders must have the same
    settings but for the device.
    """
    kinds = ("JPEG", "8 bit PNG", "16 bit PNG")
    changed = (False, True)
    encoded = [_encoded(seed, kind) for seed, kind in enumerate(kinds) for _ in changed]
    bits = np.array([16 if kind.startswith("16") else 8 for kind in kinds for _ in changed])
    window = np.stack([np.zeros(len(bits)), 2.0**bits - 1], axis=1)
    window[1::2, 1] *= 0.8
    turned = np.array([float(change) for _ in kinds for change in changed])
    parameters = ViewParameters(
        crop=np.array([[0.1, 0.05, 0.8, 0.85] if change else [0.0, 0.0, 1.0, 1.0] for change in turned]),
        angle_degrees=7.0 * turned,
        brightness=1 + 0.05 * turned,
        contrast=1 - 0.05 * turned,
        gamma=np.ones(len(turned)),
    )
    (first, ok_first), (second, ok_second) = (each.decode(encoded, parameters, window, bits) for each in (a, b))
    apart = (first.cpu() - second.cpu()).abs().flatten(1).mean(1).numpy() * a.config.std * LEVELS
    apart[~(ok_first & ok_second)] = np.inf
    names = [f"{kind}{', cut and turned' if change else ''}" for kind in kinds for change in changed]
    return dict(zip(names, apart.tolist(), strict=True))


def _encoded(seed: int, kind: str) -> bytes:
    """Waves of a random direction with some noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0 : SIDES[0], 0 : SIDES[1]] / max(SIDES)
    a, b = generator.uniform(4, 8, 2)
    value = 0.5 + 0.35 * np.sin(a * x + seed) * np.cos(b * y) + 0.01 * generator.standard_normal(x.shape)
    value = np.clip(value, 0, 1)
    stored = (value * 65535).astype(np.uint16) if kind.startswith("16") else (value * LEVELS).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(stored).save(file, *(("JPEG",) if kind == "JPEG" else ("PNG",)))
    return file.getvalue()
