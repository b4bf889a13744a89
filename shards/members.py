"""Members of a shard by name and place: which are views, records or pickles, and the side file that lists them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.batch import IMAGE_EXTENSIONS, PICKLE_EXTENSIONS, VOLUME_EXTENSION
from shards.errors import DataError

TEXT_EXTENSIONS = ("json", "txt", "caption", "text")
ATTENTION = "attention.png"  # the member of a view's attention grid, behind the view's id

_VIEW_MEMBER = re.compile(r"^(\d+)(?:-(\d+))?\.[a-z0-9]+$")
_VOLUME_PART = re.compile(rf"^(\d+)-(\d+)\.{VOLUME_EXTENSION}$")
_IMAGE_MASK = re.compile(r"^(\d+)\.mask\.(\d+)\.png$")
_MASK_PART = re.compile(rf"^(\d+)-(\d+)\.mask\.(\d+)\.{VOLUME_EXTENSION}$")


def member_extension(member: str) -> str:
    """The last part of a member name, lower case: `0.mask.1.png` -> `png`."""
    return member.rpartition(".")[2].lower()


def is_pickle(member: str) -> bool:
    """Whether some reader would unpickle this member; any part counts, so `x.pkl.gz` does too."""
    return not PICKLE_EXTENSIONS.isdisjoint(member.lower().split("."))


def is_image(member: str) -> bool:
    """Whether the member holds the pixels of a view; masks (`0.mask.1.png`, `seg.png`) and grids do not."""
    parts = member.lower().split(".")
    return parts[-1] in IMAGE_EXTENSIONS and not {"mask", "seg", "segmentation", "attention"}.intersection(parts)


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
        """Row of each view of a sample, of a volume that of its first part: ours by view id, foreign in tar order."""
        return [rows[0] for rows in self.views(sample)]

    def views(self, sample: int) -> list[list[int]]:
        """Rows of each view of a sample: one of an image, those of the parts of a volume in their order."""
        rows = [row for row in self.rows(sample) if is_image(self.member[row])]
        return [[rows[i] for i in view] for view in group_views([self.member[row] for row in rows])]

    def mask_parts(self, sample: int, view_id: str) -> dict[tuple[int, int], int]:
        """(label map, part) -> row, of the label maps of a volume."""
        matches = ((row, _MASK_PART.match(self.member[row])) for row in self.rows(sample))
        return {(int(match[3]), int(match[2])): row for row, match in matches if match and match[1] == view_id}

    def image_masks(self, sample: int, view_id: str) -> dict[tuple[int, int], int]:
        """(label map, 0) -> row, of the label maps of an image: it has one part."""
        matches = ((row, _IMAGE_MASK.match(self.member[row])) for row in self.rows(sample))
        return {(int(match[2]), 0): row for row, match in matches if match and match[1] == view_id}

    def attention_grid(self, sample: int, view_id: str) -> int | None:
        """Row of the attention grid of a view, if it has one."""
        name = f"{view_id}.{ATTENTION}"
        return next((row for row in self.rows(sample) if self.member[row] == name), None)

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


def group_views(members: Sequence[str]) -> list[list[int]]:
    """Places of the image members by view, in the order of `view_order`: the parts of a volume are one view."""
    views: list[list[int]] = []
    volume: str | None = None  # id of the view that the last part belongs to
    for place in view_order(members):
        part = _VOLUME_PART.match(members[place])
        if part is not None and part[1] == volume:
            views[-1].append(place)
        else:
            views.append([place])
        volume = part[1] if part is not None else None
    return views


def part_number(member: str) -> int | None:
    """Which part of a volume a member is; None for an image."""
    match = _VOLUME_PART.match(member)
    return int(match[2]) if match else None
