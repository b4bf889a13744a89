"""Size and depth of an encoded image from its first bytes, without decoding: a bomb is refused before it is unpacked.

`read_header` parses untrusted bytes and returns None where the format's rules are broken; `probe_image` is for sources
that take every image Pillow knows, and raises.
"""

from __future__ import annotations

import io
import re
import struct
from typing import NamedTuple

from PIL import Image


class ImageHeader(NamedTuple):
    """`bits` is the depth of the decoded values: 8 (also for 1, 2 and 4 bit PNG), 16, or the odd precision found."""

    width: int
    height: int
    bits: int


def read_header(data: bytes | memoryview) -> ImageHeader | None:
    """Header of a JPEG, PNG, JPEG 2000, TIFF, BMP, WebP or PNM image; None for anything else."""
    start = bytes(data[:16])
    try:
        for magic, reader in _READERS:
            if start.startswith(magic):
                return reader(data)
    except (struct.error, IndexError):  # the bytes end inside the header
        return None
    return None


def _jpeg(data: bytes | memoryview) -> ImageHeader | None:
    position, end = 2, len(data)
    while position + 9 <= end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            position += 2
        elif marker in (0xD9, 0xDA):  # the scan begins, or the image ends, before a frame header
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOFn (ITU T.81, table B.1)
            bits, height, width = struct.unpack_from(">BHH", data, position + 4)
            return ImageHeader(width, height, bits)
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


def _png(data: bytes | memoryview) -> ImageHeader | None:
    if bytes(data[12:16]) != b"IHDR":
        return None
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return ImageHeader(width, height, 8 if bits <= 8 else bits)


def _jpeg2000(data: bytes | memoryview) -> ImageHeader | None:
    head = bytes(data[:65536])
    start = head.find(b"\xff\x4f\xff\x51")  # SOC, SIZ (ITU T.800, A.5.1)
    if start < 0:
        return None
    x1, y1, x0, y0 = struct.unpack_from(">4I", head, start + 8)
    bits = (head[start + 42] & 0x7F) + 1
    return ImageHeader(x1 - x0, y1 - y0, bits)


def _bmp(data: bytes | memoryview) -> ImageHeader | None:
    width, height = struct.unpack_from("<ii", data, 18)
    return ImageHeader(width, abs(height), 8)  # a negative height means top row first


def _pnm(data: bytes | memoryview) -> ImageHeader | None:
    fields = re.match(rb"P[2356]\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s+(\d{1,9})\s+(\d{1,5})\s", bytes(data[:1024]))
    if fields is None:
        return None
    width, height, largest = (int(field) for field in fields.groups())
    return ImageHeader(width, height, largest.bit_length())


def _webp(data: bytes | memoryview) -> ImageHeader | None:
    chunk = bytes(data[8:16])
    if chunk == b"WEBPVP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader(width & 0x3FFF, height & 0x3FFF, 8)
    if chunk == b"WEBPVP8L":
        word = struct.unpack_from("<I", data, 21)[0]
        return ImageHeader((word & 0x3FFF) + 1, (word >> 14 & 0x3FFF) + 1, 8)
    return None  # the extended format may be an animation


def _tiff(data: bytes | memoryview) -> ImageHeader | None:
    order = "<" if data[0] == 0x49 else ">"
    directory = struct.unpack_from(order + "I", data, 4)[0]
    values = {258: 1}  # BitsPerSample has a default
    for entry in range(struct.unpack_from(order + "H", data, directory)[0]):
        offset = directory + 2 + 12 * entry
        tag, kind, count = struct.unpack_from(order + "HHI", data, offset)
        if tag in (256, 257, 258) and kind in (3, 4):
            letter = "H" if kind == 3 else "I"
            inline = count * struct.calcsize(letter) <= 4
            place = offset + 8 if inline else struct.unpack_from(order + "I", data, offset + 8)[0]
            values[tag] = struct.unpack_from(order + letter, data, place)[0]
    if 256 not in values or 257 not in values:
        return None
    return ImageHeader(values[256], values[257], 8 if values[258] <= 8 else values[258])


_READERS = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", _jpeg2000),
    (b"\xff\x4f\xff\x51", _jpeg2000),
    (b"BM", _bmp),
    (b"RIFF", _webp),
    (b"II*\x00", _tiff),
    (b"MM\x00*", _tiff),
    (b"P", _pnm),
)


def probe_image(data: bytes) -> tuple[int, int, int]:
    """(height, width, bits) from the encoded header alone. Raises ValueError when it is no known image.

    `bits` is 8 or 16, the smaller that holds the stored precision. Pillow, which reads lazily, is asked for what
    `read_header` does not know and for TIFF of 32 bits; the rest does not meet its size limit.
    """
    header = read_header(data)
    if header is not None and header.bits > 16 and data[:2] in (b"II", b"MM"):
        header = None
    if header is None and data[:3] == b"\xff\xd8\xff":
        raise ValueError("JPEG without a frame header")
    if header is None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                header = ImageHeader(image.width, image.height, 16 if image.mode.startswith(("I", "F")) else 8)
        except Image.DecompressionBombError:
            raise ValueError("image of more pixels than any limit") from None
        except Exception as error:  # Pillow's plug-ins raise many kinds for malformed headers; all mean the same here
            raise ValueError(f"no image header ({type(error).__name__})") from None
    if header.height < 1 or header.width < 1 or not 1 <= header.bits <= 16:
        raise ValueError(f"image header says {header.height} x {header.width} pixels of {header.bits} bits")
    return header.height, header.width, 8 if header.bits <= 8 else 16
