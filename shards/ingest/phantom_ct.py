"""CT volumes of the trunk that never were: organs with diseases drawn from a key, their masks, and a report by organ.

The scene (phantom_ct_scene.py) holds one patient's organs and the diseases of some; the volume is drawn by
phantom_ct_draw.py, and the report (phantom_ct_text.py) names every disease and some of the normal organs. Each disease
shows in HU, size or texture, against patients who differ in all of them, contrast medium included: no mean HU of an
organ tells them all. Most organs are normal (`normal`), as in practice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from shards.batch import LabelValue, Sample, StudyRecord
from shards.errors import ConfigError
from shards.ingest import Item, Loaded
from shards.ingest.phantom import Phantom, PhantomConfig, check_difficulty
from shards.ingest.phantom_chest_scene import patient_of
from shards.ingest.phantom_ct_draw import render
from shards.ingest.phantom_ct_scene import DIFFICULTIES, FIELD_OF_VIEW_MM, MASKS, Scene, draw_scene
from shards.ingest.phantom_ct_text import LABELS, Report, write_report
from shards.ingest.volume import Volume, whole_hu
from shards.ingest.volume_members import volume_members
from shards.keyed import hash_u64, uniform

SIDE_MIN = 16  # voxels: a coarser grid has no room for a kidney


class CtPhantom(Phantom["CtPhantom.Config"]):
    """Source of phantom CT studies."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PhantomConfig):
        """What is drawn, and how."""

        difficulty: str = "standard"
        train: int = 1200
        validation: int = 120
        test: int = 400
        normal: float = 0.9  # share of organs without disease
        shape: tuple[int, int, int] = (48, 64, 64)  # z, y, x

    def __init__(self, config: Config) -> None:
        check_difficulty(config.difficulty, DIFFICULTIES)
        if len(config.shape) != 3 or min(config.shape) < SIDE_MIN:
            raise ConfigError(f"shape={config.shape} is too coarse for a trunk; use {SIDE_MIN} voxels or more an axis")
        if not 0.0 <= config.normal <= 1.0:
            raise ConfigError(f"normal={config.normal} is no share of organs; use 0 to 1")
        # The hash is made here, so that worker processes get it with the pickled source.
        super().__init__(config, f"ct/{config.difficulty}/{config.normal:g}", generator_hash())
        self.difficulty = DIFFICULTIES[config.difficulty]
        self.name = f"phantom ct {config.difficulty} {self.generator}, {config.normal:g} normal"
        self.labels = LABELS
        self.masks = dict(MASKS)

    def scene(self, split: str, index: int) -> Scene:
        """What study `index` of a split is made from."""
        seed = split_seed(self.config.seed, split)
        return draw_scene(seed, index, self.difficulty, self.config.normal, patient_of(index))

    def load(self, item: Item) -> Loaded:
        config, split = self.config, item.split or "train"
        scene = self.scene(split, item.payload)
        drawing = render(scene, self.difficulty, config.shape)
        z_mm, y_mm, x_mm = (field / size for field, size in zip(FIELD_OF_VIEW_MM, config.shape, strict=True))
        volume = Volume(hu=whole_hu(drawing.hu), label_maps=(drawing.organs,), spacing_mm=(z_mm, y_mm, x_mm))
        members = volume_members("0", volume, MASKS, body_part="CHEST ABDOMEN")
        report = _report(scene)
        record = StudyRecord(
            study=item.key, patient=item.patient, report=report.sections, anatomy=report.anatomy,
            anatomy_status={organ: "abnormal" if scene.of(organ) else "normal" for organ in report.findings},
            anatomy_findings=report.findings, anatomy_impression=report.impression,
            entities=[finding.entity() for finding in scene.findings],
            labels=_labels(scene), sex=scene.sex, age_years=scene.age_years,
            deidentifier="synthetic: no patient exists",
            provenance={
                "generator": self.generator, "difficulty": config.difficulty, "seed": config.seed,
                "normal": config.normal, "index": scene.index,
            },
            views=[members.view],
        )  # fmt: skip
        sample = Sample(key=item.key, record=record, images=(members.image,), masks=members.masks, split=split)
        return Loaded(sample=sample)


def split_seed(seed: int, split: str) -> int:
    """Seed of a split's generator: studies of two splits share nothing."""
    return int(hash_u64(seed, f"ct phantom: split {split}"))


def _report(scene: Scene) -> Report:
    return write_report(
        scene.findings, lambda count: uniform(scene.seed, "ct phantom: words", scene.index, draws=count)
    )


def _labels(scene: Scene) -> dict[str, LabelValue]:
    found = {finding.name for finding in scene.findings}
    return {name: 1 if name in found else 0 for name in LABELS}


@cache
def generator_hash() -> str:
    """16 hex digits of what the generator gives: 4 whole studies of each difficulty, words of 32 mostly normal ones."""
    digest = hashlib.sha256()
    for name, difficulty in DIFFICULTIES.items():
        for index in range(4):
            scene = draw_scene(split_seed(0, "train"), index, difficulty, 0.4, patient_of(index))
            drawing = render(scene, difficulty, (24, 32, 32))
            digest.update(whole_hu(drawing.hu).tobytes())
            digest.update(drawing.organs.tobytes())
            entities = [finding.entity() for finding in scene.findings]
            digest.update(repr((name, _report(scene).sections, entities)).encode())
        for index in range(32):
            scene = draw_scene(split_seed(0, "train"), index, difficulty, 0.95, patient_of(index))
            digest.update(repr(_report(scene).sections).encode())
    return digest.hexdigest()[:16]
