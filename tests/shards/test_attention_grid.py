"""The grid that the pixels' own parameters carry is the grid of the pixels that the decoder shows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.batch import EncodedImage, Sample, StudyRecord, ViewRecord
from shards.decode import Decoder
from shards.ingest import Item, Loaded, Plan, hashed_key
from shards.loader import Loader
from shards.transforms.attention_grid import carry, decode, encode
from shards.transforms.augment import Config, ViewParameters, identity
from shards.transforms.masking import Config as Masking
from shards.writer import write_shards

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


@dataclass(frozen=True, kw_only=True)
class Spots:
    """Images of one bright spot with a grid of that very spot, but for every fourth study."""

    name: str = "spots"
    labels: tuple[str, ...] = ()
    masks: dict[str, int] = field(default_factory=dict)
    key_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        keys = [hashed_key(None, "study", str(i)) for i in range(12)]
        return Plan(items=[Item(key=key, patient=key, split="train", payload=i) for i, key in enumerate(keys)])

    def load(self, item: Item) -> Loaded:
        spot_y, spot_x = np.random.default_rng(item.payload).uniform(0.3, 0.7, 2)
        rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
        image = 0.1 + 0.9 * np.exp(-((columns - spot_x) ** 2 + (rows - spot_y) ** 2) / 0.04)
        buffer = io.BytesIO()
        Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(buffer, "PNG")
        record = StudyRecord(study=item.key, patient=item.key, views=[ViewRecord(id="0", height=SIDE, width=SIDE)])
        grids = {"0": encode(pooled(image, 14))} if item.payload % 4 else {}
        images = (EncodedImage(data=buffer.getvalue(), extension="png"),)
        return Loaded(sample=Sample(key=item.key, record=record, images=images, attention=grids))


def test_a_stored_grid_follows_its_image_through_the_loader(tmp_path: Path) -> None:
    manifest = write_shards(Spots(), str(tmp_path))
    assert manifest.fields["attention_grid"] == 9
    config = Loader.Config(
        train=str(tmp_path / "manifest.json"), lanes=6, buffer_bytes=1 << 26,
        decode=Decoder.Config(image_size=SIDE, mean=0.0, std=1.0), masking=Masking(patch_size=16),
        augment=Config(crop_area_fraction=(0.3, 0.6), brightness_fraction=0.0, contrast_fraction=0.0),
    )  # fmt: skip
    fields = ("pixel_values", "study_index", "valid", "attention_grid")
    with Loader(config, global_batch_size=6, seed=5, fields=fields).start(0) as run:
        batches = [next(run), next(run)]
    without = 0
    for batch in batches:
        assert batch["valid"].all()
        for pixels, found in zip(batch["pixel_values"].numpy(), batch["attention_grid"].numpy(), strict=True):
            if (found == 1).all():
                without += 1
                continue
            wanted = pooled(pixels[0], 14)
            scale = wanted.mean()
            np.testing.assert_allclose(found.reshape(14, 14), wanted / scale, atol=0.2 * wanted.max() / scale)
    assert without == 3, "1 where nobody stored a grid"
