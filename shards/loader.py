"""Manifests to batches: order, store, reader, tokenizer, decode, collate; started at a step, nothing to restore.

    plan    (pool of threads)  which members of which chunk piece; byte ranges read, checksums verified
    prepare (one thread)       JSON, view choice, text of the rows of a batch; its images go to the decoder's threads
    join    (one thread)       waits for the pixels, adds tokens: the tensors of `shards.batch.FIELDS`

A row that cannot be used becomes a void slot in `shards.collate` and nowhere else. Nothing lives outside this process.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict

from shards import keyed
from shards.batch import Batch, StudyRecord
from shards.chunk_cache import ChunkCache
from shards.collate import ENTITY_FIELDS, Collator, Decoding, Place, check_labels, check_masks
from shards.dataset import ChooseParts, DataSet, Event, Found, Members, Reads, read_units
from shards.decode import Decoder, PendingBatch
from shards.decode_volume import VolumeDecoder, parts_to_read
from shards.errors import BadSampleError, ConfigError, DataError
from shards.order import Order, Slots, lanes_of_rank
from shards.reports import structured
from shards.store import StoreConfig
from shards.tokenizer import EmptyReportError, Tokenizer, load_tokenizer, report_text
from shards.transforms import augment, entity_masking, label_text, masking, report_sentences

# After a start these many batches read just their own members; from then on whole chunk pieces are read.
_SINGLE_READ_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class MixtureSet:
    """One set of a mixture: `quota` rows of every global batch come from it.

    `reads`: reports in a language that is not learned, or labels that are not trusted, are left unread.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt `reads` would read everything

    manifest: str
    quota: int
    split: str = "train"
    reads: Reads = "everything"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a slot of a batch is, by name: enough to find the sample again, and safe to log."""

    set_index: int
    epoch: int
    unit: int
    shard: str
    key: str


class Loader:
    """Batches of one rank. Raises ConfigError and DataError when built, so that nothing starts on what cannot run."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`train` is the URL of a manifest or of its folder, or a mixture of several; quotas add up to the batch."""

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
        report: Literal["raw", "structured"] = "raw"  # which text of a study is read
        structured: structured.Config = field(default_factory=structured.Config)
        label_text: label_text.Config | None = None  # labels are classes of the union, and a text where need be
        sentences: report_sentences.Config = field(default_factory=report_sentences.Config)  # of reports, in training
        masking: masking.Config = field(default_factory=masking.Config)
        entity_masking: entity_masking.Config = field(default_factory=entity_masking.Config)
        max_skip_rate: float = 0.01  # of the last 10,000 slots; above it the run stops
        decode: Decoder.Config = field(default_factory=Decoder.Config)
        volume: VolumeDecoder.Config | None = None  # the views are volumes, cropped as this says; `decode` is not used
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
        self.rank, self.world_size = rank, world_size
        self.lanes = lanes_of_rank(rank, world_size, config.lanes, global_batch_size)
        self.sets = [
            DataSet(s.manifest, s.split, every_image=every_image, store=config.store, on_event=on_event, reads=s.reads)
            for s in sets
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
        self.labels = label_columns(config, self.sets)
        if config.label_text is not None:
            for data in self.sets:
                check_labels(config.label_text, data)
            if not config.label_text.sentences and "text_is_report" not in fields and reads_text(fields):
                raise ConfigError(
                    "data.label_text.sentences is empty, and the task has no prompts of its own for studies without a "
                    "report; give sentences, or use a task that learns prompts (chest:umcl_...)"
                )
        self.reads_text = reads_text(fields)
        self.tokenizer = tokenizer or (find_tokenizer(config, self.sets) if self.reads_text else None)
        self._collate = Collator(config, self.tokenizer, self.labels, seed, fields)
        if self.reads_text and config.report == "structured":
            for data in self.sets:
                if not data.whole.fields.get("structured_report"):
                    raise ConfigError(
                        f"{data.url}: no study has a structured report, which data.report=structured reads; "
                        "pack them (pack.py --structured for phantoms), or set data.report=raw"
                    )
        if not ENTITY_FIELDS.isdisjoint(fields) and config.entity_masking.reads_spans:
            for data in self.sets:
                if not (data.whole.fields.get("distilled") or data.whole.fields.get("descriptors")):
                    raise ConfigError(
                        f"{data.url}: no study has an entity with its place in the report, which masking by entities "
                        "reads; pack with prepared reports (phantoms: pack.py --entities), or set "
                        "data.entity_masking.masking=uniform, .rebalance=false and .distilled=0"
                    )
        for data in self.sets:
            check_masks(config, fields, data.url, data.whole)
        self._cache = ChunkCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
        if self._cache is not None:
            for data in self.sets:
                data.forget_in(self._cache)

    def _largest_lane_bytes(self) -> float:
        return max(float(data.table.bytes.sum()) for data in self.sets) / self.config.lanes

    @property
    def steps_per_epoch(self) -> float:
        return self.order.steps_per_epoch

    @property
    def forgotten_share(self) -> float:
        """Of the slots of a batch, on average: studies whose patient was forgotten. No fault of the data."""
        counts = [(quota, data.manifest) for quota, data in zip(self.order.quotas, self.sets, strict=True)]
        return sum(quota * one.forgotten / one.samples for quota, one in counts) / self.order.global_batch_size

    @property
    def bytes_read(self) -> int:
        return sum(data.bytes_read for data in self.sets)

    @property
    def store_retries(self) -> int:
        return sum(data.retries for data in self.sets)

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
        self,
        split: str | None = None,
        *,
        manifest: str | None = None,
        batch_size: int = 96,
        limit: int | None = None,
        more_fields: Sequence[str] = (),
    ) -> Iterator[Batch]:
        """Every study of a split once, in manifest order, no augmentation; the last batch is filled with void rows.

        `batch_size` counts all ranks: each reads and decodes its equal share, and the shares joined in the order of
        ranks are the batch. It is rounded up to a multiple of the ranks. `manifest` defaults to the validation
        manifest, `split` to the validation split. All views of a study are given (up to max_views). Label columns are
        `self.labels`. `more_fields` are made beside those that the objective reads.
        """
        collate = self._collate
        if more_fields:
            collate = Collator(self.config, self.tokenizer, self.labels, self.seed, (*collate.fields, *more_fields))
        first = self.sets[0].url
        data = DataSet(
            manifest or self.config.validation or first,
            split or self.config.validation_split,
            store=self.config.store,
            on_event=self.on_event,
        )
        place = (self.rank, self.world_size)

        def batches() -> Iterator[Batch]:
            with closing(data):
                yield from evaluation_batches(data, collate, self.config, self.on_event, batch_size, limit, place)

        return batches()


def as_mixture(config: Loader.Config, global_batch_size: int) -> tuple[MixtureSet, ...]:
    """The training sets with their quotas; one manifest is a mixture of one."""
    if not config.train:
        raise ConfigError("data.train is empty; name a manifest, e.g. --set data.train=shards/manifest.json")
    if isinstance(config.train, str):
        return (MixtureSet(manifest=config.train, quota=global_batch_size, split=config.train_split),)
    return config.train


def label_columns(config: Loader.Config, sets: Sequence[DataSet]) -> tuple[str, ...]:
    """Columns of a batch's `labels`: the classes that the recipe names, else the labels of all sets."""
    if config.label_text is not None:
        return config.label_text.classes
    return tuple(dict.fromkeys(name for data in sets for name in data.whole.labels))


def find_tokenizer(config: Loader.Config, sets: Sequence[DataSet]) -> Tokenizer:
    """The recipe's tokenizer, else the first that a manifest names."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    for data in sets:
        if data.whole.tokenizer:
            names = [name for name in data.store.list(data.whole.tokenizer) if name]
            return Tokenizer.from_files({name.rsplit("/", 1)[-1]: data.store.get(name) for name in names}, data.url)
    raise ConfigError("data.tokenizer is empty and no manifest names one; give a vocabulary or a tokenizer folder")


def reads_text(fields: Sequence[str]) -> bool:
    """Whether any of these fields of a batch needs a tokenizer."""
    return not {"input_ids", "anatomy_input_ids"}.isdisjoint(fields)


def corpus(config: Loader.Config, global_batch_size: int, limit: int = 200_000) -> Iterator[str]:
    """Report texts of the training sets in manifest order, at most `limit` of each: what a tokenizer is trained on.

    Where structured reports are read, each is followed by its structured text.
    """
    for part in as_mixture(config, global_batch_size):
        data = DataSet(part.manifest, part.split, store=config.store, reads=part.reads)
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
                        yield from _texts(config, found.record(data.manifest.adopted), given)
                except DataError:
                    continue  # counted when training meets it


def _texts(config: Loader.Config, record: StudyRecord, number: int) -> Iterator[str]:
    with suppress(EmptyReportError):
        yield report_text(record, config.sections)
    if config.report == "structured" and record.structured_report is not None:
        parts = structured.serialise(structured.parse(record.structured_report), config.structured, (0, 0, number))
        yield " ".join(text for _, text in parts)


class LoaderRun(Iterator[Batch]):
    """The running threads behind `Loader.start`. `step` is the step of the batch that `next` returns."""

    def __init__(self, loader: Loader, step: int):
        self._loader, self.step, self._first_step = loader, step, step
        self._stop = threading.Event()
        self._first_decoded = threading.Event()
        # With the batch that is being joined and the one that waits to be put here, three are in the decoder.
        self._decoding: queue.Queue[Decoding | BaseException] = queue.Queue(maxsize=1)
        self._batches: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, loader.config.prefetch_batches))
        self._pool = ThreadPoolExecutor(loader.config.fetch_threads, thread_name_prefix="loader-fetch")
        # The read that brings each unit; units of a piece that were used before the start or read for it.
        self._reads: dict[UnitName, Future[dict[int, Found]]] = {}
        self._taken: dict[PieceName, set[int]] = {}
        self._submitted: deque[PendingBatch] = deque()  # what is in the decoder, in the order of steps
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
        for pending in list(self._submitted):
            pending.cancel()
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
            prepared = loader._collate.prepare(
                step, slots, found, places, adopted, self._telling("skip", step, places), train=True
            )
            decoding = loader._collate.submit(prepared)
            self._submitted.append(decoding.pending)
            if not self._put(self._decoding, decoding):
                decoding.pending.cancel()
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
            on_void = self._telling("skip", decoding.prepared.step, decoding.prepared.places)
            on_unseen = self._telling("no_anatomy", decoding.prepared.step, decoding.prepared.places)
            batch = self._loader._collate.finish(decoding, on_void, on_unseen)
            self._submitted.popleft()
            self._first_decoded.set()
            if not self._put(self._batches, batch):
                return

    def _telling(self, event: str, step: int, places: Sequence[Place]) -> Callable[[int, str], None]:
        def report(row: int, cause: str) -> None:
            shard, key = places[row]()
            self._loader.on_event({"event": event, "step": step, "shard": shard, "key": key, "cause": cause})

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
        return read_units(
            loader.sets[set_index],
            chunk,
            units,
            choose,
            loader._cache,
            choose_parts=_choose_parts(loader.config, loader.seed, (set_index, epoch)),
            masks=loader._collate.reads_masks,
            attention=loader._collate.reads_grids,
        )


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


def _choose_parts(config: Loader.Config, seed: int, key: tuple[int, int] | None) -> ChooseParts | None:
    """Which parts of a volume are read, drawn by (set, epoch) `key`, unit and view; None: those of a central crop."""
    volume = config.volume
    if volume is None:
        return None
    return lambda unit, view, parts: parts_to_read(volume, parts, None if key is None else (*key, unit, view), seed)


def _all_parts(unit: int, view: int, parts: int) -> range:
    """Of a volume whose crops follow from boxes, which are known only once it is read."""
    return range(parts)


_Submitted = tuple[Decoding, Callable[[int, str], None]]
_FILLING = BadSampleError("", "", "fills up the last batch")


def evaluation_batches(
    data: DataSet,
    collate: Collator,
    config: Loader.Config,
    on_event: Callable[[Event], None],
    batch_size: int,
    limit: int | None = None,
    place: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Studies 0, 1, 2, ... of a set in batches of `batch_size`, of which rank and world size `place` take one share.

    Where `collate` crops around anatomies, a rank's batches are of one study.
    One batch is read ahead and one is decoded ahead of the caller.
    """
    check_masks(config, collate.fields, data.url, data.whole)
    total = min(data.table.total, limit or data.table.total)
    rank, world_size = place
    share = 1 if collate.around_anatomies else -(-batch_size // world_size)
    firsts = range(rank * share, rank * share + total, share * world_size)  # as many on every rank

    def read(first: int) -> tuple[Slots, list[Future[dict[int, Found]]]]:
        unit = np.arange(first, max(first, min(first + share, total)))
        chunk = data.table.chunk_of(unit)
        zero = np.zeros(share, dtype=np.int64)
        reads = [
            pool.submit(
                read_units,
                data,
                int(number),
                unit[chunk == number].tolist(),
                choose,
                choose_parts=_all_parts if collate.around_anatomies else _choose_parts(config, 0, None),
                masks=collate.reads_masks,
                attention=collate.reads_grids,
            )
            for number in np.unique(chunk)
        ]
        rest = share - len(unit)
        slots = Slots(
            set_index=zero, epoch=zero, block=zero, lane=zero, piece=zero,
            unit=np.concatenate([unit, zero[:rest]]), chunk=np.concatenate([chunk, zero[:rest]]),
        )  # fmt: skip
        return slots, reads

    def choose(unit: int, views: int) -> Sequence[int]:
        return range(min(views, config.max_views))

    def submit(first: int, slots: Slots, reads: list[Future[dict[int, Found]]]) -> _Submitted:
        members: dict[int, Found] = {}
        for one in reads:
            members |= one.result()
        present = max(0, min(share, total - first))
        found = [members[unit] for unit in slots.unit[:present].tolist()] + [_FILLING] * (share - present)
        places: list[Place] = [
            partial(data.key, int(chunk), int(unit)) for chunk, unit in zip(slots.chunk, slots.unit, strict=True)
        ]

        def on_void(row: int, cause: str) -> None:
            if found[row] is not _FILLING:
                shard, key = places[row]()
                on_event({"event": "skip", "step": None, "shard": shard, "key": key, "cause": cause})

        prepared = collate.prepare(0, slots, found, places, [data.manifest.adopted] * share, on_void, train=False)
        return collate.submit(prepared), on_void

    pool = ThreadPoolExecutor(config.fetch_threads, thread_name_prefix="evaluation-read")
    decoding: _Submitted | None = None
    try:
        ahead = {first: read(first) for first in firsts[:1]}
        for first, following in zip(firsts, [*firsts[1:], None], strict=False):
            if following is not None:
                ahead[following] = read(following)
            slots, reads = ahead.pop(first)
            submitted = submit(first, slots, reads)
            if decoding is not None:
                yield collate.finish(*decoding)
            decoding = submitted
        if decoding is not None:
            yield collate.finish(*decoding)
    finally:
        if decoding is not None:
            decoding[0].pending.cancel()
        pool.shutdown(cancel_futures=True)
