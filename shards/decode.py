"""Encoded images -> normalised pixels: one DALI graph for decoding and augmentation, on CPU or `mixed` (GPU decoding).

Every random choice comes in as a per-sample argument; no DALI random operator is used. The graph is instantiated once
for each depth and set of operations that samples need, and which instance takes a sample depends on that sample alone,
so its pixels do not depend on its batch. Bad images are reported, never raised; this module does not fetch or log.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math
from torch import Tensor

from shards.errors import ConfigError
from shards.image_header import ImageHeader, read_header
from shards.transforms.augment import ViewParameters

# Images that one DALI run takes. Small, so that threads end a batch at nearly the same time; the price, a few calls per
# run, is under 1 % of decoding 16 images.
_IMAGES_PER_RUN = 16
_IMAGES_PER_RUN_MIXED = 64  # nvJPEG needs more to fill a GPU
_RUNS_QUEUED = 2  # per pipeline: one decoding, one waiting


class _Operations(NamedTuple):
    """Which instance of the graph a sample needs. Steps that would change nothing are left out, since they cost."""

    bits: int
    padded: bool  # the image does not cover the output
    exposed: bool  # window other than the full range, brightness or contrast
    gamma: bool
    rotated: bool


class Decoded(NamedTuple):
    """`pixel_values` [V, 1, H, W] float32; `ok` [V] bool; `causes` [V]: why an image is bad, or None. Never content."""

    pixel_values: Tensor
    ok: np.ndarray
    causes: list[str | None]


@dataclass(kw_only=True, eq=False)
class _Run:
    """Samples of one batch that go through one instance together. `rows` [n] are their rows in the batch."""

    batch: PendingBatch
    operations: _Operations
    rows: np.ndarray
    worker: int = 0
    instance: _Instance | None = None


class PendingBatch:
    """A batch on its way through the decoder; `result` waits for it. Holds the bytes, which DALI reads in place."""

    def __init__(self, decoder: Decoder, encoded: Sequence[bytes], pixel_values: Tensor) -> None:
        self._decoder = decoder
        self.encoded = [np.frombuffer(image, dtype=np.uint8) for image in encoded]
        self.arguments: dict[str, np.ndarray] = {}  # [V, ...] each
        self.pixel_values = pixel_values
        self.causes: list[str | None] = [None] * len(encoded)
        self.runs_left = 0

    def result(self) -> Decoded:
        """Wait for the pixels. Batches may be waited for in any order."""
        self._decoder._finish(self)
        ok = np.array([cause is None for cause in self.causes], dtype=bool)
        return Decoded(self.pixel_values, ok, self.causes)


class _Instance:
    """One DALI pipeline for one worker. Its outputs come in the order of its runs."""

    def __init__(self, pipeline: Pipeline, arguments: tuple[str, ...]) -> None:
        self.pipeline: Pipeline | None = pipeline
        self.arguments = arguments

    def start(self, values: dict[str, Any]) -> None:
        assert self.pipeline is not None
        for name in self.arguments:
            self.pipeline.feed_input(name, values[name])
        self.pipeline.schedule_run()

    def discard(self) -> None:
        """After an error: ends its threads now, while the bytes that they may still read are held."""
        self.pipeline = None


class Decoder:
    """Decodes batches of images. One thread at a time may use it; its own threads run inside DALI.

    `submit` starts a batch and returns at once, so that a caller who keeps one batch ahead never lets the threads idle;
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

    def __init__(self, config: Config) -> None:
        if config.device == "mixed" and not torch.cuda.is_available():
            raise ConfigError("device='mixed' decodes on a GPU and this machine shows none; use device='cpu'")
        self.config = config
        self._mixed = config.device == "mixed"
        # On CPU each thread is a pipeline of its own: the operators of one pipeline run one after the other with a
        # barrier between them, at which the threads of a shared one would wait for the slowest image.
        self._workers = 1 if self._mixed else config.threads
        self._run_size = _IMAGES_PER_RUN_MIXED if self._mixed else _IMAGES_PER_RUN
        self._instances: dict[tuple[int, _Operations], _Instance] = {}
        self._next_worker = 0
        self._waiting: deque[_Run] = deque()
        self._running: deque[_Run] = deque()

    def decode(
        self, encoded: Sequence[bytes], parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> tuple[Tensor, np.ndarray]:
        """Pixels and which of them are good. V = images, C = 1.

        `encoded` [V]; `parameters` [V]; `window` [V, 2]: stored values shown black and white (white below black
        inverts); `bits` [V]: 8 or 16, the depth that the stored image must have. Returns `pixel_values` [V, 1, H, W]
        float32 and `ok` [V] bool; rows that are not ok are zero. Never raises for an image.
        """
        decoded = self.submit(encoded, parameters, window, bits).result()
        return decoded.pixel_values, decoded.ok

    def submit(
        self, encoded: Sequence[bytes], parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> PendingBatch:
        """Start decoding; arguments as for `decode`. The bytes must not change before the result is taken."""
        views, size = len(encoded), self.config.image_size
        assert len(parameters) == views and np.shape(window) == (views, 2) and np.shape(bits) == (views,)
        device = torch.device("cuda", self.config.device_id) if self._mixed else torch.device("cpu")
        batch = PendingBatch(self, encoded, torch.empty((views, 1, size, size), dtype=torch.float32, device=device))
        groups = self._plan(batch, parameters, np.asarray(window, dtype=np.float64), np.asarray(bits))
        for operations, rows in groups.items():
            runs = max(math.ceil(len(rows) / self._run_size), min(self._workers, len(rows)))
            batch.runs_left += runs
            for part in np.array_split(np.asarray(rows), runs):
                self._waiting.append(_Run(batch=batch, operations=operations, rows=part))
        for row, cause in enumerate(batch.causes):
            if cause is not None:
                batch.pixel_values[row] = 0.0
        self._start_waiting()
        return batch

    def _plan(
        self, batch: PendingBatch, parameters: ViewParameters, window: np.ndarray, bits: np.ndarray
    ) -> dict[_Operations, list[int]]:
        """Check headers, compute the arguments of the graph and sort the rows by the instance that they need."""
        views, size = len(batch.encoded), float(self.config.image_size)
        height_width = np.ones((views, 2))
        for row, image in enumerate(batch.encoded):
            header = read_header(image.data)
            batch.causes[row] = self._refusal(header, int(bits[row]), window[row])
            if header is not None and batch.causes[row] is None:
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
        target_start = np.rint((source_start - start) * scale)
        target_end = np.maximum(np.rint((source_end - start) * scale), target_start + 1)
        covered = ((target_start == 0) & (target_end == size)).all(axis=1)

        white = (2.0**bits) - 1
        angle = np.asarray(parameters.angle_degrees, dtype=np.float64)
        brightness = np.asarray(parameters.brightness, dtype=np.float64)
        contrast = np.asarray(parameters.contrast, dtype=np.float64)
        gamma = np.asarray(parameters.gamma, dtype=np.float64)
        exposed = (window[:, 0] != 0) | (window[:, 1] != white) | (brightness != 1) | (contrast != 1)
        # Window, contrast and brightness are one straight line, and so is normalisation where no power comes between:
        # brightness * (0.5 + contrast * ((x - low) / (high - low) - 0.5)).
        span = window[:, 1] - window[:, 0]
        gain = brightness * contrast / np.where(span == 0, 1.0, span)
        shift = brightness * (0.5 - 0.5 * contrast) - gain * window[:, 0]
        mean, std = np.where(gamma == 1, self.config.mean, 0.0), np.where(gamma == 1, self.config.std, 1.0)
        batch.arguments = {
            name: np.ascontiguousarray(value, dtype=np.float32)
            for name, value in {
                "roi_start": source_start,
                "roi_end": source_end,
                "size": target_end - target_start,
                "gain": gain / std,
                "shift": (shift - mean) / std,
                "gamma": gamma,
                "matrix": np.stack([_rotation(degrees, size) for degrees in angle]) if views else np.empty((0, 2, 3)),
            }.items()
        }
        batch.arguments["anchor"] = (-target_start).astype(np.int32)

        groups: dict[_Operations, list[int]] = {}
        for row in range(views):
            if batch.causes[row] is None:
                operations = _Operations(
                    int(bits[row]), not covered[row], bool(exposed[row]), bool(gamma[row] != 1), bool(angle[row] != 0)
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

    def _start_waiting(self) -> None:
        """Give waiting runs to pipelines, in order, as long as the queues take them."""
        while self._waiting and len(self._running) < self._workers * _RUNS_QUEUED:
            run = self._waiting.popleft()
            # Never more than the queue holds: the call would wait for this thread to take a result, for ever.
            load = Counter(other.worker for other in self._running)
            run.worker = min(range(self._workers), key=lambda worker: load[worker])
            if self._start(run):
                self._running.append(run)
            else:
                self._decode_parts(run)

    def _finish(self, batch: PendingBatch) -> None:
        while batch.runs_left:
            self._start_waiting()
            run = self._running.popleft()
            if not self._collect(run):
                self._decode_parts(run)
        self._start_waiting()

    def _start(self, run: _Run) -> bool:
        """Feed and schedule; False after an error, with the pipeline discarded."""
        run.instance = self._instance(run.worker, run.operations)
        arguments = run.batch.arguments
        values: dict[str, Any] = {
            name: arguments[name][run.rows] for name in run.instance.arguments if name in arguments
        }
        values["encoded"] = [run.batch.encoded[row] for row in run.rows]
        try:
            run.instance.start(values)
        except RuntimeError:
            run.instance.discard()
            return False
        return True

    def _collect(self, run: _Run) -> bool:
        """Wait for the oldest run of its pipeline; False after an error, its own or one that took it along."""
        assert run.instance is not None
        if run.instance.pipeline is None:
            return False
        try:
            self._copy_output(run, run.instance.pipeline)
        except RuntimeError:
            run.instance.discard()
            return False
        run.batch.runs_left -= 1
        return True

    def _decode_parts(self, run: _Run) -> None:
        """Decode a failed run synchronously, halving until the bad image stands alone.

        DALI raises for the whole batch and leaves the pipeline unusable (DALI #3913), so each error costs a rebuild;
        the rebuilt pipeline decodes a known image first, and what that raises is no fault of the data.
        """
        run.worker = _SYNCHRONOUS
        if self._start(run) and self._collect(run):
            return
        run.batch.runs_left -= 1
        if len(run.rows) == 1:
            row = int(run.rows[0])
            run.batch.causes[row] = "does not decode"
            run.batch.pixel_values[row] = 0.0
            return
        for rows in np.array_split(run.rows, 2):
            run.batch.runs_left += 1
            self._decode_parts(_Run(batch=run.batch, operations=run.operations, rows=rows))

    def _copy_output(self, run: _Run, pipeline: Pipeline) -> None:
        """Copy the oldest finished run [n, 1, H, W] into the rows of its batch: no DALI buffer outlives this call."""
        (output,) = pipeline.share_outputs()
        first, last = int(run.rows[0]), int(run.rows[-1])
        where = slice(first, last + 1) if last - first + 1 == len(run.rows) else run.rows
        if self._mixed:
            run.batch.pixel_values[where] = torch.from_dlpack(output.as_tensor())
            torch.cuda.current_stream(self.config.device_id).synchronize()
        else:
            # NumPy copies in this thread alone; torch would wake its own pool beside DALI's threads.
            run.batch.pixel_values.numpy()[where] = np.asarray(output.as_tensor())
        pipeline.release_outputs()

    def _instance(self, worker: int, operations: _Operations) -> _Instance:
        """The pipeline of this worker for these operations, built anew if there is none or an error broke it."""
        instance = self._instances.get((worker, operations))
        if instance is None or instance.pipeline is None:
            instance = self._build(operations, queued=1 if worker == _SYNCHRONOUS else _RUNS_QUEUED)
            self._instances[worker, operations] = instance
        return instance

    def _build(self, operations: _Operations, queued: int) -> _Instance:
        pipeline = Pipeline(
            batch_size=self._run_size,
            num_threads=self.config.threads if self._mixed else 1,
            device_id=self.config.device_id if self._mixed else None,
            prefetch_queue_depth=queued,
        )
        with pipeline:
            pixel_values, arguments = self._graph(operations)
            pipeline.set_outputs(pixel_values)
        pipeline.build()
        # The first run of a DALI pipeline fills its queue, so it must find that many batches; later runs take one each.
        blank: dict[str, Any] = {"encoded": [_blank_png(operations.bits)], **_BLANK_ARGUMENTS}
        for _ in range(queued):
            for name in arguments:
                pipeline.feed_input(name, blank[name])
        pipeline.schedule_run()
        for _ in range(queued):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return _Instance(pipeline, arguments)

    def _graph(self, operations: _Operations) -> tuple[Any, tuple[str, ...]]:
        """The DALI graph: encoded bytes -> [1, H, W] float32. Returns its output and the names of its inputs."""
        config = self.config
        names: list[str] = []

        def argument(name: str, ndim: int, dtype: Any = types.DALIDataType.FLOAT) -> Any:
            names.append(name)
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        names.append("encoded")
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
        stored: Any = fn.decoders.image(  # [rows, columns, 1], uint8 or uint16
            encoded,
            device=config.device,
            output_type=types.DALIImageType.GRAY,
            dtype=types.DALIDataType.UINT8 if operations.bits == 8 else types.DALIDataType.UINT16,
            adjust_orientation=False,  # the header's rows and columns are those of the window and the boxes
        )
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
                brightness=argument("gain", 0),
                brightness_shift=argument("shift", 0),
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


_SYNCHRONOUS = -1  # the worker that takes runs apart after an error

_BLANK_ARGUMENTS: dict[str, np.ndarray] = {
    "roi_start": np.zeros((1, 2), np.float32),
    "roi_end": np.full((1, 2), 8, np.float32),
    "size": np.full((1, 2), 8, np.float32),
    "anchor": np.zeros((1, 2), np.int32),
    "matrix": np.array([[[1, 0, 0], [0, 1, 0]]], np.float32),
    "gain": np.ones(1, np.float32),
    "shift": np.zeros(1, np.float32),
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
