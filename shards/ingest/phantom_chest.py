"""Frontal chest radiographs that never were: a scene graph drawn from a key, then rendered as an image with its truth.

The scene (phantom_chest_scene.py) holds the patient's anatomy and up to eight findings, each with side, zone, size and
a strength in (0, 1]. A finding's truth is a coin thrown with a probability that rises with its strength, so that faint
ones are ambiguous even to someone who knows the scene: `ceiling` says how far any reader can get. The image is drawn by
phantom_chest_draw.py. The report (phantom_chest_text.py) states the truth in words and hedges where the coin was
undecided. A share of the studies can be degraded (phantom_chest_degrade.py): their reports hedge more, their truth
stays.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from shards.batch import Box, EncodedImage, LabelValue, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded
from shards.ingest.phantom import Phantom, PhantomConfig, check_difficulty
from shards.ingest.phantom_chest_degrade import Degradation, degrade, draw_degradation
from shards.ingest.phantom_chest_draw import Array, Drawing, render
from shards.ingest.phantom_chest_scene import (
    DIFFICULTIES,
    FIELD_OF_VIEW_MM,
    MASKS,
    Difficulty,
    Scene,
    draw_scene,
)
from shards.ingest.phantom_chest_text import LABELS, Doubt, Report, structure, write_report
from shards.keyed import hash_u64, uniform
from shards.reports.extract import by_rules, record_members


class ChestPhantom(Phantom["ChestPhantom.Config"]):
    """Source of phantom studies."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PhantomConfig):
        """What is drawn, and how."""

        size: int = 128  # pixels a side
        bits: Literal[8, 16] = 8
        encoding: Literal["png", "jpeg"] = "png"
        masks: bool = True
        degraded: float = 0.0  # share of studies whose image is degraded and whose report is hedged for it
        structured: bool = False  # write the structured report, too
        entities: bool = False  # write distilled sentences and spans of the report's words, too

    def __init__(self, config: Config) -> None:
        check_difficulty(config.difficulty, DIFFICULTIES)
        if config.size < 16:
            raise ConfigError(f"size={config.size} is too small for a chest; use 16 pixels or more")
        if config.bits not in (8, 16) or config.encoding not in ("png", "jpeg"):
            raise ConfigError(f"bits={config.bits}, encoding={config.encoding!r}: use 8 or 16 and png or jpeg")
        if config.bits == 16 and config.encoding == "jpeg":
            raise ConfigError("bits=16 needs encoding=png: JPEG holds 8 bits")
        if not 0.0 <= config.degraded <= 1.0:
            raise ConfigError(f"degraded={config.degraded} is no share of studies; use 0 to 1")
        # The hash is made here, so that worker processes get it with the pickled source.
        super().__init__(config, f"chest/{config.difficulty}", generator_hash(degraded=config.degraded > 0))
        self.difficulty = DIFFICULTIES[config.difficulty]
        self.name = f"phantom chest {config.difficulty} {self.generator}"
        if config.degraded:
            self.name += f", {config.degraded:g} degraded"
        self.labels = LABELS
        self.masks = dict(MASKS) if config.masks else {}

    def split_seed(self, split: str) -> int:
        """Generator seed of a split."""
        return split_seed(self.config.seed, split)

    def load(self, item: Item) -> Loaded:
        config = self.config
        scene = draw_scene(self.split_seed(item.split or "train"), item.payload, self.difficulty)
        drawing = render(scene, self.difficulty, config.size)
        degradation = draw_degradation(scene.seed, scene.index, config.degraded) if config.degraded else None
        shown = degrade(drawing, scene, degradation) if degradation else drawing.pixels
        pixels = np.floor(shown * np.float32(2**config.bits - 1) + np.float32(0.5))
        image = encode_image(pixels.astype(np.uint8 if config.bits == 8 else np.uint16), config.encoding)
        boxes = [
            _box(name, region) for name, region in drawing.regions.items() if region.any() and _is_present(scene, name)
        ]
        spacing = FIELD_OF_VIEW_MM / config.size
        report = _report(scene, self.difficulty, degradation)
        context = _context(report) if config.entities else {}
        record = StudyRecord(
            study=item.key, patient=item.patient, report=report.sections, anatomy=report.anatomy,
            entities=[finding.entity() for finding in scene.findings],
            labels=_labels(scene),
            structured_report=_structured(item.key, report) if config.structured else None,
            boxes=boxes, sex=scene.sex, age_years=scene.age_years, deidentifier="synthetic: no patient exists",
            provenance={
                "generator": self.generator, "difficulty": config.difficulty, "seed": config.seed,
                "index": scene.index,
                **{f"strength of {finding.name}": round(finding.strength, 6) for finding in scene.findings},
                **(_provenance(degradation) if config.degraded else {}),
            },
            views=[ViewRecord(id="0", height=config.size, width=config.size, bits=config.bits, view="PA",
                              body_part="CHEST", spacing_mm=(spacing, spacing))],
            **context,
        )  # fmt: skip
        masks = {}
        if config.masks:
            for number, label_map in enumerate(_label_maps(drawing)):
                masks["0", number] = encode_image(label_map, "png")
        return Loaded(
            sample=Sample(key=item.key, record=record, images=(image,), masks=masks, split=item.split or "train")
        )


def split_seed(seed: int, split: str) -> int:
    """Seed of a split's generator: studies of two splits share nothing."""
    return int(hash_u64(seed, f"chest phantom: split {split}"))


def _structured(study: str, report: Report) -> dict[str, Any]:
    """Every disease has an item, so that none is named as unsaid."""
    members = asdict(structure(study, report))
    del members["unsaid"]
    return members


def _report(scene: Scene, difficulty: Difficulty, degradation: Degradation | None) -> Report:
    def draw(count: int, purpose: str = "chest phantom: words") -> Array:
        return uniform(scene.seed, purpose, scene.index, draws=count)

    doubt = None
    if degradation is not None:
        doubt = Doubt(degradation.grade, difficulty.bulk, draw(128, "chest phantom: doubt").tolist())
    return write_report(scene.findings, draw, doubt)


def _context(report: Report) -> dict[str, Any]:
    """Distilled sentences, boilerplate and descriptors as of any report that is prepared."""
    document = "\n".join(f"{name.upper()}: {text}" for name, text in sorted(report.sections.items()))
    members = record_members(by_rules(document, "en"), document)
    assert members["report"] == report.sections, "spans count in the sections"
    return {name: members[name] for name in ("distilled", "boilerplate", "descriptors")}


def _provenance(degradation: Degradation | None) -> dict[str, str | float]:
    kind, grade = (degradation.kind, degradation.grade) if degradation else ("none", 0.0)
    return {"degradation": kind, "degradation grade": round(grade, 6)}


def _labels(scene: Scene) -> dict[str, LabelValue]:
    labels: dict[str, LabelValue] = dict.fromkeys(LABELS, 0)
    for finding in scene.findings:
        labels[finding.name] = 1 if finding.present else 0
    return labels


def _is_present(scene: Scene, name: str) -> bool:
    return any(finding.name == name and finding.present for finding in scene.findings)


def encode_image(pixels: Array, encoding: str) -> EncodedImage:
    """Pixels [S, S] of 8 or 16 bit as `jpeg` or `png`."""
    buffer = io.BytesIO()
    if encoding == "jpeg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        return EncodedImage(data=buffer.getvalue(), extension="jpg")
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return EncodedImage(data=buffer.getvalue(), extension="png")


def _box(name: str, region: Array) -> Box:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return Box(
        view="0", label=name, left=float(columns[0]), top=float(rows[0]),
        width=float(columns[-1] - columns[0] + 1), height=float(rows[-1] - rows[0] + 1),
    )  # fmt: skip


def _label_maps(drawing: Drawing) -> Iterator[Array]:
    """Organs first, then the findings: each goes to the first map where it covers nothing."""
    maps = [drawing.organs]
    for name, region in drawing.regions.items():
        for label_map in maps[1:]:
            if not label_map[region].any():
                break
        else:
            label_map = np.zeros_like(drawing.organs)
            maps.append(label_map)
        label_map[region] = MASKS[name]
    return iter(maps)


@cache
def generator_hash(*, degraded: bool = False) -> str:
    """16 hex digits of what the generator gives: pixels, labels and words of 32 small studies of each difficulty.

    With `degraded`, of the same studies all degraded, too: the hash of sets that hold some.
    """
    digest = hashlib.sha256()
    for name, difficulty in DIFFICULTIES.items():
        for index in range(32):
            scene = draw_scene(split_seed(0, "train"), index, difficulty)
            drawing = render(scene, difficulty, 48)
            digest.update(_eight_bit(drawing.pixels).tobytes())
            report = _report(scene, difficulty, None)
            digest.update(repr((name, report.sections, [finding.entity() for finding in scene.findings])).encode())
            if degraded:
                degradation = draw_degradation(scene.seed, scene.index, 1.0)
                assert degradation is not None
                digest.update(_eight_bit(degrade(drawing, scene, degradation)).tobytes())
                digest.update(repr((degradation, _report(scene, difficulty, degradation).sections)).encode())
    return digest.hexdigest()[:16]


def _eight_bit(pixels: Array) -> Array:
    return np.floor(pixels * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)
