"""The contestants of `ci.bench.ct_loader`: each turns stored CT volumes into the same windowed crops.

`python -m ci.bench.ct_loader_contestants NAME SPEC` warms up, measures, and prints one JSON object. MONAI is set up as
its documentation says for two workers, without a cache: LoadImage, a random crop, ScaleIntensityRange.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

STORED = (120, 300, 400)  # voxels of a volume (z, y, x), 3 x 1 x 1 mm
CROP = (112, 256, 352)  # as fVLM's
WINDOW_HU = (-1150.0, 350.0)
BATCH = 2
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Spec:
    """`folder` holds our shards, and `nii/` the same voxels for MONAI."""

    folder: str
    studies: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one run. CPU time is that of this process and its children; `mean` of the last batch is a check."""

    studies_per_s: float
    cpu_ms_per_study: float
    shape: tuple[int, ...]
    mean: float


def ours(spec: Spec) -> Iterator[Tensor]:
    """Our Loader as a run uses it, without text and label maps."""
    from shards.loader import Loader

    loader = Loader(_config(spec), global_batch_size=BATCH, seed=1, fields=("pixel_values",))
    with loader.start(0) as batches:
        for batch in batches:
            assert bool(batch["valid"].all())
            yield batch["pixel_values"]


def decode_only(spec: Spec) -> Iterator[Tensor]:
    """No contestant: reading, zstd and differences alone, in one thread."""
    from shards.dataset import DataSet, Members, read_units
    from shards.decode_volume import Crop, VolumeDecoder, parts_to_read, place_crop

    config = _config(spec).volume
    assert config is not None
    decoder, data = VolumeDecoder(config), DataSet(f"{spec.folder}/manifest.json", "train")
    for step in count():
        chunk = step % len(data.table.units)
        unit, key = int(data.table.first_unit[chunk]), (0, step, 0, 0)

        def parts(unit: int, view: int, there: int, key: tuple[int, ...] = key) -> range:
            return parts_to_read(config, there, key, 1)

        found = read_units(data, chunk, [unit], lambda unit, views: [0], choose_parts=parts)[unit]
        assert isinstance(found, Members)
        view, chosen = found.record(adopted=False).views[0], found.views[0]
        read = range(chosen.first_part, chosen.first_part + len(chosen.parts))
        start, _ = place_crop(config, view, read, key[1:], 1)
        hu, _ = decoder._cut_out(Crop(view=view, parts=chosen.parts, first_part=read.start, start=start))
        yield torch.from_numpy(hu)[None, None].expand(BATCH, -1, -1, -1, -1)


def _config(spec: Spec):  # type: ignore[no-untyped-def]  # peers' environments import this module, too
    from shards.decode_volume import VolumeDecoder
    from shards.loader import Loader

    volume = VolumeDecoder.Config(size=CROP, windows_hu=(WINDOW_HU,), patch_size=(16, 16, 32), threads=THREADS)
    return Loader.Config(train=f"{spec.folder}/manifest.json", lanes=1, window_chunks=4, volume=volume)


def _monai(spec: Spec, ending: str) -> Iterator[Tensor]:
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropd, ScaleIntensityRanged

    files = [{"image": str(path)} for path in sorted(Path(spec.folder, "nii").glob(f"*{ending}"))]
    transform = Compose(
        [
            LoadImaged(keys=["image"], dtype=np.int16),  # a tenth faster than its default, float32
            EnsureChannelFirstd(keys=["image"]),
            RandSpatialCropd(keys=["image"], roi_size=CROP[::-1], random_size=False),
            ScaleIntensityRanged(
                keys=["image"], a_min=WINDOW_HU[0], a_max=WINDOW_HU[1], b_min=0.0, b_max=1.0, clip=True
            ),
        ]
    )
    repeats = -(-4 * spec.studies // len(files)) + BATCH
    loader = DataLoader(Dataset(files * repeats, transform), batch_size=BATCH, num_workers=THREADS, shuffle=True)
    for batch in loader:
        yield batch["image"]


def monai_nii(spec: Spec) -> Iterator[Tensor]:
    """MONAI on uncompressed NIfTI."""
    return _monai(spec, ".nii")


def monai_nii_gz(spec: Spec) -> Iterator[Tensor]:
    """MONAI on gzipped NIfTI."""
    return _monai(spec, ".nii.gz")


CONTESTANTS: dict[str, Callable[[Spec], Iterator[Tensor]]] = {
    "ours": ours,
    "monai_nii": monai_nii,
    "monai_nii_gz": monai_nii_gz,
    "decode_only": decode_only,
}


def _cpu_s() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(name: str, spec: Spec) -> Result:
    """Rate over `spec.studies` after a warm-up of eight. Consuming a batch is looking at one value of it."""
    batches = CONTESTANTS[name](spec)
    for _ in range(8 // BATCH):
        batch = next(batches)
    cpu_s, started = _cpu_s(), time.perf_counter()
    for _ in range(spec.studies // BATCH):
        batch = next(batches)
        float(batch[0, 0, 0, 0, 0])
    elapsed_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_s
    done = spec.studies // BATCH * (1 if name == "decode_only" else BATCH)
    return Result(
        studies_per_s=done / elapsed_s,
        cpu_ms_per_study=cpu_s / done * 1e3,
        shape=tuple(batch.shape),
        mean=float(batch.float().mean()),
    )


def main(arguments: list[str]) -> int:
    """`NAME SPEC`: measure and print."""
    torch.set_num_threads(1)
    result = measure(arguments[0], Spec(**json.loads(arguments[1])))
    sys.stdout.write("result " + json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
