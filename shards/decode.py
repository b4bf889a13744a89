"""Encoded images -> normalised pixels: DALI decodes, on CPU or `mixed` (GPU), and on a GPU does everything else too.

Every random choice comes in as a per-sample argument; no DALI random operator is used. On the CPU 8-bit images leave
DALI once decoded and go on in `shards.transforms.pixels`; 16-bit ones stay in DALI's graph, as all do on a GPU. The
graph is instantiated once for each depth and set of operations that samples need, and which instance takes a sample
depends on that sample alone, so its pixels do not depend on its batch. Bad images are reported, never raised; this
module does not fetch or log.
"""

from __future__ import annotations

import math
import struct
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math
from torch import Tensor

from shards.errors import ConfigError
from shards.image_header import ImageHeader, read_header
from shards.transforms import pixels
from shards.transforms.augment import ViewParameters

# Images that one DALI run takes. Small, so that threads end a batch at nearly the same time; the price, a few calls per
# run, is under 1 % of decoding 16 images.
_IMAGES_PER_RUN = 16
_IMAGES_PER_RUN_MIXED = 64  # nvJPEG needs more to fill a GPU
_WORKERS_MIXED = 2  # one run on the GPU, the next on its way there


class _Operations(NamedTuple):
    """Which instance of the graph a sample needs. Steps that would change nothing are left out, since they cost."""

    bits: int
    padded: bool  # the image does not cover the output
    exposed: bool  # window other than the full range, brightness or contrast
    gamma: bool
    rotated: bool


# The instance that only decodes; the rest is done outside of DALI. None in place of _Operations.
_DECODE_ONLY = None


class Decoded(NamedTuple):
    """`pixel_values` [V, 1, H, W] float32; `ok` [V] bool; `causes` [V]: why an image is bad, or None. Never content."""

    pixel_values: Tensor
    ok: np.ndarray
    causes: list[str | None]


class PendingBatch:
    """Images or volumes on their way through a decoder; `result` waits for them."""

    def __init__(self, pixel_values: Tensor) -> None:
        self.pixel_values = pixel_values
        self.causes: list[str | None] = [None] * len(pixel_values)
        self.runs: list[Future[None]] = []

    def refuse(self, row: int, cause: str) -> None:
        """Row `row` is bad; its pixels become zero."""
        self.causes[row] = cause
        self.pixel_values[row] = 0.0

    def cancel(self) -> None:
        """Give up what has not begun; `result` must not be asked for any more."""
        for run in self.runs:
            run.cancel()

    def result(self) -> Decoded:
        """Wait for the pixels. Batches may be waited for in any order."""
        for run in self.runs:
            run.result()
        ok = np.array([cause is None for cause in self.causes], dtype=bool)
        return Decoded(self.pixel_values, ok, self.causes)


class ImageBatch(PendingBatch):
    """Holds the bytes until DALI has copied them."""

    def __init__(self, encoded: Sequence[bytes | memoryview], pixel_values: Tensor) -> None:
        super().__init__(pixel_values)
        self.encoded = [np.frombuffer(image, dtype=np.uint8) for image in encoded]
        self.arguments: dict[str, np.ndarray] = {}  # [V, ...] each


class _Instance(NamedTuple):
    """One DALI pipeline of one worker, and the names of its inputs."""

    pipeline: Pipeline
    arguments: tuple[str, ...]

    def run(self, values: dict[str, Any]) -> Any:
        """Feed, run and wait; the output is valid until `pipeline.release_outputs`."""
        for name in self.arguments:
            self.pipeline.feed_input(name, values[name])
        self.pipeline.schedule_run()
        (output,) = self.pipeline.share_outputs()
        return output


class Decoder:
    """Decodes batches of images in workers with DALI pipelines of their own: `threads` on the CPU, two for a GPU.

    `submit` starts a batch and returns at once, so that a caller who keeps one batch ahead never lets the workers idle;
    `decode` is `submit` and wait.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        image_size: int = 224  # pixels, height and width
        # "crop": shorter side to image_size, centre square. "pad": longer side to image_size, black bars.
        fit: Literal["crop", "pad", "stretch"] = "crop"
        device: Literal["cpu", "mixed"] = "cpu"
        device_id: int = 0  # GPU of device "mixed"
        threads: int = 1
        mean: float = 0.5  # of window-normalised values in [0, 1]
        std: float = 0.25
        min_side_pixels: int = 8
        max_pixels: int = 100_000_000  # decoded size bounds memory: 16 bit at this size is 200 MB per thread

        def __post_init__(self) -> None:
            for name in ("image_size", "threads", "min_side_pixels", "max_pixels"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
            if self.fit not in ("crop", "pad", "stretch"):
                raise ConfigError(f"fit={self.fit!r} is unknown; use crop, pad or stretch")
            if self.device not in ("cpu", "mixed"):
                raise ConfigError(f"device={self.device!r} is unknown; use cpu or mixed")
            if self.std <= 0:
                raise ConfigError(f"std={self.std} must be above 0")

    def __init__(self, config: Config, *, whole_graph: bool = False) -> None:
        """`whole_graph`: on the CPU, too, everything in DALI, as on a GPU. Slower; pixels agree to about one level."""
        if config.device == "mixed" and not torch.cuda.is_available():
            raise ConfigError("device='mixed' decodes on a GPU and this machine shows none; use device='cpu'")
        self.config = config
        self._mixed = config.device == "mixed"
        self._whole_graph = whole_graph or self._mixed
        # On CPU each thread is a pipeline of its own: the operators of one pipeline run one after the other with a
        # barrier between them, at which the threads of a shared one would wait for the slowest image.
        self._workers = _WORKERS_MIXED if self._mixed else config.threads
        self._run_size = _IMAGES_PER_RUN_MIXED if self._mixed else _IMAGES_PER_RUN
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        self._of_worker = threading.local()

    def decode(
        self, encoded: Sequence[bytes | memoryview], parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Pixels and which of them are good. V = images, C = 1.

        `encoded` [V]; `parameters` [V]; `window` [V, 2]: stored values shown black and white (white below black
        inverts); `bits` [V]: 8 or 16, the depth that the stored image must have. Returns `pixel_values` [V, 1, H, W]
        float32 and `ok` [V] bool; rows that are not ok are zero. Never raises for an image.
        """
        decoded = self.submit(encoded, parameters, window, bits).result()
        return decoded.pixel_values, decoded.ok

    def submit(
        self, encoded: Sequence[bytes | memoryview], parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> ImageBatch:
        """Start decoding; arguments as for `decode`. The bytes must not change before the result is taken."""
        views, size = len(encoded), self.config.image_size
        assert len(parameters) == views and np.shape(window) == (views, 2) and np.shape(bits) == (views,)
        device = torch.device("cuda", self.config.device_id) if self._mixed else torch.device("cpu")
        shape = (views, 1, size, size)
        # NumPy asks the system for large pages: with torch's small ones, touching them anew costs 0.2 ms an image.
        room = torch.empty(shape, device=device) if self._mixed else torch.from_numpy(np.empty(shape, np.float32))
        batch = ImageBatch(encoded, room)
        groups = self._plan(batch, parameters, np.asarray(window, dtype=np.float64), np.asarray(bits))
        for operations, rows in groups.items():
            runs = max(math.ceil(len(rows) / self._run_size), min(self._workers, len(rows)))
            batch.runs += [
                self._pool.submit(self._decode_rows, batch, operations, part)
                for part in np.array_split(np.asarray(rows), runs)
            ]
        return batch

    def _plan(
        self, batch: ImageBatch, parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> dict[_Operations | None, list[int]]:
        """Check headers, compute the arguments of every row and sort the rows by the instance that they need."""
        views, size = len(batch.encoded), float(self.config.image_size)
        height_width = np.ones((views, 2))
        for row, image in enumerate(batch.encoded):
            header = read_header(image.data)
            cause = self._refusal(header, int(bits[row]), window[row])
            if cause is not None:
                batch.refuse(row, cause)
            elif header is not None:
                height_width[row] = header.height, header.width

        # Crop in pixels of the image, which starts at (0, 0); the fitted region may be smaller (crop) or larger (pad).
        if self.config.fit == "stretch":
            region = height_width
        elif self.config.fit == "crop":
            region = np.repeat(height_width.min(axis=1, keepdims=True), 2, axis=1)
        else:
            region = np.repeat(height_width.max(axis=1, keepdims=True), 2, axis=1)
        crop = np.asarray(parameters.crop, dtype=np.float64)[:, [1, 0, 3, 2]]  # top, left, height, width
        start = (height_width - region) / 2 + crop[:, :2] * region
        end = start + crop[:, 2:] * region
        # The part of the crop that the image covers, and where that part lies in the output [0, size].
        source_start, source_end = np.maximum(start, 0.0), np.minimum(end, height_width)
        scale = size / (end - start)
        target_start = np.clip(np.rint((source_start - start) * scale), 0, size - 1)
        target_end = np.clip(np.rint((source_end - start) * scale), target_start + 1, size)
        # Cut at whole pixels of the image: no more than half a pixel off, and the same in DALI and outside of it.
        source_start = np.clip(np.rint(source_start), 0, height_width - 1)
        source_end = np.clip(np.rint(source_end), source_start + 1, height_width)
        covered = ((target_start == 0) & (target_end == size)).all(axis=1)

        white = (2.0**bits) - 1
        angle = np.asarray(parameters.angle_degrees, dtype=np.float64)
        brightness = np.asarray(parameters.brightness, dtype=np.float64)
        contrast = np.asarray(parameters.contrast, dtype=np.float64)
        gamma = np.asarray(parameters.gamma, dtype=np.float64)
        exposed = (window[:, 0] != 0) | (window[:, 1] != white) | (brightness != 1) | (contrast != 1)
        # Window, contrast and brightness are one straight line:
        # brightness * (0.5 + contrast * ((x - low) / (high - low) - 0.5)).
        span = window[:, 1] - window[:, 0]
        gain = brightness * contrast / np.where(span == 0, 1.0, span)
        shift = brightness * (0.5 - 0.5 * contrast) - gain * window[:, 0]
        # In the graph normalisation joins that line where no power comes between.
        mean, std = np.where(gamma == 1, self.config.mean, 0.0), np.where(gamma == 1, self.config.std, 1.0)
        batch.arguments = {
            name: np.ascontiguousarray(value, dtype=np.float32)
            for name, value in {
                "roi_start": source_start,
                "roi_end": source_end,
                "size": target_end - target_start,
                "gain": gain,
                "shift": shift,
                "graph_gain": gain / std,
                "graph_shift": (shift - mean) / std,
                "gamma": gamma,
                "matrix": np.stack([_rotation(degrees, size) for degrees in angle]) if views else np.empty((0, 2, 3)),
            }.items()
        }
        batch.arguments["region"] = np.concatenate([source_start, source_end], axis=1).astype(np.int64)
        batch.arguments["anchor"] = (-target_start).astype(np.int32)
        batch.arguments["turned"] = angle != 0

        groups: dict[_Operations | None, list[int]] = {}
        for row in range(views):
            if batch.causes[row] is None:
                operations = _DECODE_ONLY
                if self._whole_graph or bits[row] != 8:
                    operations = _Operations(
                        bits=int(bits[row]),
                        padded=not covered[row],
                        exposed=bool(exposed[row]),
                        gamma=bool(gamma[row] != 1),
                        rotated=bool(angle[row] != 0),
                    )
                groups.setdefault(operations, []).append(row)
        return groups

    def _refusal(self, header: ImageHeader | None, bits: int, window: np.ndarray) -> str | None:
        """Why an image is not even tried, or None."""
        if header is None:
            return "not an image of a known format"
        if min(header.width, header.height) < self.config.min_side_pixels:
            return f"{header.width} x {header.height} pixels, fewer than min_side_pixels={self.config.min_side_pixels}"
        if header.width * header.height > self.config.max_pixels:
            return f"{header.width} x {header.height} pixels, more than max_pixels={self.config.max_pixels}"
        if bits not in (8, 16) or header.bits != bits:
            return f"{header.bits} bits stored where {bits} were declared"
        if not np.isfinite(window).all() or window[0] == window[1]:
            return "window of no width"
        return None

    def _decode_rows(self, batch: ImageBatch, operations: _Operations | None, rows: np.ndarray) -> None:
        """Decode rows of a batch in this worker; after an error again in halves, until the bad image stands alone.

        DALI raises for the whole run and leaves the pipeline unusable (DALI #3913), so each error costs a rebuild; the
        rebuilt pipeline decodes a known image first, and what that raises is no fault of the data.
        """
        if self._run(batch, operations, rows):
            return
        if len(rows) == 1:
            batch.refuse(int(rows[0]), "does not decode")
            return
        for half in np.array_split(rows, 2):
            self._decode_rows(batch, operations, half)

    def _run(self, batch: ImageBatch, operations: _Operations | None, rows: np.ndarray) -> bool:
        """One run of a pipeline; False after an error of DALI, with the pipeline gone when this returns."""
        instance = self._instance(operations)
        values: dict[str, Any] = {
            name: batch.arguments[name][rows] for name in instance.arguments if name in batch.arguments
        }
        values["encoded"] = [batch.encoded[row] for row in rows]
        try:
            output = instance.run(values)
        except RuntimeError:
            del self._of_worker.instances[operations]
            return False
        try:
            if operations is _DECODE_ONLY:
                for place, row in enumerate(rows.tolist()):
                    self._finish_on_host(batch, row, np.asarray(output[place]))  # in place; `at` would copy
            elif self._mixed:
                batch.pixel_values[torch.from_numpy(rows)] = torch.from_dlpack(output.as_tensor())
                torch.cuda.current_stream(self.config.device_id).synchronize()
            else:
                batch.pixel_values.numpy()[rows] = np.asarray(output.as_tensor())
        finally:
            instance.pipeline.release_outputs()
        return True

    def _finish_on_host(self, batch: ImageBatch, row: int, image: np.ndarray) -> None:
        """Stored levels [rows, columns, 1] uint8 -> the normalised pixels of `row`: what the graph does elsewhere."""
        size, mean, std = self.config.image_size, self.config.mean, self.config.std
        gain, shift, gamma, region, target, anchor = (
            batch.arguments[name][row].tolist() for name in ("gain", "shift", "gamma", "region", "size", "anchor")
        )
        if image.shape[0] < region[2] or image.shape[1] < region[3]:
            batch.refuse(row, "decodes to fewer pixels than its header says")
            return
        height, width = (round(side) for side in target)
        low = pixels.resize(image[:, :, 0], region, height, width)
        tone = pixels.tone_table(gain, shift, gamma)
        shown = batch.pixel_values.numpy()[row, 0]
        turned = bool(batch.arguments["turned"][row])
        table = tone if turned else (tone - np.float32(mean)) * np.float32(1 / std)
        if (height, width) == (size, size):
            np.take(table, low, out=shown, mode="clip")  # the default mode, "raise", works in a copy
        else:
            shown.fill(0.0 if turned else -mean / std)
            shown[-anchor[0] : height - anchor[0], -anchor[1] : width - anchor[1]] = table[low]
        if turned:  # before normalisation, where black is 0
            turned_pixels = pixels.warp(shown, batch.arguments["matrix"][row])
            np.multiply(turned_pixels, np.float32(1 / std), out=shown)
            shown -= np.float32(mean / std)

    def _instance(self, operations: _Operations | None) -> _Instance:
        """This worker's pipeline for these operations, built anew if there is none or an error broke it."""
        instances: dict[_Operations | None, _Instance] = self._of_worker.__dict__.setdefault("instances", {})
        if operations not in instances:
            instances[operations] = self._build(operations)
        return instances[operations]

    def _build(self, operations: _Operations | None) -> _Instance:
        pipeline = Pipeline(
            batch_size=self._run_size,
            num_threads=max(1, self.config.threads // self._workers),
            device_id=self.config.device_id if self._mixed else None,
            prefetch_queue_depth=1,
            exec_async=self._mixed,  # on the CPU the worker itself decodes: no other thread to wake and wait for
        )
        with pipeline:
            output, arguments = self._graph(operations)
            pipeline.set_outputs(output)
        pipeline.build()
        instance = _Instance(pipeline, arguments)
        bits = 8 if operations is _DECODE_ONLY else operations.bits
        instance.run({"encoded": [_blank_png(bits)], **_BLANK_ARGUMENTS})
        pipeline.release_outputs()
        return instance

    def _graph(self, operations: _Operations | None) -> tuple[Any, tuple[str, ...]]:
        """The DALI graph: encoded bytes -> [1, H, W] float32. Returns its output and the names of its inputs.

        _DECODE_ONLY: -> [rows, columns, 1] uint8.
        """
        config = self.config
        names: list[str] = []

        def argument(name: str, ndim: int, dtype: Any = types.DALIDataType.FLOAT) -> Any:
            names.append(name)
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        names.append("encoded")
        bits = 8 if operations is _DECODE_ONLY else operations.bits
        # Copied on the way in: without a copy DALI 2.4 keeps 48 bytes for every address that it was ever given, amid
        # its large buffers, and the heap grows by 5 kB an image.
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        stored: Any = fn.decoders.image(  # [rows, columns, 1], uint8 or uint16
            encoded,
            device=config.device,
            output_type=types.DALIImageType.GRAY,
            dtype=types.DALIDataType.UINT8 if bits == 8 else types.DALIDataType.UINT16,
            adjust_orientation=False,  # the header's rows and columns are those of the window and the boxes
        )
        if operations is _DECODE_ONLY:
            return stored, tuple(names)
        # Integers in, integers out: twice as fast as float on CPU, rounded to the depth that the image had.
        image: Any = fn.resize(
            stored,
            roi_start=argument("roi_start", 1),
            roi_end=argument("roi_end", 1),
            size=argument("size", 1) if operations.padded else (config.image_size, config.image_size),
            interp_type=types.DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
        # Value of black, also where no image is; and of white, after normalisation.
        black, white = -config.mean / config.std, (1.0 - config.mean) / config.std
        full_scale = 255.0 if operations.bits == 8 else 65535.0
        shown: Any
        if operations.exposed or operations.gamma:
            if operations.bits == 16:  # which the next operator does not take
                image = fn.cast(image, dtype=types.DALIDataType.FLOAT)
            shown = fn.brightness_contrast(  # gain * value + shift
                image,
                brightness=argument("graph_gain", 0),
                brightness_shift=argument("graph_shift", 0),
                dtype=types.DALIDataType.FLOAT,
            )
            if operations.gamma:
                gamma = argument("gamma", 0)
                if self._mixed:  # the operands of arithmetic must share a device
                    gamma = gamma.gpu()
                shown = (dali_math.pow(dali_math.clamp(shown, 0.0, 1.0), gamma) - config.mean) * (1.0 / config.std)
            else:
                shown = dali_math.clamp(shown, black, white)
        else:
            shown = fn.crop_mirror_normalize(
                image,
                mean=[config.mean * full_scale],
                std=[config.std * full_scale],
                dtype=types.DALIDataType.FLOAT,
                output_layout="HWC",
            )
        if operations.padded:
            shown = fn.slice(
                shown,
                start=argument("anchor", 1, types.DALIDataType.INT32),
                shape=(config.image_size, config.image_size),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=black,
            )
        if operations.rotated:
            shown = fn.warp_affine(
                shown,
                matrix=argument("matrix", 2),
                fill_value=black,
                interp_type=types.DALIInterpType.INTERP_LINEAR,
            )
        output = fn.reshape(shown, layout="CHW", shape=[1, -1, config.image_size])  # [H, W, 1] -> [1, H, W]
        return output, tuple(names)


_BLANK_ARGUMENTS: dict[str, np.ndarray] = {
    "roi_start": np.zeros((1, 2), np.float32),
    "roi_end": np.full((1, 2), 8, np.float32),
    "size": np.full((1, 2), 8, np.float32),
    "anchor": np.zeros((1, 2), np.int32),
    "matrix": np.array([[[1, 0, 0], [0, 1, 0]]], np.float32),
    "graph_gain": np.ones(1, np.float32),
    "graph_shift": np.zeros(1, np.float32),
    "gamma": np.ones(1, np.float32),
}


def _blank_png(bits: int) -> np.ndarray:
    """A black 8 x 8 PNG as uint8 [n], the image that a new pipeline proves itself on."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = (b"\0" + bytes(8 * bits // 8)) * 8
    header = struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return np.frombuffer(png, dtype=np.uint8)


def _rotation(degrees: float, size: float) -> np.ndarray:
    """[2, 3] matrix from output to input pixels (x, y), turning the picture counter-clockwise about its centre."""
    # math, not NumPy: its vectorised sine may differ in the last bit with the position in the array.
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre = size / 2
    return np.array(
        [
            [cosine, -sine, centre - cosine * centre + sine * centre],
            [sine, cosine, centre - sine * centre - cosine * centre],
        ]
    )
