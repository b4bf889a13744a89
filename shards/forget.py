"""The right to erasure: a patient's studies become void slots at once, and their bytes leave the shards later.

The order of training stays: a void slot keeps its place, counts for nothing and is told in `events.jsonl`. `forget`
changes the manifest alone. `rewrite` writes the shards that still hold bytes of forgotten studies under a new name,
`<name>-r1`, then the manifest, then deletes the old ones; interrupted anywhere, it goes on when it is called again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from shards.dataset import manifest_place, open_manifest
from shards.errors import BadSampleError, ConfigError, DataError
from shards.manifest import Manifest, Shard
from shards.members import MembersTable
from shards.reader import check_member, read_members
from shards.store import Store
from shards.tar_index import TAR_BLOCK, TarIndex

logger = logging.getLogger(__name__)

SHARDS_BETWEEN_MANIFESTS = 16  # rewritten shards at most that an interruption costs
_REVISION = re.compile(r"^(.*)-r([1-9]\d*)$")


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """What `forget` did: `found` are the keyed hashes that have studies here, `unreadable` the records that could not
    be read, so that nobody can tell whose they are."""

    found: frozenset[str]
    samples: int  # void slots that are new
    before: int  # of these patients, void already
    unreadable: int
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What `rewrite` did."""

    shards: int
    bytes_removed: int


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """One shard's records: (sample, keyed hash of its patient) of those looked for, and how many could not be read."""

    samples: tuple[tuple[int, str], ...]
    unreadable: int


def forget(url: str, patients: Collection[str], *, workers: int = 8) -> Forgotten:
    """Make the studies of `patients`, keyed hashes, void slots of the set at `url`.

    Every record of the set is read, since nothing else says whose a study is. Raises ConfigError for a set of adopted
    tars, which name no patients, or where the manifest was changed meanwhile.
    """
    store, manifest = open_manifest(url)
    with store:
        _refuse_adopted(url, manifest)
        wanted = frozenset(patients)
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            seen = list(pool.map(lambda shard: _look(store, shard, wanted), manifest.shards))
        changed, new, before, left = [], 0, 0, dict(manifest.patients)
        for shard, one in zip(manifest.shards, seen, strict=True):
            fresh = {sample for sample, _ in one.samples}.difference(shard.void)
            new, before = new + len(fresh), before + len(one.samples) - len(fresh)
            changed.append(replace(shard, void=tuple(sorted({*shard.void, *fresh}))))
        for split in manifest.splits:
            gone = {
                patient
                for shard, one in zip(manifest.shards, seen, strict=True)
                for sample, patient in one.samples
                if shard.split == split and sample not in shard.void
            }
            if split in left:
                left[split] = max(0, left[split] - len(gone))
        if new:
            after = replace(manifest, shards=tuple(changed), patients=left, packed_sha256=manifest.origin)
            _put_manifest(store, url, manifest, after)
            manifest = after
        return Forgotten(
            found=frozenset(patient for one in seen for _, patient in one.samples),
            samples=new,
            before=before,
            unreadable=sum(one.unreadable for one in seen),
            manifest=manifest,
        )


def _refuse_adopted(url: str, manifest: Manifest) -> None:
    """Adopted tars belong to somebody else: their names may look like our revisions, and nothing of them is deleted."""
    if manifest.adopted:
        raise ConfigError(
            f"{url}: tars from elsewhere name no patients; remove the samples there and adopt the tars anew"
        )


def _look(store: Store, shard: Shard, wanted: frozenset[str]) -> _Seen:
    table = read_members(store, shard)
    samples = table.sample_index
    rows = [row for row, member in enumerate(table.member) if member == "json" and table.size[row]]
    bodies = store.read_ranges([(shard.tar, int(table.offset[row]), int(table.size[row])) for row in rows])
    found: list[tuple[int, str]] = []
    unreadable = 0
    for row, body in zip(rows, bodies, strict=True):
        sample = int(samples[row])
        crc = None if table.crc32c is None else int(table.crc32c[row])
        try:
            check_member(
                body, shard=shard.name, key=table.keys[sample], member="json", size=int(table.size[row]), crc32c=crc
            )
            patient = json.loads(bytes(body))["patient"]
        except (BadSampleError, ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if patient in wanted:
            found.append((sample, patient))
    return _Seen(samples=tuple(found), unreadable=unreadable)


def _put_manifest(store: Store, url: str, before: Manifest, after: Manifest) -> None:
    """Raises ConfigError where another program changed the manifest since it was read."""
    _, name = manifest_place(url)
    if Manifest.from_bytes(store.get(name), url).sha256 != before.sha256:
        raise ConfigError(f"{url}: was changed by another program meanwhile; nothing was written, repeat the command")
    store.put(name, after.to_bytes())


def rewrite(url: str, *, on_shard: Callable[[str], None] = lambda name: None) -> Rewritten:
    """Write the shards of the set at `url` without the bytes of forgotten studies, and delete what held them.

    Runs that go on reading the set with the manifest from before end with exit code 3 where they miss a shard: stop
    them first. Raises DataError for a shard that is not what the manifest says, ConfigError for a set of adopted tars.
    """
    store, manifest = open_manifest(url)
    with store:
        _refuse_adopted(url, manifest)
        _sweep(store, manifest)  # what an interrupted call has written anew and not yet deleted
        written = removed = 0
        pending: dict[int, Shard] = {}

        def commit() -> None:
            nonlocal manifest
            shards = tuple(pending.get(index, shard) for index, shard in enumerate(manifest.shards))
            after = replace(manifest, shards=shards)
            _put_manifest(store, url, manifest, after)
            manifest = after
            _sweep(store, replace(after, shards=tuple(pending.values())))
            pending.clear()

        for index, shard in _holding(store, manifest):
            on_shard(shard.name)
            pending[index], less = _rewrite_shard(store, shard)
            written, removed = written + 1, removed + less
            if len(pending) == SHARDS_BETWEEN_MANIFESTS:
                commit()
        if pending:
            commit()
        return Rewritten(shards=written, bytes_removed=removed)


def _holding(store: Store, manifest: Manifest) -> Iterator[tuple[int, Shard]]:
    """Shards with bytes of forgotten studies."""
    for index, shard in enumerate(manifest.shards):
        if shard.void and shard.url is None:
            table = read_members(store, shard)
            if any(table.size[row] for sample in shard.void for row in table.rows(sample)):
                yield index, shard


def _sweep(store: Store, manifest: Manifest) -> None:
    """Delete earlier versions of the shards of a manifest."""
    for shard in manifest.shards:
        match = _REVISION.match(shard.name)
        if match and shard.url is None:
            for number in range(int(match[2])):
                name = f"{match[1]}-r{number}" if number else match[1]
                for end in (".tar", ".idx", ".members.parquet"):
                    store.delete(f"{name}{end}")


def _next_name(name: str) -> str:
    match = _REVISION.match(name)
    return f"{match[1]}-r{int(match[2]) + 1}" if match else f"{name}-r1"


def _rewrite_shard(store: Store, shard: Shard) -> tuple[Shard, int]:
    """(the shard as it is written anew, bytes that it lost). Its void slots keep names of members, of no bytes, in the
    side file, since the order counts them; the tar and DALI's index do not have them."""
    table, data = read_members(store, shard), store.get(shard.tar)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise DataError(f"{shard.tar}: does not match the manifest's sha256; run pack.py --verify, restore it first")
    tar = io.BytesIO()
    keys, offset, size = list(table.keys), table.offset.copy(), table.size.copy()
    crc32c = None if table.crc32c is None else table.crc32c.copy()
    start, end = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
    forgotten = set(shard.void)
    for sample in range(len(table)):
        rows = table.rows(sample)
        start[sample] = tar.tell()
        if sample in forgotten:
            keys[sample] = f"forgotten{sample:06d}"
            offset[rows.start : rows.stop], size[rows.start : rows.stop] = tar.tell(), 0
            if crc32c is not None:
                crc32c[rows.start : rows.stop] = 0
        else:
            first = int(table.offset[rows.start]) - TAR_BLOCK  # our headers are one block
            last = int(table.offset[rows.stop - 1] + table.size[rows.stop - 1])
            offset[rows.start : rows.stop] += tar.tell() - first
            tar.write(data[first : -(-last // TAR_BLOCK) * TAR_BLOCK])
        end[sample] = tar.tell()
    tar.write(b"\0" * (2 * TAR_BLOCK))
    body = tar.getvalue()
    whole = MembersTable(
        keys=tuple(keys), first=table.first, member=table.member, offset=offset, size=size, crc32c=crc32c
    )
    living = TarIndex(
        table=_without(whole, forgotten), start=start, end=end, tar_bytes=len(body), sha256=None, refused={}
    )
    index, members = living.dali_index(), whole.to_parquet()
    chunks = shard.chunks
    held = [row for row in range(len(chunks)) if forgotten.intersection(_samples(shard, row))]
    last_sample = chunks.first_sample + chunks.samples - 1
    new = replace(
        shard,
        name=_next_name(shard.name),
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        members_sha256=hashlib.sha256(members).hexdigest(),
        chunks=replace(
            chunks, offset=start[chunks.first_sample], bytes=end[last_sample] - start[chunks.first_sample]
        ),
        erased=(
            *shard.erased, *((shard.sha256 or "", int(chunks.offset[row]), int(chunks.bytes[row])) for row in held)
        ),
    )  # fmt: skip
    store.put(new.tar, body)
    store.put(new.index, index)
    store.put(new.members, members)
    return new, shard.bytes - new.bytes


def _samples(shard: Shard, chunk: int) -> range:
    first = int(shard.chunks.first_sample[chunk])
    return range(first, first + int(shard.chunks.samples[chunk]))


def _without(table: MembersTable, gone: Collection[int]) -> MembersTable:
    """The table of the samples that are left."""
    kept = [sample for sample in range(len(table)) if sample not in gone]
    rows = np.asarray([row for sample in kept for row in table.rows(sample)], dtype=np.int64)
    counts = np.diff(table.first)[kept]
    return MembersTable(
        keys=tuple(table.keys[sample] for sample in kept),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        member=tuple(table.member[row] for row in rows),
        offset=table.offset[rows],
        size=table.size[rows],
        crc32c=None if table.crc32c is None else table.crc32c[rows],
    )
