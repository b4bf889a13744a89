"""The loader's promises on a real small set: a batch is a pure function, voids stay in place, nothing is read twice."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from awscrt.checksums import crc32c as crc32c_of
from PIL import Image

from ci.bench.fault_proxy import FaultProxy, Plan
from shards import ingest, keyed
from shards.batch import NOT_ANNOTATED, Batch, EncodedImage, Sample, StudyRecord, ViewRecord
from shards.decode import Decoder, PendingBatch
from shards.errors import ConfigError, DataError, StoreUnreachableError
from shards.ingest import Item, Loaded, hashed_key
from shards.loader import Loader, LoaderRun, MixtureSet, Row, evaluation_batches
from shards.manifest import Manifest
from shards.reader import read_members
from shards.store import Store, open_store
from shards.tokenizer import train_wordpiece
from shards.writer import WriterConfig, write_shards

STUDIES, BATCH, LANES = 150, 24, 12
WORDS = ("lungs", "clear", "effusion", "left", "right", "small", "large", "no", "opacity", "heart", "normal")


@dataclass(frozen=True, kw_only=True)
class Studies:
    """150 training studies of one to three views with noise images, and a few for validation."""

    name: str = "test"
    labels: tuple[str, ...] = ("effusion", "opacity")
    masks: Mapping[str, int] = field(default_factory=dict)
    key_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def plan(self) -> ingest.Plan:
        return ingest.Plan(
            items=[
                Item(
                    key=hashed_key(None, "study", f"{self.seed}-{i}"),
                    patient=hashed_key(None, "patient", f"{self.seed}-{i // 2}"),
                    split="train" if i < STUDIES else "validation",
                    payload=i,
                )
                for i in range(STUDIES + 20)
            ]
        )

    def load(self, item: Item) -> Loaded:
        i = item.payload
        views, images = [], []
        for view in range(1 + i % 3):
            noise = keyed.integers(0, 256, self.seed, "pixels", i, view, draws=40 * 30).reshape(40, 30)
            deep = i % 5 == 0
            pixels = noise.astype(np.uint16) * 257 if deep else noise.astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append(EncodedImage(data=buffer.getvalue(), extension="png"))
            views.append(ViewRecord(id=str(view), height=40, width=30, bits=16 if deep else 8))
        words = [WORDS[j] for j in keyed.integers(0, len(WORDS), self.seed, "words", i, draws=3 + i % 9)]
        record = StudyRecord(
            study=item.key,
            patient=item.patient,
            report={"findings": " ".join(words)},
            labels={"effusion": i % 2} | ({"opacity": -1} if i % 7 == 0 else {}),
            views=views,
        )
        return Loaded(sample=Sample(key=item.key, record=record, images=tuple(images), split=item.split or "train"))


def pack(folder: Path, **source: Any) -> Path:
    write_shards(Studies(**source), str(folder), WriterConfig(shard_samples=16, chunk_bytes=6000))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece([" ".join(WORDS)] * 3, 90, folder)
    return str(folder)


@pytest.fixture
def config(manifest: Path, vocabulary: str) -> Loader.Config:
    return Loader.Config(
        train=str(manifest),
        lanes=LANES,
        window_chunks=3,
        tokenizer=vocabulary,
        text_length=16,
        sections=("findings",),
        decode=Decoder.Config(image_size=32),
        buffer_bytes=1 << 30,
    )


def batches(
    config: Loader.Config, first: int, count: int, rank: int = 0, world_size: int = 1, **more: Any
) -> list[Batch]:
    loader = Loader(config, global_batch_size=BATCH, seed=5, rank=rank, world_size=world_size, **more)
    with loader.start(first) as run:
        return [next(run) for _ in range(count)]


def joined(parts: list[Batch]) -> Batch:
    """The global batch from the ranks' parts; token columns cut or filled to one length."""
    length = max(part["input_ids"].shape[1] for part in parts)
    whole: Batch = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if name in ("input_ids", "attention_mask"):
            columns = [torch.nn.functional.pad(column, (0, length - column.shape[1])) for column in columns]
        if name == "study_index":
            rows = itertools.accumulate([0] + [len(part["valid"]) for part in parts])
            columns = [column + row for column, row in zip(columns, rows, strict=False)]
        whole[name] = torch.cat(columns)
    return whole


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("sampling", ["one_view", "all_views", "every_image"])
def test_a_batch_is_a_pure_function_of_its_step(config: Loader.Config, sampling: Any):
    config = replace(config, sampling=sampling)
    walked = batches(config, 0, 9)
    for start in (1, 5, 8):
        for step, batch in enumerate(batches(config, start, 9 - start), start):
            assert_equal(batch, walked[step])
    assert all(batch["valid"].all() for batch in walked)
    if sampling == "one_view":
        assert all(len(batch["pixel_values"]) == BATCH for batch in walked)
    if sampling == "all_views":
        assert len({len(batch["pixel_values"]) for batch in walked}) > 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_parts_of_the_same_batch(config: Loader.Config, world_size: int):
    whole = batches(config, 3, 3)
    parts = [batches(config, 3, 3, rank, world_size) for rank in range(world_size)]
    for step in range(3):
        assert_equal(joined([part[step] for part in parts]), whole[step])


def test_batches_hold_what_was_packed(config: Loader.Config, manifest: Path):
    source = Studies()
    plan = {item.patient: item for item in source.plan().items}
    patients = {keyed.text_key(patient): patient for patient in plan}
    loader = Loader(config, global_batch_size=BATCH, seed=5)
    seen: Counter[tuple[int, int]] = Counter()
    with loader.start(0) as run:
        for _ in range(2 * STUDIES // BATCH + 1):
            batch = next(run)
            assert batch["pixel_values"].shape == (BATCH, 1, 32, 32) and batch["pixel_values"].dtype == torch.float32
            assert all(int(key) in patients for key in batch["patient_key"])
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
            assert set(batch["labels"].unique().tolist()) <= {0, 1, -1, NOT_ANNOTATED}
            seen.update(zip(batch["epoch"].tolist(), batch["sample_id"].tolist(), strict=True))
    assert set(seen.values()) == {1} and sum(epoch == 0 for epoch, _ in seen) == STUDIES


def count_reads(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], np.ndarray]:
    """(epoch, tar) -> how often each byte was asked for."""
    counts: dict[tuple[int, str], np.ndarray] = {}
    current, lock = threading.local(), threading.Lock()
    read, read_ranges = LoaderRun._read, Store.read_ranges

    def counted_read(run: LoaderRun, set_index: int, chunk: int, epoch: int, units: list[int]) -> Any:
        current.epoch = epoch
        return read(run, set_index, chunk, epoch, units)

    def counted_read_ranges(store: Store, requests: Any) -> Any:
        with lock:
            for name, offset, length in requests:
                counts.setdefault((current.epoch, name), np.zeros(1 << 18, dtype=int))[offset : offset + length] += 1
        return read_ranges(store, requests)

    monkeypatch.setattr(LoaderRun, "_read", counted_read)
    monkeypatch.setattr(Store, "read_ranges", counted_read_ranges)
    return counts


@pytest.mark.parametrize("start", [0, 4])
def test_no_byte_is_read_twice_in_an_epoch_nor_before_the_start(
    config: Loader.Config, monkeypatch: pytest.MonkeyPatch, start: int
):
    counts = count_reads(monkeypatch)
    whole = Loader(config, global_batch_size=BATCH, seed=5)
    used_before = {(row.shard, row.key) for step in range(start) for row in whole.describe(step)}
    for rank in range(3):
        batches(config, start, 2 * STUDIES // BATCH, rank, 3)
    assert {epoch for epoch, _ in counts} >= {0, 1}
    for (epoch, _), times in counts.items():
        assert times.max() == 1, f"bytes of epoch {epoch} were read twice"
    for index, shard in enumerate(whole.sets[0].manifest.shards):
        table = whole.sets[0].members(index)
        times = counts[0, shard.tar]
        for sample, key in enumerate(table.keys):
            read = sum(
                int(times[table.offset[row] : table.offset[row] + table.size[row]].sum()) for row in table.rows(sample)
            )
            assert (read == 0) == ((shard.name, key) in used_before)


def spoil(manifest: Path, folder: Path, how: str, victim: Row) -> Path:
    """A copy of the set in which the victim's first image was broken by the disk, or was so before it was packed."""
    shutil.copytree(manifest.parent, folder)
    store = open_store(str(folder))
    whole = Manifest.from_bytes(store.get("manifest.json"))
    shard = next(shard for shard in whole.shards if shard.name == victim.shard)
    table = read_members(store, shard)
    row = table.images(table.keys.index(victim.key))[0]
    path = folder / shard.tar
    data = bytearray(path.read_bytes())
    offset, size = int(table.offset[row]), int(table.size[row])
    data[offset + size // 2 : offset + size // 2 + 8] = b"\x00" * 8
    path.write_bytes(data)
    if how == "decode":  # checksums agree, the pixels do not decode
        assert table.crc32c is not None
        body = json.loads(store.get("manifest.json"))
        table.crc32c[row] = crc32c_of(bytes(data[offset : offset + size]))
        content = table.to_parquet()
        (folder / shard.members).write_bytes(content)
        for entry in body["shards"]:
            if entry["name"] == shard.name:
                entry["members_sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(body))
    return folder / "manifest.json"


@pytest.mark.parametrize("how", ["checksum", "decode"])
def test_a_corrupt_sample_is_the_same_void_everywhere(config: Loader.Config, manifest: Path, tmp_path: Path, how: str):
    config = replace(config, sampling="all_views")
    step, row = 2, 5
    victim = Loader(config, global_batch_size=BATCH, seed=5).describe(step)[row]
    spoiled = spoil(manifest, tmp_path / "spoiled", how, victim)
    events: list[dict[str, Any]] = []
    good = batches(config, 0, STUDIES // BATCH)
    bad = batches(replace(config, train=str(spoiled)), 0, STUDIES // BATCH, on_event=events.append)
    voids = [(i, int(j)) for i, batch in enumerate(bad) for j in torch.nonzero(~batch["valid"])]
    assert voids == [(step, row)]
    event = next(event for event in events if event["event"] == "skip" and event["step"] == step)
    assert (event["shard"], event["key"]) == (victim.shard, victim.key)
    assert event["cause"]
    for number, (a, b) in enumerate(zip(good, bad, strict=True)):
        if number != step:
            assert_equal(a, b)
    kept = [i for i in range(BATCH) if i != row]
    for name in ("sample_id", "epoch", "labels", "report_key", "patient_key"):
        assert torch.equal(good[step][name][kept], bad[step][name][kept])
    assert bad[step]["sample_id"][row] == good[step]["sample_id"][row]
    pixels, study = bad[step]["pixel_values"], bad[step]["study_index"]
    assert (pixels[study == row] == 0).all() and (bad[step]["labels"][row] == NOT_ANNOTATED).all()
    assert torch.equal(pixels[study != row], good[step]["pixel_values"][good[step]["study_index"] != row])
    assert_equal(batches(replace(config, train=str(spoiled)), step, 1)[0], bad[step])  # after a restart
    for world_size in (2, 4):
        parts = [batches(replace(config, train=str(spoiled)), step, 1, r, world_size)[0] for r in range(world_size)]
        assert_equal(joined(parts), bad[step])


@pytest.mark.parametrize("cached", [False, True])
def test_bytes_that_change_on_their_way_are_read_again(
    config: Loader.Config, manifest: Path, tmp_path: Path, faulty_bucket: str, fault_proxy: FaultProxy, cached: bool
):
    with open_store(faulty_bucket, create=True) as store:
        for path in manifest.parent.iterdir():
            store.put(path.name, path)
    far = replace(config, train=f"{faulty_bucket}/manifest.json")
    if cached:
        far = replace(far, cache_dir=str(tmp_path / "cache"))
    near, events = batches(config, 0, 3), []
    fault_proxy.plan(Plan(rate=0.5, kinds=("flip",), methods=("GET",), match="/train", attempts=1))
    for first, second in zip(near, batches(far, 0, 3, on_event=events.append), strict=True):
        assert_equal(first, second)
    assert fault_proxy.report()["faults"]["flip"] > 0
    assert {event["event"] for event in events} <= {"read_again", "retry"}
    if cached:  # what was damaged was not kept
        fault_proxy.plan(Plan())
        assert_equal(near[0], batches(far, 0, 1)[0])


def test_a_mixture_keeps_its_quotas(config: Loader.Config, manifest: Path, tmp_path: Path):
    other = pack(tmp_path / "other", seed=1)
    sets = (MixtureSet(manifest=str(manifest), quota=18), MixtureSet(manifest=str(other), quota=6))
    config = replace(config, train=sets)
    walked = batches(config, 0, 12)
    assert all((batch["set_index"] == 1).sum() == 6 for batch in walked)
    for start in (3, 10):
        assert_equal(batches(config, start, 1)[0], walked[start])
    parts = [batches(config, 7, 1, rank, 4)[0] for rank in range(4)]
    assert_equal(joined(parts), walked[7])


def test_evaluation_gives_every_study_once(config: Loader.Config):
    loader = Loader(config, global_batch_size=BATCH, seed=5)
    found = list(loader.evaluate(batch_size=8))
    assert [int(batch["valid"].sum()) for batch in found] == [8, 8, 4]
    ids = torch.cat([batch["sample_id"][batch["valid"]] for batch in found])
    assert ids.tolist() == list(range(20))
    assert len(found[0]["pixel_values"]) == len(found[0]["study_index"]) > 8


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_evaluation(config: Loader.Config, world_size: int):
    config = replace(config, lanes=24)
    whole = list(Loader(config, global_batch_size=BATCH, seed=5).evaluate(batch_size=24))
    shares = [
        list(Loader(config, global_batch_size=BATCH, seed=5, rank=rank, world_size=world_size).evaluate(batch_size=24))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert {len(part["valid"]) for part in parts} == {24 // world_size}
        assert_equal(joined(parts), batch)
    # What does not divide is rounded up; the study counts stay.
    uneven = [
        batch
        for rank in range(world_size)
        for batch in Loader(config, global_batch_size=BATCH, seed=5, rank=rank, world_size=world_size).evaluate(
            batch_size=7
        )
    ]
    assert sorted(int(i) for batch in uneven for i in batch["sample_id"][batch["valid"]]) == list(range(20))


def test_evaluations_leave_no_descriptor_and_no_thread_behind(config: Loader.Config):
    loader = Loader(config, global_batch_size=BATCH, seed=5)

    def count() -> tuple[int, int]:
        list(loader.evaluate(batch_size=8))
        next(partly := loader.evaluate(batch_size=8))
        partly.close()
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    first = count()
    assert [count() for _ in range(3)] == [first] * 3


def test_an_evaluation_of_nothing_gives_nothing(config: Loader.Config):
    loader = Loader(config, global_batch_size=BATCH, seed=5)
    data = loader.sets[0]
    nothing: Any = SimpleNamespace(table=SimpleNamespace(total=0), url=data.url, whole=data.whole)
    assert list(evaluation_batches(nothing, loader._collate, config, print, 8)) == []


def test_each_rank_tells_of_its_own_bad_studies_in_an_evaluation(config: Loader.Config, manifest: Path, tmp_path: Path):
    shard = Manifest.from_bytes(manifest.read_bytes()).of_split("validation").shards[0]
    key = read_members(open_store(str(manifest.parent)), shard).keys[3]
    victim = Row(set_index=0, epoch=0, unit=3, shard=shard.name, key=key)
    spoiled = spoil(manifest, tmp_path / "spoiled", "decode", victim)
    events: list[dict[str, Any]] = []
    for rank in range(2):
        config = replace(config, train=str(spoiled))
        shares = Loader(config, global_batch_size=BATCH, seed=5, rank=rank, world_size=2, on_event=events.append)
        list(shares.evaluate(batch_size=6))
    assert [(event["event"], event["shard"], event["key"]) for event in events] == [("skip", victim.shard, victim.key)]


def test_closing_a_run_gives_up_what_waits_for_the_decoder(config: Loader.Config, monkeypatch: pytest.MonkeyPatch):
    submitted: list[PendingBatch] = []
    submit, hold = Decoder.submit, threading.Event()

    def slow_submit(decoder: Decoder, *arguments: Any) -> PendingBatch:
        if submitted:  # from the second batch on the workers are busy
            for _ in range(decoder.config.threads):
                decoder._pool.submit(hold.wait, 20)
        submitted.append(submit(decoder, *arguments))
        return submitted[-1]

    monkeypatch.setattr(Decoder, "submit", slow_submit)
    run = Loader(config, global_batch_size=BATCH, seed=5).start(0)
    next(run)
    while len(submitted) < 2:
        time.sleep(0.01)
    closing = threading.Thread(target=run.close)
    closing.start()
    closing.join(timeout=15)
    hold.set()
    assert not closing.is_alive()
    assert all(future.cancelled() for pending in submitted[1:] for future in pending.runs)


def test_a_cache_gives_the_same_batches(config: Loader.Config, tmp_path: Path):
    cached = replace(config, cache_dir=str(tmp_path / "cache"))
    for want, first, second in zip(batches(config, 2, 4), batches(cached, 2, 4), batches(cached, 2, 4), strict=True):
        assert_equal(want, first)
        assert_equal(want, second)


def test_a_forgotten_study_is_void_and_unread(config: Loader.Config, manifest: Path, tmp_path: Path):
    body = json.loads(manifest.read_text())
    shard = next(entry for entry in body["shards"] if entry["split"] == "train")
    shard["void"] = [2]
    changed = manifest.parent / "forgotten.json"
    changed.write_text(json.dumps(body))
    events: list[dict[str, Any]] = []
    found = batches(replace(config, train=str(changed)), 0, STUDIES // BATCH, on_event=events.append)
    assert sum(int((~batch["valid"]).sum()) for batch in found) <= 1
    assert all(event["cause"] == "forgotten" for event in events)


def test_a_failing_bucket_gives_the_same_batches_and_tells_each_retry(
    config: Loader.Config, manifest: Path, faulty_bucket: str, fault_proxy: FaultProxy
):
    with open_store(faulty_bucket) as store:
        for path in manifest.parent.iterdir():
            store.put(path.name, path)
    events: list[dict[str, Any]] = []
    fault_proxy.plan(Plan(rate=0.3, kinds=["error", "reset", "truncate"], methods=["GET"], match="train-"))
    remote = replace(config, train=f"{faulty_bucket}/manifest.json")
    for want, got in zip(batches(config, 2, 3), batches(remote, 2, 3, on_event=events.append), strict=True):
        assert_equal(want, got)
    assert events and {event["event"] for event in events} == {"retry"}
    assert all(event["object"].startswith("train-") and event["cause"] for event in events)


def test_misfits_are_refused_before_anything_starts(config: Loader.Config, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data.train is empty"):
        Loader(replace(config, train=""), global_batch_size=BATCH, seed=0)
    with pytest.raises(ConfigError, match=r"window_chunks"):
        Loader(replace(config, buffer_bytes=1000), global_batch_size=BATCH, seed=0)
    with pytest.raises(ConfigError, match=r"world_size=5 does not divide data.lanes=12"):
        Loader(config, global_batch_size=BATCH, seed=0, world_size=5)
    with pytest.raises(DataError, match=r"split 'nowhere' has no shard; this manifest has train, validation"):
        Loader(replace(config, train_split="nowhere"), global_batch_size=BATCH, seed=0)


def test_a_silent_store_stops_the_run_and_skips_nothing(config: Loader.Config, monkeypatch: pytest.MonkeyPatch):
    events: list[dict[str, Any]] = []
    loader = Loader(config, global_batch_size=BATCH, seed=5, on_event=events.append)

    def silent(store: Store, requests: Any) -> Any:
        raise StoreUnreachableError("no answer for 60 s")

    monkeypatch.setattr(Store, "read_ranges", silent)
    with loader.start(0) as run, pytest.raises(StoreUnreachableError):
        next(run)
    assert events == []
