"""The CLIP experiment: how seeds become figures, and that the supervised twin trains on shards as they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ci.bench.clip import Scores, summary, supervised
from configs import tiny
from shards import writer
from shards.ingest.phantom_chest import ChestPhantom, generator_hash


def scores(zero_shot: float) -> Scores:
    return Scores(zero_shot=zero_shot, probe=zero_shot + 0.1, supervised=0.95, ceiling=0.99, train_s=1.0)


def test_easy_is_judged_by_its_lowest_seed_and_standard_by_the_mean() -> None:
    three = [scores(0.84), scores(0.79), scores(0.86)]
    easy = {one.id: one for one in summary("easy", (0, 1, 2), three, 10.0)}
    assert easy["clip.easy_zero_shot_auc"].value == 0.79
    assert easy["clip.easy_zero_shot_auc"].holds is False
    assert easy["clip.easy_probe_auc"].holds is True
    assert easy["clip.easy_ceiling_auc"].value == pytest.approx(0.99)
    standard = {one.id: one for one in summary("standard", (0, 1, 2), three, 10.0)}
    assert standard["clip.standard_zero_shot_auc"].value == pytest.approx(0.83)
    for one in (*easy.values(), *standard.values()):
        assert one.seeds == (0, 1, 2)
    for text in ("0.840, 0.790, 0.860", generator_hash()):
        assert text in standard["clip.standard_zero_shot_auc"].note


def test_supervised_twin_trains_on_shards(tmp_path: Path) -> None:
    source = ChestPhantom(ChestPhantom.Config(train=48, validation=0, test=48, size=32, masks=False))
    writer.write_shards(source, str(tmp_path), writer.WriterConfig(workers=1))
    config = tiny.clip()
    config = replace(
        config,
        data=replace(config.data, train=str(tmp_path / "manifest.json")),
        trainer=replace(config.trainer, steps=2),
    )
    value = supervised(config)
    assert math.isnan(value) or 0.0 <= value <= 1.0
