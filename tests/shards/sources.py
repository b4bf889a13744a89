"""A source of tiny studies for tests; picklable, since worker processes load it."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from shards.batch import EncodedImage, Sample, StudyRecord, ViewRecord
from shards.ingest import Item, Loaded, Plan, Refusal, hashed_key
from shards.keyed import integers


def encoded(seed: int, height: int = 40, width: int = 36, extension: str = "jpg", bits: int = 8) -> bytes:
    """A grey image of noise."""
    pixels = integers(0, 2**bits, seed, "test image", draws=height * width).reshape(height, width)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16))
    picture.save(buffer, "JPEG" if extension == "jpg" else "PNG")
    return buffer.getvalue()


def make_sample(key: str, patient: str, number: int, views: int = 1, masks: int = 0) -> Sample:
    record = StudyRecord(
        study=key,
        patient=patient,
        report={"findings": f"Étude {number}."},
        labels={"nodule": 1 if number % 2 else 0},
        views=[ViewRecord(id=str(i), height=40, width=36, view="PA") for i in range(views)],
    )
    images = tuple(EncodedImage(data=encoded(1000 * i + number), extension="jpg") for i in range(views))
    label_maps = {("0", n): EncodedImage(data=encoded(n, extension="png"), extension="png") for n in range(masks)}
    return Sample(key=key, record=record, images=images, masks=label_maps)


@dataclass(frozen=True)
class TinySource:
    """`count` studies of two a patient; every `refuse_every`-th gives a refusal; study i has 1 + i % 3 views."""

    count: int = 40
    refuse_every: int = 0
    delay_s: float = 0.0
    name: str = "tiny"
    labels: tuple[str, ...] = ("nodule",)
    key_fingerprint: str | None = None

    @property
    def masks(self) -> dict[str, int]:
        return {"lung": 1}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"refuse_every": self.refuse_every}

    def plan(self) -> Plan:
        return Plan(
            items=[
                Item(key=hashed_key(None, "study", str(i)), patient=hashed_key(None, "patient", str(i // 2)), payload=i)
                for i in range(self.count)
            ]
        )

    def load(self, item: Item) -> Loaded:
        time.sleep(self.delay_s)
        number: int = item.payload
        if self.refuse_every and number % self.refuse_every == 0:
            return Loaded(sample=None, refusals=(Refusal(f"study {number}", "does not decode"),))
        return Loaded(sample=make_sample(item.key, item.patient, number, 1 + number % 3, number % 2))


@dataclass(frozen=True)
class DyingSource(TinySource):
    """Its seventh study ends the worker process."""

    def load(self, item: Item) -> Loaded:
        if item.payload == 7:
            import os

            os._exit(9)
        return super().load(item)
