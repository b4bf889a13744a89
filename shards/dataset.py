"""One manifest's split as units that can be read: where a unit lies, and its members, verified.

What a batch needs of which unit is the order's and the loader's business; nothing here is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shards.batch import StudyRecord
from shards.chunk_cache import ChunkCache
from shards.errors import BadSampleError, DataError, MissingObjectError, StoreUnreachableError
from shards.folder import room_for
from shards.manifest import MANIFEST, Manifest, Shard
from shards.members import MembersTable, part_number
from shards.order import UnitTable
from shards.reader import check_member, log_key, read_members, record_from_members
from shards.store import Store, StoreConfig, StoreRetry, Stores, open_store, split_url

# Members that follow each other are read as one range: between them lie padding and tar headers, nothing else unless a
# foreign tar holds a member that its index left out.
_MERGE_GAP_BYTES = 4096
READ_AGAIN = 3  # times that a member is read once more when its bytes are not what the index says

Event = dict[str, Any]
Reads = Literal["everything", "report", "labels"]  # what is seen of a study beside its images


def manifest_place(url: str) -> tuple[str, str]:
    """(store, name in it) of a manifest; `url` names it, or the folder that pack.py wrote it into."""
    root, name = split_url(url)
    if (Path(root) / name).is_dir() or (url.startswith("s3://") and not name.endswith(".json")):
        return f"{root}/{name}", MANIFEST
    return root, name


def open_manifest(
    url: str, config: StoreConfig | None = None, *, on_retry: Callable[[StoreRetry], None] | None = None
) -> tuple[Store, Manifest]:
    """The store of a set and its manifest; `url` names the manifest, or the folder that pack.py wrote it into.

    Raises ConfigError for a store that cannot be opened, DataError where there is no manifest or it is broken.
    """
    root, name = manifest_place(url)
    store = open_store(root, config, on_retry=on_retry)
    try:
        return store, Manifest.from_bytes(store.get(name), url)
    except MissingObjectError:
        raise MissingObjectError(
            f"{store.url}: holds no {name}; name the {MANIFEST} of a set, or its folder. launchers/pack.py writes it "
            "last: repeat the same command where it was interrupted"
        ) from None


def read_manifest(url: str, config: StoreConfig | None = None) -> Manifest:
    """The manifest alone; its store is closed again. Raises as `open_manifest` does."""
    store, manifest = open_manifest(url, config)
    store.close()
    return manifest


class DataSet:
    """One manifest's split: its store, its unit table, and the side files of the shards as they are needed."""

    def __init__(
        self,
        url: str,
        split: str,
        *,
        every_image: bool = False,
        store: StoreConfig | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        reads: Reads = "everything",
    ):
        self._on_event, self._adopted = on_event, False
        self.store, self.whole = open_manifest(url, store, on_retry=self._tell_retry)
        self.url, self.every_image, self.reads = url, every_image, reads
        self._adopted = self.whole.adopted
        self.manifest = self.whole.of_split(split)
        self.table = UnitTable.of(self.manifest, every_image=every_image)
        self.members = lru_cache(maxsize=1024)(self._read_members)
        self._elsewhere = Stores(self.store.config, on_retry=self._tell_retry)
        self.void = {(index, sample) for index, shard in enumerate(self.manifest.shards) for sample in shard.void}
        self._forgotten: dict[int, list[int]] = {}  # chunk -> its samples whose patient was forgotten
        for index, sample in sorted(self.void):
            row = int(np.searchsorted(self.manifest.shards[index].chunks.first_sample, sample, "right")) - 1
            self._forgotten.setdefault(int(np.searchsorted(self.table.shard, index)) + row, []).append(sample)

    def _tell_retry(self, retry: StoreRetry) -> None:
        # Names below an adopted tar's URL may be somebody's identifiers; ours are shard names.
        name = None if self._adopted else retry.name
        self._on_event({"event": "retry", "object": name, "cause": retry.cause, "attempt": retry.attempt})

    def _read_members(self, shard_index: int) -> MembersTable:
        return read_members(self.store, self.manifest.shards[shard_index])

    def tar(self, shard: Shard) -> tuple[Store, str]:
        """Where the shard's tar lies: beside the manifest, or, for adopted tars, wherever they were found."""
        if shard.url is None:
            return self.store, shard.tar
        return self._elsewhere.of(shard.url)

    def forgotten_in(self, chunk: int) -> Sequence[int]:
        """Samples of a chunk, counted within its shard, whose patient was forgotten."""
        return self._forgotten.get(chunk, ())

    def forget_in(self, cache: ChunkCache) -> None:
        """Remove from a cache what was read of chunks before patients in them were forgotten."""
        for shard in self.manifest.shards:
            for identity, offset, length in shard.erased:
                cache.discard(identity, offset, length)
        for chunk in self._forgotten:
            cache.discard(*_cached_range(self, chunk))

    def read_again(self, chunk: int, offset: int, size: int, cache: ChunkCache | None) -> bytes:
        """A member whose bytes were not what the index says, from its store: they may have changed on the way here.

        The cache forgets the chunk that it came in. What the store does not have is empty.
        """
        if cache is not None:
            cache.discard(*_cached_range(self, chunk))
        shard = self.shard(chunk)
        store, name = self.tar(shard)
        self._on_event({"event": "read_again", "shard": shard.name, "offset": offset, "bytes": size})
        try:
            return store.get_range(name, offset, size)
        except StoreUnreachableError:
            raise
        except DataError:  # the tar is shorter than its index says
            return b""

    @property
    def bytes_read(self) -> int:
        return sum(store.stats.bytes_read for store in (self.store, *self._elsewhere.opened))

    @property
    def retries(self) -> int:
        return sum(store.stats.retries for store in (self.store, *self._elsewhere.opened))

    def close(self) -> None:
        """Close its stores: descriptors and threads."""
        self.store.close()
        self._elsewhere.close()

    def shard(self, chunk: int) -> Shard:
        return self.manifest.shards[int(self.table.shard[chunk])]

    def locate(self, chunk: int, unit: int) -> tuple[int, int, int | None]:
        """(shard, sample in it, view number or None) of a unit. Reads the side file if units are images."""
        shard_index = int(self.table.shard[chunk])
        chunks = self.manifest.shards[shard_index].chunks
        row = int(self.table.chunk_in_shard[chunk])
        first, place = int(chunks.first_sample[row]), unit - int(self.table.first_unit[chunk])
        if not self.every_image:
            return shard_index, first + place, None
        table = self.members(shard_index)
        for sample in range(first, first + int(chunks.samples[row])):
            views = len(table.images(sample))
            if place < views:
                return shard_index, sample, place
            place -= views
        raise DataError(
            f"{self.manifest.shards[shard_index].members}: fewer images than the manifest's chunk table says"
        )

    def key(self, chunk: int, unit: int) -> tuple[str, str]:
        """(shard name, sample key), both safe to log."""
        shard_index, sample, view = self.locate(chunk, unit)
        key = log_key(self.manifest, self.members(shard_index).keys[sample])
        return self.manifest.shards[shard_index].name, key if view is None else f"{key}.{view}"


class View(NamedTuple):
    """A chosen view of a unit: its number and (first) member, and the content of what was read of it.

    An image has one part, 0, and in `attention` its grid where it has one and that was asked for. Of a volume of
    `parts_there` parts, `parts` are those from `first_part` on, and
    `masks[map, part]` their label maps where those were asked for. Content lies in the range that was read, together
    with its neighbours': to cut it out would copy it.
    """

    number: int
    member: str
    parts: list[memoryview]
    first_part: int
    parts_there: int
    masks: dict[tuple[int, int], memoryview]
    attention: dict[str, memoryview]  # view id -> its attention grid

    @property
    def id(self) -> str:
        return self.member.partition(".")[0].partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class Members:
    """Verified members of one unit: texts by member name, and the chosen views in their order."""

    key: str
    texts: dict[str, bytes]
    views: list[View]
    mask_ids: dict[str, int] = field(default_factory=dict)  # the manifest's: name -> id in the label maps
    labels: tuple[str, ...] = ()  # the manifest's
    reads: Reads = "everything"

    def record(self, adopted: bool) -> StudyRecord:
        """Raises BadSampleError without a place; the caller knows it."""
        images = {view.member: bytes(view.parts[0]) for view in self.views} if adopted else {}
        try:
            record = record_from_members(self.texts | images, adopted=adopted, key=self.key)
        except ValueError as error:
            raise BadSampleError("", "", str(error)) from None
        if self.reads == "everything":
            return record
        return record.without_labels() if self.reads == "report" else record.without_report()


Found = Members | BadSampleError


ChooseViews = Callable[[int, int], Sequence[int]]  # (unit, views there are) -> their numbers
ChooseParts = Callable[[int, int, int], range]  # (unit, view, parts of the volume) -> those that are read


class _Wanted(NamedTuple):
    """One member to read, and where its content goes."""

    offset: int
    row: int  # of the members table
    unit: int
    put: Callable[[memoryview], None]


def read_units(
    data: DataSet,
    chunk: int,
    units: Sequence[int],
    choose: ChooseViews,
    cache: ChunkCache | None = None,
    *,
    choose_parts: ChooseParts | None = None,
    masks: bool = False,
    attention: bool = False,
) -> dict[int, Found]:
    """Verified members of some units of a chunk, by unit. `choose` says which views are read, of a volume
    `choose_parts` which parts (all, if None); `masks` whether their label maps are read, `attention` whether the
    attention grids of images are.

    Neighbouring members are read as one range. A member that fails its check fails its unit only; a store that does
    not answer raises.
    """
    shard, table = data.shard(chunk), data.members(int(data.table.shard[chunk]))
    result: dict[int, Found] = {}
    wanted: list[_Wanted] = []
    for unit in units:
        shard_index, sample, view = data.locate(chunk, unit)
        key = log_key(data.manifest, table.keys[sample])
        if (shard_index, sample) in data.void:
            result[unit] = BadSampleError(shard.name, key, "forgotten")
            continue
        found = Members(
            key=table.keys[sample], texts={}, views=[], mask_ids=data.manifest.masks, labels=data.manifest.labels,
            reads=data.reads,
        )  # fmt: skip
        views = table.views(sample)
        rows = _text_rows(table, sample, found)
        try:
            for number in sorted([view] if view is not None else choose(unit, len(views))):
                parts = choose_parts(unit, number, len(views[number])) if choose_parts else range(len(views[number]))
                rows += _view_rows(table, sample, found, number, views[number], parts, masks=masks)
                chosen = found.views[-1]
                if attention and (row := table.attention_grid(sample, chosen.id)) is not None:
                    rows.append((row, partial(chosen.attention.__setitem__, chosen.id)))
        except ValueError as error:
            result[unit] = BadSampleError(shard.name, key, str(error))
            continue
        result[unit] = found
        wanted += [_Wanted(int(table.offset[row]), row, unit, put) for row, put in rows]
    wanted.sort(key=lambda one: (one.offset, one.row))

    ranges: list[tuple[int, int]] = []
    last_row = -2
    for offset, row, _, _ in wanted:
        end = offset + int(table.size[row])
        if row == last_row + 1 and offset - ranges[-1][1] <= _MERGE_GAP_BYTES:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((offset, end))
        last_row = row
    bodies = _read_ranges(data, shard, chunk, ranges, cache)

    current = 0
    for offset, row, unit, put in wanted:
        while offset >= ranges[current][1] and current + 1 < len(ranges):
            current += 1
        begin, size, member = offset - ranges[current][0], int(table.size[row]), table.member[row]
        body = memoryview(bodies[current])[begin : begin + size]
        present = result[unit]
        if isinstance(present, BadSampleError):
            continue
        check = partial(
            check_member,
            shard=shard.name,
            key=log_key(data.manifest, present.key),
            member=member,
            size=size,
            crc32c=None if table.crc32c is None else int(table.crc32c[row]),
            adopted=data.manifest.adopted,
        )
        fault = _fault(check, body)
        for _ in range(READ_AGAIN):
            if fault is None:
                break
            body = memoryview(data.read_again(chunk, offset, size, cache))
            fault = _fault(check, body) and fault
        if fault is not None:
            result[unit] = fault
            continue
        put(body)
    return result


def _fault(check: Callable[[memoryview], None], body: memoryview) -> BadSampleError | None:
    try:
        check(body)
    except BadSampleError as error:
        return error
    return None


_Rows = list[tuple[int, Callable[[memoryview], None]]]  # (row of the members table, where its content goes)


def _text_rows(table: MembersTable, sample: int, found: Members) -> _Rows:
    def put(member: str, body: memoryview) -> None:
        found.texts[member] = bytes(body)

    return [(row, partial(put, table.member[row])) for row in table.records(sample)]


def _view_rows(
    table: MembersTable, sample: int, found: Members, number: int, rows: Sequence[int], parts: range, *, masks: bool
) -> _Rows:
    """Of one view, which is added to `found`. Raises ValueError where a part of a volume is missing."""
    first = table.member[rows[0]]
    view = View(number, first, [memoryview(b"")] * len(parts), parts.start, len(rows), {}, {})
    found.views.append(view)
    if part_number(first) is None:
        label_maps = table.image_masks(sample, view.id) if masks else {}
        of_maps = [(row, partial(view.masks.__setitem__, key)) for key, row in label_maps.items()]
        return [(rows[0], partial(view.parts.__setitem__, 0)), *of_maps]
    if [part_number(table.member[row]) for row in rows] != list(range(len(rows))):
        raise ValueError(f"view {view.id}: a part of the volume is missing")
    wanted: _Rows = [(rows[part], partial(view.parts.__setitem__, place)) for place, part in enumerate(parts)]
    if masks:
        there = table.mask_parts(sample, view.id)
        wanted += [(row, partial(view.masks.__setitem__, key)) for key, row in there.items() if key[1] in parts]
    return wanted


def _read_ranges(
    data: DataSet, shard: Shard, chunk: int, ranges: list[tuple[int, int]], cache: ChunkCache | None
) -> list[bytes | memoryview]:
    if not ranges:
        return []
    store, name = data.tar(shard)
    if cache is None:
        return store.read_ranges([(name, low, high - low) for low, high in ranges])
    # The cache keeps whole chunks, so that every later epoch finds what it needs however its lanes cut the chunk.
    identity, start, length = _cached_range(data, chunk)

    def fetch() -> bytes:
        return _without_forgotten(data, chunk, start, store.get_range(name, start, length))

    body = cache.get_or_fetch(identity, start, length, fetch)
    bodies: list[bytes | memoryview] = []
    for low, high in ranges:
        part = memoryview(body)[low - start : high - start]
        room = room_for(len(part))  # a view of the chunk would hold it whole
        room[:] = part
        bodies.append(room)
    return bodies


def _cached_range(data: DataSet, chunk: int) -> tuple[str, int, int]:
    """What a cache knows a chunk by: (hash of its shard, offset, bytes)."""
    shard, row = data.shard(chunk), int(data.table.chunk_in_shard[chunk])
    return shard.sha256 or shard.members_sha256, int(shard.chunks.offset[row]), int(shard.chunks.bytes[row])


def _without_forgotten(data: DataSet, chunk: int, start: int, body: bytes) -> bytes:
    """A chunk that lies at `start` of its tar, with zeros for what members of forgotten samples hold."""
    forgotten = data.forgotten_in(chunk)
    if not forgotten:
        return body
    table, clean = data.members(int(data.table.shard[chunk])), bytearray(body)
    for sample in forgotten:
        for row in table.rows(sample):
            offset, size = int(table.offset[row]) - start, int(table.size[row])
            clean[offset : offset + size] = bytes(size)
    return bytes(clean)
