"""One image file of a public or clinical set -> encoded pixels fit for a shard, with nothing but pixels in them.

JPEG and PNG keep their compressed data; metadata segments, which may name the patient, are cut out without decoding.
Everything else is decoded and stored as grey PNG.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from shards.batch import EncodedImage
from shards.image_header import probe_image

if TYPE_CHECKING:  # the tables of its neighbours take a second to load
    from shards.reports.identity.burned_in import BurnedInText

SIDE_MIN_PIXELS = 32
AREA_MAX_PIXELS = 100_000_000
EXIF_ORIENTATION = 0x0112

_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # a marker that is neither stuffing nor a restart
_PNG_KEPT = (b"IHDR", b"IDAT", b"IEND")


class ImageRefusedError(ValueError):
    """The reason why a file gives no image; one of few, quoting nothing of the file."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Sizes taken: no side below `side_min`, no more than `area_max` pixels."""

    side_min: int = SIDE_MIN_PIXELS
    area_max: int = AREA_MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Encoded pixels with the facts a ViewRecord needs."""

    encoded: EncodedImage
    height: int
    width: int
    bits: int  # 8 or 16


def load_image_file(data: bytes, limits: ImageLimits, burned_in: BurnedInText | None = None) -> StoredImage:
    """Check a whole image file (header, then a full decode) and return what is stored.

    Raises ImageRefusedError with the reason: empty, no image, too small, too large, does not decode, one flat value,
    several frames, a mode that grey 8 or 16 bit cannot hold, text in the pixels.
    """
    if not data:
        raise ImageRefusedError("image file has 0 bytes")
    try:
        height, width, _ = probe_image(data)
    except ValueError:
        raise ImageRefusedError("image does not decode: no image header") from None
    if height * width > limits.area_max:  # before any decoding
        raise ImageRefusedError(f"image larger than {limits.area_max} pixels")
    if min(height, width) < limits.side_min:
        raise ImageRefusedError(f"image side below {limits.side_min} pixels")
    try:
        image = Image.open(io.BytesIO(data))
        if getattr(image, "n_frames", 1) != 1:
            raise ImageRefusedError("image of several frames")
        image.load()
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except ImageRefusedError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many kinds for broken files; all mean the same here
        raise ImageRefusedError(f"image does not decode: {type(error).__name__}") from None
    pixels = _grey(image)
    if pixels.min() == pixels.max():
        raise ImageRefusedError("image all black" if pixels.max() == 0 else "image of one flat value")
    stored = _stored(data, image, pixels, orientation)
    if burned_in is not None and (reason := burned_in.refusal(pixels)):
        raise ImageRefusedError(reason)
    return stored


def _stored(data: bytes, image: Image.Image, pixels: np.ndarray, orientation: int) -> StoredImage:
    upright = orientation in (0, 1)
    if image.format == "PNG" and data[24] == 16 and data[25] in (2, 6):
        raise ImageRefusedError("16-bit colour image")  # Pillow would keep 8 of the 16 bits
    plain: bytes | None = None
    if image.format == "JPEG" and image.mode in ("L", "RGB") and upright:
        plain = strip_jpeg(data)
    elif image.format == "PNG" and upright and _png_kind(data) in ((8, 0), (16, 0), (8, 2)):
        plain = strip_png(data)
    if plain is not None:
        extension = "jpg" if image.format == "JPEG" else "png"
        bits = 16 if extension == "png" and _png_kind(data)[0] == 16 else 8
        encoded = EncodedImage(data=plain, extension=extension)
        return StoredImage(encoded=encoded, height=image.height, width=image.width, bits=bits)
    picture = Image.fromarray(pixels)
    if not upright:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        picture.info["exif"] = exif.tobytes()
        picture = ImageOps.exif_transpose(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=b"")
    encoded_png = strip_png(buffer.getvalue())
    assert encoded_png is not None  # Pillow just wrote it
    return StoredImage(
        encoded=EncodedImage(data=encoded_png, extension="png"),
        height=picture.height,
        width=picture.width,
        bits=16 if pixels.dtype == np.uint16 else 8,
    )


def _grey(image: Image.Image) -> np.ndarray:
    """[height, width] uint8 or uint16. Transparent pixels lie on black. Raises ImageRefusedError for other depths."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageRefusedError("image values outside 16 bit")
        return pixels.astype(np.uint16)
    if image.mode == "F":
        raise ImageRefusedError("image of floating-point values")
    if image.mode in ("RGBA", "LA", "PA", "P", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(ground, rgba).convert("L"))
    if image.mode not in ("1", "L", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        raise ImageRefusedError(f"image mode {image.mode}")
    return np.asarray(image.convert("L"))


def _png_kind(data: bytes) -> tuple[int, int]:
    """(bit depth, colour type) of a PNG; (0, 0) when its bytes hold transparency, which would need blending."""
    if b"tRNS" in data[: data.find(b"IDAT")]:
        return 0, 0
    return data[24], data[25]


def strip_jpeg(data: bytes) -> bytes | None:
    """The JPEG without comments and application segments, entropy-coded data untouched; None if it is malformed.

    Kept are a plain JFIF header and Adobe's 14-byte colour flag: decoders need them to know the colour space, and they
    have no room for text. What follows the end of the image is cut off.
    """
    kept = [data[:2]]
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xD9:
            kept.append(b"\xff\xd9")
            return b"".join(kept)
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        segment = data[at:end]
        if marker == 0xDA:
            found = _SCAN_END.search(data, end)
            if found is None:
                return None
            kept.append(data[at : found.start()])
            at = found.end() - 2
            if data[at + 1] == 0xD9:
                return b"".join([*kept, b"\xff\xd9"])
            continue
        jfif = marker == 0xE0 and len(segment) == 18 and segment[4:9] == b"JFIF\0"
        adobe = marker == 0xEE and len(segment) == 16 and segment[4:9] == b"Adobe"
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or jfif or adobe:
            kept.append(segment)
        at = end
    return None


def strip_png(data: bytes) -> bytes | None:
    """The PNG with header, pixel and end chunks only: no text, time, EXIF or profile; None if it is malformed."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if kind in _PNG_KEPT:
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    return None
