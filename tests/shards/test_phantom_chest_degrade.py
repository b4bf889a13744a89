"""Degraded phantoms: clean studies keep every bit, grades destroy, reports hedge by grade and never name the cause."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from shards.batch import Sample
from shards.errors import ConfigError
from shards.ingest.phantom_chest import ChestPhantom, _report, generator_hash, split_seed
from shards.ingest.phantom_chest_degrade import KINDS, Degradation, Kind, degrade, draw_degradation
from shards.ingest.phantom_chest_draw import Drawing, render
from shards.ingest.phantom_chest_scene import STANDARD, Scene, draw_scene
from shards.ingest.phantom_chest_text import FINDINGS, Doubt, write_report
from shards.writer import sample_members

# As tests/shards/test_phantom_chest.py's: figures of different hashes must not be compared.
DEGRADED_HASH = "7d26d0a27ad32844"
# sha256 of all members of 32 studies as packed before this option existed, plus six empty members of newer records.
CLEAN_BITS = {"easy": "7234ec4bd77f33a0", "standard": "ee589e8884f32612"}


def load(difficulty: str = "standard", **options: float) -> list[Sample]:
    counts = {"size": 64, "train": 24, "validation": 4, "test": 4} | options
    source = ChestPhantom(ChestPhantom.Config(difficulty=difficulty, **counts))  # type: ignore[arg-type]
    loaded = [source.load(item).sample for item in source.plan().items]
    return [sample for sample in loaded if sample is not None]


@cache
def drawn(index: int) -> tuple[Scene, Drawing]:
    scene = draw_scene(3, index, STANDARD)
    return scene, render(scene, STANDARD, 64)


def with_grade(kind: Kind, grade: float) -> Degradation:
    return Degradation(kind=kind, grade=grade, places=(0.3, 0.5, 0.5, 0.5, 0.5))


@pytest.mark.parametrize("difficulty", list(CLEAN_BITS))
def test_without_degradation_all_bits_are_as_before(difficulty: str) -> None:
    digest = hashlib.sha256()
    for sample in load(difficulty):
        for name, data in sample_members(sample):
            digest.update(data if name == "json" else name.encode() + data)
    assert digest.hexdigest()[:16] == CLEAN_BITS[difficulty]


def test_generator_of_degraded_studies_is_the_fixed_one() -> None:
    assert generator_hash(degraded=True) == DEGRADED_HASH
    assert generator_hash() != DEGRADED_HASH
    assert DEGRADED_HASH in ChestPhantom(ChestPhantom.Config(degraded=0.2)).name


def test_only_image_words_and_provenance_of_the_degraded_change() -> None:
    clean, mixed = load(train=60), load(train=60, degraded=0.4)
    kinds = Counter[str]()
    for before, after in zip(clean, mixed, strict=True):
        kind, grade = after.record.provenance["degradation"], after.record.provenance["degradation grade"]
        kinds[str(kind)] += 1
        assert before.masks == after.masks
        truth = before.record.model_dump(exclude={"report", "anatomy", "provenance"})
        assert truth == after.record.model_dump(exclude={"report", "anatomy", "provenance"})
        if kind == "none":
            assert grade == 0.0
            assert before.images == after.images
            assert (before.record.report, before.record.anatomy) == (after.record.report, after.record.anatomy)
        else:
            assert isinstance(grade, float)
            assert 0.0 < grade <= 1.0
            assert before.images != after.images
        added = {"degradation", "degradation grade"}
        assert set(after.record.provenance) - set(before.record.provenance) == added
    assert kinds["none"] > sum(kinds.values()) / 2
    assert len(kinds) == 1 + len(KINDS)


def test_shares_kinds_and_grades_of_many_draws() -> None:
    draws = [draw_degradation(7, index, 0.2) for index in range(5000)]
    degraded = [one for one in draws if one is not None]
    assert abs(len(degraded) / 5000 - 0.2) < 0.02
    grades = np.array([one.grade for one in degraded])
    assert grades.min() > 0.0
    assert grades.max() <= 1.0
    assert np.abs(np.histogram(grades, 4, (0, 1))[0] / len(grades) - 0.25).max() < 0.05
    assert min(Counter(one.kind for one in degraded).values()) > 0.15 * len(degraded)
    larger = [draw_degradation(7, index, 0.5) for index in range(200)]
    assert all(few is None or few == many for few, many in zip(draws[:200], larger, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_worse_with_grade(kind: Kind) -> None:
    grades = (0.01, 0.3, 0.65, 1.0)
    changes = np.zeros(len(grades))
    for index in range(12):
        scene, drawing = drawn(index)
        before = drawing.pixels.copy()
        for position, grade in enumerate(grades):
            pixels = degrade(drawing, scene, with_grade(kind, grade))
            assert pixels.shape == (64, 64)
            assert 0.0 <= pixels.min() <= pixels.max() <= 1.0
            changes[position] += np.abs(pixels - drawing.pixels).mean()
        assert (drawing.pixels == before).all()
    assert (np.diff(changes) > 0).all(), changes


def test_the_strongest_grade_hides_small_findings() -> None:
    """What of a nodule's trace in the pixels is left in its place, beside what noise there is."""
    left: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in range(400):
        scene = draw_scene(3, index, STANDARD)
        if [finding.name for finding in scene.findings if finding.present] != ["nodule"] or len(scene.findings) > 1:
            continue
        healthy = Scene(**{**vars(scene), "findings": ()})
        drawings = render(scene, STANDARD, 64), render(healthy, STANDARD, 64)
        region = drawings[0].regions["nodule"]
        trace = np.abs(drawings[0].pixels - drawings[1].pixels)[region].mean()
        for kind in KINDS:
            # The healthy twin is degraded in the same place, so it needs the drawing's regions.
            twin = Drawing(drawings[1].pixels, drawings[0].organs, drawings[0].regions)
            pair = [degrade(one, scene, with_grade(kind, 1.0)) for one in (drawings[0], twin)]
            left[kind].append(np.abs(pair[0] - pair[1])[region].mean() / trace)
    assert len(left["blur"]) >= 4
    assert max(left["blur"]) < 0.35
    assert max(left["contrast"]) < 0.05
    assert max(left["occlusion"]) == 0.0
    assert min(left["crop"]) == 0.0  # a nodule outside of the field


def test_the_same_image_is_degraded_alike_at_any_size() -> None:
    """Strengths are fractions of the image: twice the pixels, averaged down, give nearly the same picture."""
    scene = draw_scene(3, 1, STANDARD)
    small, large = (
        degrade(render(scene, STANDARD, size), scene, with_grade("blur", 0.5)).astype(np.float64) for size in (48, 96)
    )
    assert np.abs(large.reshape(48, 2, 48, 2).mean(axis=(1, 3)) - small).mean() < 0.03


def hedged_share(grade: float) -> float:
    hedged = said = 0
    for index in range(150):
        scene = draw_scene(3, index, STANDARD)
        numbers = np.random.default_rng(index).random(256)
        doubt = Doubt(grade, 1.0, numbers[64:].tolist())
        certain = tuple(finding for finding in scene.findings if not finding.hedged)
        statements = write_report(certain, lambda count, given=numbers: given[:count], doubt).statements  # type: ignore[misc]
        hedged += sum(statement.exist == "unsure" for statement in statements)
        said += len(statements)
    return hedged / said


def test_statements_are_hedged_in_proportion_to_grade() -> None:
    assert hedged_share(0.0) == 0.0
    assert abs(hedged_share(0.5) - 0.5) < 0.07
    assert hedged_share(1.0) == 1.0


def sections(index: int, share: float) -> dict[str, str]:
    scene = draw_scene(split_seed(0, "train"), index, STANDARD)
    return _report(scene, STANDARD, draw_degradation(scene.seed, index, share)).sections


def shapes(report: dict[str, str]) -> set[str]:
    """A report's sentences without side, zone and size, which any report varies."""
    text = " ".join(report.values()).lower()
    words = {word for kind in FINDINGS.values() for word in (*kind.sides, *kind.zones, *kind.sizes) if word}
    text = re.sub(rf"\b({'|'.join(sorted(words))}|\d+ mm)\b", "_", text)
    return {sentence.strip() for sentence in text.split(".") if sentence.strip()}


def test_no_sentence_tells_a_degraded_image() -> None:
    """Every sentence of degraded reports is found in clean ones too: words tell doubt, not its cause."""
    clean = set().union(*(shapes(sections(index, 0.0)) for index in range(2500)))
    degraded = Counter[str]()
    for index in range(400):
        degraded.update(shapes(sections(index, 1.0)))
    total = sum(degraded.values())
    unknown = {sentence: count for sentence, count in degraded.items() if sentence not in clean}
    assert sum(unknown.values()) < 0.01 * total, unknown
    assert max(degraded.values()) < 0.12 * total


def test_reports_are_never_empty() -> None:
    for index in range(300):
        report = sections(index, 1.0)
        assert set(report) == {"findings", "impression"}
        assert all(any(c.isalpha() for c in text) for text in report.values())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_bad_share(share: float) -> None:
    with pytest.raises(ConfigError, match="degraded="):
        ChestPhantom(ChestPhantom.Config(degraded=share))
