"""Images per second of the whole loader, 512-px grey JPEG to normalised 224-px tensors, against the loaders of others.

Same files or the same bytes in the peer's own format, same output, same number of worker threads; each contestant runs
alone in a process of its own, in turns. Install the peers with `bash ci/bench/setup_peers.sh`; one that is missing is
printed as not installed. Temporary files: about 2 GB.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ci.bench.fault_proxy import FaultProxy, Plan
from ci.bench.figure import REPOSITORY, Figure, alternate, figure, ratio
from ci.bench.loader_contestants import BATCH, MEAN, SIZE, STD, THREADS, Result, Spec, pillow_pixels
from ci.bench.s3_server import S3Server
from shards.batch import EncodedImage, Sample, StudyRecord, ViewRecord
from shards.decode import Decoder
from shards.errors import RoentgenError
from shards.ingest import Item, Loaded, hashed_key
from shards.ingest import Plan as SourcePlan
from shards.manifest import Manifest
from shards.reader import read_members
from shards.store import open_store
from shards.transforms import augment
from shards.writer import WriterConfig, write_shards

DESCRIPTION = "the loader's images/s: against five others on a folder, from S3, with faults, with corrupt members"

PEERS = {
    "dali_reader": "DALI's own webdataset reader",
    "webdataset": "webdataset + Pillow",
    "mosaic": "MosaicML Streaming + Pillow",
    "litdata": "litdata + Pillow",
    "energon": "Megatron-Energon + Pillow",
}
PEERS_PYTHON = REPOSITORY / ".venv" / "peers" / "bin" / "python"
CORRUPT_EVERY = 100
FAULT_RATE = 0.05
FAULT_KINDS = ("error", "throttle", "reset", "reset_midway", "truncate", "stall")
_LIMIT_S = 600


class ContestantFailedError(RoentgenError):
    """A contestant ended without a result."""


@dataclass(frozen=True)
class Pictures:
    """The bench's own source: `samples` studies of one view, each one of the given JPEGs."""

    images: tuple[bytes, ...]
    samples: int
    name: str = "bench"
    labels: tuple[str, ...] = ()
    key_fingerprint: str | None = None

    @property
    def masks(self) -> dict[str, int]:
        return {}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"samples": self.samples, "distinct": len(self.images)}

    def plan(self) -> SourcePlan:
        keys = [hashed_key(None, "study", str(index)) for index in range(self.samples)]
        return SourcePlan(
            items=[Item(key=key, patient=key, split="train", payload=index) for index, key in enumerate(keys)]
        )

    def load(self, item: Item) -> Loaded:
        view = ViewRecord(id="0", height=512, width=512)
        record = StudyRecord(study=item.key, patient=item.patient, report={"findings": "bench"}, views=[view])
        image = EncodedImage(data=self.images[item.payload % len(self.images)], extension="jpg")
        return Loaded(sample=Sample(key=item.key, record=record, images=(image,), split="train"))


def picture(seed: int) -> bytes:
    """A 512-px grey JPEG of quality 95 and about 100 kB: soft shapes, edges and the noise of a radiograph."""
    rng = np.random.default_rng(seed)
    value = np.zeros((512, 512), dtype=np.float32)
    for cells, weight in ((4, 60), (16, 25), (64, 10)):
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        value += weight * np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC))
    value += 120 + rng.normal(0, 5.5, value.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(value, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def _spawn(python: Path | str, arguments: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of `ci.bench.loader_contestants`. Raises ContestantFailedError with the end of its errors."""
    done = subprocess.run(
        [str(python), "-m", "ci.bench.loader_contestants", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ContestantFailedError(f"{arguments[0]} ended with {done.returncode}: {lines[-1]}")
    return done.stdout


def _python_of(name: str) -> Path | str:
    return PEERS_PYTHON if name in PEERS and PEERS_PYTHON.exists() else sys.executable


def run_contestant(name: str, spec: Spec, environment: Mapping[str, str] | None = None) -> Result:
    """One run in a fresh process."""
    output = _spawn(_python_of(name), [name, spec.to_json()], environment)
    (line,) = [line for line in output.splitlines() if line.startswith("result ")]
    return Result.from_json(line.removeprefix("result "))


class Runs:
    """Runs of contestants, each `Result` kept; `rate` is what `alternate` wants."""

    def __init__(self) -> None:
        self.results: dict[str, list[Result]] = {}

    def rate(self, label: str, name: str, spec: Spec, environment: Mapping[str, str] | None = None) -> float:
        result = run_contestant(name, spec, environment)
        self.results.setdefault(label, []).append(result)
        return result.images_per_s

    def cpu_ms(self, label: str) -> float:
        return statistics.median(result.cpu_ms_per_image for result in self.results[label])


def prepare(folder: Path, spec: Spec, samples: int) -> dict[str, str]:
    """Our shards and every peer's copy in `folder`; returns the peers that cannot take part, with the reason."""
    print(f"making {samples} samples and each peer's copy of them", file=sys.stderr)
    images = tuple(picture(seed) for seed in range(min(samples, 480)))
    (folder / "jpeg").mkdir()
    for index, image in enumerate(images):
        (folder / "jpeg" / f"{index:06d}.jpg").write_bytes(image)
    # webdataset gives whole shards to its workers, so there must be at least as many; these are about 60 MB, or 10.
    config = WriterConfig(fractions={"train": 1.0}, shard_samples=max(samples // 8, BATCH))
    write_shards(Pictures(images, samples), str(folder), config)
    missing = {}
    for name in PEERS:
        try:
            if name in ("mosaic", "litdata", "energon"):
                _spawn(_python_of(name), ["write", name, spec.to_json(), str(samples)])
            run_contestant(name, replace(spec, warmup_images=BATCH, images=BATCH))
        except ContestantFailedError as error:
            missing[name] = "not installed" if "ModuleNotFoundError" in str(error) else str(error)
            print(f"{PEERS[name]}: {missing[name]}", file=sys.stderr)
    return missing


def corrupt_copy(folder: Path, target: Path) -> None:
    """The shards with one byte changed in every hundredth image, side files and manifest as they were."""
    target.mkdir()
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    store, sample = open_store(str(folder)), 0
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copy(path, target / path.name)
    for shard in manifest.shards:
        table = read_members(store, shard)
        with open(target / shard.tar, "r+b") as tar:
            for row, member in enumerate(table.member):
                if member.endswith(".jpg"):
                    sample += 1
                    if sample % CORRUPT_EVERY == 0:
                        tar.seek(int(table.offset[row]) + int(table.size[row]) // 2)
                        byte = tar.read(1)[0]
                        tar.seek(-1, os.SEEK_CUR)
                        tar.write(bytes([byte ^ 0xFF]))


def pixel_error(images: int) -> float:
    """Mean absolute difference from Pillow, 1.0 = white."""
    encoded = [picture(seed) for seed in range(images)]
    decoder = Decoder(Decoder.Config(image_size=SIZE, mean=MEAN, std=STD))
    window, bits = np.tile([0.0, 255.0], (images, 1)), np.full(images, 8)
    ours, _ = decoder.decode(encoded, augment.identity(images), window, bits)
    theirs = np.stack([pillow_pixels(image) for image in encoded])
    return float(np.abs(ours.numpy() - theirs).mean() * STD)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(quick: bool) -> list[Figure]:
    """Folder against the peers, then S3 against folder, then faults, corrupt members, memory and pixels."""
    samples, rounds = (3 * BATCH, 1) if quick else (50 * BATCH, 5)
    with tempfile.TemporaryDirectory(prefix="roentgen-bench-") as name:
        folder = Path(name, "shards")
        folder.mkdir()
        spec = Spec(
            folder=str(folder),
            warmup_images=BATCH if quick else 5 * BATCH,
            images=BATCH if quick else 40 * BATCH,
        )
        figures = _folder(spec, samples, rounds)
        figures += _s3(spec, Path(name), rounds)
        figures += _corrupt(spec, Path(name, "corrupt"), rounds)
        figures += _memory(spec, samples, epochs=3 if quick else 10)
    error = pixel_error(4 if quick else 32)
    note = "grey JPEG, 512 to 224 px, against Pillow's antialiased bilinear filter"
    figures.append(figure("loader.pixel_error", error, note=note))
    return figures


def _folder(spec: Spec, samples: int, rounds: int) -> list[Figure]:
    started = time.perf_counter()
    missing = prepare(Path(spec.folder), spec, samples)
    runs = Runs()
    names = ["ours", *(name for name in PEERS if name not in missing), "decode_only"]
    rates = alternate({name: partial(runs.rate, name, name, spec) for name in names}, rounds, log=_log)
    expected = runs.results["ours"][0]
    for name in names[:-1]:
        result = runs.results[name][0]
        # Means over different images of one kind: a wrong normalisation would be far off.
        if result.shape[1:] != expected.shape[1:] or abs(result.mean - expected.mean) > 0.3:
            raise ContestantFailedError(
                f"{name} gives other tensors than ours: {result.shape}, mean {result.mean:.3f} "
                f"against {expected.shape}, {expected.mean:.3f}"
            )
    wall_s = time.perf_counter() - started
    rate = partial(figure, unit="images/s", better="higher", repeats=rounds, threads=THREADS)
    figures = []
    for name, title in PEERS.items():
        if name in missing:
            figures.append(rate(f"loader.{name}_images_per_s", float("nan"), note=f"{title}: {missing[name]}"))
        else:
            note = f"{title}; {runs.cpu_ms(name):.2f} ms CPU an image"
            figures.append(rate(f"loader.{name}_images_per_s", statistics.median(rates[name]), note=note))
    ceiling = statistics.median(rates["decode_only"])
    figures.append(rate("loader.decode_ceiling_images_per_s", ceiling, note="DALI reading and decoding, no resize"))
    ours = statistics.median(rates["ours"])
    note = f"{runs.cpu_ms('ours'):.2f} ms CPU an image; {ours / ceiling:.2f} of the decode ceiling"
    figures.append(rate("loader.folder_images_per_s", ours, note=note))
    present = [name for name in PEERS if name not in missing]
    if present:
        best = max(present, key=lambda name: statistics.median(rates[name]))
        note = f"best of {len(present)} peers" + (f"; without {', '.join(missing)}" if missing else "")
        figures.append(
            ratio(
                "loader.folder_vs_best_peer",
                rates["ours"],
                rates[best],
                peer_name=PEERS[best],
                threads=THREADS,
                wall_s=wall_s,
                note=note,
            )
        )
    return figures


def _s3(spec: Spec, temporary: Path, rounds: int) -> list[Figure]:
    """The same files as a bucket. Server and proxy share the two cores with the loader, which counts against it."""
    started = time.perf_counter()
    bucket = temporary / "s3" / "bench"
    bucket.mkdir(parents=True)
    for path in Path(spec.folder).iterdir():
        if path.is_file():
            os.link(path, bucket / path.name)
    remote = replace(spec, manifest="s3://bench/manifest.json")
    runs = Runs()
    with ExitStack() as stack:
        server = S3Server("nanio", bucket.parent)
        stack.callback(server.stop)
        proxy = FaultProxy(server.endpoint)
        stack.callback(proxy.stop)
        direct, through = server.environment(), server.environment(proxy.endpoint)

        def faulty() -> float:
            proxy.plan(Plan(rate=FAULT_RATE, kinds=FAULT_KINDS, stall_s=60.0))
            rate = runs.rate("faulty", "ours", remote, through)
            report = proxy.report()
            _log(f"faults: {report['faults']} in {report['requests']} requests")
            proxy.plan(Plan())
            return rate

        rates = alternate(
            {
                "folder": partial(runs.rate, "folder", "ours", spec),
                "s3": partial(runs.rate, "s3", "ours", remote, direct),
                "quiet": partial(runs.rate, "quiet", "ours", remote, through),
                "faulty": faulty,
            },
            rounds,
            log=_log,
        )
    shutil.rmtree(bucket.parent)
    wall_s = time.perf_counter() - started
    note = f"nanio on the same cores; {runs.cpu_ms('folder'):.2f} and {runs.cpu_ms('s3'):.2f} ms CPU an image"
    faults = f"{FAULT_RATE:.0%} of attempts: {', '.join(FAULT_KINDS)}"
    return [
        ratio(
            "loader.s3_vs_folder",
            rates["s3"],
            rates["folder"],
            peer_name="own folder rate",
            threads=THREADS,
            wall_s=wall_s,
            note=note,
        ),
        ratio(
            "loader.s3_faults_vs_quiet",
            rates["faulty"],
            rates["quiet"],
            peer_name="no faults, same proxy",
            threads=THREADS,
            wall_s=wall_s,
            note=faults,
        ),
    ]


def _corrupt(spec: Spec, target: Path, rounds: int) -> list[Figure]:
    corrupt_copy(Path(spec.folder), target)
    runs = Runs()
    rates = alternate(
        {
            "whole": partial(runs.rate, "whole", "ours", spec),
            "corrupt": partial(runs.rate, "corrupt", "ours", replace(spec, folder=str(target))),
        },
        rounds,
        log=_log,
    )
    shutil.rmtree(target)
    good = runs.results["corrupt"][0].good_fraction
    note = f"{1 - good:.2%} void slots; without corrupt members {statistics.median(rates['whole']):,.0f}"
    median = statistics.median(rates["corrupt"])
    return [figure("loader.corrupt_1pct_images_per_s", median, repeats=rounds, threads=THREADS, note=note)]


def _memory(spec: Spec, samples: int, epochs: int) -> list[Figure]:
    started = time.perf_counter()
    result = run_contestant("ours", replace(spec, images=samples, epochs=epochs))
    # The first epoch fills buffers; after it, one epoch's end differs from the next by what the queues then hold.
    later = result.resident_mb[1:] or result.resident_mb
    half = max(1, len(later) // 2)
    early, late = statistics.median(later[:half]), statistics.median(later[-half:])
    return [
        figure(
            "loader.memory_growth_mb",
            late - early,
            threads=THREADS,
            wall_s=time.perf_counter() - started,
            note=f"medians of resident MB at the ends of epochs 2 to {epochs}, both halves: {early:,.0f}, {late:,.0f}",
        )
    ]
