"""The contestants of `ci.bench.loader`: each turns the same JPEGs into the same tensors, in a process of its own.

`python -m ci.bench.loader_contestants NAME SPEC` warms up, measures, and prints one JSON object. A peer is set up as
its documentation says for two workers: shuffled, decoding with Pillow in grey, resizing with Pillow's antialiased
bilinear filter, batches put together in the workers. Peers are imported inside the functions, so that one that is not
installed ends as ImportError, which the parent reports.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

BATCH = 96
SIZE = 224
MEAN, STD = 0.5, 0.25
THREADS = 2
MEMBER = "0.jpg"  # of every sample of the shards


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to read and how much. `folder` holds the shards; the formats of others lie in its subfolders."""

    folder: str
    warmup_images: int
    images: int
    manifest: str = ""  # ours; a folder or s3:// URL
    epochs: int = 0  # ours: run this many whole epochs and report memory instead

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one run. `cpu_ms_per_image` counts this process and its children; `mean` is of the last batch, a check."""

    images_per_s: float
    cpu_ms_per_image: float
    shape: tuple[int, ...]
    mean: float
    good_fraction: float = 1.0
    resident_mb: tuple[float, ...] = ()  # ours: after each epoch, children included

    @classmethod
    def from_json(cls, text: str) -> Result:
        body = json.loads(text)
        body["shape"], body["resident_mb"] = tuple(body["shape"]), tuple(body["resident_mb"])
        return cls(**body)


def pillow_pixels(encoded: bytes) -> np.ndarray:
    """One JPEG -> [1, H, W] float32, the way a careful user of Pillow and NumPy writes it."""
    image = Image.open(io.BytesIO(encoded)).convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32)
    pixels -= np.float32(255 * MEAN)
    pixels *= np.float32(1 / (255 * STD))
    return pixels[None]


def stack(images: list[np.ndarray]) -> Tensor:
    """A batch of `pillow_pixels` -> [B, 1, H, W]."""
    return torch.from_numpy(np.stack(images))


# ---- contestants: Spec -> endless batches [B, 1, H, W] ----


def ours(spec: Spec) -> Iterator[Tensor]:
    """Our Loader as a run uses it, without augmentation and text."""
    from shards.decode import Decoder
    from shards.loader import Loader
    from shards.transforms import augment

    nothing = augment.Config(
        crop_area_fraction=(1.0, 1.0),
        crop_aspect_ratio=1.0,
        rotation_degrees=0.0,
        brightness_fraction=0.0,
        contrast_fraction=0.0,
    )
    config = Loader.Config(
        train=spec.manifest or f"{spec.folder}/manifest.json",
        max_skip_rate=0.1,
        decode=Decoder.Config(image_size=SIZE, threads=THREADS, mean=MEAN, std=STD),
        augment=nothing,
    )
    loader = Loader(config, global_batch_size=BATCH, seed=1, fields=("pixel_values",))
    with loader.start(0) as batches:
        for batch in batches:
            good = batch["valid"][batch["study_index"]]
            yield batch["pixel_values"] if bool(good.all()) else batch["pixel_values"][good]


def webdataset(spec: Spec) -> Iterator[Tensor]:
    """webdataset on the same tars, Pillow in a DataLoader."""
    import webdataset as wds

    shards = sorted(str(path) for path in Path(spec.folder).glob("*.tar"))
    data = (
        wds.WebDataset(shards, shardshuffle=len(shards), resampled=False)
        .shuffle(500)
        .map(lambda sample: pillow_pixels(sample[MEMBER]))
        .batched(BATCH, collation_fn=stack)
        .repeat()
    )
    yield from wds.WebLoader(data, batch_size=None, num_workers=THREADS)


def _forever(make: Callable[[], Any]) -> Iterator[Tensor]:
    """The epochs of a DataLoader whose workers persist."""
    loader = make()
    while True:
        yield from loader


def _define_torchvision_operators() -> None:
    """So that PyPI's torchvision, which streaming imports for data sets not used here, loads beside a torch for CPU."""
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def mosaic(spec: Spec) -> Iterator[Tensor]:
    """MosaicML Streaming on its own format, Pillow in a DataLoader."""
    _define_torchvision_operators()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    class Pictures(StreamingDataset):
        def __getitem__(self, at: Any) -> np.ndarray:
            return pillow_pixels(super().__getitem__(at)["jpg"])

    clean_stale_shared_memory()
    data = Pictures(local=f"{spec.folder}/mds", shuffle=True, batch_size=BATCH)
    return _forever(
        lambda: DataLoader(
            data, batch_size=BATCH, num_workers=THREADS, collate_fn=stack, drop_last=True, persistent_workers=True
        )
    )


def write_mosaic(spec: Spec, images: list[bytes], samples: int) -> None:
    """The same images in MosaicML's format."""
    _define_torchvision_operators()
    from streaming import MDSWriter

    with MDSWriter(out=f"{spec.folder}/mds", columns={"jpg": "bytes"}) as writer:
        for sample in range(samples):
            writer.write({"jpg": images[sample % len(images)]})


def litdata(spec: Spec) -> Iterator[Tensor]:
    """litdata on its own format, Pillow in its DataLoader."""
    from litdata import StreamingDataLoader, StreamingDataset

    class Pictures(StreamingDataset):
        def __getitem__(self, at: Any) -> np.ndarray:
            return pillow_pixels(super().__getitem__(at)["jpg"])

    data = Pictures(f"{spec.folder}/litdata", shuffle=True, drop_last=True)
    return _forever(
        lambda: StreamingDataLoader(
            data, batch_size=BATCH, num_workers=THREADS, collate_fn=stack, persistent_workers=True
        )
    )


def write_litdata(spec: Spec, images: list[bytes], samples: int) -> None:
    """The same images in litdata's format."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(f"{spec.folder}/litdata", chunk_bytes="64MB")
    for sample in range(samples):
        writer[sample] = {"jpg": images[sample % len(images)]}
    writer.done()
    writer.merge()


def energon(spec: Spec) -> Iterator[Tensor]:
    """Megatron-Energon on the same tars, Pillow in its task encoder."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon import Sample as EnergonSample

    @edataclass
    class Picture(EnergonSample):
        encoded: bytes

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        return Picture(**basic_sample_keys(sample), encoded=sample[MEMBER])

    class Pictures(DefaultTaskEncoder):  # type: ignore[misc, type-arg]
        decoder = None
        cookers = (Cooker(cook),)

        @stateless
        def encode_sample(self, sample: Any) -> np.ndarray:
            return pillow_pixels(sample.encoded)

        def batch(self, samples: list[np.ndarray]) -> Tensor:
            return stack(samples)

        def encode_batch(self, batch: Tensor) -> Tensor:
            return batch

    data = get_train_dataset(
        f"{spec.folder}/energon",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=THREADS),
        batch_size=BATCH,
        shuffle_buffer_size=500,
        max_samples_per_sequence=100,
        task_encoder=Pictures(),
    )
    yield from get_loader(data)


def write_energon(spec: Spec, images: list[bytes], samples: int) -> None:
    """Energon's index beside hard links to the same tars."""
    folder = Path(spec.folder, "energon")
    folder.mkdir()
    for tar in Path(spec.folder).glob("*.tar"):
        os.link(tar, folder / tar.name)
    command = [
        sys.executable, "-m", "megatron.energon.cli.main", "prepare", "--non-interactive", "--split-ratio", "1,0,0",
        "--sample-type", "CrudeWebdataset", "--num-workers", "1", "--no-progress", str(folder),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def _dali(spec: Spec, *, decode_only: bool) -> Iterator[Tensor]:
    from nvidia.dali import Pipeline, fn, types

    paths = sorted(Path(spec.folder).glob("*.tar"))

    pipeline = Pipeline(batch_size=BATCH, num_threads=THREADS, device_id=None, prefetch_queue_depth=2, seed=1)
    with pipeline:
        encoded: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=[MEMBER],
            random_shuffle=True,
            initial_fill=500,
        )
        image: Any = fn.decoders.image(encoded, output_type=types.DALIImageType.GRAY)
        if not decode_only:
            # uint8 out of the resize is DALI's default and its fastest way.
            image = fn.resize(image, size=(SIZE, SIZE))
            image = fn.crop_mirror_normalize(image, mean=[255 * MEAN], std=[255 * STD], output_layout="CHW")
        pipeline.set_outputs(image)
    pipeline.build()
    nothing = torch.zeros((BATCH, 1, SIZE, SIZE))
    while True:
        (output,) = pipeline.run()
        # The buffer is DALI's, and overwritten two batches later: a batch to be kept must be copied.
        yield nothing if decode_only else torch.from_dlpack(output.as_tensor()).clone()


def dali_reader(spec: Spec) -> Iterator[Tensor]:
    """DALI's own webdataset reader on the same tars and indices, all in one pipeline."""
    return _dali(spec, decode_only=False)


def decode_only(spec: Spec) -> Iterator[Tensor]:
    """No contestant: what reading and decoding alone allow."""
    return _dali(spec, decode_only=True)


CONTESTANTS: dict[str, Callable[[Spec], Iterator[Tensor]]] = {
    "ours": ours,
    "webdataset": webdataset,
    "mosaic": mosaic,
    "litdata": litdata,
    "energon": energon,
    "dali_reader": dali_reader,
    "decode_only": decode_only,
}
WRITERS: dict[str, Callable[[Spec, list[bytes], int], None]] = {
    "mosaic": write_mosaic,
    "litdata": write_litdata,
    "energon": write_energon,
}


# ---- the clock ----


def _processes() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _cpu_s() -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in _processes()))


def _resident_mb() -> float:
    return sum(process.memory_info().rss for process in _processes()) / 2**20


def measure(name: str, spec: Spec) -> Result:
    """Wall rate over `spec.images`, after `spec.warmup_images`. Consuming a batch is looking at one value of it."""
    batches = CONTESTANTS[name](spec)
    seen = 0
    while seen < spec.warmup_images:
        batch = next(batches)
        seen += BATCH
    seen = good = 0
    cpu_s, started = _cpu_s(), time.perf_counter()
    while seen < spec.images:
        batch = next(batches)
        float(batch[0, 0, 0, 0])
        seen += BATCH
        good += len(batch)
    elapsed_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_s
    resident: list[float] = []
    for _ in range(spec.epochs):
        seen = 0
        while seen < spec.images:
            next(batches)
            seen += BATCH
        resident.append(_resident_mb())
    return Result(
        images_per_s=spec.images / elapsed_s,
        cpu_ms_per_image=cpu_s / spec.images * 1e3,
        shape=tuple(batch.shape),
        mean=float(batch.mean()),
        good_fraction=good / spec.images,
        resident_mb=tuple(resident),
    )


def main(arguments: list[str]) -> int:
    """`NAME SPEC`: measure. `write NAME SPEC SAMPLES`: make a peer's copy of the data from the files in `jpeg/`."""
    torch.set_num_threads(1)  # a loader's threads are those it was given; torch's own would come on top
    if arguments[0] == "write":
        name, spec = arguments[1], Spec(**json.loads(arguments[2]))
        images = [path.read_bytes() for path in sorted(Path(spec.folder, "jpeg").iterdir())]
        WRITERS[name](spec, images, int(arguments[3]))
        return 0
    result = measure(arguments[0], Spec(**json.loads(arguments[1])))
    sys.stdout.write("result " + json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):  # workers of some peers take long to say goodbye
        child.kill()
    if arguments[0] == "mosaic":
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
