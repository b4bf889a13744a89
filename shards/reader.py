"""From byte ranges of a tar back to samples: member checks, records, whole samples, and the check of a whole shard.

Nothing read here is unpickled or executed, and nothing is decoded except JSON and image headers. A problem of one
sample is a BadSampleError (the loader makes it a void slot); a problem of a whole shard is a DataError.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from awscrt.checksums import crc32c as crc32c_of
from pydantic import ValidationError

from shards.batch import VOLUME_EXTENSION, EncodedImage, EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.errors import BadSampleError, DataError
from shards.image_header import probe_image
from shards.manifest import Manifest, Shard
from shards.members import (
    ATTENTION,
    TEXT_EXTENSIONS,
    MembersTable,
    group_views,
    is_image,
    is_pickle,
    member_extension,
    view_order,
)
from shards.store import Store, Stores
from shards.tar_index import StoreStream
from shards.volume_codec import part_count

CAPTION_FIELDS = ("caption", "text", "report", "findings", "impression", "description", "TEXT")

_MASK_MEMBER = re.compile(r"^(\d+)\.mask\.(\d+)\.[a-z0-9]+$")


def read_members(store: Store, shard: Shard) -> MembersTable:
    """The members table of a shard, checked against the manifest.

    Raises DataError when the side file is not the one the manifest was written with, or disagrees with it.
    """
    for _ in range(2):  # what is wrong may have gone wrong on its way here
        data = store.get(shard.members)
        digest = hashlib.sha256(data).hexdigest()
        if digest == shard.members_sha256:
            break
    else:
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


def check_member(
    data: bytes | memoryview,
    *,
    shard: str,
    key: str,
    member: str,
    size: int,
    crc32c: int | None,
    adopted: bool = False,
) -> None:
    """Check a member before it is used. Raises BadSampleError for a pickle name, 0 bytes, a short read, a wrong crc.

    Of an `adopted` tar only the member's extension is named: the rest may be anything, a person's name included.
    """
    shown = member_extension(member) if adopted else member
    if is_pickle(member):
        raise BadSampleError(shard, key, f"member .{shown} is in a pickle format, which is never read")
    if size == 0:
        raise BadSampleError(shard, key, f"member .{shown} has 0 bytes")
    if len(data) != size:
        raise BadSampleError(shard, key, f"member .{shown} has {len(data)} of {size} bytes; truncated tar?")
    if crc32c is not None and crc32c_of(data) != int(crc32c):
        raise BadSampleError(shard, key, f"member .{shown} does not match its crc32c")


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


def _caption(members: Mapping[str, bytes]) -> str:
    """Text of a foreign sample: `.txt` or `.caption`, else a caption field of its JSON. Raises ValueError."""
    for member, data in members.items():
        extension = member_extension(member)
        if extension not in TEXT_EXTENSIONS:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"member .{extension} not UTF-8 at byte {error.start}") from None
        if extension != "json":
            if text.strip():
                return text.strip()
            continue
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"member .{extension} is not JSON") from None
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
            raise ValueError(f"member .{member_extension(member)}: {error}") from None
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
        views = [[names[place] for place in view] for view in group_views(names)]
        if len(views) != len(record.views):
            raise ValueError(f"{len(views)} images for {len(record.views)} views")
        images = tuple(_image(members, view, of) for view, of in zip(record.views, views, strict=True))
        masks = _masks(members, record)
    except ValueError as error:
        raise BadSampleError(shard, shown_key or key, str(error)) from None
    grids = {view.id: members[name] for view in record.views if (name := f"{view.id}.{ATTENTION}") in members}
    return Sample(key=key, record=record, images=images, masks=masks, attention=grids, split=split)


def _image(members: Mapping[str, bytes], view: ViewRecord, names: Sequence[str]) -> EncodedImage | EncodedVolume:
    """An image, or the parts of a volume. Raises ValueError when parts are missing."""
    if view.depth is None:
        return EncodedImage(data=members[names[0]], extension=member_extension(names[0]))
    return _volume(members, view, "")


def _volume(members: Mapping[str, bytes], view: ViewRecord, infix: str) -> EncodedVolume:
    expected = [f"{view.id}-{number}{infix}.{VOLUME_EXTENSION}" for number in range(part_count(view.depth or 0))]
    missing = [name for name in expected if name not in members]
    if missing:
        raise ValueError(f"member .{missing[0]} is missing")
    return EncodedVolume(parts=tuple(EncodedImage(data=members[n], extension=VOLUME_EXTENSION) for n in expected))


def _masks(members: Mapping[str, bytes], record: StudyRecord) -> dict[tuple[str, int], EncodedImage | EncodedVolume]:
    masks: dict[tuple[str, int], EncodedImage | EncodedVolume] = {}
    for name, data in members.items():
        if match := _MASK_MEMBER.match(name):
            masks[match[1], int(match[2])] = EncodedImage(data=data, extension=member_extension(name))
    for view in record.views:
        for number in range(view.mask_maps if view.depth is not None else 0):
            masks[view.id, number] = _volume(members, view, f".mask.{number}")
    return masks


def read_samples(
    store: Store, manifest: Manifest, shard: Shard, numbers: Sequence[int] | None = None
) -> Iterator[Sample | BadSampleError]:
    """Samples of one shard in order, member by member checked: for tools, not for training.

    `numbers`: those of the shard that are read, None for all. A bad sample is yielded as its error, so that the caller
    decides; so is one that was forgotten.
    """
    table = read_members(store, shard)
    with Stores() as elsewhere:  # adopted tars lie at their own URL
        where, name = (store, shard.tar) if shard.url is None else elsewhere.of(shard.url)
        for sample in range(len(table)) if numbers is None else numbers:
            members: dict[str, bytes] = {}
            key = table.keys[sample]
            shown = log_key(manifest, key)
            try:
                if sample in shard.void:
                    raise BadSampleError(shard.name, shown, "forgotten")
                for row in table.rows(sample):
                    offset, size = int(table.offset[row]), int(table.size[row])
                    data = where.get_range(name, offset, size) if size else b""
                    crc = None if table.crc32c is None else int(table.crc32c[row])
                    member = table.member[row]
                    check_member(
                        data,
                        shard=shard.name,
                        key=shown,
                        member=member,
                        size=size,
                        crc32c=crc,
                        adopted=manifest.adopted,
                    )
                    members[member] = data
                yield sample_from_members(
                    members, shard=shard.name, key=key, split=shard.split, adopted=manifest.adopted, shown_key=shown
                )
            except BadSampleError as error:
                yield error


@dataclass(frozen=True)
class Fault:
    """One finding of `verify`: `key` is None when the whole shard or a side file is meant."""

    shard: str
    key: str | None
    cause: str


def verify(store: Store, manifest: Manifest, shard: Shard) -> list[Fault]:
    """Check one shard whole, in one pass: sizes, sha256, every member's crc32c and JSON, both side files."""
    faults: list[Fault] = []
    with Stores() as elsewhere:  # adopted tars lie at their own URL
        try:
            index = store.get(shard.index)
            if hashlib.sha256(index).hexdigest() != shard.index_sha256:
                faults.append(Fault(shard.name, None, f"{shard.index} does not match the manifest's sha256"))
            table = read_members(store, shard)
            where, name = (store, shard.tar) if shard.url is None else elsewhere.of(shard.url)
            stream = StoreStream(where, name)
        except DataError as error:
            return [*faults, Fault(shard.name, None, str(error))]
        return faults + _verify_tar(stream, table, manifest, shard)


def _verify_tar(stream: StoreStream, table: MembersTable, manifest: Manifest, shard: Shard) -> list[Fault]:
    faults: list[Fault] = []
    if stream.bytes != shard.bytes:
        faults.append(Fault(shard.name, None, f"{shard.tar} has {stream.bytes} bytes, the manifest says {shard.bytes}"))
    samples = table.sample_index
    for row in np.argsort(table.offset, kind="stable"):
        size, member = int(table.size[row]), table.member[row]
        if size == 0 and int(samples[row]) in shard.void:
            continue  # forgotten, and written without its bytes since
        shown = log_key(manifest, table.keys[samples[row]])
        stream.skip(int(table.offset[row]) - stream.position)
        data = stream.read(size)
        crc = None if table.crc32c is None else int(table.crc32c[row])
        try:
            check_member(
                data, shard=shard.name, key=shown, member=member, size=size, crc32c=crc, adopted=manifest.adopted
            )
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
