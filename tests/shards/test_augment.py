import dataclasses

import numpy as np
import pytest

from shards.errors import ConfigError
from shards.transforms import augment

CONFIG = augment.Config(gamma_ratio=1.25)
NAMES = [field.name for field in dataclasses.fields(augment.ViewParameters)]


def draw(sample_id, epoch=0, view=0, seed=1, config=CONFIG):
    sample_id = np.atleast_1d(sample_id)
    return augment.draw(config, seed, np.full_like(sample_id, epoch), sample_id, np.full_like(sample_id, view))


def test_draws_do_not_depend_on_the_batch():
    together = draw(np.arange(200))
    for i in (0, 1, 57, 199):
        alone = draw(i)
        for name in NAMES:
            assert (getattr(alone, name)[0] == getattr(together, name)[i]).all()


@pytest.mark.parametrize("change", [{"epoch": 1}, {"view": 1}, {"seed": 2}])
def test_each_part_of_the_key_counts(change):
    base, other = draw(np.arange(100)), draw(np.arange(100), **change)
    for name in NAMES:
        assert (getattr(base, name) != getattr(other, name)).mean() > 0.9


def test_ranges():
    drawn = draw(np.arange(20_000))
    left, top, width, height = drawn.crop.T
    assert left.min() >= 0 and top.min() >= 0 and (left + width).max() <= 1 and (top + height).max() <= 1
    # A side is cut at the whole image, so the area may fall below what was drawn, by the aspect ratio at most.
    assert (width * height).max() <= 1.0 and (width * height).min() > 0.6 * 0.75 - 1e-9
    ratio = width / height
    assert ratio.min() >= 0.75 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    assert abs((ratio > 1).mean() - 0.5) < 0.02
    assert np.abs(drawn.angle_degrees).max() <= 10 and abs(drawn.angle_degrees.mean()) < 0.2
    for values, spread in ((drawn.brightness, 0.1), (drawn.contrast, 0.1)):
        assert np.abs(values - 1).max() <= spread and abs(values.mean() - 1) < 0.01
    assert drawn.gamma.min() >= 0.8 and drawn.gamma.max() <= 1.25 and abs(np.log(drawn.gamma).mean()) < 0.01


def test_switched_off_is_the_identity():
    off = augment.Config(
        crop_area_fraction=(1, 1), crop_aspect_ratio=1, rotation_degrees=0, brightness_fraction=0, contrast_fraction=0
    )
    drawn, nothing = draw(np.arange(50), config=off), augment.identity(50)
    for name in NAMES:
        assert (getattr(drawn, name) == getattr(nothing, name)).all()
    assert len(nothing) == 50 and len(augment.identity(0)) == 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"crop_area_fraction": (0.9, 0.5)}, "crop_area_fraction"),
        ({"crop_aspect_ratio": 0.5}, "crop_aspect_ratio"),
        ({"gamma_ratio": 0.0}, "gamma_ratio"),
        ({"rotation_degrees": -1.0}, "rotation_degrees"),
        ({"brightness_fraction": 2.0}, "brightness_fraction"),
    ],
)
def test_bad_ranges_are_named(wrong, named):
    with pytest.raises(ConfigError, match=named):
        augment.Config(**wrong)
