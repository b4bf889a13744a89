"""From byte ranges of a tar back to samples: the members table, the one-pass tar index, member checks, adopted tars.

Nothing read here is unpickled or executed, and nothing is decoded except JSON and image headers. A problem of one
sample is a BadSampleError (the loader makes it a void slot); a problem of a whole shard is a DataError.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import logging
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from crc32c import crc32c as crc32c_of
from PIL import Image
from pydantic import ValidationError

from shards.batch import IMAGE_EXTENSIONS, PICKLE_EXTENSIONS, EncodedImage, Sample, StudyRecord
from shards.errors import BadSampleError, ConfigError, DataError
from shards.manifest import ChunkTable, Manifest, Shard
from shards.store import Store, open_store, split_url

logger = logging.getLogger(__name__)

TAR_BLOCK = 512
STREAM_BYTES = 8 << 20  # read ahead of a streaming pass
CHUNK_BYTES = 2 << 20  # target of the chunk table: the unit of fetching
DALI_INDEX_VERSION = "v1.2"  # format of DALI's wds2idx
TEXT_EXTENSIONS = ("json", "txt", "caption", "text")
CAPTION_FIELDS = ("caption", "text", "report", "findings", "impression", "description", "TEXT")

_MASK_MEMBER = re.compile(r"^(\d+(?:-\d+)?)\.mask\.(\d+)\.[a-z0-9]+$")
_VIEW_MEMBER = re.compile(r"^(\d+)(?:-(\d+))?\.[a-z0-9]+$")
_PAX_RECORD = re.compile(rb"(\d+) ([^=\n]+)=")
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


def member_extension(member: str) -> str:
    """The last part of a member name, lower case: `0.mask.1.png` -> `png`."""
    return member.rpartition(".")[2].lower()


def is_pickle(member: str) -> bool:
    """Whether some reader would unpickle this member; any part counts, so `x.pkl.gz` does too."""
    return not PICKLE_EXTENSIONS.isdisjoint(member.lower().split("."))


def is_image(member: str) -> bool:
    """Whether the member holds the pixels of a view; masks (`0.mask.1.png`, `seg.png`) do not."""
    parts = member.lower().split(".")
    return parts[-1] in IMAGE_EXTENSIONS and not {"mask", "seg", "segmentation"}.intersection(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class MembersTable:
    """Members of one shard in tar order: n samples, m members.

    `keys` [n]; `first` [n + 1] int64: members of sample i are rows first[i]:first[i + 1]; `member` [m] is the name
    after the key and its dot; `offset`, `size` [m] int64 bytes of the content; `crc32c` [m] uint32, None when unknown.
    """

    keys: tuple[str, ...]
    first: np.ndarray
    member: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray
    crc32c: np.ndarray | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sample_index(self) -> np.ndarray:
        """[m] int64, the sample within the shard that each member belongs to."""
        return np.repeat(np.arange(len(self.keys), dtype=np.int64), np.diff(self.first))

    def rows(self, sample: int) -> range:
        """Rows of all members of a sample."""
        return range(int(self.first[sample]), int(self.first[sample + 1]))

    def images(self, sample: int) -> list[int]:
        """Rows of the views of a sample: ours by view id, foreign ones in tar order. Row i belongs to view i."""
        rows = [row for row in self.rows(sample) if is_image(self.member[row])]
        return [rows[i] for i in view_order([self.member[row] for row in rows])]

    def records(self, sample: int) -> list[int]:
        """Rows of the JSON or text members, the first of them if a sample has both: read with the views."""
        return [row for row in self.rows(sample) if member_extension(self.member[row]) in TEXT_EXTENSIONS]

    def to_parquet(self) -> bytes:
        """The side file `<name>.members.parquet`; the same bytes for the same table and pyarrow."""
        counts = np.diff(self.first)
        keys = pa.DictionaryArray.from_arrays(
            pa.array(np.repeat(np.arange(len(self.keys), dtype=np.int32), counts)), pa.array(self.keys, pa.string())
        )
        crc = pa.nulls(len(self.member), pa.uint32()) if self.crc32c is None else pa.array(self.crc32c, pa.uint32())
        table = pa.table(
            {
                "key": keys.cast(pa.string()),
                "member": pa.array(self.member, pa.string()),
                "offset": pa.array(self.offset, pa.int64()),
                "size": pa.array(self.size, pa.int64()),
                "crc32c": crc,
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", store_schema=False)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes, name: str) -> MembersTable:
        """Parse a side file. Raises DataError naming `name` when it is no such table or names a pickle member."""
        try:
            # A start reads a hundred side files. As dictionaries keys and names are made once, not once a row; and
            # `pq.read_table` would import pyarrow's datasets, `to_numpy` pandas: together a second before any batch.
            with pq.ParquetFile(pa.BufferReader(data), read_dictionary=["key", "member"]) as file:
                table = file.read(columns=["key", "member", "offset", "size", "crc32c"], use_threads=False)
            columns = {name: table[name].unify_dictionaries().combine_chunks() for name in table.column_names}
            offset, size = (np.from_dlpack(columns[name]).astype(np.int64) for name in ("offset", "size"))
            crc = None if columns["crc32c"].null_count else np.from_dlpack(columns["crc32c"]).astype(np.uint32)
            (key_of_row, keys), (member_of_row, members) = (_dictionary(columns[name]) for name in ("key", "member"))
        except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, BufferError) as error:
            raise DataError(
                f"{name}: not a members table ({type(error).__name__}); copy it anew with its tar"
            ) from None
        if None in keys or None in members:
            raise DataError(f"{name}: a member without a name; copy the table anew with its tar")
        if len(offset) and (offset.min() < 0 or size.min() < 0):
            raise DataError(f"{name}: a member with a negative offset or size; copy the table anew with its tar")
        for extension in members:
            if is_pickle(extension):
                raise DataError(
                    f"{name}: member *.{extension} is in a pickle format, which is never read; pack it anew"
                )
        starts = np.flatnonzero(np.diff(key_of_row, prepend=-1))
        return cls(
            keys=tuple(keys[i] for i in key_of_row[starts].tolist()),
            first=np.append(starts, len(key_of_row)).astype(np.int64),
            member=tuple(members[i] for i in member_of_row.tolist()),
            offset=offset,
            size=size,
            crc32c=crc,
        )


def _dictionary(column: pa.DictionaryArray) -> tuple[np.ndarray, list[Any]]:
    """(row's place among the values [n], values), the values holding None where a row has none."""
    if column.null_count:
        return np.zeros(len(column), dtype=np.int64), [None]
    return np.from_dlpack(column.indices).astype(np.int64), column.dictionary.to_pylist()


def view_order(members: Sequence[str]) -> list[int]:
    """Order of image members by view id (and part) where all have one, else as they stand."""
    matches = [_VIEW_MEMBER.match(member) for member in members]
    if not all(matches):
        return list(range(len(members)))
    numbers = [(int(match[1]), int(match[2] or 0)) for match in matches if match]
    return sorted(range(len(members)), key=numbers.__getitem__)


@dataclass(frozen=True, kw_only=True, eq=False)
class TarIndex:
    """What one streaming pass over a tar finds. `start`, `end` [n] int64: tar range of each sample with its headers."""

    table: MembersTable
    start: np.ndarray
    end: np.ndarray
    tar_bytes: int
    sha256: str | None
    refused: dict[str, int]

    def images(self) -> np.ndarray:
        """[n] int64, number of views of each sample."""
        flags = np.asarray([is_image(member) for member in self.table.member], dtype=np.int64)
        return np.add.reduceat(flags, self.table.first[:-1]) if len(self.table) else flags

    def chunks(self, target_bytes: int = CHUNK_BYTES) -> ChunkTable:
        """Consecutive samples of at most `target_bytes`; one larger sample is a chunk of its own."""
        images, borders = self.images(), [0]
        for i in range(1, len(self.start)):
            if self.end[i] - self.start[borders[-1]] > target_bytes:
                borders.append(i)
        borders = borders if len(self.start) else []
        first = np.asarray(borders, dtype=np.int64)
        last = np.append(first[1:], len(self.start)) if borders else first
        offset = self.start[first]
        return ChunkTable(
            first_sample=first,
            samples=last - first,
            images=np.asarray([images[a:b].sum() for a, b in zip(first, last, strict=True)], dtype=np.int64),
            offset=offset,
            bytes=self.end[last - 1] - offset,
        )

    def dali_index(self) -> bytes:
        """The side file `<name>.idx`: `v1.2 <samples>`, then per sample `extension offset size file` per member.

        White space, which the format cannot hold, becomes `%20` (DALI uses the names in messages only).
        """
        lines = [f"{DALI_INDEX_VERSION} {len(self.table)}"]
        for sample, key in enumerate(self.table.keys):
            parts: list[str] = []
            for row in self.table.rows(sample):
                extension = re.sub(r"\s", "%20", self.table.member[row])
                name = re.sub(r"\s", "%20", key)
                parts += [extension, str(self.table.offset[row]), str(self.table.size[row]), f"{name}.{extension}"]
            lines.append(" ".join(parts))
        return ("\n".join(lines) + "\n").encode()


def describe_shard(name: str, split: str, index: TarIndex, chunk_bytes: int) -> tuple[Shard, dict[str, bytes]]:
    """The shard's line of the manifest, and its side files (name -> content)."""
    dali, members = index.dali_index(), index.table.to_parquet()
    chunks = index.chunks(chunk_bytes)
    shard = Shard(
        name=name,
        split=split,
        bytes=index.tar_bytes,
        sha256=index.sha256,
        samples=len(index.table),
        images=int(chunks.images.sum()),
        index_sha256=hashlib.sha256(dali).hexdigest(),
        members_sha256=hashlib.sha256(members).hexdigest(),
        chunks=chunks,
    )
    return shard, {shard.index: dali, shard.members: members}


class ByteSource(Protocol):
    """What an index pass needs of a file: bytes in order."""

    def read(self, length: int) -> bytes: ...

    def skip(self, length: int) -> None: ...


class StoreStream:
    """An object of a store read front to back by ranges of 8 MB. With `digest` every byte goes through sha256.

    Without it, `skip` jumps, so that only headers are fetched (`window` bytes a time).
    """

    def __init__(self, store: Store, name: str, *, digest: bool = True) -> None:
        self._store, self._name = store, name
        self.bytes = store.size(name)
        self.digest = hashlib.sha256() if digest else None
        self._window = STREAM_BYTES if digest else 64 << 10
        self._block, self._block_start, self.position = b"", 0, 0

    def read(self, length: int) -> bytes:
        """Up to `length` bytes, fewer at the end of the object only."""
        parts: list[bytes] = []
        while length > 0 and self.position < self.bytes:
            inside = self.position - self._block_start
            if not 0 <= inside < len(self._block):
                span = min(max(self._window, 0), self.bytes - self.position)
                self._block, self._block_start, inside = (
                    self._store.get_range(self._name, self.position, span),
                    self.position,
                    0,
                )
            part = self._block[inside : inside + length]
            if self.digest is not None:
                self.digest.update(part)
            parts.append(part)
            self.position += len(part)
            length -= len(part)
        return b"".join(parts)

    def skip(self, length: int) -> None:
        """Pass over `length` bytes; they are still hashed when there is a digest."""
        if self.digest is None:
            self.position = min(self.position + length, self.bytes)
            return
        while length > 0:
            passed = len(self.read(min(length, STREAM_BYTES)))
            if passed == 0:
                return
            length -= passed


def _tar_members(stream: ByteSource, name: str) -> Iterator[tuple[str, int, int, int]]:
    """(name, header offset, content offset, size) of each regular file; the caller consumes exactly `size` bytes.

    Unlike tarfile, which takes an invalid header for the end, this raises DataError for anything but zeros or the end
    of the file after a member.
    """
    position = 0

    def take(length: int, what: str) -> bytes:
        nonlocal position
        data = stream.read(length)
        if len(data) < length:
            raise DataError(f"{name}: truncated in {what} at byte {position + len(data)}; copy the tar anew")
        position += length
        return data

    long_name: str | None = None
    long_size: int | None = None
    start: int | None = None
    while True:
        block = stream.read(TAR_BLOCK)
        if not block or block.count(0) == len(block):
            if start is not None:
                raise DataError(f"{name}: truncated after an extended header at byte {position}; copy the tar anew")
            if position == 0 and not block:
                raise DataError(f"{name}: empty file, not a tar; copy it anew")
            while rest := stream.read(STREAM_BYTES):
                if rest.count(0) != len(rest):
                    raise DataError(f"{name}: bytes after the end of the archive at {position}; write the tar anew")
            return
        if len(block) < TAR_BLOCK:
            raise DataError(f"{name}: truncated in a header at byte {position}; copy the tar anew")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            kind = "compressed; unpack it, since members are read by range" if block[:2] == b"\x1f\x8b" else "no header"
            raise DataError(f"{name}: not a tar at byte {position} ({kind})") from None
        start = position if start is None else start
        position += TAR_BLOCK
        padded = -(-header.size // TAR_BLOCK) * TAR_BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if padded > 1 << 20:
                raise DataError(f"{name}: extended header of {padded} bytes at byte {start}; write the tar anew")
            content = take(padded, "an extended header")[: header.size]
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type == tarfile.XHDTYPE:
                records = _pax_records(content)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if records.get("size", "").isdigit() else long_size
            elif header.type == tarfile.XGLTYPE:
                start = None
            continue
        size = header.size if long_size is None else long_size
        path = header.name if long_name is None else long_name
        padded = -(-size // TAR_BLOCK) * TAR_BLOCK
        if header.type in _REGULAR and not path.endswith("/"):
            yield path, start, position, size
        elif header.type in (tarfile.GNUTYPE_SPARSE,):
            raise DataError(f"{name}: sparse member at byte {start}; write the tar anew without --sparse")
        elif header.type in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            size = padded = 0  # these have no content, whatever the size field says
        else:
            stream.skip(size)
        position += size
        take(padded - size, "the padding of a member")
        long_name = long_size = start = None


def _pax_records(content: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    at = 0
    while match := _PAX_RECORD.match(content, at):
        end = at + int(match[1])
        if end <= match.end() or end > len(content):
            break
        records[match[2].decode("utf-8", "replace")] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    return records


def split_member(path: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of its last component, the rest is the member."""
    folder, slash, base = path.rpartition("/")
    stem, _, member = base.partition(".")
    return folder + slash + stem, member


def index_tar(stream: StoreStream, name: str, *, checksums: bool = True) -> TarIndex:
    """Index a tar in one pass. Samples without an image, and members in pickle formats, are left out and counted.

    Raises DataError naming `name` and the byte for a truncated, compressed or malformed tar.
    """
    refused: Counter[str] = Counter()
    keys: list[str] = []
    first: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    rows: list[tuple[str, int, int, int]] = []  # member, offset, size, crc32c
    group: list[tuple[str, int, int, int]] = []
    group_key: str | None = None
    group_start = group_end = 0

    def close_group() -> None:
        if group_key is None:
            return
        if not any(is_image(member) for member, *_ in group):
            refused["no image in sample"] += 1
            return
        keys.append(group_key)
        first.append(len(rows))
        starts.append(group_start)
        ends.append(group_end)
        rows.extend(group)

    for path, header, offset, size in _tar_members(stream, name):
        key, member = split_member(path)
        crc = 0
        if checksums:
            crc, left = 0, size
            while left and (part := stream.read(min(left, STREAM_BYTES))):
                crc = crc32c_of(part, crc)
                left -= len(part)
            if left:
                raise DataError(f"{name}: truncated at byte {offset + size - left} inside a member; copy the tar anew")
        else:
            if offset + size > stream.bytes:
                raise DataError(f"{name}: truncated at byte {stream.bytes} inside a member; copy the tar anew")
            stream.skip(size)
        try:
            path.encode()
        except UnicodeEncodeError:
            refused["member name not UTF-8"] += 1
            continue
        if not member or key.rpartition("/")[2] == "":
            refused["file without key or extension"] += 1  # README, .DS_Store: WebDataset skips them too
            continue
        if key != group_key:
            close_group()
            group, group_key, group_start = [], key, header
        group_end = offset + -(-size // TAR_BLOCK) * TAR_BLOCK
        if is_pickle(member):
            refused[f"member in pickle format .{member_extension(member)}"] += 1
        elif any(member == other for other, *_ in group):
            refused["member twice in one sample"] += 1
        else:
            group.append((member, offset, size, crc))
    close_group()
    for key, count in Counter(keys).items():
        if count > 1:
            hashed = hashlib.sha256(key.encode()).hexdigest()[:16]
            raise DataError(f"{name}: duplicate key (sha256 {hashed}) in {count} places; rename one and write it anew")
    table = MembersTable(
        keys=tuple(keys),
        first=np.asarray([*first, len(rows)], dtype=np.int64),
        member=tuple(row[0] for row in rows),
        offset=np.asarray([row[1] for row in rows], dtype=np.int64),
        size=np.asarray([row[2] for row in rows], dtype=np.int64),
        crc32c=np.asarray([row[3] for row in rows], dtype=np.uint32) if checksums else None,
    )
    return TarIndex(
        table=table,
        start=np.asarray(starts, dtype=np.int64),
        end=np.asarray(ends, dtype=np.int64),
        tar_bytes=stream.bytes,
        sha256=stream.digest.hexdigest() if stream.digest is not None else None,
        refused=dict(sorted(refused.items())),
    )


def read_members(store: Store, shard: Shard) -> MembersTable:
    """The members table of a shard, checked against the manifest.

    Raises DataError when the side file is not the one the manifest was written with, or disagrees with it.
    """
    data = store.get(shard.members)
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.members_sha256:
        raise DataError(
            f"{shard.members}: sha256 {digest[:12]}..., the manifest says {shard.members_sha256[:12]}...; "
            "the index is older than its tar or from another set: copy tar, idx and parquet together"
        )
    table = MembersTable.from_parquet(data, shard.members)
    if len(table) != shard.samples:
        raise DataError(f"{shard.members}: {len(table)} samples, the manifest says {shard.samples}; copy the set anew")
    if len(table.offset) and int((table.offset + table.size).max()) > shard.bytes:
        raise DataError(f"{shard.members}: a member ends after the {shard.bytes} bytes of its tar; copy the set anew")
    return table


def log_key(manifest: Manifest, key: str) -> str:
    """The key as it may stand in logs: ours is a keyed hash already, one of an adopted tar is hashed first."""
    return "#" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16] if manifest.adopted else key


def check_member(data: bytes | memoryview, *, shard: str, key: str, member: str, size: int, crc32c: int | None) -> None:
    """Check a member before it is used. Raises BadSampleError for a pickle name, 0 bytes, a short read, a wrong crc."""
    if is_pickle(member):
        raise BadSampleError(shard, key, f"member .{member} is in a pickle format, which is never read")
    if size == 0:
        raise BadSampleError(shard, key, f"member .{member} has 0 bytes")
    if len(data) != size:
        raise BadSampleError(shard, key, f"member .{member} has {len(data)} of {size} bytes; truncated tar?")
    if crc32c is not None and crc32c_of(data) != int(crc32c):
        raise BadSampleError(shard, key, f"member .{member} does not match its crc32c")


def parse_study(data: bytes) -> StudyRecord:
    """Parse `<key>.json`. Raises ValueError with a one-line cause that quotes nothing of the content."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"JSON not UTF-8 at byte {error.start}") from None
    try:
        return StudyRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = str(first["loc"][0]) if first["loc"] and first["loc"][0] in StudyRecord.model_fields else "record"
        if place == "labels" and first["type"] == "literal_error":
            raise ValueError("labels: a value other than 0, 1, -1") from None
        raise ValueError(f"JSON does not fit the schema: {place}: {first['type']}") from None


def probe_image(data: bytes) -> tuple[int, int, int]:
    """(height, width, bits) from the encoded header alone. Raises ValueError when it is no known image.

    `bits` is 8 or 16, the smaller that holds the stored precision. JPEG, PNG and JPEG 2000 (also HTJ2K) headers are
    read here, so that no size limit of Pillow stands before ours; anything else by Pillow, which reads lazily.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 29 and data[12:16] == b"IHDR":
        width, height, depth = struct.unpack(">IIB", data[16:25])
        return _checked_size(height, width, depth)
    if data[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(data) and data[at] == 0xFF:
            marker = data[at + 1]
            if marker == 0xFF:  # fill byte
                at += 1
                continue
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                precision, height, width = struct.unpack(">BHH", data[at + 4 : at + 9])
                return _checked_size(height, width, precision)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        raise ValueError("JPEG without a frame header")
    codestream = data[:65536].find(b"\xff\x4f\xff\x51")
    if codestream >= 0 and (codestream == 0 or data[4:8] == b"jP  ") and len(data) >= codestream + 43:
        at = codestream + 8
        x_size, y_size, x_offset, y_offset = struct.unpack(">IIII", data[at : at + 16])
        return _checked_size(y_size - y_offset, x_size - x_offset, (data[at + 34] & 0x7F) + 1)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _checked_size(image.height, image.width, 16 if image.mode.startswith(("I", "F")) else 8)
    except Image.DecompressionBombError:
        raise ValueError("image of more pixels than any limit") from None
    except Exception as error:  # Pillow's plug-ins raise many kinds for malformed headers; all mean the same here
        raise ValueError(f"no image header ({type(error).__name__})") from None


def _checked_size(height: int, width: int, depth: int) -> tuple[int, int, int]:
    if height < 1 or width < 1 or depth > 16:
        raise ValueError(f"image header says {height} x {width} pixels of {depth} bits")
    return height, width, 8 if depth <= 8 else 16


def _caption(members: Mapping[str, bytes]) -> str:
    """Text of a foreign sample: `.txt` or `.caption`, else a caption field of its JSON. Raises ValueError."""
    for member, data in members.items():
        extension = member_extension(member)
        if extension not in TEXT_EXTENSIONS:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"member .{member} not UTF-8 at byte {error.start}") from None
        if extension != "json":
            if text.strip():
                return text.strip()
            continue
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"member .{member} is not JSON") from None
        for name in CAPTION_FIELDS:
            value = body.get(name) if isinstance(body, dict) else None
            if isinstance(value, str) and value.strip():
                return value.strip()
    return ""


def record_from_members(members: Mapping[str, bytes], *, adopted: bool, key: str = "") -> StudyRecord:
    """The record of a sample from its members (name after the key -> content).

    Ours is `json`, checked against the schema. A foreign sample becomes a record with report {"text": caption} and one
    view per image, numbered in order, with sizes from the encoded headers; its study and patient are the hashed key.
    Raises ValueError with a one-line cause.
    """
    if "json" in members and (not adopted or b'"patient"' in members["json"]):
        try:
            return parse_study(members["json"])
        except ValueError:
            if not adopted:
                raise
    if not adopted:
        raise ValueError("no .json member")
    # Text before JSON: a caption file beside web metadata is the meant text.
    ordered = dict(sorted(members.items(), key=lambda item: member_extension(item[0]) == "json"))
    caption = _caption(ordered)
    images = [member for member in members if is_image(member)]
    if not images:
        raise ValueError("no image member")
    views: list[dict[str, Any]] = []
    for number, index in enumerate(view_order(images)):
        member = images[index]
        try:
            height, width, bits = probe_image(members[member])
        except ValueError as error:
            raise ValueError(f"member .{member}: {error}") from None
        views.append({"id": str(number), "height": height, "width": width, "bits": bits})
    identity = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    body = {"study": identity, "patient": identity, "report": {"text": caption} if caption else {}, "views": views}
    return StudyRecord.model_validate(body | {"provenance": {"adopted": True}})


def sample_from_members(
    members: Mapping[str, bytes],
    *,
    shard: str,
    key: str,
    split: str,
    adopted: bool = False,
    shown_key: str | None = None,
) -> Sample:
    """Assemble a sample from all of its members. Raises BadSampleError (with `shown_key`, safe for logs)."""
    try:
        record = record_from_members(members, adopted=adopted, key=key)
        names = [name for name in members if is_image(name)]
        names = [names[i] for i in view_order(names)]
        if len(names) != len(record.views):
            raise ValueError(f"{len(names)} images for {len(record.views)} views")
    except ValueError as error:
        raise BadSampleError(shard, shown_key or key, str(error)) from None
    masks = {}
    for name, data in members.items():
        if match := _MASK_MEMBER.match(name):
            masks[match[1], int(match[2])] = EncodedImage(data=data, extension=member_extension(name))
    images = tuple(EncodedImage(data=members[name], extension=member_extension(name)) for name in names)
    return Sample(key=key, record=record, images=images, masks=masks, split=split)


def read_samples(store: Store, manifest: Manifest, shard: Shard) -> Iterator[Sample | BadSampleError]:
    """All samples of one shard in order, member by member checked: for tools, tests and statistics, not for training.

    A bad sample is yielded as its error, so that the caller decides.
    """
    table = read_members(store, shard)
    for sample, key in enumerate(table.keys):
        members: dict[str, bytes] = {}
        shown = log_key(manifest, key)
        try:
            for row in table.rows(sample):
                offset, size = int(table.offset[row]), int(table.size[row])
                data = _tar_range(store, shard, offset, size)
                crc = None if table.crc32c is None else int(table.crc32c[row])
                check_member(data, shard=shard.name, key=shown, member=table.member[row], size=size, crc32c=crc)
                members[table.member[row]] = data
            yield sample_from_members(
                members, shard=shard.name, key=key, split=shard.split, adopted=manifest.adopted, shown_key=shown
            )
        except BadSampleError as error:
            yield error


def _tar_store(store: Store, shard: Shard) -> tuple[Store, str]:
    """Where the tar of a shard lies: beside the manifest, or for adopted sets at its own URL."""
    if shard.url is None:
        return store, shard.tar
    root, name = split_url(shard.url)
    return open_store(root), name


def _tar_range(store: Store, shard: Shard, offset: int, size: int) -> bytes:
    if size == 0:
        return b""
    where, name = _tar_store(store, shard)
    return where.get_range(name, offset, size)


@dataclass(frozen=True)
class Fault:
    """One finding of `verify`: `key` is None when the whole shard or a side file is meant."""

    shard: str
    key: str | None
    cause: str


def verify(store: Store, manifest: Manifest, shard: Shard) -> list[Fault]:
    """Check one shard whole, in one pass: sizes, sha256, every member's crc32c and JSON, both side files."""
    faults: list[Fault] = []
    try:
        index = store.get(shard.index)
        if hashlib.sha256(index).hexdigest() != shard.index_sha256:
            faults.append(Fault(shard.name, None, f"{shard.index} does not match the manifest's sha256"))
        table = read_members(store, shard)
        where, name = _tar_store(store, shard)
        stream = StoreStream(where, name)
    except DataError as error:
        return [*faults, Fault(shard.name, None, str(error))]
    if stream.bytes != shard.bytes:
        faults.append(Fault(shard.name, None, f"{shard.tar} has {stream.bytes} bytes, the manifest says {shard.bytes}"))
    samples = table.sample_index
    for row in np.argsort(table.offset, kind="stable"):
        size, member = int(table.size[row]), table.member[row]
        shown = log_key(manifest, table.keys[samples[row]])
        stream.skip(int(table.offset[row]) - stream.position)
        data = stream.read(size)
        crc = None if table.crc32c is None else int(table.crc32c[row])
        try:
            check_member(data, shard=shard.name, key=shown, member=member, size=size, crc32c=crc)
            if member == "json" and not manifest.adopted:
                parse_study(data)
        except BadSampleError as error:
            faults.append(Fault(shard.name, shown, error.cause))
        except ValueError as error:
            faults.append(Fault(shard.name, shown, str(error)))
    stream.skip(stream.bytes - stream.position)
    digest = stream.digest.hexdigest() if stream.digest is not None else None
    if shard.sha256 is not None and digest != shard.sha256:
        faults.append(Fault(shard.name, None, f"{shard.tar} does not match the manifest's sha256"))
    return faults


def expand_urls(patterns: Sequence[str]) -> list[str]:
    """URLs of tars from names, `{000..015}` ranges and `*` patterns, in a folder or a bucket.

    Raises ConfigError for a pattern that matches nothing or names a pipe.
    """
    urls: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or pattern.endswith("|"):
            raise ConfigError("pipe: URLs run a shell and are refused; give a path or s3:// URL")
        for url in braceexpand(pattern):
            root, name = split_url(url)
            if not root.startswith("s3://"):  # a manifest must not depend on where it was made from
                root = str(Path(root).resolve())
                url = f"{root}/{name}"
            if not set("*?[") & set(name):
                urls.append(url)
                continue
            found = sorted(other for other in open_store(root).list("") if fnmatch.fnmatchcase(other, name))
            found = [other for other in found if other.count("/") == name.count("/")]
            if not found:
                raise ConfigError(f"--input {pattern}: matches no object; check the folder and the pattern")
            urls += [f"{root.rstrip('/')}/{other}" for other in found]
    if len(set(urls)) != len(urls):
        raise ConfigError("--input names a tar twice; give each once")
    return urls


def adopt(
    splits: Mapping[str, Sequence[str]],
    output: str,
    *,
    headers_only: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Index foreign WebDataset tars (split -> URLs or patterns) and write side files and manifest to `output`.

    One streaming pass per tar computes checksums; no tar is rewritten. `headers_only` leaves crc32c and sha256 None.
    Raises ConfigError for patterns that match nothing, DataError for a tar that cannot be read.
    """
    store = open_store(output, create=True)
    if store.exists("manifest.json") and not overwrite:
        raise ConfigError(f"{store.url} already holds a manifest.json; choose an empty --output or give --overwrite")
    if headers_only:
        logger.warning("--headers-only: members of the adopted tars carry no checksum and are used unverified")
    shards: list[Shard] = []
    refused: Counter[str] = Counter()
    fields: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for split, patterns in splits.items():
        for url in expand_urls(patterns):
            root, name = split_url(url)
            stream = StoreStream(open_store(root), name, digest=not headers_only)
            index = index_tar(stream, name, checksums=not headers_only)
            refused.update(index.refused)
            stem = re.sub(r"[^A-Za-z0-9_.-]", "_", name.rpartition("/")[2].removesuffix(".tar")) or "shard"
            taken[stem] += 1
            stem = stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"
            if len(index.table) == 0:
                refused["tar without samples"] += 1
                logger.warning("%s: no sample with an image; left out", name)
                continue
            fields["text"] += sum(1 for i in range(len(index.table)) if index.table.records(i))
            shard, side_files = describe_shard(stem, split, index, chunk_bytes)
            for file, content in side_files.items():
                store.put(file, content)
            shards.append(replace(shard, url=url))
            logger.info("%s: %d samples, %d members", name, len(index.table), len(index.table.member))
    if not shards:
        raise DataError("no sample in any of the adopted tars; they need members like <key>.jpg and <key>.txt")
    for reason, count in sorted(refused.items()):
        logger.warning("left out %d: %s", count, reason)
    manifest = Manifest(
        shards=tuple(shards),
        fields=dict(sorted(fields.items())),
        sections={"text": fields["text"]} if fields["text"] else {},
        refused=dict(sorted(refused.items())),
        source="adopt",
        adopted=True,
    )
    store.put("manifest.json", manifest.to_bytes())
    return manifest
