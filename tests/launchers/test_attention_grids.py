"""A set written anew with attention grids: what a run sees, nothing else changed, and training reads it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import tiny
from configs.schema import TrainConfig, apply_overrides
from core import collectives
from launchers import attention_grids, pack
from launchers.past_run import open_run
from shards.batch import Sample
from shards.dataset import open_manifest
from shards.errors import BadSampleError
from shards.ingest import Item, Loaded
from shards.ingest.phantom_chest import ChestPhantom
from shards.loader import Loader
from shards.manifest import Manifest
from shards.reader import read_samples
from shards.transforms import attention_grid
from shards.writer import WriterConfig, sample_members, write_shards
from tests.launchers.past_runs import make_run

SIDE = 4  # of the grid of tiny:ecamp


class TwoViews(ChestPhantom):
    """Phantoms of which every third has a second view, and every fifth an image that does not decode."""

    def load(self, item: Item) -> Loaded:
        sample = super().load(item).sample
        assert sample is not None
        record, images = sample.record, sample.images
        if item.payload % 5 == 4:
            images = (replace(images[0], data=images[0].data[:60]),)
        elif item.payload % 3 == 0:
            other = record.views[0].model_copy(update={"id": "1"})
            record, images = record.model_copy(update={"views": [*record.views, other]}), (images[0], images[0])
        return Loaded(sample=replace(sample, record=record, images=images, masks={}))


def config() -> TrainConfig:
    return replace(tiny.ecamp(), recipe="tiny:ecamp")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = TwoViews(ChestPhantom.Config(train=30, validation=4, test=4, size=40, masks=False, entities=True))
    folder = tmp_path_factory.mktemp("set")
    write_shards(source, str(folder), WriterConfig(shard_samples=8, chunk_bytes=6000))
    return folder


@pytest.fixture(scope="module")
def run_dir(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [text for sample in samples(plain) for text in sample.record.report.values()]
    return make_run(tmp_path_factory.mktemp("runs") / "a", plain / "manifest.json", config(), corpus)


@pytest.fixture(scope="module")
def with_grids(plain: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grids")
    assert main(plain, run_dir, folder) == 0
    return folder


def main(plain: Path, run_dir: Path, output: Path, *more: object) -> int:
    arguments = ["--source", "grids", "--input", plain, "--run-dir", run_dir, "--output", output, "--shard-samples", 8]
    return pack.main([str(one) for one in (*arguments, *more)])


def samples(folder: Path) -> Iterator[Sample]:
    store, manifest = open_manifest(str(folder))
    for shard in manifest.shards:
        for sample in read_samples(store, manifest, shard):
            assert not isinstance(sample, BadSampleError)
            yield sample


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_nothing_but_grids_is_added(plain: Path, with_grids: Path) -> None:
    before, after = list(samples(plain)), list(samples(with_grids))
    assert [(one.key, one.split) for one in after] == [(one.key, one.split) for one in before]
    undecodable = 0
    for old, new in zip(before, after, strict=True):
        assert sample_members(replace(new, attention={})) == sample_members(old)
        if new.attention:
            assert list(new.attention) == [view.id for view in new.record.views], "a grid for every view"
        undecodable += len(old.images[0].data) == 60
    one, other = (Manifest.from_bytes((folder / "manifest.json").read_bytes()) for folder in (plain, with_grids))
    assert (other.patients, other.labels, other.sections) == (one.patients, one.labels, one.sections)
    counted = other.fields.pop("attention_grid")
    assert other.fields == one.fields and counted == sum(bool(sample.attention) for sample in after) > 20
    assert other.source.startswith(f"{one.source}, attention grids of tiny:ecamp step 4, weights ")
    without = {reason: count for reason, count in other.noted.items() if reason.startswith("no attention grid")}
    assert sum(without.values()) == len(after) - counted, "each study without one is counted with the reason"
    assert undecodable and sum(count for reason, count in without.items() if "image" in reason) == undecodable
    assert pack.main(["--verify", str(with_grids)]) == 0


def test_grids_are_what_the_run_sees(run_dir: Path, with_grids: Path) -> None:
    of_words = [sample for sample in samples(with_grids) if sample.attention][:6]
    with open_run(str(run_dir), device=torch.device("cpu")) as run:
        source = attention_grids.AttentionGrids(run, str(with_grids))
        for sample in of_words:
            marked = [attention_grids.mark_report(sample.record, run.config.data.sections)]
            ids, seen, chosen = source._tokens(marked)
            assert 0 < chosen.sum() < seen.sum(), "entities alone, not all words"
            pixels, _ = source._pixels([(sample.record.views[0], sample.images[0])])
            batch = {
                "pixel_values": pixels, "study_index": torch.arange(1), "valid": torch.ones(1, dtype=torch.bool),
                "input_ids": ids, "attention_mask": seen,
            }  # fmt: skip
            wanted = run.task.attention_maps(batch, chosen).view(SIDE, SIDE)
            stored = attention_grid.decode(sample.attention["0"])
            np.testing.assert_allclose(stored, (wanted / wanted.max()).numpy(), atol=1.01 / 255)
    stored = [attention_grid.decode(sample.attention["0"]) for sample in of_words]
    assert any(not np.array_equal(stored[0], other) for other in stored[1:])


def test_the_same_bytes_after_an_interruption(
    plain: Path, run_dir: Path, with_grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, written = pack.writer._put_shard, []

    def stop_after_two(*arguments: object) -> object:
        if len(written) == 2:
            raise OSError(28, "No space left on device", "disk")
        written.append(arguments[1])
        return put(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(pack.writer, "_put_shard", stop_after_two)
        with pytest.raises(OSError, match="No space"):
            main(plain, run_dir, tmp_path)
    assert len(written) == 2 and not (tmp_path / "manifest.json").exists()
    assert main(plain, run_dir, tmp_path) == 0
    assert files(tmp_path) == files(with_grids)


def test_grids_are_replaced_and_forgotten_studies_left_out(run_dir: Path, with_grids: Path, tmp_path: Path) -> None:
    shutil.copytree(with_grids, tmp_path / "old")
    manifest = Manifest.from_bytes((tmp_path / "old" / "manifest.json").read_bytes())
    shards = tuple(replace(one, void=(1,) if one.name == "test-000000" else ()) for one in manifest.shards)
    (tmp_path / "old" / "manifest.json").write_bytes(replace(manifest, shards=shards).to_bytes())
    assert main(tmp_path / "old", run_dir, tmp_path / "new") == 0
    expected = list(samples(with_grids))
    gone = [one for one in expected if one.split == "test"][1]
    again = list(samples(tmp_path / "new"))
    assert [sample_members(one) for one in again] == [sample_members(one) for one in expected if one is not gone]
    assert Manifest.from_bytes((tmp_path / "new" / "manifest.json").read_bytes()).refused == {"forgotten": 1}


def test_refusals_name_what_is_in_the_way(
    plain: Path, run_dir: Path, with_grids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: object) -> str:
        assert main(*arguments) == 2  # type: ignore[arg-type]
        return capsys.readouterr().err

    corpus = ["The lungs are clear."]
    clip = make_run(tmp_path / "clip", plain / "manifest.json")
    assert "task CLIP has no attention maps" in refusal(plain, clip, tmp_path / "out")
    for change, message in (("task.fusion=coarse", "looks at no patch"), ("task.weights.mlm=0", "reads no report")):
        changed = apply_overrides(config(), [change])
        other = make_run(tmp_path / change, plain / "manifest.json", changed, corpus)
        assert message in refusal(plain, other, tmp_path / "out")
    assert "holds the set that is read" in refusal(plain, run_dir, plain, "--overwrite")
    assert (plain / "manifest.json").exists()
    bare = ChestPhantom(ChestPhantom.Config(train=6, validation=0, test=0, size=32, masks=False))
    write_shards(bare, str(tmp_path / "bare"))
    assert "no study has an entity" in refusal(tmp_path / "bare", run_dir, tmp_path / "out")
    assert pack.main(["--source", "grids", "--input", str(plain), "--output", str(tmp_path / "out")]) == 2
    assert "--run-dir is missing" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_step_is_trained_on_grids_carried_through_crops(run_dir: Path, with_grids: Path) -> None:
    with open_run(str(run_dir), device=torch.device("cpu")) as run:
        task, data, tokenizer = run.task, run.config.data, run.tokenizer
    manifest = str(with_grids / "manifest.json")
    data = replace(data, train=manifest, lanes=6)
    loader = Loader(data, global_batch_size=6, seed=5, fields=task.fields, tokenizer=tokenizer)
    with loader.start(0) as started:
        batches = [next(started) for _ in range(2)]
    for batch in batches:
        grid, images = batch["attention_grid"], batch["valid"][batch["study_index"]]
        np.testing.assert_allclose(grid[images].mean(dim=1).numpy(), 1.0, rtol=1e-5)
        assert grid[images].std(dim=1).gt(1e-3).any(), "words look at some places more than at others"
    valid = batches[0]["valid"]
    assert valid.any()
    task.train().requires_grad_(True)

    def loss_on(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        encoded = task.encode(batch)
        return task.objective(collectives.gather(encoded.gather), encoded.local).loss

    even = {**batches[0], "attention_grid": torch.ones_like(batches[0]["attention_grid"])}
    before = loss_on(batches[0])
    assert abs(float(before.detach() - loss_on(even).detach())) > 1e-6, "the grid changes what is learned"
    before.backward()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter -= 0.01 * parameter.grad
        assert float(loss_on(batches[0])) < float(before)
