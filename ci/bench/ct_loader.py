"""Studies per second of the volume loader against MONAI without a cache, on the same voxels, and what decoding takes.

Volumes of 120 x 300 x 400 voxels made of a real CT's slices, crops of 112 x 256 x 352, fVLM's window, two threads or
workers; each contestant runs alone in a process of its own, in turns. MONAI: `bash ci/bench/setup_peers.sh`.
Temporary files: about 0.4 GB.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ci.bench.ct_loader_contestants import CROP, STORED, THREADS, Result, Spec
from ci.bench.ct_voxels import full_size
from ci.bench.figure import REPOSITORY, Figure, alternate, figure, ratio
from ci.bench.loader import PEERS_PYTHON, ContestantFailedError
from shards.batch import EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.ingest import Item, Loaded, Plan, hashed_key
from shards.volume_codec import encode_volume
from shards.writer import WriterConfig, write_shards

DESCRIPTION = "the volume loader's studies/s against MONAI on .nii and .nii.gz, and the share of decoding"

PEERS = {"monai_nii": "MONAI, .nii", "monai_nii_gz": "MONAI, .nii.gz"}
CROP_MB = float(np.prod(CROP)) * 2 / 1e6  # of 16-bit voxels
_LIMIT_S = 300


@dataclass(frozen=True)
class FullSize:
    """The bench's own source: `count` studies of one volume each."""

    count: int
    name: str = "bench"
    labels: tuple[str, ...] = ()
    key_fingerprint: str | None = None

    @property
    def masks(self) -> dict[str, int]:
        return {}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"count": self.count}

    def plan(self) -> Plan:
        keys = [hashed_key(None, "study", str(index)) for index in range(self.count)]
        return Plan(items=[Item(key=key, patient=key, split="train", payload=n) for n, key in enumerate(keys)])

    def load(self, item: Item) -> Loaded:
        depth, height, width = STORED
        view = ViewRecord(id="0", depth=depth, height=height, width=width, bits=16, spacing_mm=(3.0, 1.0, 1.0))
        record = StudyRecord(study=item.key, patient=item.patient, report={"findings": "bench"}, views=[view])
        volume = EncodedVolume(parts=tuple(encode_volume(full_size(item.payload, STORED))))
        return Loaded(sample=Sample(key=item.key, record=record, images=(volume,)))


def run_contestant(name: str, spec: Spec) -> Result:
    """One run in a fresh process. Raises ContestantFailedError with the end of its errors."""
    python = str(PEERS_PYTHON) if name in PEERS and PEERS_PYTHON.exists() else sys.executable
    done = subprocess.run(
        [python, "-m", "ci.bench.ct_loader_contestants", name, spec.to_json()],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=_LIMIT_S, check=False,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode != 0 or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ContestantFailedError(f"{name} ended with {done.returncode}: {lines[-1]}")
    return Result(**json.loads(found[0].removeprefix("result ")))


def run(quick: bool) -> list[Figure]:
    """Ours and MONAI in turns; then what decoding alone takes."""
    volumes, studies, rounds = (2, 4, 1) if quick else (6, 24, 3)
    results: dict[str, list[Result]] = {}

    def rate(name: str, spec: Spec) -> float:
        result = run_contestant(name, spec)
        results.setdefault(name, []).append(result)
        return result.studies_per_s

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="roentgen-bench-") as name:
        spec = Spec(folder=name, studies=studies)
        stored_bytes = _write(Path(name), volumes)
        names = ("ours", *PEERS, "decode_only")
        rates = alternate({one: partial(rate, one, spec) for one in names}, rounds, log=_log)
    _check_same(results)
    wall_s = time.perf_counter() - started

    cpu_ms = {one: statistics.median(result.cpu_ms_per_study for result in results[one]) for one in results}
    median = {one: statistics.median(rates[one]) for one in rates}
    shown = partial(figure, better="higher", repeats=rounds, threads=THREADS)
    figures = []
    for one in ("ours", *PEERS):
        note = f"{PEERS.get(one, 'ours')}; {median[one] * CROP_MB:.0f} MB/s of voxels; {cpu_ms[one]:.0f} ms CPU each"
        figures.append(shown(f"ct_loader.{one}_studies_per_s", median[one], unit="studies/s", note=note))
    share = cpu_ms["decode_only"] / cpu_ms["ours"]
    voxels = float(np.prod(STORED)) * 2
    note = f"{cpu_ms['decode_only']:.0f} of {cpu_ms['ours']:.0f} ms CPU; stored at 1 / {voxels / stored_bytes:.2f}"
    figures.append(figure("ct_loader.decode_share", share, unit="fraction", better="lower", note=note, repeats=rounds))
    best = max(PEERS, key=lambda one: median[one])
    figures.append(
        ratio(
            "ct_loader.vs_monai", rates["ours"], rates[best], peer_name=PEERS[best], threads=THREADS, wall_s=wall_s,
            note="no cache; the faster of the two",
        )
    )  # fmt: skip
    return figures


def _write(folder: Path, volumes: int) -> float:
    """Our shards and MONAI's files of the same voxels; returns our bytes a study."""
    manifest = write_shards(FullSize(volumes), str(folder), WriterConfig(fractions={"train": 1.0}))
    (folder / "nii").mkdir()
    for number in range(volumes):
        voxels = full_size(number, STORED).transpose(2, 1, 0)
        image = nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0]))
        for ending in (".nii", ".nii.gz"):
            nib.save(image, folder / "nii" / f"{number:03d}{ending}")
    return sum(shard.bytes for shard in manifest.shards) / volumes


def _check_same(results: Mapping[str, list[Result]]) -> None:
    """Means of crops of one kind: a wrong window would be far off."""
    ours = results["ours"][0]
    for name in PEERS:
        one = results[name][0]
        if sorted(one.shape) != sorted(ours.shape) or abs(one.mean - ours.mean) > 0.1:
            raise ContestantFailedError(
                f"{name} gives other tensors than ours: {one.shape}, mean {one.mean:.3f}, "
                f"against {ours.shape}, {ours.mean:.3f}"
            )


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
