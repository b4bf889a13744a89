"""Random view parameters (crop, rotation, exposure) from a keyed generator on the host; `shards.decode` applies them.

Nothing here touches a pixel. There is no mirroring: the side of a finding is part of the report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from shards import keyed
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewParameters:
    """How each of V images is cut, turned and exposed. Pure numbers, so they are the same on every rank and machine.

    `crop` [V, 4] float64: left, top, width, height as fractions of the fitted region (the centre square for fit "crop",
    the padded square for "pad", the whole image for "stretch").
    `angle_degrees` [V] float64: counter-clockwise as displayed, about the centre; corners that open up are black.
    `brightness`, `contrast`, `gamma` [V] float64: of v = 0 at the window's black and 1 at its white, in this order:
    brightness * (0.5 + contrast * (v - 0.5)), the clip to [0, 1], then v ** gamma.
    """

    crop: np.ndarray
    angle_degrees: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    gamma: np.ndarray

    def __len__(self) -> int:
        return len(self.crop)

    def take(self, rows: np.ndarray) -> ViewParameters:
        """The parameters of some of the images."""
        return ViewParameters(**{name: column[rows] for name, column in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ranges of the uniform draws. The defaults change a radiograph no more than positioning and exposure do."""

    crop_area_fraction: tuple[float, float] = (0.6, 1.0)
    crop_aspect_ratio: float = 4 / 3  # width over height lies in [1 / this, this]
    rotation_degrees: float = 10.0  # angle in [-this, this]
    brightness_fraction: float = 0.1  # factor in [1 - this, 1 + this]
    contrast_fraction: float = 0.1  # factor in [1 - this, 1 + this]
    gamma_ratio: float = 1.0  # exponent in [1 / this, this]; 1 spares the power

    def __post_init__(self) -> None:
        smallest, largest = self.crop_area_fraction
        if not 0 < smallest <= largest <= 1:
            raise ConfigError(f"crop_area_fraction={self.crop_area_fraction}: give 0 < smallest <= largest <= 1")
        for name in ("crop_aspect_ratio", "gamma_ratio"):
            if not 1 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name}={getattr(self, name)} is outside [1, 10]; 1 switches it off")
        for name, limit in (("rotation_degrees", 180), ("brightness_fraction", 1), ("contrast_fraction", 1)):
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name}={getattr(self, name)} is outside [0, {limit}]; 0 switches it off")


def identity(views: int) -> ViewParameters:
    """Parameters of `views` images that change nothing: for evaluation."""
    one = np.ones(views)
    crop = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (views, 1))
    return ViewParameters(crop=crop, angle_degrees=np.zeros(views), brightness=one, contrast=one, gamma=one)


def _ratio(u: np.ndarray, largest: float) -> np.ndarray:
    """u in [0, 1) -> [1 / largest, largest), as likely above 1 as below.

    Nearly log-uniform, but made of exactly rounded operations only: exp and log differ between machines.
    """
    t = (2.0 * u - 1.0) * ((largest - 1.0) / (largest + 1.0))
    return (1.0 + t) / (1.0 - t)


def draw(config: Config, seed: int, epoch: ArrayLike, sample_id: ArrayLike, view: ArrayLike) -> ViewParameters:
    """Parameters [V] as a pure function of (seed, epoch, sample id, view); the three arrays are integers [V]."""
    ids = (np.asarray(epoch), np.asarray(sample_id), np.asarray(view))
    u = keyed.uniform(seed, "augment/crop", *ids, draws=4)  # [V, 4]
    smallest, largest = config.crop_area_fraction
    area = smallest + (largest - smallest) * u[:, 0]
    ratio = _ratio(u[:, 1], config.crop_aspect_ratio)
    width = np.minimum(np.sqrt(area * ratio), 1.0)
    height = np.minimum(np.sqrt(area / ratio), 1.0)
    crop = np.stack([u[:, 2] * (1.0 - width), u[:, 3] * (1.0 - height), width, height], axis=1)
    angle = keyed.uniform(seed, "augment/rotation", *ids)[:, 0]
    exposure = keyed.uniform(seed, "augment/exposure", *ids, draws=3)  # [V, 3]
    return ViewParameters(
        crop=crop,
        angle_degrees=(2.0 * angle - 1.0) * config.rotation_degrees,
        brightness=1.0 + (2.0 * exposure[:, 0] - 1.0) * config.brightness_fraction,
        contrast=1.0 + (2.0 * exposure[:, 1] - 1.0) * config.contrast_fraction,
        gamma=_ratio(exposure[:, 2], config.gamma_ratio),
    )
