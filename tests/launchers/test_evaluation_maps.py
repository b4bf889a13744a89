"""Maps of studies and what a text query finds: measured, drawn, and written with keys only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import tiny
from core.evaluation.latent_map import LatentMap
from core.evaluation.text_query import TextQuery
from launchers import evaluate
from shards.dataset import DataSet
from shards.errors import ConfigError, DataError
from shards.ingest.phantom_bone import BonePhantom
from shards.writer import WriterConfig, write_shards
from tests.launchers.past_runs import make_run

CORPUS = ("Fracture du radius droit.", "Pas de fracture.", "Genou gauche, gonarthrose.", "Radiographie de la main.")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bones")
    source = BonePhantom(BonePhantom.Config(train=24, validation=12, test=30, size=32))
    write_shards(source, str(folder), WriterConfig(shard_samples=40, workers=1))
    config = replace(tiny.align(), recipe="tiny:align")
    return make_run(tmp_path_factory.mktemp("runs") / "a", folder / "manifest.json", config, CORPUS)


def test_a_map_and_a_query_are_drawn_and_written(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--run-dir", str(run_dir), "--device", "cpu"]
    assert evaluate.main([*options, "--protocol", "map", "--query", "fracture du radius", "main gauche"]) == 0
    assert "map: 30 studies" in capsys.readouterr().out
    written = {path.relative_to(run_dir / "eval").as_posix() for path in (run_dir / "eval").rglob("*.png")}
    assert {"map/body_part.png", "map/fracture.png", "map/kl_grade.png", "query/1.png", "query/2.png"} <= written
    found = json.loads((run_dir / "eval" / "query.json").read_text())
    config = json.loads((run_dir / "config.json").read_text())
    with_keys = set(DataSet(config["data"]["train"], "test").members(0).keys)
    hits = found["queries"]["1"]["found"]
    assert found["queries"]["1"]["query"] == "fracture du radius" and len(hits) == 12
    assert {hit["study"] for hit in hits} <= with_keys and len({hit["study"] for hit in hits}) == 12
    similarities = [hit["similarity"] for hit in hits]
    assert similarities == sorted(similarities, reverse=True)
    events = EventAccumulator(str(run_dir / "eval" / "tb"))
    events.Reload()
    tags = events.Tags()
    assert {"eval/map/body_part", "eval/query/1"} <= set(tags["images"])
    assert "eval/map/body part" in tags["scalars"]


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--protocol", "query"], "say what with --query"), (["--query", " "], "--query: says nothing")],
)
def test_bad_queries_are_one_line(
    change: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--run-dir", str(run_dir), "--device", "cpu", *change]) == 2
    assert message in capsys.readouterr().err


def test_like_neighbours_are_counted_among_other_patients() -> None:
    draws = np.random.default_rng(0)
    part = np.arange(60) % 2
    features = draws.normal(0, 0.1, (60, 5)) + np.stack([part, 1 - part, *np.zeros((3, 60))], axis=1)
    patients = np.arange(60) // 2  # each has one study of either part
    asked = LatentMap(LatentMap.Config(neighbours=5))
    words = tuple("hand" if one else "knee" for one in part)
    strange = tuple(str(one) for one in draws.integers(0, 2, 60))
    unknown = (None, *words[1:])
    attributes = {"part": words, "noise": strange, "alone": ("x",) * 60, "some": unknown}
    found = dict(asked.run(features, attributes, patients))
    assert found["part"] == found["some"] == 1.0 and 0.3 < found["noise"] < 0.7 and "alone" not in found
    assert asked.report()["by_chance"]["part"] == pytest.approx(0.5)
    assert set(asked.pictures()) == {"part", "noise", "some"}
    # A study's own patient is no neighbour: twins in all features say nothing.
    twins = np.repeat(draws.normal(size=(30, 5)), 2, axis=0)
    own = tuple(str(one) for one in patients)
    assert dict(asked.run(twins, {"patient": own}, patients))["patient"] == 0.0
    with pytest.raises(DataError, match="a map of 3 studies"):
        list(asked.run(features[:3], {}, patients[:3]))


def test_a_query_shows_each_study_once_by_its_nearest_view() -> None:
    index = torch.tensor([0, 0, 1, 2, 2])
    views = torch.nn.functional.normalize(torch.tensor([[0.0, 1], [1, 0.1], [1, 1], [1, 0], [-1, 0]]), dim=1)
    asked = TextQuery(["x"], TextQuery.Config(shown=2))
    best = dict(asked.run(torch.tensor([[1.0, 0.0]]), views, torch.rand(5, 1, 8, 8), index, ["a", "b", "c"]))
    assert [(hit["study"], hit["view"]) for hit in asked.report()["queries"]["1"]["found"]] == [("c", 0), ("a", 1)]
    assert best == {"1": 1.0} and asked.pictures()["1"].shape[0] == 3
    with pytest.raises(ConfigError, match="says nothing"):
        TextQuery([])
