"""One pass over a tar: samples, byte ranges, checksums; from these a shard's line of the manifest and side files.

Stricter than tarfile, which takes a broken header for the end of the archive.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from awscrt.checksums import crc32c as crc32c_of

from shards.errors import DataError
from shards.manifest import ChunkTable, Shard
from shards.members import MembersTable, is_image, is_pickle, member_extension
from shards.store import Store

TAR_BLOCK = 512
STREAM_BYTES = 8 << 20  # read ahead of a streaming pass
CHUNK_BYTES = 2 << 20  # target of the chunk table: the unit of fetching
DALI_INDEX_VERSION = "v1.2"  # format of DALI's wds2idx

_PAX_RECORD = re.compile(rb"(\d+) ([^=\n]+)=")
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


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
        return np.asarray([len(self.table.images(sample)) for sample in range(len(self.table))], dtype=np.int64)

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
