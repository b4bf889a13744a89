"""Seconds from a start at step N to the first batch, against N; bytes read of samples used before; what a kill leaves.

The set has 1,000,000 samples of about 100 kB on a folder. It would take 100 GB, so a few distinct tars are written and
linked under many names; side files, of which a start reads some, are copies of their own. Every start is measured in
a new process on a cold page cache, from after the imports to the first batch in hand.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ci.bench.figure import REPOSITORY, Figure, figure
from shards import keyed
from shards.batch import EncodedImage, Sample, StudyRecord, ViewRecord
from shards.errors import DataError
from shards.manifest import Manifest, Shard
from shards.tar_index import CHUNK_BYTES, describe_shard
from shards.writer import ShardBuilder

DESCRIPTION = "seconds to the first batch of a start at step N of 1,000,000 samples, cold; what is read, what is left"

BATCH, LANES, THREADS, IMAGE_SIZE, SEED = 96, 48, 2, 224, 0
STORED_SIZE, JPEG_QUALITY, NOISE = 512, 95, 4.5  # grey pixels a side; noise that makes a member about 100 kB
POSITIONS = (0.0, 0.01, 0.1, 0.5, 0.9, 3.5)  # epochs
START_LIMIT_S = 180.0
PEERS = ("streaming", "litdata", "energon", "webdataset")
EXTRAPOLATED = "extrapolated: it skips by reading"
PEERS_PYTHON = REPOSITORY / ".venv" / "peers" / "bin" / "python"
# Peers that cannot be sent to a position. webdataset skips by reading, so a straight line is drawn through these.
REACHED = {"webdataset": (0.0, 0.002, 0.01), "energon": (0.0,)}
WORDS = ("heart", "lungs", "clear", "normal", "size", "no", "effusion", "opacity", "left", "right", "lower", "stable")


@dataclass(frozen=True, kw_only=True)
class Size:
    """`names` shards of `samples_per_shard`, of which `tars` are distinct and hold `images` distinct images."""

    names: int
    tars: int
    samples_per_shard: int
    images: int

    @property
    def samples(self) -> int:
        return self.names * self.samples_per_shard


FULL = Size(names=2000, tars=20, samples_per_shard=500, images=500)
QUICK = Size(names=200, tars=4, samples_per_shard=50, images=25)


def encoded_images(count: int) -> list[bytes]:
    """Bundled radiographs, enlarged to 512 pixels, with noise of a detector: real content at about 100 kB each."""
    files = sorted((REPOSITORY / "ci" / "data" / "nih_cxr" / "images").glob("*.*"))[:count]
    if len(files) < count:
        raise DataError(f"ci/data/nih_cxr/images holds {len(files)} images, {count} are needed; check the repository")
    noise = np.float32(NOISE) * keyed.normal(SEED, "resume noise", np.arange(STORED_SIZE), draws=STORED_SIZE)
    result = []
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            image = opened.convert("L").resize((STORED_SIZE, STORED_SIZE), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) + np.roll(noise, (number * 31, number * 17), (0, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=JPEG_QUALITY)
        result.append(buffer.getvalue())
    return result


def build(folder: Path, size: Size) -> Path:
    """Write the tars, link them, copy their side files, train a vocabulary; returns the manifest's path."""
    from shards.tokenizer import train_wordpiece

    images = encoded_images(size.images)
    (folder / "tars").mkdir(parents=True)
    described: list[tuple[Shard, bytes]] = []
    texts = []
    for tar in range(size.tars):
        builder = ShardBuilder()
        for i in range(size.samples_per_shard):
            number = tar * size.samples_per_shard + i
            key = f"{number:032x}"
            words = [WORDS[j] for j in keyed.integers(0, len(WORDS), SEED, "resume words", number, draws=30)]
            texts.append(" ".join(words))
            view = ViewRecord(id="0", height=STORED_SIZE, width=STORED_SIZE)
            record = StudyRecord(study=key, patient=key, report={"findings": texts[-1]}, views=[view])
            image = EncodedImage(data=images[number % len(images)], extension="jpg")
            builder.add(Sample(key=key, record=record, images=(image,)))
        data, index = builder.finish()
        (folder / "tars" / f"{tar}.tar").write_bytes(data)
        shard, side_files = describe_shard("", "train", index, CHUNK_BYTES)
        described.append((shard, side_files[shard.members]))
    (folder / "set").mkdir()
    shards = []
    for number in range(size.names):
        shard, members = described[number % size.tars]
        shards.append(replace(shard, name=f"train-{number:06d}"))
        os.link(folder / "tars" / f"{number % size.tars}.tar", folder / "set" / shards[-1].tar)
        (folder / "set" / shards[-1].members).write_bytes(members)
    manifest = folder / "set" / "manifest.json"
    manifest.write_bytes(Manifest(shards=tuple(shards), source="resume").to_bytes())
    train_wordpiece(texts[:500], 200, folder / "tokenizer")
    os.sync()
    return manifest


def make_cold(folder: Path) -> None:
    """Drop every file below `folder` from the page cache; a file of many names once."""
    seen = set()
    for path in folder.rglob("*"):
        status = path.stat()
        if path.is_file() and status.st_ino not in seen:
            seen.add(status.st_ino)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def start_once(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """One start in a process of its own on a cold page cache; what it prints as its last line, JSON.

    Raises DataError with the last line of its error output when it fails.
    """
    make_cold(folder)
    finished = subprocess.run(
        command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=START_LIMIT_S,
        env=_environment(folder),
    )  # fmt: skip
    if finished.returncode:
        last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"{' '.join(command[1:4])} ended with code {finished.returncode}: {last[:200]}")
    return dict(json.loads(finished.stdout.strip().splitlines()[-1]))


def _environment(folder: Path) -> dict[str, str]:
    (folder / "temporary").mkdir(exist_ok=True)
    return os.environ | {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": str(THREADS)}


def ours(action: str, manifest: Path, step: int) -> list[str]:
    """Command line of a child of this module."""
    return [sys.executable, "-m", "ci.bench.resume", action, str(manifest), str(step)]


# What the children do.


def _loader(manifest: Path) -> Any:
    from shards.decode import Decoder
    from shards.loader import Loader

    config = Loader.Config(
        train=str(manifest),
        lanes=LANES,
        tokenizer=str(manifest.parents[1] / "tokenizer"),
        sections=("findings",),
        decode=Decoder.Config(image_size=IMAGE_SIZE, threads=THREADS),
    )
    return Loader(config, global_batch_size=BATCH, seed=SEED)


def _first_batch(manifest: Path, step: int) -> dict[str, Any]:
    import shards.decode
    import shards.loader  # noqa: F401  imports are not on the clock

    disk_before, processor_before = _disk_bytes(), time.process_time()
    started = time.perf_counter()
    loader = _loader(manifest)
    built_s = time.perf_counter() - started
    run = loader.start(step)
    batch = next(run)
    seconds = time.perf_counter() - started
    cpu_s = time.process_time() - processor_before
    disk_mb = (_disk_bytes() - disk_before) / 1e6
    rows = int(batch["valid"].sum())
    run.close()
    return {"seconds": seconds, "built_s": built_s, "rows": rows, "cpu_s": cpu_s, "disk_mb": disk_mb}


def _disk_bytes() -> int:
    """Bytes this process made the kernel fetch from a disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _ranges_read(manifest: Path, step: int) -> dict[str, Any]:
    """Read on from `step`, record every range asked of a tar, and intersect with members of samples used before.

    Used before: by a batch of the same epoch block with a lower step. What is read for the block after it is of the
    next epoch and does not count, so `step` must lie well before the end of its block.
    """
    from shards.store import Store

    asked: list[tuple[str, int, int]] = []
    lock = threading.Lock()
    read_ranges, get_range = Store.read_ranges, Store.get_range

    def recording_ranges(self: Store, requests: Sequence[tuple[str, int, int]]) -> Any:
        with lock:
            asked.extend(requests)
        return read_ranges(self, requests)

    def recording_range(self: Store, name: str, offset: int, length: int) -> bytes:
        with lock:
            asked.append((name, offset, length))
        return get_range(self, name, offset, length)

    Store.read_ranges, Store.get_range = recording_ranges, recording_range  # type: ignore[method-assign]
    loader = _loader(manifest)
    data = loader.sets[0]
    with loader.start(step) as run:
        for _ in range(6):  # whole chunk pieces are read from the third batch on
            next(run)
    Store.read_ranges, Store.get_range = read_ranges, get_range  # type: ignore[method-assign]

    block = loader.order.block_of(0, step)
    before = np.concatenate(
        [
            np.arange(low, low + (step - block.first_step) * width)
            for low, width in zip(block.lane_start, block.widths, strict=True)
        ]
    )
    used = np.zeros(data.table.total, dtype=bool)
    used[block.slots_at(before).unit] = True
    shard_of = {shard.tar: i for i, shard in enumerate(data.manifest.shards)}
    samples = np.asarray([shard.samples for shard in data.manifest.shards])
    first_unit = np.cumsum(samples) - samples
    skipped_read = total = 0
    for name, offset, length in asked:
        table = data.members(shard_of[name])
        low = np.maximum(table.offset, offset)
        high = np.minimum(table.offset + table.size, offset + length)
        is_used = used[first_unit[shard_of[name]] + table.sample_index]
        skipped_read += int(np.maximum(high - low, 0)[is_used].sum())
        total += length
    return {"skipped_read": skipped_read, "asked": total, "ranges": len(asked), "used": int(used.sum())}


def _stream(manifest: Path, step: int) -> None:
    with _loader(manifest).start(step) as run:
        for count, _ in enumerate(run):
            print(count, flush=True)


# What the parent does with them.


def files_left(command: Sequence[str], folder: Path, batches: int = 4) -> int:
    """Kill a streaming process after some batches; files it left in /dev/shm and its temporary folder."""
    places = [Path("/dev/shm"), folder / "temporary"]
    environment = _environment(folder)
    before = {path for place in places for path in place.rglob("*")}
    child = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert child.stdout is not None
    watchdog = threading.Timer(START_LIMIT_S, child.kill)
    watchdog.start()
    try:
        seen = sum(1 for _, line in zip(range(batches), child.stdout, strict=False) if line.strip())
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally:
        watchdog.cancel()
        child.stdout.close()
    if seen < batches:
        raise DataError(f"{' '.join(command[1:4])} ended after {seen} of {batches} batches")
    new = {path for place in places for path in place.rglob("*")} - before
    return len(new - _in_use()) if new else 0


def _in_use() -> set[Path]:
    """Files that some process has open or mapped: those of /dev/shm that others made in the meantime."""
    found: set[Path] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it ended, or is not ours to look at
                for line in (process / "maps").read_text().splitlines():
                    if "/dev/shm/" in line:
                        found.add(Path(line.split(maxsplit=5)[5]))
                for file in list((process / "fd").iterdir()):
                    with suppress(OSError):  # closed since it was listed
                        found.add(Path(os.readlink(file)))
    return found


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder on a disk, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="roentgen-resume-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def step_of(position: float, size: Size) -> int:
    """The step at a position in epochs."""
    return int(position * size.samples / BATCH)


def peer_seconds(name: str, folder: Path, size: Size, positions: Sequence[float]) -> dict[float, float] | str:
    """Seconds by position where the peer was measured, or why it was not."""
    if not PEERS_PYTHON.exists():
        return "not measured: run bash ci/bench/setup_peers.sh"
    command = [str(PEERS_PYTHON), "-m", "ci.bench.resume_peers"]
    measured: dict[float, float] = {}
    try:
        build_command = [*command, "build", name, str(folder), str(size.names)]
        subprocess.run(
            build_command, check=True, cwd=REPOSITORY, capture_output=True, timeout=600, env=_environment(folder)
        )
        for position in REACHED.get(name, positions):
            epoch, samples = int(position), step_of(position % 1.0, size) * BATCH
            start = [*command, "start", name, str(folder), str(samples), "--epoch", str(epoch)]
            measured[position] = float(start_once(start, folder)["seconds"])
    except (DataError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, DataError) else type(error).__name__
        return measured or f"not measured: {reason}"
    return measured


def with_line(measured: dict[float, float], positions: Sequence[float]) -> dict[float, float]:
    """What skipping costs at every position, from a straight line through the first and last that were measured."""
    (near, near_s), (far, far_s) = min(measured.items()), max(measured.items())
    rate = (far_s - near_s) / (far - near)
    return {p: measured.get(p, near_s + rate * (p % 1.0 - near)) for p in positions}


def run(quick: bool) -> list[Figure]:
    """The curve of ours and of the peers, then the three figures that have bars."""
    size, repeats = (QUICK, 1) if quick else (FULL, 3)
    positions = (0.5,) if quick else POSITIONS
    with workplace() as folder:
        manifest = build(folder, size)
        started = time.perf_counter()
        starts = {
            p: [start_once(ours("first_batch", manifest, step_of(p, size)), folder) for _ in range(repeats)]
            for p in positions
        }
        wall_s = time.perf_counter() - started
        within = [p for p in positions if 0.05 < p % 1.0 < 0.95]
        reads = [start_once(ours("ranges_read", manifest, step_of(p, size)), folder) for p in within]
        left = sum(files_left(ours("stream", manifest, step_of(0.5, size)), folder) for _ in range(repeats))
        peers = {} if quick else {name: peer_seconds(name, folder, size, positions) for name in PEERS}

    medians = {p: statistics.median(one["seconds"] for one in starts[p]) for p in positions}
    figures = list(_curve(medians, peers, positions, repeats))
    worst = max(medians, key=medians.__getitem__)
    every = [one for ones in starts.values() for one in ones]
    note = (
        f"slowest position, {worst:g} epochs; all {min(o['seconds'] for o in every):.2f}-"
        f"{max(o['seconds'] for o in every):.2f} s, of the processor "
        f"{statistics.median(o['cpu_s'] for o in every):.2f} s, from disk "
        f"{statistics.median(o['disk_mb'] for o in every):.0f} MB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        f"cores; {size.samples:,} samples: {size.tars} distinct tars linked under {size.names:,} names"
    )
    asked = sum(one["asked"] for one in reads)
    return [
        *figures,
        figure(
            "resume.files_left_behind", left, repeats=repeats, threads=THREADS,
            note=f"SIGKILL {repeats} times; /dev/shm and the temporary folder",
        ),
        figure(
            "resume.bytes_skipped_read", sum(one["skipped_read"] for one in reads), repeats=len(reads), threads=THREADS,
            note=f"{len(reads)} starts, {asked / 1e6:,.0f} MB asked for, {max(o['used'] for o in reads):,} used before",
        ),
        figure(
            "resume.first_batch_s", medians[worst], ours=medians[worst], repeats=repeats, seeds=(SEED,),
            threads=THREADS, wall_s=wall_s, note=note,
        ),
    ]  # fmt: skip


def _curve(
    medians: dict[float, float], peers: dict[str, dict[float, float] | str], positions: Sequence[float], repeats: int
) -> Iterator[Figure]:
    """One figure a peer and position, ours over theirs; without peers, ours alone."""
    if not peers:
        for p in positions:
            yield figure(f"resume.ours_at_{p:g}_epochs", medians[p], ours=medians[p], unit="s", better="lower")
    for name, measured in peers.items():
        if isinstance(measured, str):
            yield figure(f"resume.vs_{name}", math.nan, unit="ratio", better="lower", peer_name=name, note=measured)
            continue
        theirs = with_line(measured, positions) if name == "webdataset" and len(measured) > 1 else measured
        for p in positions:
            if p in theirs:
                yield figure(
                    f"resume.vs_{name}_at_{p:g}_epochs", medians[p] / theirs[p], unit="ratio", better="lower",
                    ours=medians[p], peer=theirs[p], peer_name=name, repeats=repeats, threads=THREADS,
                    note="" if p in measured else EXTRAPOLATED,
                )  # fmt: skip
        if not set(positions) <= set(theirs):
            yield figure(
                f"resume.vs_{name}_beyond", math.nan, unit="ratio", better="lower", peer_name=name,
                note=f"not measured beyond {max(measured):g} epochs: its state exists only after reading up to it",
            )  # fmt: skip


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Seconds to the first batch against position, ours and every peer; what is extrapolated is hollow."""
    from matplotlib.figure import Figure as Drawing

    curves: dict[str, dict[float, tuple[float, bool]]] = {}
    for one in figures:
        match = re.fullmatch(r"resume\.(?:vs_(\w+)|ours)_at_([\d.]+)_epochs", one.id)
        if match is None or one.ours is None:
            continue
        position = float(match[2])
        curves.setdefault("ours", {})[position] = (one.ours, True)
        if match[1] and one.peer is not None:
            curves.setdefault(match[1], {})[position] = (one.peer, EXTRAPOLATED not in one.note)
    drawing = Drawing(figsize=(7, 4.5), layout="constrained")
    axes = drawing.add_subplot()
    for name, curve in curves.items():
        places = sorted(curve)
        (line,) = axes.plot(places, [curve[p][0] for p in places], label=name, linewidth=2.5 if name == "ours" else 1)
        for p in places:
            face = line.get_color() if curve[p][1] else "white"
            axes.plot([p], [curve[p][0]], "o", color=line.get_color(), markerfacecolor=face)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="position of the start, epochs of 1,000,000 samples", ylabel="seconds to the first batch", yscale="log",
        title="Start at step N, cold page cache (hollow: extrapolated)",
    )  # fmt: skip
    axes.legend()
    drawing.savefig(path, dpi=130)


def main() -> None:
    """A child: one action from one step, its result as a line of JSON."""
    parser = argparse.ArgumentParser(description="a child of `python -m ci.bench resume`")
    actions = {"first_batch": _first_batch, "ranges_read": _ranges_read, "stream": _stream}
    parser.add_argument("action", choices=actions)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("step", type=int)
    options = parser.parse_args()
    print(json.dumps(actions[options.action](options.manifest, options.step)), flush=True)


if __name__ == "__main__":
    main()
