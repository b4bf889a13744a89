"""Parts of CT volumes -> windowed crops of one size, and the shares of anatomies in them from the same crop.

The host undoes zstd and the differences for the crop alone, slice by slice while they are in its cache. What follows,
resize and HU windows, is one DALI graph for volume and label maps on a GPU, and on the CPU where the recipe resizes;
a crop that is only windowed leaves the host finished, since DALI's arithmetic on the CPU takes five times as long.
Every choice comes in as a number; bad volumes are reported, never raised; this module does not fetch or log.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math
from torch import Tensor

from shards import keyed
from shards.batch import ViewRecord
from shards.decode import PendingBatch
from shards.errors import ConfigError
from shards.transforms.anatomy import Place, Sides, patch_grid, plain_name, shares
from shards.volume_codec import AIR_HU, PART_SLICES, Part, part_count

_CACHED_VOXELS = 1 << 16  # float32 voxels that one pass after the other finds in the cache


def stored_sides(view: ViewRecord) -> Sides:
    """Slices, rows and columns of a stored volume."""
    return view.depth or 1, view.height, view.width


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One crop to decode: the parts that hold its slices, of the volume and of each label map, and where it lies.

    `parts` [K] are numbers `first_part` ... of the volume; `maps` [M][K] those of its label maps, none if no shares are
    wanted. `mask_ids`: anatomy -> id in the maps. `flip`: axes that are mirrored after everything else.
    `size`: voxels cut, where they are not the recipe's; alike for all crops of a batch. `shows`: the anatomies it was
    made for, None for all.
    """

    view: ViewRecord
    parts: Sequence[memoryview]
    first_part: int
    maps: Sequence[Sequence[memoryview]] = ()
    mask_ids: Mapping[str, int] = field(default_factory=dict)
    start: Sides = (0, 0, 0)
    flip: tuple[bool, bool, bool] = (False, False, False)
    size: Sides | None = None
    shows: frozenset[str] | None = None


class VolumeBatch(PendingBatch):
    """Crops on their way through the decoder; `result` waits for them.

    After it `share` [V, A, T] float32, `present` and `whole` [V, A] bool are filled, zero where no maps were given.
    `labels` [V, D, H, W] uint8, if wanted: 1 + the number of a voxel's anatomy, of several the last, 0 for none.
    """

    def __init__(self, pixel_values: Tensor, anatomies: int, patches: int, *, labels: bool = False) -> None:
        super().__init__(pixel_values)
        views = len(pixel_values)
        self.labels = np.zeros((views, *pixel_values.shape[2:]), np.uint8) if labels else None
        self.share = np.zeros((views, anatomies, patches), np.float32)
        self.present = np.zeros((views, anatomies), bool)
        self.whole = np.zeros((views, anatomies), bool)


class VolumeDecoder:
    """Crops to tensors in `threads` workers, one crop a worker."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sides are (z, y, x). Each HU window is a channel, 0 at its low and 1 at its high end; then mean and std."""

        size: Sides = (112, 256, 352)  # voxels of the model's input
        # Voxels cut out of the stored volume and resized to `size` (linear, label maps nearest); None: cut as `size`.
        cut: Sides | None = None
        windows_hu: tuple[tuple[float, float], ...] = ((-1150.0, 350.0),)
        mean: float = 0.0
        std: float = 1.0
        patch_size: Sides = (16, 16, 32)
        anatomies: tuple[str, ...] = ()  # columns of the anatomy fields; names of the manifest's masks
        # An anatomy that a face of the crop cuts counts all the same if the report speaks of it (fvlm.md, 5.1.6).
        keep_cut_if_mentioned: bool = True
        flip_probability: tuple[float, float, float] = (0.0, 0.0, 0.0)  # reports name sides: leave x at 0
        threads: int = 1
        device: Literal["cpu", "mixed"] = "cpu"
        device_id: int = 0

        def __post_init__(self) -> None:
            for name in ("size", "cut", "patch_size"):
                sides = getattr(self, name)
                if sides is not None and min(sides) < 1:
                    raise ConfigError(f"{name}={sides}: every side needs at least 1 voxel")
            if any(side % patch for side, patch in zip(self.size, self.patch_size, strict=True)):
                raise ConfigError(f"patch_size={self.patch_size} does not divide size={self.size}; change one")
            if not self.windows_hu or any(not low < high for low, high in self.windows_hu):
                raise ConfigError(f"windows_hu={self.windows_hu}: give pairs (low, high) with low below high")
            if self.std <= 0 or self.threads < 1:
                raise ConfigError(f"std={self.std}, threads={self.threads}: std above 0, threads at least 1")
            if len({plain_name(name) for name in self.anatomies}) != len(self.anatomies):
                raise ConfigError(f"anatomies={self.anatomies}: one is named twice")
            if not all(0 <= chance <= 1 for chance in self.flip_probability):
                raise ConfigError(f"flip_probability={self.flip_probability} is outside [0, 1]")

        @property
        def taken(self) -> Sides:
            """Voxels cut out of the stored volume."""
            return self.cut or self.size

        @property
        def patches(self) -> int:
            return math.prod(patch_grid(self.size, self.patch_size))

    def __init__(self, config: Config, *, whole_graph: bool = False) -> None:
        """`whole_graph`: on the CPU, too, windows in DALI, as on a GPU; the same pixels to rounding, slower."""
        if config.device == "mixed" and not torch.cuda.is_available():
            raise ConfigError("device='mixed' decodes on a GPU and this machine shows none; use device='cpu'")
        self.config = config
        self._mixed = config.device == "mixed"
        self._in_graph = whole_graph or self._mixed or config.taken != config.size
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="decode-volume")
        self._of_worker = threading.local()

    def submit(self, crops: Sequence[Crop], *, labels: bool = False) -> VolumeBatch:
        """Start decoding; the bytes must not change before the result is taken. `labels`: give those of voxels, too."""
        config = self.config
        sizes = {crop.size or config.taken for crop in crops} or {config.taken}
        assert len(sizes) == 1, f"crops of {len(sizes)} sizes make no batch"
        (taken,) = sizes
        size = config.size if taken == config.taken else taken
        assert size == taken or config.cut is not None, "only crops of the recipe's own size are resized"
        shape = (len(crops), len(config.windows_hu), *size)
        if self._mixed:
            room = torch.empty(shape, device=torch.device("cuda", config.device_id))
        else:
            room = torch.from_numpy(np.empty(shape, np.float32))
        patches = math.prod(patch_grid(size, config.patch_size))
        batch = VolumeBatch(room, len(config.anatomies), patches, labels=labels)
        batch.runs = [self._pool.submit(self._decode, batch, row, crop) for row, crop in enumerate(crops)]
        return batch

    def _decode(self, batch: VolumeBatch, row: int, crop: Crop) -> None:
        try:
            hu, maps = self._cut_out(crop)
        except ValueError as error:
            batch.refuse(row, str(error))
            return
        if self._in_graph:
            maps = self._run_graph(batch.pixel_values[row], hu, maps)
        else:
            self._window(batch.pixel_values.numpy()[row], hu)
        flipped = [axis for axis, flip in enumerate(crop.flip) if flip]
        if flipped:
            batch.pixel_values[row] = batch.pixel_values[row].flip([axis + 1 for axis in flipped])
            maps = [np.ascontiguousarray(np.flip(one, tuple(flipped))) for one in maps]
        if maps and self.config.anatomies:
            self._shares(batch, row, crop, maps, flipped)

    def _cut_out(self, crop: Crop) -> tuple[np.ndarray, list[np.ndarray]]:
        """HU int16 [D, H, W] and label maps uint8 [D, H, W] each. Raises ValueError with the cause."""
        hu = self._assemble(crop, crop.parts, 2, AIR_HU)
        return hu, [self._assemble(crop, parts, 1, 0) for parts in crop.maps]

    def _assemble(self, crop: Crop, parts: Sequence[memoryview], itemsize: int, outside: int) -> np.ndarray:
        view, size = crop.view, crop.size or self.config.taken
        what = "" if itemsize == 2 else "label map: "
        depth = view.depth or 1
        low = [max(0, start) for start in crop.start]
        high = [min(n, start + side) for n, start, side in zip(
            (depth, view.height, view.width), crop.start, size, strict=True
        )]  # fmt: skip
        out = np.empty(size, np.int16 if itemsize == 2 else np.uint8)
        inside = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, crop.start, strict=True))
        if any(b - a < side for a, b, side in zip(low, high, size, strict=True)):
            out.fill(outside)
        target = out[inside].view(np.uint16) if itemsize == 2 else out[inside]
        window = (slice(low[1], high[1]), slice(low[2], high[2]))
        for number, data in enumerate(parts, start=crop.first_part):
            first = number * PART_SLICES
            expected = (min(PART_SLICES, depth - first), view.height, view.width)
            try:
                part = Part(data, itemsize=itemsize)
                if (part.slices, part.rows, part.columns) != expected:
                    found = f"{part.slices} x {part.rows} x {part.columns}"
                    raise ValueError(f"a part of {found} voxels where the record's grid has {expected}")
                begin, end = max(low[0], first), min(high[0], first + part.slices)
                if begin < end:
                    part.decode(target[begin - low[0] : end - low[0]], begin - first, window)
            except ValueError as error:
                raise ValueError(f"{what}{error}") from None
        return out

    def _window(self, shown: np.ndarray, hu: np.ndarray) -> None:
        """HU int16 [D, H, W] -> `shown` float32 [C, D, H, W]; a few slices at a time, which stay in the cache."""
        step = max(1, _CACHED_VOXELS // (hu.shape[1] * hu.shape[2]))
        for channel, (gain, shift, black, white) in enumerate(self._levels()):
            for first in range(0, len(hu), step):
                target = shown[channel, first : first + step]
                np.multiply(hu[first : first + step], gain, out=target)
                target += shift
                np.maximum(target, black, out=target)
                np.minimum(target, white, out=target)

    def _levels(self) -> list[tuple[np.float32, np.float32, np.float32, np.float32]]:
        """For each window: normalised = clip(gain * HU + shift, black, white)."""
        mean, std = self.config.mean, self.config.std
        return [
            (
                np.float32(1 / ((high - low) * std)),
                np.float32((-low / (high - low) - mean) / std),
                np.float32(-mean / std),
                np.float32((1 - mean) / std),
            )
            for low, high in self.config.windows_hu
        ]

    def _shares(
        self, batch: VolumeBatch, row: int, crop: Crop, maps: Sequence[np.ndarray], flipped: Sequence[int]
    ) -> None:
        config, view = self.config, crop.view
        known = {plain_name(name): number for name, number in crop.mask_ids.items()}
        names = [plain_name(name) for name in config.anatomies]
        taken = crop.size or config.taken
        place = Place(start=crop.start, size=taken, stored=stored_sides(view))
        faces = [faces[::-1] if axis in flipped else faces for axis, faces in enumerate(place.cut_faces)]
        depth, height, width = maps[0].shape
        boxes: list[tuple[Sides, Sides] | None] = [((0, 0, 0), (depth, height, width))] * len(names)
        if view.anatomy_boxes is not None and config.cut is None and not flipped:
            found = {plain_name(name): box for name, box in view.anatomy_boxes.items()}
            boxes = [_within(found[name], crop.start) if name in found else None for name in names]
        ids = [known[name] for name in names]
        share, present, whole = shares(maps, ids, config.patch_size, faces, boxes)
        batch.share[row], batch.present[row], batch.whole[row] = share, present, whole
        if batch.labels is not None:
            for number, wanted in enumerate(ids, start=1):
                for one in maps:
                    batch.labels[row][one == wanted] = number

    # ---- the DALI graph ----

    def _run_graph(self, shown: Tensor, hu: np.ndarray, maps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """HU and label maps of the cut -> `shown` [C, D, H, W], and label maps of the input's size."""
        pipelines: dict[int, Pipeline] = self._of_worker.__dict__.setdefault("pipelines", {})
        if len(maps) not in pipelines:
            pipelines[len(maps)] = self._build(len(maps))
        pipeline = pipelines[len(maps)]
        pipeline.feed_input("hu", [hu[..., None]])
        if maps:
            pipeline.feed_input("labels", [np.stack(maps, axis=-1)])
        pipeline.schedule_run()
        pixels, *labels = pipeline.share_outputs()
        try:
            if self._mixed:
                shown.copy_(torch.from_dlpack(pixels.as_tensor())[0])
                torch.cuda.current_stream(self.config.device_id).synchronize()
            else:
                shown.numpy()[...] = np.asarray(pixels.at(0))
            resized = [np.asarray(one.as_cpu().at(0) if self._mixed else one.at(0)) for one in labels]
            return [np.ascontiguousarray(one[..., n]) for one in resized for n in range(one.shape[-1])]
        finally:
            pipeline.release_outputs()

    def _build(self, maps: int) -> Pipeline:
        config = self.config
        pipeline = Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=config.device_id if self._mixed else None,
            prefetch_queue_depth=1,
            exec_async=self._mixed,
        )
        with pipeline:
            stored: Any = fn.external_source(name="hu", dtype=types.DALIDataType.INT16, ndim=4, layout="DHWC")
            outputs = [self._graph(stored)]
            if maps:
                labels: Any = fn.external_source(name="labels", dtype=types.DALIDataType.UINT8, ndim=4, layout="DHWC")
                if self._mixed:
                    labels = labels.gpu()
                if config.taken != config.size:
                    nearest = types.DALIInterpType.INTERP_NN
                    labels = fn.resize(labels, size=list(config.size), interp_type=nearest)
                outputs.append(labels)
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _graph(self, stored: Any) -> Any:
        """HU int16 [d, h, w, 1] -> [C, D, H, W] float32."""
        config = self.config
        if self._mixed:
            stored = stored.gpu()
        if config.taken != config.size:
            stored = fn.resize(
                stored,
                size=list(config.size),
                interp_type=types.DALIInterpType.INTERP_LINEAR,
                antialias=True,
                dtype=types.DALIDataType.FLOAT,
            )
        else:
            stored = fn.cast(stored, dtype=types.DALIDataType.FLOAT)
        channels = [
            dali_math.clamp(stored * float(gain) + float(shift), float(black), float(white))
            for gain, shift, black, white in self._levels()
        ]
        joined = fn.cat(*channels, axis=3) if len(channels) > 1 else channels[0]
        return fn.transpose(joined, perm=[3, 0, 1, 2])


def _within(box: tuple[int, int, int, int, int, int], start: Sides) -> tuple[Sides, Sides]:
    """A box of the stored grid in voxels of the crop."""
    first, end = ([box[side + axis] - start[axis] for axis in range(3)] for side in (0, 3))
    return (first[0], first[1], first[2]), (end[0], end[1], end[2])


# ---- which parts are read, and where the crop lies in them ----


def parts_to_read(config: VolumeDecoder.Config, parts: int, key: tuple[int, ...] | None, seed: int) -> range:
    """Which of a volume's `parts` are read, chosen before anything of it is known but their number.

    `key` (set, epoch, unit, view): a random crop; None: the central one, whatever the depth of the last part.
    """
    depth = config.taken[0]
    if key is None:
        starts = [(slices - depth) // 2 for slices in (PART_SLICES * (parts - 1) + 1, PART_SLICES * parts)]
        first, last = max(0, starts[0]) // PART_SLICES, (starts[1] + depth - 1) // PART_SLICES
        return range(min(first, parts - 1), min(last + 1, parts))
    needed = min(parts, part_count(depth - 1) + 1)
    first = int(keyed.integers(0, parts - needed + 1, seed, "volume part", *key)[0])
    return range(first, first + needed)


def place_crop(
    config: VolumeDecoder.Config, view: ViewRecord, parts: range, key: tuple[int, ...] | None, seed: int
) -> tuple[Sides, tuple[bool, bool, bool]]:
    """(first voxel of the crop, axes to mirror), within the parts that were read; volumes too small are centred.

    `key` (epoch, sample key, view): a random crop; None: the central one.
    """
    depth = view.depth or 1
    bounds = ((PART_SLICES * parts.start, min(depth, PART_SLICES * parts.stop)), (0, view.height), (0, view.width))
    if key is None:
        sides = (depth, view.height, view.width)
        centre = [(stored - side) // 2 for stored, side in zip(sides, config.taken, strict=True)]
        return (centre[0], centre[1], centre[2]), (False, False, False)
    u = keyed.uniform(seed, "volume crop", *key, draws=6)
    start = []
    for (low, high), side, chance in zip(bounds, config.taken, u[:3], strict=True):
        spare = high - low - side
        start.append(low + (int(chance * (spare + 1)) if spare >= 0 else spare // 2))
    flips = [bool(chance < limit) for chance, limit in zip(u[3:], config.flip_probability, strict=True)]
    return (start[0], start[1], start[2]), (flips[0], flips[1], flips[2])
