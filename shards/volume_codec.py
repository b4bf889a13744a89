"""CT volumes as shard members: parts of 16 slices, HU as integers without loss, decoded several times faster than PNG.

A part is a header, the length of every frame, then the frames: for each slice one zstd frame a byte plane. A slice is
stored as its difference from the slice before it (the first of a part from zero), modulo 2^16 for HU, 2^8 for labels.
A 16-bit difference d is split into low = d mod 256 and high = (d + 128) div 256: small differences of either sign then
have the high byte 0, and that plane costs nearly nothing. Undoing it is one addition a plane, so decoding runs at the
speed of zstd. `shards/README.md` has the table of codecs that were measured.

Axes are (z, y, x) of a right-anterior-superior grid: z grows towards the head, y to the front, x to the right of the
patient.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from shards.batch import VOLUME_EXTENSION, EncodedImage

PART_SLICES = 16
HU_MIN, HU_MAX = -32768, 32767  # what 16 bits hold
AIR_HU = -1024  # what lies outside of a volume

_MAGIC = b"RVP1"
_HEADER = struct.Struct("<4sIIII")  # magic, bytes a voxel, slices, rows, columns
_ZSTD = pa.Codec("zstd")  # to decode with; it keeps no state
_ZSTD_LEVEL = 1  # noise does not compress better at higher levels, and takes longer to decode
_SLICE_VOXELS_MAX = 1 << 24  # 4096 x 4096: what a header says is believed up to here


def part_count(depth: int) -> int:
    """Parts of a volume of `depth` slices."""
    return -(-depth // PART_SLICES)


def encode_volume(hu: ArrayLike) -> list[EncodedImage]:
    """HU [D, H, W] -> the parts, first slices first. Floats are rounded to whole HU.

    Raises ValueError for another shape, for values that are not finite or outside of 16 bits.
    """
    volume = np.asarray(hu)
    if volume.dtype.kind == "f":
        if not np.isfinite(volume).all():
            raise ValueError("a volume holds values that are not finite; refuse or replace them before encoding")
        volume = np.rint(volume)
    if volume.dtype.kind not in "iuf":
        raise ValueError(f"HU are numbers, got {volume.dtype}")
    if volume.size and not (volume.min() >= HU_MIN and volume.max() <= HU_MAX):
        raise ValueError(f"HU from {volume.min():g} to {volume.max():g}; only {HU_MIN} to {HU_MAX} can be stored")
    return _encode(volume.astype(np.int16).view(np.uint16))


def encode_labels(labels: np.ndarray) -> list[EncodedImage]:
    """Label map uint8 [D, H, W] -> the parts, cut where those of the volume are. Raises ValueError."""
    labels = np.asarray(labels)
    if labels.dtype != np.uint8:
        raise ValueError(f"label maps are uint8, got {labels.dtype}")
    return _encode(labels)


def decode_volume(parts: Sequence[bytes | memoryview | EncodedImage]) -> np.ndarray:
    """Parts in their order -> HU int16 [D, H, W]. Raises ValueError for bytes that are no such parts."""
    return _decode(parts, 2).view(np.int16)


def decode_labels(parts: Sequence[bytes | memoryview | EncodedImage]) -> np.ndarray:
    """Parts of a label map in their order -> uint8 [D, H, W]. Raises ValueError for bytes that are no such parts."""
    return _decode(parts, 1)


def _encode(volume: np.ndarray) -> list[EncodedImage]:
    if volume.ndim != 3 or min(volume.shape) < 1 or volume.shape[1] * volume.shape[2] > _SLICE_VOXELS_MAX:
        raise ValueError(f"a volume has three sides, up to {_SLICE_VOXELS_MAX} voxels a slice, got {volume.shape}")
    firsts = range(0, volume.shape[0], PART_SLICES)
    parts = [_encode_part(volume[first : first + PART_SLICES]) for first in firsts]
    return [EncodedImage(data=data, extension=VOLUME_EXTENSION) for data in parts]


def _encode_part(slices: np.ndarray) -> bytes:
    """uint8 or uint16 [S, H, W] -> bytes."""
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
    difference = np.diff(slices, axis=0, prepend=np.zeros_like(slices[:1]))  # wraps around, as it should
    frames: list[bytes] = []
    for one in difference:
        planes = [one.astype(np.uint8)]
        if slices.itemsize == 2:
            planes.append(((one + np.uint16(128)) >> 8).astype(np.uint8))  # wraps around, too
        frames += [codec.compress(plane.tobytes(), asbytes=True) for plane in planes]
    header = _HEADER.pack(_MAGIC, slices.itemsize, *slices.shape)
    return header + struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)


class Part:
    """One encoded part: its size from the header, its slices in order. Bytes are untrusted: all is checked."""

    def __init__(self, data: bytes | memoryview, *, itemsize: int) -> None:
        """`itemsize`: bytes a voxel there must be, 2 for HU and 1 for labels. Raises ValueError."""
        if len(data) < _HEADER.size:
            raise ValueError("a part of a volume that ends in its header")
        magic, stored, self.slices, self.rows, self.columns = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("no part of a volume")
        if stored != itemsize:
            raise ValueError(f"{stored} bytes a voxel where {itemsize} were declared")
        sides = (self.slices, self.rows, self.columns)
        if not (1 <= self.slices <= PART_SLICES and 1 <= self.rows * self.columns <= _SLICE_VOXELS_MAX):
            raise ValueError(f"a part of {' x '.join(map(str, sides))} voxels")
        self._itemsize, self._data = itemsize, memoryview(data)
        frames = self.slices * itemsize
        start = _HEADER.size + 4 * frames
        if len(data) < start:
            raise ValueError("a part of a volume that ends in its header")
        lengths = np.frombuffer(data, "<u4", frames, _HEADER.size).astype(np.int64)
        self._edges = np.concatenate([[start], start + np.cumsum(lengths)]).tolist()
        if self._edges[-1] != len(data):
            raise ValueError(f"a part of {len(data)} bytes where its header says {self._edges[-1]}")

    def planes(self, index: int) -> tuple[np.ndarray, ...]:
        """Of one slice as differences: (low,) or (low, high), uint8 [rows, columns] each. Raises ValueError."""
        return tuple(self._plane(index * self._itemsize + plane) for plane in range(self._itemsize))

    def _plane(self, frame: int) -> np.ndarray:
        body = self._data[self._edges[frame] : self._edges[frame + 1]]
        size = self.rows * self.columns
        try:
            plane = _ZSTD.decompress(body, size)
        except (OSError, ValueError) as error:  # also for a frame of another size than the header says
            raise ValueError(f"a slice that does not decode ({type(error).__name__})") from None
        return np.frombuffer(plane, np.uint8).reshape(self.rows, self.columns)

    def decode(self, out: np.ndarray, first: int, window: tuple[slice, slice]) -> None:
        """Slices from `first` on, cut to `window` (rows, columns), into `out` [S, h, w] uint8 or uint16.

        Slices after `first + S` are not decoded. Raises ValueError.
        """
        stop = first + len(out)
        low_sum = np.zeros(out.shape[1:], np.int16 if self._itemsize == 2 else np.uint8)
        high_sum = np.zeros(out.shape[1:], np.uint8)  # only its value modulo 256 matters
        for index in range(stop):
            low, *high = (plane[window] for plane in self.planes(index))
            if high:
                np.add(low_sum, low.view(np.int8), out=low_sum)
                np.add(high_sum, high[0], out=high_sum)
            else:
                np.add(low_sum, low, out=low_sum)
            if index >= first:
                shown = out[index - first]
                if high:
                    np.left_shift(high_sum, 8, out=shown, dtype=np.uint16)
                    np.add(shown, low_sum.view(np.uint16), out=shown)
                else:
                    shown[...] = low_sum


def _decode(parts: Sequence[bytes | memoryview | EncodedImage], itemsize: int) -> np.ndarray:
    opened = [Part(part.data if isinstance(part, EncodedImage) else part, itemsize=itemsize) for part in parts]
    if not opened:
        raise ValueError("a volume without parts")
    rows, columns = opened[0].rows, opened[0].columns
    if any((part.rows, part.columns) != (rows, columns) for part in opened):
        raise ValueError("parts of different size in one volume")
    if any(part.slices != PART_SLICES for part in opened[:-1]):
        raise ValueError(f"a part before the last of fewer than {PART_SLICES} slices")
    depth = sum(part.slices for part in opened)
    volume = np.empty((depth, rows, columns), np.uint16 if itemsize == 2 else np.uint8)
    for number, part in enumerate(opened):
        first = number * PART_SLICES
        part.decode(volume[first : first + part.slices], 0, (slice(None), slice(None)))
    return volume
