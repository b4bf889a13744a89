"""Starts of other loaders at a sample, for `ci.bench.resume`: run by the Python that holds the peers.

    python -m ci.bench.resume_peers build NAME FOLDER NAMES
    python -m ci.bench.resume_peers start NAME FOLDER SAMPLES --epoch EPOCH

A start is at SAMPLES of epoch EPOCH. FOLDER holds `tars/<n>.tar`, the distinct tars. Each peer gets its own format of
the same samples below FOLDER/NAME, a few distinct files linked under NAMES names. All decode the same 224-pixel tensors
with Pillow in two worker processes; none reads the report. Imports are within functions: a child needs one peer only.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ci.bench.loader_contestants import _define_torchvision_operators, pillow_pixels, stack
from shards.errors import ConfigError

PEERS = ("streaming", "litdata", "energon", "webdataset")
BATCH, WORKERS, SHUFFLE_BUFFER = 96, 2, 500


def images_of(tar: Path) -> Iterator[bytes]:
    """JPEG members of a tar in order."""
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                content = archive.extractfile(member)
                assert content is not None
                yield content.read()


def _first_of(loader: Any) -> tuple[Any, Any]:
    """(iterator, first batch): the iterator is kept, since ending its workers does not belong to a start."""
    batches = iter(loader)
    return batches, next(batches)


def _distinct(folder: Path) -> list[Path]:
    return sorted((folder / "tars").glob("*.tar"), key=lambda path: int(path.stem))


def build_streaming(folder: Path, names: int) -> None:
    """MDS: one shard a tar, then an index that repeats them."""
    _define_torchvision_operators()
    from streaming import MDSWriter

    target, entries = folder / "streaming", []
    target.mkdir()
    for tar in _distinct(folder):
        part = folder / "streaming-parts" / tar.stem
        with MDSWriter(out=str(part), columns={"jpg": "bytes"}, size_limit=1 << 31) as writer:
            for image in images_of(tar):
                writer.write({"jpg": image})
        (entry,) = json.loads((part / "index.json").read_text())["shards"]
        entries.append((part / entry["raw_data"]["basename"], entry))
    shards = []
    for number in range(names):
        file, entry = entries[number % len(entries)]
        name = f"shard.{number:05d}.mds"
        os.link(file, target / name)
        shards.append(entry | {"raw_data": entry["raw_data"] | {"basename": name}})
    (target / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def start_streaming(folder: Path, samples: int, epoch: int) -> Callable[[], tuple[Any, Any]]:
    """`load_state_dict` with the state it documents."""
    _define_torchvision_operators()
    from streaming import StreamingDataLoader, StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return pillow_pixels(super().__getitem__(at)["jpg"])

    def first() -> tuple[Any, Any]:
        dataset = Images(
            local=str(folder / "streaming"), shuffle=True, shuffle_seed=0, batch_size=BATCH, num_canonical_nodes=1
        )
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, collate_fn=stack)
        loader.load_state_dict(
            {
                "epoch": epoch, "sample_in_epoch": samples, "num_canonical_nodes": 1, "shuffle_seed": 0,
                "initial_physical_nodes": 1,
            }
        )  # fmt: skip
        return _first_of(loader)

    return first


def build_litdata(folder: Path, names: int) -> None:
    """One chunk a tar, then an index that repeats them."""
    from litdata.streaming.cache import Cache

    target, parts = folder / "litdata", folder / "litdata-parts"
    target.mkdir()
    tars = _distinct(folder)
    number, chunk_size = 0, sum(1 for _ in images_of(tars[0]))
    cache = Cache(str(parts), chunk_size=chunk_size)
    for tar in tars:
        for image in images_of(tar):
            cache[number] = {"jpg": image}
            number += 1
    cache.done()
    cache.merge()
    index = json.loads((parts / "index.json").read_text())
    chunks = []
    for number in range(names):
        chunk = index["chunks"][number % len(index["chunks"])]
        name = f"chunk-0-{number}.bin"
        os.link(parts / chunk["filename"], target / name)
        chunks.append(chunk | {"filename": name})
    (target / "index.json").write_text(json.dumps(index | {"chunks": chunks}))


def start_litdata(folder: Path, samples: int, epoch: int) -> Callable[[], tuple[Any, Any]]:
    """`load_state_dict` with a fresh loader's state moved to the sample."""
    from litdata import StreamingDataLoader, StreamingDataset

    def first() -> tuple[Any, Any]:
        dataset = StreamingDataset(
            str(folder / "litdata"), shuffle=True, seed=0, transform=lambda item: pillow_pixels(item["jpg"])
        )
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, collate_fn=stack)
        if samples or epoch:
            state = loader.state_dict()
            state["dataset"]["current_epoch"] = state["current_epoch"] = epoch + 1
            state["dataset"]["num_samples_yielded"] = state["num_samples_yielded"] = samples
            state["dataset"]["sample_in_epoch"] = samples
            state["latest_worker_idx"] = (samples // BATCH - 1) % WORKERS
            loader.load_state_dict(state)
        return _first_of(loader)

    return first


def build_webdataset(folder: Path, names: int) -> None:
    """The tars as they are, under many names."""
    target, tars = folder / "webdataset", _distinct(folder)
    target.mkdir()
    for number in range(names):
        os.link(tars[number % len(tars)], target / f"{number:06d}.tar")


def start_webdataset(folder: Path, samples: int, epoch: int) -> Callable[[], tuple[Any, Any]]:
    """It keeps no position: the same order is drawn again and skipped over, before anything is decoded."""
    import webdataset as wds

    def first() -> tuple[Any, Any]:
        urls = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
        dataset = wds.DataPipeline(
            wds.SimpleShardList(urls, seed=0),
            wds.split_by_worker,
            wds.tarfile_to_samples(),
            wds.detshuffle(SHUFFLE_BUFFER, initial=100, seed=0),
            wds.slice(samples // WORKERS, 1 << 62),
            wds.map(lambda sample: pillow_pixels(sample["0.jpg"])),
        )
        return _first_of(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, collate_fn=stack))

    return first


def build_energon(folder: Path, names: int) -> None:
    """Its own preparation of the distinct tars; index files are linked and the shard list repeats them."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory

    target, parts, tars = folder / "energon", folder / "energon-parts", _distinct(folder)
    (target / ".nv-meta").mkdir(parents=True)
    parts.mkdir()
    for tar in tars:
        os.link(tar, parts / tar.name)
    BaseWebdatasetFactory.prepare_dataset(
        EPath(parts), [tar.name for tar in tars], split_parts_ratio=[("train", 1.0)], workers=1
    )
    info = json.loads((parts / ".nv-meta" / ".info.json").read_text())
    counts = {}
    for number in range(names):
        source = tars[number % len(tars)].name
        name = f"{number:06d}.tar"
        os.link(parts / source, target / name)
        os.link(parts / f"{source}.idx", target / f"{name}.idx")
        counts[name] = info["shard_counts"][source]
    (target / ".nv-meta" / ".info.json").write_text(json.dumps(info | {"shard_counts": counts}))
    (target / ".nv-meta" / "split.yaml").write_text(json.dumps({"split_parts": {"train": list(counts)}, "exclude": []}))
    (target / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def start_energon(folder: Path, samples: int, epoch: int) -> Callable[[], tuple[Any, Any]]:
    """From the beginning only: a state cannot be made for a position, just saved after reading up to it."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class Picture(Sample):
        pixels: np.ndarray

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        return Picture(**basic_sample_keys(sample), pixels=pillow_pixels(sample["0.jpg"]))

    class Pictures(DefaultTaskEncoder):  # type: ignore[misc, type-arg]
        decoder = None
        cookers = (Cooker(cook),)

        def batch(self, samples: list[Any]) -> Any:
            return stack([sample.pixels for sample in samples])

        def encode_batch(self, batch: Any) -> Any:
            return batch

    if epoch or samples:
        raise ConfigError("energon: a state can only be had by reading up to it")

    def first() -> tuple[Any, Any]:
        data = get_train_dataset(
            str(folder / "energon"),
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
            batch_size=BATCH,
            shuffle_buffer_size=SHUFFLE_BUFFER,
            max_samples_per_sequence=100,
            task_encoder=Pictures(),
        )
        return _first_of(get_savable_loader(data))

    return first


BUILD = {
    "streaming": build_streaming, "litdata": build_litdata, "webdataset": build_webdataset, "energon": build_energon
}  # fmt: skip
START = {
    "streaming": start_streaming, "litdata": start_litdata, "webdataset": start_webdataset, "energon": start_energon
}  # fmt: skip


def main() -> None:
    """Build, or start once; a start prints one line of JSON."""
    parser = argparse.ArgumentParser(description="a child of `python -m ci.bench resume`")
    parser.add_argument("action", choices=("build", "start"))
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--epoch", type=int, default=0)
    options = parser.parse_args()
    if options.action == "build":
        BUILD[options.name](options.folder, options.count)
        os.sync()
        return
    torch.set_num_threads(1)
    first = START[options.name](options.folder, options.count, options.epoch)
    started = time.perf_counter()
    batches, batch = first()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "rows": len(batch)}), flush=True)
    del batches  # ends workers


if __name__ == "__main__":
    main()
