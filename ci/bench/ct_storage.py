"""Bytes a study and decoding rates of lossless codecs on real CT voxels: why volumes are stored as they are.

Parts of 16 slices stacked along height, as every image codec would hold them; one thread, CPU time, best of three.
Encoders of JPEG 2000, HTJ2K, JPEG XL and JPEG-LS come with `bash ci/bench/setup_peers.sh`; ours decodes with what the
loader decodes with, the others with DALI, or where it cannot, with the library named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from ci.bench.ct_voxels import real_slices, real_trunk
from ci.bench.figure import REPOSITORY, Figure, figure
from ci.bench.loader import PEERS_PYTHON, ContestantFailedError
from shards.volume_codec import PART_SLICES, decode_volume, encode_volume

DESCRIPTION = "bytes a study and decoding rate of lossless codecs for CT volumes"

_LIMIT_S = 600
Stack = np.ndarray  # uint16 [slices * H, W], HU + 32768
Decode = Callable[[Sequence[bytes]], list[np.ndarray]]


def run(quick: bool) -> list[Figure]:
    """One figure a codec and set of voxels: bytes over those of raw 16 bit, with the rate in the note."""
    python = str(PEERS_PYTHON) if PEERS_PYTHON.exists() else sys.executable
    done = subprocess.run(
        [python, "-m", "ci.bench.ct_storage", *(["quick"] if quick else [])],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=_LIMIT_S, check=False,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if done.returncode != 0 or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ContestantFailedError(f"ct_storage ended with {done.returncode}: {lines[-1]}")
    rows = json.loads(found[0].removeprefix("result "))
    _print(rows)
    return [
        figure(
            f"ct_storage.{row['codec'].replace(' ', '_').replace(',', '')}.{row['voxels']}", row["ratio"], unit="ratio",
            better="higher", threads=1,
            note=f"raw over stored; {row['bytes']:,} bytes, decoded at {row['decode_mb_s']:.0f} MB/s ({row['by']})",
        )
        for row in rows
    ]  # fmt: skip


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="lossless codecs on real CT voxels, 16 bit", title_justify="left", show_edge=False)
    for heading in ("voxels", "codec", "bytes", "ratio", "encode MB/s", "decode MB/s", "decoded by"):
        table.add_column(heading, justify="left" if heading in ("voxels", "codec", "decoded by") else "right")
    for row in rows:
        table.add_row(
            row["voxels"], row["codec"], f"{row['bytes']:,}", f"{row['ratio']:.2f}", f"{row['encode_mb_s']:.0f}",
            f"{row['decode_mb_s']:.0f}", row["by"],
        )  # fmt: skip
    Console(width=120).print(table)


# ---- in the peers' environment ----


def _with_dali() -> Decode:
    from nvidia.dali import Pipeline, fn, types

    pipelines: dict[int, Any] = {}

    def decode(encoded: Sequence[bytes]) -> list[np.ndarray]:
        if len(encoded) not in pipelines:
            pipeline = Pipeline(
                batch_size=len(encoded), num_threads=1, device_id=None, prefetch_queue_depth=1, exec_async=False
            )
            with pipeline:
                data: Any = fn.external_source(name="data", dtype=types.DALIDataType.UINT8, ndim=1)
                kind = types.DALIImageType.ANY_DATA
                pipeline.set_outputs(fn.decoders.image(data, output_type=kind, dtype=types.DALIDataType.UINT16))
            pipeline.build()
            pipelines[len(encoded)] = pipeline
        pipeline = pipelines[len(encoded)]
        pipeline.feed_input("data", [np.frombuffer(one, np.uint8) for one in encoded])
        (output,) = pipeline.run()
        return [np.asarray(output.at(place))[..., 0] for place in range(len(encoded))]

    return decode


def _codecs(slow: bool) -> dict[str, tuple[Callable[[Stack], bytes], str, Decode]]:
    """Codec -> (encoder of one part, what decodes it, decoder of all parts)."""
    import io

    import imagecodecs
    from PIL import Image

    def pillow(stack: Stack, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(stack).save(file, kind, **options)
        return file.getvalue()

    dali = _with_dali()
    zstd = pa.Codec("zstd", compression_level=3)

    def unzstd(encoded: Sequence[bytes]) -> list[np.ndarray]:
        sizes = [int.from_bytes(one[:8], "little") for one in encoded]
        return [
            np.frombuffer(zstd.decompress(one[8:], size), np.uint16) for one, size in zip(encoded, sizes, strict=True)
        ]

    def library(decode_one: Callable[[bytes], np.ndarray]) -> Decode:
        return lambda encoded: [decode_one(one) for one in encoded]

    found: dict[str, tuple[Callable[[Stack], bytes], str, Decode]] = {
        "raw TIFF": (lambda stack: pillow(stack, "TIFF"), "DALI", dali),
        "zstd 3 of raw": (
            lambda stack: stack.nbytes.to_bytes(8, "little") + zstd.compress(stack.tobytes(), asbytes=True),
            "pyarrow", unzstd,
        ),
        "PNG": (lambda stack: pillow(stack, "PNG"), "DALI", dali),
        "TIFF zstd, predictor": (
            lambda stack: pillow(stack, "TIFF", compression="zstd", tiffinfo={317: 2}), "DALI", dali
        ),
        "HTJ2K": (imagecodecs.htj2k_encode, "DALI", dali),
        "HTJ2K (OpenJPH)": (imagecodecs.htj2k_encode, "OpenJPH", library(imagecodecs.htj2k_decode)),
        "JPEG XL": (
            lambda stack: imagecodecs.jpegxl_encode(stack, lossless=True, effort=1), "libjxl",
            library(imagecodecs.jpegxl_decode),
        ),
        "JPEG-LS": (imagecodecs.jpegls_encode, "CharLS", library(imagecodecs.jpegls_decode)),
    }  # fmt: skip
    if slow:
        found["JPEG 2000"] = (
            lambda stack: imagecodecs.jpeg2k_encode(stack, level=0, reversible=True, codecformat="j2k"), "DALI", dali
        )  # fmt: skip
    return found


def _seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        started = time.process_time()
        result = function()
        best = min(best, time.process_time() - started)
    return best, result


def _encode_all(encode: Callable[[Stack], bytes], stacks: Sequence[Stack]) -> list[bytes]:
    return [bytes(encode(stack)) for stack in stacks]


def _measure(hu: np.ndarray, voxels: str, *, slow: bool) -> list[dict[str, Any]]:
    stored = (hu.astype(np.int32) + 32768).astype(np.uint16)
    stacks = [
        stored[first : first + PART_SLICES].reshape(-1, stored.shape[2]) for first in range(0, len(hu), PART_SLICES)
    ]
    raw = stored.nbytes

    def row(codec: str, by: str, encode_s: float, decode_s: float, size: int) -> dict[str, Any]:
        return {
            "codec": codec, "voxels": voxels, "by": by, "bytes": size, "ratio": raw / size,
            "encode_mb_s": raw / encode_s / 1e6, "decode_mb_s": raw / decode_s / 1e6,
        }  # fmt: skip

    encode_s, parts = _seconds(lambda: encode_volume(hu), 1)
    decode_s, back = _seconds(lambda: decode_volume(parts), 3)
    assert np.array_equal(back, hu)
    rows = [row("ours", "shards.volume_codec", encode_s, decode_s, sum(len(part.data) for part in parts))]
    for codec, (encode, by, decode) in _codecs(slow).items():
        encode_s, encoded = _seconds(partial(_encode_all, encode, stacks), 1)
        decode_s, decoded = _seconds(partial(decode, encoded), 1 if codec == "JPEG 2000" else 3)
        same = all(np.array_equal(a.reshape(b.shape), b) for a, b in zip(decoded, stacks, strict=True))
        assert same, f"{codec} is not lossless"
        rows.append(row(codec, by, encode_s, decode_s, sum(map(len, encoded))))
    return rows


if __name__ == "__main__":
    quick = sys.argv[1:] == ["quick"]
    measured = _measure(real_trunk()[:32] if quick else real_trunk(), "trunk", slow=not quick)
    measured += [] if quick else _measure(real_slices(), "slices", slow=True)
    print("result " + json.dumps(measured))
