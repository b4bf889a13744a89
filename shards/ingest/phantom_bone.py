"""Bone radiographs that never were, with French reports: hands and wrists that grow, knees that wear, bones that break.

The scene (phantom_bone_scene.py) holds a limb of one patient; each of its views is drawn by phantom_bone_draw.py, and
the report (phantom_bone_text.py) names what is there in French, Belgian or Swiss words. A fracture's truth is a coin
thrown with a probability that rises with its strength, and it may be hidden in all views but one. Grades, bone age and
angles are numbers of the record, `measurements`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from shards.batch import Box, EncodedImage, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded
from shards.ingest.phantom import Phantom, PhantomConfig, check_difficulty
from shards.ingest.phantom_bone_draw import Drawing, render
from shards.ingest.phantom_bone_scene import DIFFICULTIES, FIELD_OF_VIEW_MM, LABELS, Scene, draw_scene
from shards.ingest.phantom_bone_text import write_report
from shards.ingest.phantom_chest import encode_image
from shards.keyed import hash_u64

SIZE_MIN = 32  # pixels: below, a joint space is thinner than one


class BonePhantom(Phantom["BonePhantom.Config"]):
    """Source of phantom studies."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PhantomConfig):
        """What is drawn, and how."""

        size: int = 128  # pixels a side
        bits: Literal[8, 16] = 8

    def __init__(self, config: Config) -> None:
        check_difficulty(config.difficulty, DIFFICULTIES)
        if config.size < SIZE_MIN:
            raise ConfigError(f"size={config.size} is too small for a joint; use {SIZE_MIN} pixels or more")
        if config.bits not in (8, 16):
            raise ConfigError(f"bits={config.bits}: use 8 or 16")
        # The hash is made here, so that worker processes get it with the pickled source.
        super().__init__(config, f"bone/{config.difficulty}", generator_hash())
        self.difficulty = DIFFICULTIES[config.difficulty]
        self.name = f"phantom bone {config.difficulty} {self.generator}"
        self.labels = LABELS
        self.masks = {}

    def scene(self, split: str, index: int) -> Scene:
        """What study `index` of a split is made from."""
        return draw_scene(split_seed(self.config.seed, split), index, self.difficulty)

    def load(self, item: Item) -> Loaded:
        config, split = self.config, item.split or "train"
        scene = self.scene(split, item.payload)
        drawings = [render(scene, number, self.difficulty, config.size) for number in range(len(scene.views))]
        fracture = scene.fracture
        record = StudyRecord(
            study=item.key, patient=item.patient, language="fr", report=write_report(scene).sections,
            labels=dict(scene.labels), measurements=scene.measurements or None,
            boxes=_boxes(drawings) if fracture is not None and fracture.present else [],
            sex=scene.sex, age_years=scene.age_years, deidentifier="synthetic: no patient exists",
            provenance={
                "generator": self.generator, "difficulty": config.difficulty, "seed": config.seed,
                "index": scene.index, "country": scene.habit,
                "strength of fracture": round(fracture.strength, 6) if fracture else 0.0,
            },
            views=[_view_record(scene, number, config) for number in range(len(scene.views))],
        )  # fmt: skip
        images = tuple(_encode(drawing, config.bits) for drawing in drawings)
        return Loaded(sample=Sample(key=item.key, record=record, images=images, split=split))


def _view_record(scene: Scene, number: int, config: BonePhantom.Config) -> ViewRecord:
    height_mm, width_mm = FIELD_OF_VIEW_MM[scene.part]
    return ViewRecord(
        id=str(number), height=config.size, width=config.size, bits=config.bits, view=scene.views[number],
        laterality=scene.side, body_part=scene.part, spacing_mm=(height_mm / config.size, width_mm / config.size),
    )  # fmt: skip


def _encode(drawing: Drawing, bits: int) -> EncodedImage:
    pixels = np.floor(drawing.pixels * np.float32(2**bits - 1) + np.float32(0.5))
    return encode_image(pixels.astype(np.uint8 if bits == 8 else np.uint16), "png")


def _boxes(drawings: list[Drawing]) -> list[Box]:
    found = []
    for number, drawing in enumerate(drawings):
        if drawing.fracture is not None:
            left, top, width, height = drawing.fracture
            found.append(Box(view=str(number), label="fracture", left=left, top=top, width=width, height=height))
    return found


def split_seed(seed: int, split: str) -> int:
    """Seed of a split's generator: studies of two splits share nothing."""
    return int(hash_u64(seed, f"bone phantom: split {split}"))


@cache
def generator_hash() -> str:
    """16 hex digits of what the generator gives: views, truth and words of 32 small studies of each difficulty."""
    digest = hashlib.sha256()
    for name, difficulty in DIFFICULTIES.items():
        for index in range(32):
            scene = draw_scene(split_seed(0, "train"), index, difficulty)
            for number in range(len(scene.views)):
                drawing = render(scene, number, difficulty, 48)
                digest.update(_encode_eight_bit(drawing))
                digest.update(repr(drawing.fracture).encode())
            said = write_report(scene).sections
            digest.update(repr((name, said, scene.labels, scene.measurements, scene.views, scene.side)).encode())
    return digest.hexdigest()[:16]


def _encode_eight_bit(drawing: Drawing) -> bytes:
    return np.floor(drawing.pixels * np.float32(255.0) + np.float32(0.5)).astype(np.uint8).tobytes()
