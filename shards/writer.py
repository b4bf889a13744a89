"""Samples of a source -> tar shards, side files and manifest: deterministic, parallel, atomic per shard, resumable.

The order of samples, and so every byte, follows from the plan alone: the items of a split sorted by key (a keyed hash,
so neighbours are unrelated), loaded by any number of workers, taken in order. A shard is built in memory and put with
its side files, then its receipt; an interrupted run starts after the last receipt. `manifest.json` comes last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice

import numpy as np
from awscrt.checksums import crc32c as crc32c_of

from shards.batch import EncodedImage, EncodedVolume, Sample, ViewRecord
from shards.errors import ConfigError, DataError
from shards.ingest import Item, Loaded, Plan, Refusal, Source
from shards.manifest import MANIFEST, Manifest, Shard
from shards.members import ATTENTION, MembersTable, is_pickle
from shards.store import Store, open_store
from shards.tar_index import CHUNK_BYTES, TAR_BLOCK, TarIndex, describe_shard
from shards.volume_codec import part_count
from shards.workers import WorkerDiedError, in_order

logger = logging.getLogger(__name__)

REFUSED = "refused.jsonl"
AUDIT = "audit.md"
RECEIPTS = "receipts/"
# Members of a record that count as present where they are not empty.
COUNTED = (
    "report", "anatomy", "anatomy_status", "anatomy_findings", "anatomy_impression", "entities", "distilled",
    "boilerplate", "descriptors", "labels", "measurements", "boxes",
)  # fmt: skip
KEY_LENGTH_MAX = 64  # with the longest member name still within the 100 bytes of a plain tar header


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """How samples become shards. A shard ends at `shard_bytes` or `shard_samples`, whichever comes first."""

    shard_bytes: int = 64 << 20
    shard_samples: int | None = None
    chunk_bytes: int = CHUNK_BYTES
    workers: int = 1
    # Share of the patients in each split, where the source does not give the split itself.
    fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 0.8, "validation": 0.1, "test": 0.1})
    overwrite: bool = False

    def check(self) -> None:
        """Raises ConfigError naming the option."""
        if self.shard_bytes < TAR_BLOCK:
            raise ConfigError(f"--shard-bytes {self.shard_bytes}: needs at least {TAR_BLOCK}")
        if self.shard_samples is not None and self.shard_samples < 1:
            raise ConfigError(f"--shard-samples {self.shard_samples}: needs at least 1")
        if self.chunk_bytes < 1:
            raise ConfigError(f"--chunk-bytes {self.chunk_bytes}: needs at least 1")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: needs at least 1")
        total = sum(self.fractions.values())
        if not self.fractions or min(self.fractions.values()) < 0 or abs(total - 1.0) > 1e-6:
            raise ConfigError(
                f"--fractions {dict(self.fractions)}: add up to {total:g}, not 1; e.g. train=0.8 test=0.2"
            )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Told after each item: for a progress bar."""

    done: int
    total: int
    shard: str
    bytes_written: int


def split_of_patient(patient: str, fractions: Mapping[str, float]) -> str:
    """The split of a patient: a hash of the (already keyed) patient name against the cumulated fractions."""
    point = int(hashlib.sha256(b"split\0" + patient.encode()).hexdigest()[:13], 16) / 16.0**13
    upper = 0.0
    for split, fraction in fractions.items():
        upper += fraction
        if point < upper:
            return split
    return [split for split, fraction in fractions.items() if fraction > 0][-1]


def assign_splits(items: Sequence[Item], fractions: Mapping[str, float]) -> dict[str, list[Item]]:
    """Items of each split, sorted by key. Raises DataError for a duplicate key or a patient in two splits."""
    split_of: dict[str, str] = {}
    given: dict[str, set[str]] = {}
    for item in items:
        if item.split is not None:
            given.setdefault(item.patient, set()).add(item.split)
    torn = {patient: splits for patient, splits in given.items() if len(splits) > 1}
    if torn:
        patient, splits = min(torn.items())
        raise DataError(
            f"patient {patient} is in splits {' and '.join(sorted(splits))} ({len(torn)} such patients); "
            "give each patient one split, or leave the split column out to split by patient here"
        )
    seen: set[str] = set()
    result: dict[str, list[Item]] = {}
    for item in items:
        if item.key in seen:
            raise DataError(f"duplicate key {item.key}: two studies of the input have the same name; rename one")
        seen.add(item.key)
        if not item.key.isalnum() or len(item.key) > KEY_LENGTH_MAX:
            raise DataError(f"a key of {len(item.key)} characters: only up to {KEY_LENGTH_MAX} letters and digits fit")
        if item.patient not in split_of:
            chosen = given.get(item.patient)
            split_of[item.patient] = min(chosen) if chosen else split_of_patient(item.patient, fractions)
        split = split_of[item.patient]
        if not split.replace("_", "").replace("-", "").isalnum():
            raise DataError(f"split {split!r}: use letters, digits, - and _")
        result.setdefault(split, []).append(item)
    return {split: sorted(result[split], key=lambda item: item.key) for split in sorted(result)}


def sample_members(sample: Sample) -> list[tuple[str, bytes]]:
    """(member, content) of a sample in the order written: JSON, then each view with its attention grid, then masks.

    Raises DataError when images and views disagree or a member is in a pickle format: a mistake of the source.
    """
    if len(sample.images) != len(sample.record.views):
        raise DataError(f"sample {sample.key}: {len(sample.images)} images for {len(sample.record.views)} views")
    record = sample.record.model_dump(mode="json", exclude_none=True)
    body = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    members = [("json", body.encode())]
    for view, image in zip(sample.record.views, sample.images, strict=True):
        if isinstance(image, EncodedVolume) != (view.depth is not None):
            raise DataError(f"sample {sample.key}: view {view.id} is a volume with a depth, or neither")
        if isinstance(image, EncodedVolume):
            members += _volume_members(sample, view, image)
        else:
            members.append((f"{view.id}.{image.extension}", image.data))
        if view.id in sample.attention:
            members.append((f"{view.id}.{ATTENTION}", sample.attention[view.id]))
    volumes = {(view.id, number) for view in sample.record.views for number in range(view.mask_maps)}
    for (view_id, number), mask in sorted(sample.masks.items()):
        if isinstance(mask, EncodedVolume) != ((view_id, number) in volumes):
            raise DataError(f"sample {sample.key}: label map {number} of view {view_id} is not one of its mask_maps")
        if isinstance(mask, EncodedImage):
            members.append((f"{view_id}.mask.{number}.{mask.extension}", mask.data))
    for member, content in members:
        if is_pickle(member):
            raise DataError(f"sample {sample.key}: member .{member} is in a pickle format, which no shard may hold")
        if not content:
            raise DataError(f"sample {sample.key}: member .{member} has 0 bytes")
    return members


def _volume_members(sample: Sample, view: ViewRecord, volume: EncodedVolume) -> list[tuple[str, bytes]]:
    """Each part with those of its label maps behind it, so that a few parts are one range of the tar."""
    maps = [sample.masks.get((view.id, number)) for number in range(view.mask_maps)]
    count = part_count(view.depth or 0)
    members = []
    for number in range(count):
        for infix, whole in (("", volume), *((f".mask.{n}", one) for n, one in enumerate(maps))):
            if not isinstance(whole, EncodedVolume) or len(whole.parts) != count:
                found = len(whole.parts) if isinstance(whole, EncodedVolume) else "no"
                raise DataError(
                    f"sample {sample.key}: {found} parts of member {view.id}{infix}, {view.depth} slices need {count}"
                )
            part = whole.parts[number]
            members.append((f"{view.id}-{number}{infix}.{part.extension}", part.data))
    return members


class ShardBuilder:
    """One tar in memory: plain ustar headers with every variable field zero, so that bytes depend on content only."""

    def __init__(self) -> None:
        self._tar = io.BytesIO()
        self._keys: list[str] = []
        self._first: list[int] = []
        self._start: list[int] = []
        self._end: list[int] = []
        self._rows: list[tuple[str, int, int, int]] = []
        self.fields: Counter[str] = Counter()
        self.sections: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def tar_bytes(self) -> int:
        """Bytes so far, without the two closing blocks."""
        return self._tar.tell()

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        members = sample_members(sample)
        self._keys.append(sample.key)
        self._first.append(len(self._rows))
        self._start.append(self._tar.tell())
        for member, content in members:
            header = tarfile.TarInfo(f"{sample.key}.{member}")
            header.size, header.mode = len(content), 0o644
            self._tar.write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
            self._rows.append((member, self._tar.tell(), len(content), crc32c_of(content)))
            self._tar.write(content)
            self._tar.write(b"\0" * (-len(content) % TAR_BLOCK))
        self._end.append(self._tar.tell())
        self._count(sample)

    def _count(self, sample: Sample) -> None:
        record = sample.record
        present = {name: bool(getattr(record, name)) for name in COUNTED} | {
            name: getattr(record, name) is not None for name in ("structured_report", "sex", "age_years")
        }
        present["masks"] = bool(sample.masks)
        present["attention_grid"] = bool(sample.attention)
        present["view"] = any(view.view for view in record.views)
        present["spacing_mm"] = any(view.spacing_mm for view in record.views)
        self.fields.update(name for name, is_present in present.items() if is_present)
        self.sections.update(record.report.keys())

    def finish(self) -> tuple[bytes, TarIndex]:
        """The tar's bytes and its index."""
        self._tar.write(b"\0" * (2 * TAR_BLOCK))
        data = self._tar.getvalue()
        table = MembersTable(
            keys=tuple(self._keys),
            first=np.asarray([*self._first, len(self._rows)], dtype=np.int64),
            member=tuple(row[0] for row in self._rows),
            offset=np.asarray([row[1] for row in self._rows], dtype=np.int64),
            size=np.asarray([row[2] for row in self._rows], dtype=np.int64),
            crc32c=np.asarray([row[3] for row in self._rows], dtype=np.uint32),
        )
        index = TarIndex(
            table=table,
            start=np.asarray(self._start, dtype=np.int64),
            end=np.asarray(self._end, dtype=np.int64),
            tar_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            refused={},
        )
        return data, index


@dataclass(frozen=True, kw_only=True)
class Span:
    """Items [first_item, next_item) of a split: `lost` are those that gave no sample."""

    plan: str  # plan_digest
    split: str
    first_item: int
    next_item: int
    lost: tuple[int, ...]
    refusals: tuple[Refusal, ...]
    counts: Mapping[str, int] = field(default_factory=dict)  # of what was done to these items


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """`receipts/<name>.json`, put after a shard and its side files: what a later run needs to go on behind it."""

    span: Span
    shard: Shard
    fields: dict[str, int]
    sections: dict[str, int]

    def to_bytes(self) -> bytes:
        """JSON; the shard's line in the words of the manifest."""
        manifest = Manifest(shards=(self.shard,), fields=self.fields, sections=self.sections)
        return json.dumps({"span": asdict(self.span), "manifest": manifest.to_bytes().decode()}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Parse. Raises ValueError, KeyError, TypeError or DataError for anything else: the shard is written again."""
        body = json.loads(data)
        manifest = Manifest.from_bytes(body["manifest"].encode())
        span = body["span"]
        span["lost"] = tuple(span["lost"])
        span["refusals"] = tuple(Refusal(**refusal) for refusal in span["refusals"])
        return cls(span=Span(**span), shard=manifest.shards[0], fields=manifest.fields, sections=manifest.sections)


def plan_digest(source: Source, splits: Mapping[str, Sequence[Item]], config: WriterConfig) -> str:
    """sha256 of all that the output follows from, except the content of input files."""
    digest = hashlib.sha256()
    head = {
        "source": source.name,
        "labels": list(source.labels),
        "masks": source.masks,
        "settings": dict(source.settings),
        "key": source.key_fingerprint,
        "shard_bytes": config.shard_bytes,
        "shard_samples": config.shard_samples,
        "chunk_bytes": config.chunk_bytes,
    }
    digest.update(json.dumps(head, sort_keys=True, default=repr).encode())
    for split, items in splits.items():
        for item in items:
            digest.update(f"{split}\0{item.key}\0{item.patient}\0{item.payload!r}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# `function` of every input, in their order, by so many workers: `shards.workers.in_order`, or a cluster's.
Run = Callable[[Callable[[Item], Loaded], Sequence[Item], int], Generator[Loaded, None, None]]


def load_in_order(
    source: Source, items: Sequence[Item], workers: int, run: Run = in_order
) -> Generator[Loaded, None, None]:
    """`source.load` of every item, in the order of the items; see `in_order`. Raises DataError when a worker dies."""
    try:
        with closing(run(source.load, items, workers)) as loads:
            yield from loads
    except WorkerDiedError as died:
        raise DataError(
            f"a worker died while loading sample {items[died.position].key} (out of memory?); "
            "run again with fewer --workers, finished shards are kept"
        ) from None


def _receipt(store: Store, name: str, plan: str) -> Receipt | None:
    """The receipt of a finished shard that still is what it says, else None.

    Raises ConfigError when it is of another plan.
    """
    path = f"{RECEIPTS}{name}.json"
    if not store.exists(path):
        return None
    try:
        receipt = Receipt.from_bytes(store.get(path))
    except (ValueError, KeyError, TypeError, IndexError, DataError):
        return None
    if receipt.span.plan != plan:
        raise ConfigError(
            f"{store.url} holds an interrupted run with other inputs or options; repeat that command, choose an empty "
            "--output, or give --overwrite"
        )
    shard = receipt.shard
    hashes = ((shard.tar, shard.sha256), (shard.index, shard.index_sha256), (shard.members, shard.members_sha256))
    for file, digest in hashes:
        if not store.exists(file) or hashlib.sha256(store.get(file)).hexdigest() != digest:
            return None
    return receipt


def _clear(store: Store) -> None:
    """Remove what an earlier run left: manifest first, so that no moment shows a manifest without its shards."""
    names = store.list("")
    stems = [name.removeprefix(RECEIPTS).removesuffix(".json") for name in names if name.startswith(RECEIPTS)]
    if MANIFEST in names:
        with suppress(DataError):
            old = Manifest.from_bytes(store.get(MANIFEST), MANIFEST)
            stems += [shard.name for shard in old.shards if not shard.url]
    doomed = {f"{stem}{end}" for stem in stems for end in (".tar", ".idx", ".members.parquet")}
    for name in (MANIFEST, REFUSED, AUDIT, *sorted(doomed), *(name for name in names if name.startswith(RECEIPTS))):
        if name in names:
            store.delete(name)


def write_shards(
    source: Source,
    output: str,
    config: WriterConfig | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    audit: Callable[[Manifest, Mapping[str, int]], str] | None = None,
    run: Run = in_order,
) -> Manifest:
    """Pack a source into `output` (folder or s3:// prefix) and return the manifest, which is written last.

    `audit`: the manifest and all counts of plan and loads -> the text of `audit.md`, written beside it.

    `run` is who loads the studies. The same plan and key give the same bytes, whatever the number of workers, machines
    and interruptions. Raises ConfigError for
    an output that holds another set, DataError for a duplicate key, a patient in two splits, a full disk, or when no
    input gave a sample.
    """
    config = config or WriterConfig()
    config.check()
    plan = source.plan()
    splits = assign_splits(plan.items, config.fractions)
    digest = plan_digest(source, splits, config)
    store = open_store(output, create=True)
    if config.overwrite:
        _clear(store)
    elif store.exists(MANIFEST):
        raise ConfigError(f"{store.url} already holds a {MANIFEST}; choose an empty --output or give --overwrite")
    finished = {split: _finished(store, split, items, digest) for split, items in splits.items()}
    position = {split: found[-1].span.next_item if found else 0 for split, found in finished.items()}
    receipts: list[Receipt] = []
    spans: list[Span] = []
    done, written = sum(position.values()), sum(receipt.shard.bytes for found in finished.values() for receipt in found)
    if done:
        logger.info("%s holds finished shards of %d studies; continuing behind them", store.url, done)
    remaining = [item for split, items in splits.items() for item in items[position[split] :]]
    with closing(load_in_order(source, remaining, config.workers, run)) as loads:
        for split, items in splits.items():
            receipts += finished[split]
            start = (position[split], len(finished[split]))
            for event in _write_split(source.name, split, items, start, loads, digest, store, config):
                if isinstance(event, str):
                    done += 1
                    if on_progress is not None:
                        progress = Progress(done=done, total=len(plan.items), shard=event, bytes_written=written)
                        on_progress(progress)
                elif isinstance(event, Span):
                    spans.append(event)
                else:
                    receipts.append(event)
                    written += event.shard.bytes
    spans += [receipt.span for receipt in receipts]
    spans.sort(key=lambda span: (span.split, span.first_item))
    return _write_manifest(source, plan, splits, receipts, spans, store, audit)


def _finished(store: Store, split: str, items: Sequence[Item], plan: str) -> list[Receipt]:
    receipts: list[Receipt] = []
    position = 0
    while position < len(items):
        receipt = _receipt(store, f"{split}-{len(receipts):06d}", plan)
        if receipt is None or receipt.span.first_item != position:
            break
        receipts.append(receipt)
        position = receipt.span.next_item
    return receipts


def _write_split(
    source_name: str,
    split: str,
    items: Sequence[Item],
    start: tuple[int, int],
    loads: Iterator[Loaded],
    plan: str,
    store: Store,
    config: WriterConfig,
) -> Iterator[Receipt | Span | str]:
    """Write the shards of one split from `start` (item, shard number) on, taking what it needs from `loads`.

    Yields the shard name per item and a Receipt per shard. A shard is put by one thread while the next is built: at
    most two are in memory. Refusals behind the last shard come as a Span without a shard, which is not stored: a
    resumed run meets them again.
    """
    position, number = start
    builder, first_item = ShardBuilder(), position
    lost: list[int] = []
    refusals: list[Refusal] = []
    counts: Counter[str] = Counter()
    pending: Future[Receipt] | None = None

    def span(next_item: int) -> Span:
        return Span(
            plan=plan, split=split, first_item=first_item, next_item=next_item, lost=tuple(lost),
            refusals=tuple(refusals), counts=dict(sorted(counts.items())),
        )  # fmt: skip

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="put") as putter:
        for index, loaded in enumerate(islice(loads, len(items) - position), start=position):
            key, sample = items[index].key, loaded.sample
            refusals += loaded.refusals
            counts.update(loaded.counts)
            if sample is not None:
                if sample.key != key:
                    raise DataError(f"source {source_name}: item {key} gave sample {sample.key}")
                builder.add(replace(sample, split=split))
            elif loaded.refusals:
                lost.append(index)
            else:
                raise DataError(f"source {source_name}: item {key} gave neither sample nor refusal")
            name = f"{split}-{number:06d}"
            yield name
            full = builder.tar_bytes >= config.shard_bytes or len(builder) == config.shard_samples
            if not len(builder) or not (full or index == len(items) - 1):
                continue
            if pending is not None:
                yield pending.result()
            pending = putter.submit(_put_shard, store, name, split, builder, span(index + 1), config.chunk_bytes)
            builder, first_item, lost, refusals, counts = ShardBuilder(), index + 1, [], [], Counter()
            number += 1
        if pending is not None:
            yield pending.result()
        if refusals or counts:
            yield span(len(items))


def _put_shard(store: Store, name: str, split: str, builder: ShardBuilder, span: Span, chunk_bytes: int) -> Receipt:
    """Put a tar, its side files, then its receipt."""
    data, index = builder.finish()
    shard, side_files = describe_shard(name, split, index, chunk_bytes)
    receipt = Receipt(span=span, shard=shard, fields=dict(builder.fields), sections=dict(builder.sections))
    store.put(shard.tar, data)
    for file, content in side_files.items():
        store.put(file, content)
    store.put(f"{RECEIPTS}{name}.json", receipt.to_bytes())
    return receipt


def _write_manifest(
    source: Source,
    plan: Plan,
    splits: Mapping[str, Sequence[Item]],
    receipts: Sequence[Receipt],
    spans: Sequence[Span],
    store: Store,
    audit: Callable[[Manifest, Mapping[str, int]], str] | None,
) -> Manifest:
    refusals = [*plan.refusals, *(refusal for span in spans for refusal in span.refusals)]
    reasons = Counter(refusal.reason for refusal in refusals if not refusal.kept)
    noted = Counter(refusal.reason for refusal in refusals if refusal.kept)
    lost: dict[str, set[int]] = {}
    for span in spans:
        lost.setdefault(span.split, set()).update(span.lost)
    shards = tuple(receipt.shard for receipt in receipts)
    patients = {
        split: len({item.patient for i, item in enumerate(items) if i not in lost.get(split, ())})
        for split, items in splits.items()
    }
    fields = sum((Counter(receipt.fields) for receipt in receipts), Counter[str]())
    sections = sum((Counter(receipt.sections) for receipt in receipts), Counter[str]())
    manifest = Manifest(
        shards=shards,
        labels=tuple(source.labels),
        masks=dict(source.masks),
        fields=dict(sorted(fields.items())),
        sections=dict(sorted(sections.items())),
        patients={split: count for split, count in patients.items() if count},
        refused=dict(sorted(reasons.items())),
        noted=dict(sorted(noted.items())),
        source=source.name,
        key_fingerprint=source.key_fingerprint,
    )
    if refusals:
        store.put(REFUSED, "".join(map(_refused_line, refusals)).encode())
    elif store.exists(REFUSED):  # of a run that gave no sample
        store.delete(REFUSED)
    if audit is not None:
        counts = sum((Counter(span.counts) for span in spans), Counter(plan.counts))
        store.put(AUDIT, audit(manifest, counts).encode())
    if not shards:
        common = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        where = f"; each is named in {store.url.rstrip('/')}/{REFUSED}" if refusals else ""
        raise DataError(f"no input of source {source.name} gave a sample: {common or 'the input is empty'}{where}")
    store.put(MANIFEST, manifest.to_bytes())
    for shard in shards:
        store.delete(f"{RECEIPTS}{shard.name}.json")
    return manifest


def _refused_line(refusal: Refusal) -> str:
    kept = {"kept": True} if refusal.kept else {}
    return json.dumps({"input": refusal.name, "reason": refusal.reason} | kept, ensure_ascii=True) + "\n"
