"""Manifests to batches: order, store, reader, tokenizer, decode, collate; started at a step, nothing to restore.

    plan    (pool of threads)  which members of which chunk piece; byte ranges read, checksums verified
    prepare (one thread)       JSON, view choice, text of the rows of a batch; its images go to the decoder's threads
    join    (one thread)       waits for the pixels, adds tokens: the tensors of `shards.batch.FIELDS`

A row that cannot be used becomes a void slot here and nowhere else. Nothing lives outside this process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch

from shards import keyed
from shards.batch import NOT_ANNOTATED, Batch, StudyRecord
from shards.chunk_cache import ChunkCache
from shards.decode import Decoder, PendingBatch
from shards.errors import BadSampleError, ConfigError, DataError
from shards.manifest import Manifest, Shard
from shards.order import Order, Slots, UnitTable, lanes_of_rank
from shards.reader import MembersTable, check_member, log_key, read_members, record_from_members
from shards.store import Store, StoreConfig, StoreRetry, open_store, split_url
from shards.tokenizer import EmptyReportError, Tokenizer, load_tokenizer, report_text
from shards.transforms import augment

# Members that follow each other are read as one range: between them lie padding and tar headers, nothing else unless a
# foreign tar holds a member that its index left out.
_MERGE_GAP_BYTES = 4096
# After a start these many batches read just their own members; from then on whole chunk pieces are read.
_SINGLE_READ_BATCHES = 2

Event = dict[str, Any]
Place = Callable[[], tuple[str, str]]  # (shard, key) of a row, looked up only when it is to be logged


@dataclass(frozen=True, kw_only=True)
class MixtureSet:
    """One set of a mixture: `quota` rows of every global batch come from it."""

    manifest: str
    quota: int
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a slot of a batch is, by name: enough to find the sample again, and safe to log."""

    set_index: int
    epoch: int
    unit: int
    shard: str
    key: str


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
    ):
        root, name = split_url(url)
        self._on_event, self._adopted = on_event, False
        self.store = open_store(root, store, on_retry=self._tell_retry)
        self.url, self.every_image = url, every_image
        self.whole = Manifest.from_bytes(self.store.get(name), url)
        self._adopted = self.whole.adopted
        self.manifest = self.whole.of_split(split)
        self.table = UnitTable.of(self.manifest, every_image=every_image)
        self.members = lru_cache(maxsize=1024)(self._read_members)
        self._elsewhere: dict[str, Store] = {}
        self.void = {(index, sample) for index, shard in enumerate(self.manifest.shards) for sample in shard.void}

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
        root, name = split_url(shard.url)
        if root not in self._elsewhere:
            self._elsewhere[root] = open_store(root, self.store.config, on_retry=self._tell_retry)
        return self._elsewhere[root], name

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


@dataclass(kw_only=True)
class _Prepared:
    """Rows of a batch before decoding; `images` of row i are those with study_index i."""

    step: int
    images: list[memoryview]
    study_index: list[int]
    window: list[tuple[float, float]]
    bits: list[int]
    view: list[int]
    columns: dict[str, np.ndarray]
    texts: list[str]
    places: list[Place]


class Loader:
    """Batches of one rank. Raises ConfigError and DataError when built, so that nothing starts on what cannot run."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`train` is a manifest's URL, or a mixture of several with integer quotas that add up to the global batch."""

        train: str | tuple[MixtureSet, ...] = ""
        validation: str | None = None  # manifest; None: the (first) training manifest
        train_split: str = "train"
        validation_split: str = "validation"
        sampling: Literal["one_view", "all_views", "every_image"] = "one_view"
        max_views: int = 4  # of a study, for all_views
        lanes: int = 48
        window_chunks: int | None = None  # open chunks a lane; None: six for every row the lane gives to a batch
        buffer_bytes: int = 12 << 30  # a rank's open chunks may take this much memory
        fetch_threads: int = 8
        prefetch_batches: int = 2
        cache_dir: str | None = None
        cache_bytes: int = 100 << 30
        tokenizer: str | None = None  # file or folder; None: the one named by the manifest
        text_length: int = 128  # tokens
        sections: tuple[str, ...] = ("findings", "impression")
        max_skip_rate: float = 0.01  # of the last 10,000 slots; above it the run stops
        decode: Decoder.Config = field(default_factory=Decoder.Config)
        augment: augment.Config = field(default_factory=augment.Config)
        store: StoreConfig = field(default_factory=StoreConfig)

    def __init__(
        self,
        config: Loader.Config,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fields: Sequence[str] = ("pixel_values", "input_ids"),
        tokenizer: Tokenizer | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ):
        sets = as_mixture(config, global_batch_size)
        self.config, self.seed, self.on_event = config, seed, on_event
        every_image = config.sampling == "every_image"
        self.lanes = lanes_of_rank(rank, world_size, config.lanes, global_batch_size)
        self.sets = [
            DataSet(s.manifest, s.split, every_image=every_image, store=config.store, on_event=on_event) for s in sets
        ]
        self.order = Order(
            [data.table for data in self.sets],
            global_batch_size=global_batch_size,
            seed=seed,
            lanes=config.lanes,
            window_chunks=config.window_chunks,
            quotas=[s.quota for s in sets],
        )
        self.buffer_bytes = int(len(self.lanes) * min(self.order.window_bytes(), self._largest_lane_bytes()))
        if self.buffer_bytes > config.buffer_bytes:
            raise ConfigError(
                f"{len(self.lanes)} lanes x {self.order.window_chunks} open chunks need "
                f"{self.buffer_bytes / 2**30:.1f} GiB a rank, data.buffer_bytes allows "
                f"{config.buffer_bytes / 2**30:.1f} GiB; lower data.window_chunks, raise data.buffer_bytes or use more "
                "ranks"
            )
        self.labels = tuple(dict.fromkeys(name for data in self.sets for name in data.whole.labels))
        self.reads_text = "input_ids" in fields
        self.tokenizer = tokenizer or (find_tokenizer(config, self.sets) if self.reads_text else None)
        self._collate = Collator(config, self.tokenizer, self.labels, seed)
        self._cache = ChunkCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None

    def _largest_lane_bytes(self) -> float:
        return max(float(data.table.bytes.sum()) for data in self.sets) / self.config.lanes

    @property
    def steps_per_epoch(self) -> float:
        return self.order.steps_per_epoch

    @property
    def bytes_read(self) -> int:
        return sum(data.store.stats.bytes_read for data in self.sets)

    @property
    def store_retries(self) -> int:
        return sum(data.store.stats.retries for data in self.sets)

    def describe(self, step: int, *, all_ranks: bool = False) -> list[Row]:
        """The rows of the batch of `step` by name, without reading any sample."""
        slots = self.order.batch(step, None if all_ranks else self.lanes)
        rows = []
        for i in range(len(slots)):
            data, unit = self.sets[slots.set_index[i]], int(slots.unit[i])
            shard, key = data.key(int(slots.chunk[i]), unit)
            rows.append(
                Row(set_index=int(slots.set_index[i]), epoch=int(slots.epoch[i]), unit=unit, shard=shard, key=key)
            )
        return rows

    def start(self, step: int) -> LoaderRun:
        """Batches from `step` on, without end. Close the result, or use it in a `with`, to stop its threads."""
        return LoaderRun(self, step)

    def evaluate(
        self, split: str | None = None, *, manifest: str | None = None, batch_size: int = 96, limit: int | None = None
    ) -> Iterator[Batch]:
        """Every study of a split once, in manifest order, no augmentation; the last batch is filled with void rows.

        `manifest` defaults to the validation manifest, `split` to the validation split. All views of a study are given
        (up to max_views). Label columns are `self.labels`.
        """
        first = self.sets[0].url
        data = DataSet(
            manifest or self.config.validation or first, split or self.config.validation_split, store=self.config.store
        )
        return evaluation_batches(data, self._collate, self.config, self.on_event, batch_size, limit)


def as_mixture(config: Loader.Config, global_batch_size: int) -> tuple[MixtureSet, ...]:
    """The training sets with their quotas; one manifest is a mixture of one."""
    if not config.train:
        raise ConfigError("data.train is empty; name a manifest, e.g. --set data.train=shards/manifest.json")
    if isinstance(config.train, str):
        return (MixtureSet(manifest=config.train, quota=global_batch_size, split=config.train_split),)
    return config.train


def find_tokenizer(config: Loader.Config, sets: Sequence[DataSet]) -> Tokenizer:
    """The recipe's tokenizer, else the first that a manifest names."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    for data in sets:
        if data.whole.tokenizer:
            names = [name for name in data.store.list(data.whole.tokenizer) if name]
            return Tokenizer.from_files({name.rsplit("/", 1)[-1]: data.store.get(name) for name in names}, data.url)
    raise ConfigError("data.tokenizer is empty and no manifest names one; give a vocabulary or a tokenizer folder")


def corpus(config: Loader.Config, global_batch_size: int, limit: int = 200_000) -> Iterator[str]:
    """Report texts of the training sets in manifest order, at most `limit` of each: what a tokenizer is trained on."""
    for part in as_mixture(config, global_batch_size):
        data = DataSet(part.manifest, part.split, store=config.store)
        given = 0
        for chunk in range(len(data.table.units)):
            first, count = int(data.table.first_unit[chunk]), int(data.table.units[chunk])
            if given >= limit:
                break
            views = (lambda unit, count: [0]) if data.manifest.adopted else (lambda unit, count: [])
            for found in read_units(data, chunk, range(first, first + count), views).values():
                given += 1
                try:
                    if isinstance(found, Members):
                        yield report_text(found.record(data.manifest.adopted), config.sections)
                except (BadSampleError, EmptyReportError):
                    continue  # counted when training meets it


@dataclass(frozen=True, kw_only=True)
class Members:
    """Verified members of one unit: texts by member name, and the chosen views as (number, member name, content).

    The content of a view lies in the range that was read, together with its neighbours': to cut it out would copy it.
    """

    key: str
    texts: dict[str, bytes]
    views: list[tuple[int, str, memoryview]]

    def record(self, adopted: bool) -> StudyRecord:
        """Raises BadSampleError without a place; the caller knows it."""
        images = {member: bytes(data) for _, member, data in self.views} if adopted else {}
        try:
            return record_from_members(self.texts | images, adopted=adopted, key=self.key)
        except ValueError as error:
            raise BadSampleError("", "", str(error)) from None


Found = Members | BadSampleError


def read_units(
    data: DataSet,
    chunk: int,
    units: Sequence[int],
    choose: Callable[[int, int], Sequence[int]],
    cache: ChunkCache | None = None,
) -> dict[int, Found]:
    """Verified members of some units of a chunk, by unit. `choose(unit, views there are)` says which views are read.

    Neighbouring members are read as one range. A member that fails its check fails its unit only; a store that does
    not answer raises.
    """
    shard, table = data.shard(chunk), data.members(int(data.table.shard[chunk]))
    result: dict[int, Found] = {}
    wanted: list[tuple[int, int, int, int]] = []  # (offset, row of the members table, unit, view number or -1)
    for unit in units:
        shard_index, sample, view = data.locate(chunk, unit)
        if (shard_index, sample) in data.void:
            result[unit] = BadSampleError(shard.name, log_key(data.manifest, table.keys[sample]), "forgotten")
            continue
        images = table.images(sample)
        chosen = [view] if view is not None else choose(unit, len(images))
        result[unit] = Members(key=table.keys[sample], texts={}, views=[])
        wanted += [(int(table.offset[row]), row, unit, -1) for row in table.records(sample)]
        wanted += [(int(table.offset[images[number]]), images[number], unit, number) for number in chosen]
    wanted.sort()

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
    for offset, row, unit, number in wanted:
        while offset >= ranges[current][1] and current + 1 < len(ranges):
            current += 1
        begin, size, member = offset - ranges[current][0], int(table.size[row]), table.member[row]
        body = memoryview(bodies[current])[begin : begin + size]
        found = result[unit]
        if isinstance(found, BadSampleError):
            continue
        try:
            crc32c = None if table.crc32c is None else int(table.crc32c[row])
            key = log_key(data.manifest, found.key)
            check_member(body, shard=shard.name, key=key, member=member, size=size, crc32c=crc32c)
        except BadSampleError as error:
            result[unit] = error
            continue
        if number < 0:
            found.texts[member] = bytes(body)
        else:
            found.views.append((number, member, body))
    for found in result.values():
        if isinstance(found, Members):
            found.views.sort()
    return result


def _read_ranges(
    data: DataSet, shard: Shard, chunk: int, ranges: list[tuple[int, int]], cache: ChunkCache | None
) -> list[bytes]:
    if cache is None:
        store, name = data.tar(shard)
        return store.read_ranges([(name, low, high - low) for low, high in ranges])
    # The cache keeps whole chunks, so that every later epoch finds what it needs however its lanes cut the chunk.
    chunks, row = shard.chunks, int(data.table.chunk_in_shard[chunk])
    start, length = int(chunks.offset[row]), int(chunks.bytes[row])
    store, name = data.tar(shard)
    identity = shard.sha256 or shard.members_sha256
    body = cache.get_or_fetch(identity, start, length, lambda: store.get_range(name, start, length))
    return [body[low - start : high - start] for low, high in ranges]


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """A batch in the decoder; `present` [n] are the images that were given to it, of `study_index` [V]."""

    prepared: _Prepared
    pending: PendingBatch
    present: np.ndarray
    study_index: np.ndarray


class Collator:
    """Rows to tensors: JSON, text, view metadata, then one call of the decoder."""

    def __init__(self, config: Loader.Config, tokenizer: Tokenizer | None, labels: Sequence[str], seed: int):
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.labels = {name: column for column, name in enumerate(labels)}
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:  # DALI takes a second to build, and describing a batch needs none
            self._decoder = Decoder(self.config.decode)
        return self._decoder

    def prepare(
        self,
        step: int,
        slots: Slots,
        found: Sequence[Found],
        places: list[Place],
        adopted: Sequence[bool],
        on_void: Callable[[int, str], None],
    ) -> _Prepared:
        """Everything but the pixels. `on_void(row, cause)` is told of each row that cannot be used."""
        count = len(slots)
        columns = {
            "valid": np.zeros(count, dtype=bool),
            "labels": np.full((count, len(self.labels)), NOT_ANNOTATED, dtype=np.int8),
            "report_key": np.zeros(count, dtype=np.int64),
            "patient_key": np.zeros(count, dtype=np.int64),
            "sample_id": slots.unit,
            "set_index": slots.set_index,
            "epoch": slots.epoch,
        }
        result = _Prepared(
            step=step, images=[], study_index=[], window=[], bits=[], view=[], columns=columns,
            texts=[""] * count, places=places,
        )  # fmt: skip
        for i, members in enumerate(found):
            try:
                if isinstance(members, BadSampleError):
                    raise members
                record = members.record(adopted[i])
                text = self._text(record)
                if not members.views:
                    raise BadSampleError("", "", "no image")
            except (BadSampleError, EmptyReportError) as error:
                on_void(i, error.cause if isinstance(error, BadSampleError) else "empty report")
                self._add_image(result, i, 0, memoryview(b""), (0.0, 1.0), 8)
                continue
            columns["valid"][i] = True
            columns["patient_key"][i] = keyed.text_key(record.patient)
            columns["report_key"][i] = keyed.text_key(text)
            result.texts[i] = text
            for name, value in record.labels.items():
                if name in self.labels:
                    columns["labels"][i, self.labels[name]] = value
            views = {view.id: view for view in record.views}
            for place, (number, member, data) in enumerate(members.views):
                # Ours are named by their id; a foreign record lists just the images that it was made from.
                view = record.views[place] if adopted[i] else views.get(member.partition(".")[0])
                bits = view.bits if view else 8
                window = view.window if view and view.window else (0.0, 255.0 if bits == 8 else 65535.0)
                self._add_image(result, i, number, data, window, bits)
        return result

    def _text(self, record: StudyRecord) -> str:
        return report_text(record, self.config.sections) if self.tokenizer is not None else ""

    @staticmethod
    def _add_image(
        to: _Prepared, row: int, view: int, data: memoryview, window: tuple[float, float], bits: int
    ) -> None:
        to.images.append(data)
        to.study_index.append(row)
        to.view.append(view)
        to.window.append(window)
        to.bits.append(bits)

    def submit(self, prepared: _Prepared, *, train: bool) -> _Decoding:
        """Start decoding; at most a few batches are under way at once, finished in order by `finish`."""
        columns, study_index = prepared.columns, np.asarray(prepared.study_index, dtype=np.int64)
        present = np.flatnonzero(columns["valid"][study_index])
        if train:
            parameters = augment.draw(
                self.config.augment,
                self.seed,
                columns["epoch"][study_index],
                # Unit 7 of one set and unit 7 of another are different samples.
                columns["sample_id"][study_index] + (columns["set_index"][study_index] << 48),
                np.asarray(prepared.view),
            )
        else:
            parameters = augment.identity(len(study_index))
        pending = self.decoder.submit(
            [prepared.images[i] for i in present],
            parameters.take(present),
            np.asarray(prepared.window, dtype=np.float32).reshape(-1, 2)[present],
            np.asarray(prepared.bits)[present],
        )
        return _Decoding(prepared=prepared, pending=pending, present=present, study_index=study_index)

    def finish(self, decoding: _Decoding, on_void: Callable[[int, str], None]) -> Batch:
        """Wait for the pixels, make void what did not decode, and join the tensors of the batch."""
        prepared, present, study_index = decoding.prepared, decoding.present, decoding.study_index
        columns = prepared.columns
        pixels, decoded, causes = decoding.pending.result()
        for image in np.flatnonzero(~decoded):
            row = int(study_index[present[image]])
            if columns["valid"][row]:  # one event a study, whatever the number of its bad views
                columns["valid"][row] = False
                on_void(row, f"image: {causes[image]}")
        valid = columns["valid"]
        if len(present) == len(study_index):
            pixel_values = pixels
        else:
            pixel_values = torch.zeros(len(study_index), *pixels.shape[1:], dtype=pixels.dtype, device=pixels.device)
            pixel_values[torch.from_numpy(present)] = pixels
        if not valid.all():
            void_image = torch.from_numpy(~valid[study_index])
            pixel_values[void_image] = 0.0
            for name in ("report_key", "patient_key"):
                columns[name] = np.where(valid, columns[name], 0)
            columns["labels"][~valid] = NOT_ANNOTATED
        batch: Batch = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        batch["pixel_values"] = pixel_values
        batch["study_index"] = torch.from_numpy(study_index)
        if self.tokenizer is not None:
            texts = [text if ok else "" for text, ok in zip(prepared.texts, valid, strict=True)]
            batch["input_ids"], batch["attention_mask"] = self.tokenizer.encode(texts, self.config.text_length)
        return batch


class LoaderRun(Iterator[Batch]):
    """The running threads behind `Loader.start`. `step` is the step of the batch that `next` returns."""

    def __init__(self, loader: Loader, step: int):
        self._loader, self.step, self._first_step = loader, step, step
        self._stop = threading.Event()
        self._first_decoded = threading.Event()
        # With the batch that is being joined and the one that waits to be put here, three are in the decoder.
        self._decoding: queue.Queue[_Decoding | BaseException] = queue.Queue(maxsize=1)
        self._batches: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, loader.config.prefetch_batches))
        self._pool = ThreadPoolExecutor(loader.config.fetch_threads, thread_name_prefix="loader-fetch")
        # The read that brings each unit; units of a piece that were used before the start or read for it.
        self._reads: dict[UnitName, Future[dict[int, Found]]] = {}
        self._taken: dict[PieceName, set[int]] = {}
        self._threads = [
            threading.Thread(target=self._guard, args=(target, sink), daemon=True, name=name)
            for target, sink, name in (
                (self._prepare_all, self._decoding, "loader-prepare"),
                (self._join_all, self._batches, "loader-join"),
            )
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queue_depth(self) -> int:
        return self._batches.qsize()

    def __next__(self) -> Batch:
        item = self._batches.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.step += 1
        return item

    def __enter__(self) -> LoaderRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; what they hold is dropped. Waits for reads under way, but not for one that stalls."""
        self._stop.set()
        self._first_decoded.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)
        wait([read for read in list(self._reads.values()) if read.running()], timeout=10)

    def _guard(self, target: Callable[[], None], sink: queue.Queue[Any]) -> None:
        try:
            target()
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(sink, error)

    def _put(self, sink: queue.Queue[Any], item: object) -> bool:
        while not self._stop.is_set():
            try:
                sink.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _prepare_all(self) -> None:
        loader = self._loader
        ahead = loader.config.prefetch_batches + 1
        planned = self._first_step
        slots_of: dict[int, Slots] = {}
        self._leave_out_used()
        step = self._first_step
        while not self._stop.is_set():
            # Nothing is read ahead of the first batch: it would share disk and processor with it.
            if step > self._first_step:
                self._first_decoded.wait()
            while planned <= (step + ahead if self._first_decoded.is_set() else step):
                slots_of[planned] = loader.order.batch(planned, loader.lanes)
                self._plan(slots_of[planned], single=planned < self._first_step + _SINGLE_READ_BATCHES)
                planned += 1
            slots = slots_of.pop(step)
            found = [self._reads.pop(name).result().pop(name[3]) for name in _names(slots)]
            places: list[Place] = [
                partial(loader.sets[set_index].key, int(chunk), int(unit))
                for set_index, chunk, unit in zip(slots.set_index, slots.chunk, slots.unit, strict=True)
            ]
            adopted = [loader.sets[set_index].manifest.adopted for set_index in slots.set_index]
            prepared = loader._collate.prepare(step, slots, found, places, adopted, self._on_void(step, places))
            if not self._put(self._decoding, loader._collate.submit(prepared, train=True)):
                return
            step += 1

    def _join_all(self) -> None:
        while not self._stop.is_set():
            try:
                decoding = self._decoding.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(decoding, BaseException):
                raise decoding
            on_void = self._on_void(decoding.prepared.step, decoding.prepared.places)
            batch = self._loader._collate.finish(decoding, on_void)
            self._first_decoded.set()
            if not self._put(self._batches, batch):
                return

    def _on_void(self, step: int, places: Sequence[Place]) -> Callable[[int, str], None]:
        def report(row: int, cause: str) -> None:
            shard, key = places[row]()
            self._loader.on_event({"event": "skip", "step": step, "shard": shard, "key": key, "cause": cause})

        return report

    def _leave_out_used(self) -> None:
        """Mark what batches before the first step have used of the pieces that are open now: it is not read again."""
        lanes = np.asarray(self._loader.lanes)
        for set_index in range(len(self._loader.sets)):
            block = self._loader.order.block_of(set_index, self._first_step)
            for *piece, unit in _names(block.consumed(self._first_step, lanes)):
                self._taken.setdefault((piece[0], piece[1], piece[2]), set()).add(unit)

    def _plan(self, slots: Slots, *, single: bool) -> None:
        """Ask for what these rows need: their whole pieces, or for a quick start only their own members (`single`)."""
        loader = self._loader
        wanted: dict[PieceName, list[int]] = {}
        chunk_and_epoch: dict[PieceName, tuple[int, int]] = {}
        for name, chunk, epoch in zip(_names(slots), slots.chunk.tolist(), slots.epoch.tolist(), strict=True):
            if name in self._reads:
                continue
            piece = name[:3]
            chunk_and_epoch[piece] = (chunk, epoch)
            if single:
                wanted.setdefault(piece, []).append(name[3])
                self._taken.setdefault(piece, set()).add(name[3])
            elif piece not in wanted:
                taken = self._taken.pop(piece, set())
                units = loader.order.block_of_number(piece[0], piece[1]).units_of(piece[2]).tolist()
                wanted[piece] = [unit for unit in units if unit not in taken]
        for piece, units in wanted.items():
            future = self._pool.submit(self._read, piece[0], *chunk_and_epoch[piece], units)
            for unit in units:
                self._reads[(*piece, unit)] = future

    def _read(self, set_index: int, chunk: int, epoch: int, units: list[int]) -> dict[int, Found]:
        loader = self._loader
        choose = partial(_choose_views, loader.config, loader.seed, set_index, epoch)
        return read_units(loader.sets[set_index], chunk, units, choose, loader._cache)


PieceName = tuple[int, int, int]  # set, block, piece
UnitName = tuple[int, int, int, int]  # set, block, piece, unit


def _names(slots: Slots) -> list[UnitName]:
    columns = (slots.set_index, slots.block, slots.piece, slots.unit)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _choose_views(config: Loader.Config, seed: int, set_index: int, epoch: int, unit: int, views: int) -> Sequence[int]:
    """Views of a study that are read, drawn before anything is fetched."""
    if config.sampling == "one_view":
        return [int(keyed.integers(0, max(views, 1), seed, "view", set_index, epoch, unit)[0])] if views else []
    if views <= config.max_views:
        return range(views)
    return sorted(keyed.permutation(views, seed, "view", set_index, epoch, unit)[: config.max_views].tolist())


def evaluation_batches(
    data: DataSet,
    collate: Collator,
    config: Loader.Config,
    on_event: Callable[[Event], None],
    batch_size: int,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Studies 0, 1, 2, ... of a set in batches of `batch_size`; reads one batch ahead."""
    total = min(data.table.total, limit or data.table.total)

    def read(first: int) -> tuple[Slots, list[Found]]:
        unit = np.arange(first, min(first + batch_size, total))
        chunk = np.searchsorted(data.table.first_unit, unit, "right") - 1
        zero = np.zeros(batch_size, dtype=np.int64)
        found: dict[int, Found] = {}
        for number in np.unique(chunk):
            units = unit[chunk == number].tolist()
            found |= read_units(data, int(number), units, lambda unit, views: range(min(views, config.max_views)))
        rest = batch_size - len(unit)
        slots = Slots(
            set_index=zero, epoch=zero, block=zero, lane=zero, piece=zero,
            unit=np.concatenate([unit, zero[:rest]]), chunk=np.concatenate([chunk, zero[:rest]]),
        )  # fmt: skip
        return slots, [found[u] for u in unit.tolist()] + [_FILLING] * rest

    with ThreadPoolExecutor(1, thread_name_prefix="evaluation-read") as pool:
        ahead = pool.submit(read, 0)
        for first in range(0, total, batch_size):
            slots, found = ahead.result()
            if first + batch_size < total:
                ahead = pool.submit(read, first + batch_size)
            places: list[Place] = [
                partial(data.key, int(chunk), int(unit)) for chunk, unit in zip(slots.chunk, slots.unit, strict=True)
            ]

            def on_void(row: int, cause: str, places: list[Place] = places, found: list[Found] = found) -> None:
                if found[row] is not _FILLING:
                    shard, key = places[row]()
                    on_event({"event": "skip", "step": None, "shard": shard, "key": key, "cause": cause})

            prepared = collate.prepare(0, slots, found, places, [data.manifest.adopted] * batch_size, on_void)
            yield collate.finish(collate.submit(prepared, train=False), on_void)


_FILLING = BadSampleError("", "", "fills up the last batch")
