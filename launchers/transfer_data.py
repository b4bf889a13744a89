"""What transfer is judged with: an image encoder from a run directory or a file of others, and images of a manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.images import ImageSplit
from core.models.foreign import Given, load_encoder
from core.models.initialise import draw_weights
from core.models.view_pool import GatedViewPool
from core.models.vision import VisionEncoder
from launchers.past_run import CONFIG, open_run
from shards.batch import NOT_ANNOTATED, StudyRecord
from shards.dataset import DataSet, Members, read_units
from shards.decode import Decoder
from shards.errors import BadSampleError, ConfigError, DataError
from shards.image_truth import Frame
from shards.keyed import text_key
from shards.store import open_store
from shards.transforms import augment

GREY_MEAN, GREY_STD = 0.5, 0.25  # of pixels that foreign encoders are given; folded into their patch kernel
DECODED_AT_ONCE = 64
AGE_BANDS = ((18, "below 18"), (40, "18 to 39"), (60, "40 to 59"), (75, "60 to 74"))


@dataclass(frozen=True, kw_only=True)
class TransferEncoder:
    """`decode`: how its images are made; `source`: where it is from and what matched, ready for JSON.

    `pool`: what its run learned to make one vector of a study's views, None for their mean.
    """

    name: str
    vision: VisionEncoder
    decode: Decoder.Config
    autocast: torch.dtype | None
    source: dict[str, Any]
    pool: GatedViewPool | None = None


def open_encoder(
    path: str,
    *,
    name: str | None = None,
    checkpoint: str = "latest",
    image_size: int | None = None,
    given: Given | None = None,
    device: torch.device | None = None,
) -> TransferEncoder:
    """The frozen encoder of a run directory (folder or s3://), or of a weights file or Hugging Face folder.

    `image_size`: pixels a side that it is judged at, None for its own; positions are interpolated. Raises ConfigError
    for a run of volumes, and as `load_encoder` does.
    """
    device, pool = device or torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    if path.startswith("s3://") or _is_run(path):
        with open_run(path, checkpoint, device) as run:
            vision, decode, autocast = vision_of(run.task), run.decode, run.autocast
            pool = pool_of(run.task)
            source = {"run": path, "recipe": run.recipe, "step": run.step}
        default = f"{run.recipe} step {run.step}"
    else:
        foreign = load_encoder(path, given)
        foreign.takes_grey_as(GREY_MEAN, GREY_STD)
        vision, autocast = foreign.encoder.to(device), torch.bfloat16 if device.type == "cuda" else None
        decode = Decoder.Config(image_size=vision.config.image_size, mean=GREY_MEAN, std=GREY_STD)
        report = foreign.report
        source = {
            "weights": path, "matched": len(report.matched), "missing": report.missing,
            "unexpected": report.unexpected, "reshaped": report.reshaped,
        }  # fmt: skip
        default = Path(path).stem
    size = image_size or vision.config.image_size  # a task may be given larger images than its encoder
    if size % vision.config.patch_size:
        fit = max(1, size // vision.config.patch_size) * vision.config.patch_size
        raise ConfigError(
            f"image size {size} is no multiple of {path}'s patch of {vision.config.patch_size}; use {fit}"
        )
    decode = replace(
        decode, image_size=size, device="mixed" if device.type == "cuda" else "cpu", threads=os.cpu_count() or 1
    )
    vision.eval().requires_grad_(False)
    if pool is not None:
        pool.eval().requires_grad_(False)
    return TransferEncoder(
        name=name or default, vision=vision, decode=decode, autocast=autocast, source=source, pool=pool
    )


def _is_run(path: str) -> bool:
    if not Path(path.removeprefix("file://")).is_dir():
        return False
    with open_store(path) as store:  # a Hugging Face folder has a config.json, too
        return store.exists(CONFIG) and store.exists("latest")


def vision_of(task: torch.nn.Module) -> VisionEncoder:
    """The first image encoder in a task, in the order of its parts. Raises ConfigError where it has none."""
    for part in task.modules():
        if isinstance(part, VisionEncoder):
            return part
    raise ConfigError(f"task {type(task).__name__} has no encoder of images; volumes are judged by evaluate.py")


def pool_of(task: torch.nn.Module) -> GatedViewPool | None:
    """The attention over views that a task has learned, if it has."""
    return next((part for part in task.modules() if isinstance(part, GatedViewPool)), None)


def random_like(encoder: TransferEncoder, seed: int) -> TransferEncoder:
    """An encoder of the same shape with weights drawn from `seed`: what pre-training has to beat."""
    vision = VisionEncoder(encoder.vision.config)
    draw_weights(vision, seed)
    vision = vision.to(encoder.vision.patch.weight.device).eval().requires_grad_(False)
    return replace(encoder, name="random", vision=vision, source={"random": seed}, pool=None)


def read_images(
    manifest: str,
    split: str,
    decode: Decoder.Config,
    *,
    structures: Sequence[str] = (),
    limit: int | None = None,
    source: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ImageSplit:
    """The first view of every study of a split, with masks of `structures` and with boxes, in memory.

    A study that cannot be used, and a box that is empty or outside its image, is left out and counted in `skipped`.
    `source`: value of the group of that name; None: the data's own name. Raises ConfigError where the manifest does
    not know a structure, DataError where no image is left.
    """
    data = DataSet(manifest, split)
    unknown = [name for name in structures if name not in data.whole.masks]
    if unknown:
        raise ConfigError(
            f"{manifest}: its label maps do not know {', '.join(unknown)}; there is "
            f"{', '.join(sorted(data.whole.masks)) or 'none'}"
        )
    total = min(data.table.total, limit or data.table.total)
    reading = _Reading(data, decode, tuple(structures), source or data.whole.source)
    decoder = Decoder(decode)
    for first in range(0, total, DECODED_AT_ONCE):
        reading.take(decoder, np.arange(first, min(first + DECODED_AT_ONCE, total)))
        progress(f"{split}: images", min(first + DECODED_AT_ONCE, total), total)
    data.close()
    return reading.split()


class _Reading:
    """Images of a split as they come."""

    def __init__(self, data: DataSet, decode: Decoder.Config, structures: tuple[str, ...], source: str) -> None:
        self.data, self.decode, self.structures, self.source = data, decode, structures, source
        self.names = tuple(data.whole.labels)
        self.box_names: dict[str, int] = {}
        self.pixels: list[Tensor] = []
        self.masks: list[np.ndarray] = []
        self.boxes: list[tuple[Tensor, Tensor]] = []
        self.records: list[StudyRecord] = []
        self.skipped: Counter[str] = Counter()

    def take(self, decoder: Decoder, units: np.ndarray) -> None:
        """Decode the first views of these units."""
        found: dict[int, Any] = {}
        chunk = self.data.table.chunk_of(units)
        for number in np.unique(chunk):
            found |= read_units(
                self.data, int(number), units[chunk == number].tolist(), lambda unit, views: range(min(views, 1)),
                masks=bool(self.structures),
            )  # fmt: skip
        usable = []
        for unit in units.tolist():
            try:
                if isinstance(found[unit], BadSampleError):
                    raise found[unit]
                usable.append((found[unit], self._truth(found[unit])))
            except BadSampleError as error:
                self.skipped[error.cause] += 1
        if not usable:
            return
        views = [truth[0].views[0] for _, truth in usable]
        windows = [view.window or (0.0, 255.0 if view.bits == 8 else 65535.0) for view in views]
        pixels, decoded, causes = decoder.submit(
            [members.views[0].parts[0] for members, _ in usable], augment.identity(len(usable)),
            np.asarray(windows, dtype=np.float32), np.asarray([view.bits for view in views]),
        ).result()  # fmt: skip
        self.skipped.update(f"image: {cause}" for cause in causes if cause is not None)
        self.pixels.append(pixels[torch.from_numpy(decoded)].cpu())
        for (_, (record, masks, boxes)), ok in zip(usable, decoded.tolist(), strict=True):
            if ok:
                self.records.append(record)
                self.masks.append(masks)
                self.boxes.append(boxes)

    def _truth(self, members: Members) -> tuple[StudyRecord, np.ndarray, tuple[Tensor, Tensor]]:
        record = members.record(self.data.manifest.adopted)
        if not members.views:
            raise BadSampleError("", "", "no image")
        view, shown = record.views[0], members.views[0]
        if view.depth is not None:
            raise BadSampleError("", "", "a volume")
        frame = Frame.of(view.height, view.width, self.decode)
        ids = [self.data.whole.masks[name] for name in self.structures]
        if ids and not shown.masks:
            raise BadSampleError("", "", "no label map")
        masks = frame.masks([shown.masks[key] for key in sorted(shown.masks)], ids)
        corners, labels = [], []
        for box in record.boxes:
            if box.view != view.id:
                continue
            found = frame.box(box)
            if isinstance(found, str):
                self.skipped[found] += 1
                continue
            corners.append(found)
            labels.append(self.box_names.setdefault(box.label, len(self.box_names)))
        return record, masks, (torch.tensor(corners, dtype=torch.float32).view(-1, 4), torch.tensor(labels).long())

    def split(self) -> ImageSplit:
        """Raises DataError where nothing was usable."""
        if not self.records:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.skipped.items())
            raise DataError(f"{self.data.url}: no image to use; left out: {causes or 'nothing'}")
        labels = [[record.labels.get(name, NOT_ANNOTATED) for name in self.names] for record in self.records]
        # Names of boxes in alphabetical order, whatever came first: another split numbers them alike.
        box_names = tuple(sorted(self.box_names))
        place = torch.zeros(max(1, len(box_names)), dtype=torch.int64)
        for name, number in self.box_names.items():
            place[number] = box_names.index(name)
        return ImageSplit(
            pixel_values=torch.cat(self.pixels),
            labels=torch.tensor(labels, dtype=torch.int8).view(len(self.records), len(self.names)),
            label_names=self.names,
            patient_key=torch.tensor([text_key(record.patient) for record in self.records]),
            masks=torch.from_numpy(np.stack(self.masks)) if self.structures else None,
            structures=self.structures,
            boxes=tuple(corners for corners, _ in self.boxes),
            box_labels=tuple(place[labels] for _, labels in self.boxes),
            box_names=box_names,
            groups=groups_of(self.records, self.source),
            skipped=dict(self.skipped),
        )


def groups_of(records: Sequence[StudyRecord], source: str) -> Mapping[str, tuple[str | None, ...]]:
    """Attribute -> its value of each study, None where it is not known."""
    return {
        "age": tuple(age_band(record.age_years) for record in records),
        "sex": tuple(record.sex for record in records),
        "view": tuple(record.views[0].view for record in records),
        "source": tuple(str(record.provenance.get("collection") or source) for record in records),
    }


def age_band(years: float | None) -> str | None:
    """The band of an age in years, None where it is not known."""
    if years is None:
        return None
    return next((name for end, name in AGE_BANDS if years < end), "75 and above")
