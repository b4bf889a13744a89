"""`manifest.json`: all that planning needs to know of a set, and the hashes that everything else is checked against."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from shards.errors import DataError

MANIFEST = "manifest.json"  # its name in the folder of a set
FORMAT_VERSION = 1
CHUNK_COLUMNS = ("first_sample", "samples", "images", "offset", "bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkTable:
    """Consecutive samples of one shard that are fetched together; int64 columns of equal length [chunks].

    `first_sample` counts within the shard; `offset` and `bytes` are the tar range from the first header of the chunk's
    first sample to the end of its last sample's padding; `images` is the number of views in the chunk.
    """

    first_sample: np.ndarray
    samples: np.ndarray
    images: np.ndarray
    offset: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def to_json(self) -> dict[str, list[int]]:
        return {name: getattr(self, name).tolist() for name in CHUNK_COLUMNS}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> ChunkTable:
        return cls(**{name: np.asarray(data[name], dtype=np.int64) for name in CHUNK_COLUMNS})


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One `<name>.tar` with side files `<name>.idx` and `<name>.members.parquet`, all named relative to the manifest.

    `sha256` is None for adopted shards indexed with `--headers-only`; their members then carry no checksum either.
    """

    name: str
    split: str
    bytes: int
    sha256: str | None
    samples: int
    images: int
    index_sha256: str
    members_sha256: str
    chunks: ChunkTable
    # Shards adopted from elsewhere may keep their tar at another place than the manifest.
    url: str | None = None
    void: tuple[int, ...] = ()  # samples forgotten since the shard was written
    # (sha256 of the tar, offset, bytes) of chunks of earlier versions that held forgotten samples: caches drop them.
    erased: tuple[tuple[str, int, int], ...] = ()

    @property
    def tar(self) -> str:
        return self.url or f"{self.name}.tar"

    @property
    def index(self) -> str:
        return f"{self.name}.idx"

    @property
    def members(self) -> str:
        return f"{self.name}.members.parquet"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set. Immutable: a change is a new file with a new `sha256`."""

    shards: tuple[Shard, ...]
    labels: tuple[str, ...] = ()  # column order of Batch["labels"]
    masks: dict[str, int] = field(default_factory=dict)  # name -> id in the label maps
    fields: dict[str, int] = field(default_factory=dict)  # field present -> number of samples that have it
    sections: dict[str, int] = field(default_factory=dict)  # report section -> number of samples that have it
    patients: dict[str, int] = field(default_factory=dict)  # split -> number of patients
    refused: dict[str, int] = field(default_factory=dict)  # reason -> inputs refused while packing
    noted: dict[str, int] = field(default_factory=dict)  # remark -> inputs that it is made on, which were packed
    source: str = ""
    tokenizer: str | None = None  # file or folder beside the manifest
    key_fingerprint: str | None = None
    creator: str = "roentgen 0.1.0"
    adopted: bool = False  # tars from elsewhere: sample keys may be identifiers and are hashed in logs
    packed_sha256: str | None = None  # of the manifest as it was packed, once patients were forgotten; None: this one

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({shard.split for shard in self.shards}))

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def origin(self) -> str:
        """sha256 of the set as it was packed, whoever was forgotten since: its order is that of the set as it is."""
        return self.packed_sha256 or self.sha256

    @property
    def forgotten(self) -> int:
        """Samples that are void slots because their patient was forgotten."""
        return sum(len(shard.void) for shard in self.shards)

    def of_split(self, split: str) -> Manifest:
        """The shards of one split. Raises DataError naming the splits there are when it has none."""
        shards = tuple(shard for shard in self.shards if shard.split == split)
        if not shards:
            raise DataError(f"split {split!r} has no shard; this manifest has {', '.join(self.splits) or 'no shards'}")
        return replace(self, shards=shards)

    def to_bytes(self) -> bytes:
        """UTF-8 JSON, the same bytes for the same content."""
        body: dict[str, Any] = {"format": "roentgen-manifest", "version": FORMAT_VERSION}
        for name in (
            "creator", "source", "adopted", "key_fingerprint", "tokenizer", "labels", "masks", "fields", "sections",
            "patients", "refused",
        ):  # fmt: skip
            body[name] = getattr(self, name)
        if self.noted:  # most sets have none, and those of before it was counted keep their hash
            body["noted"] = self.noted
        if self.packed_sha256 is not None:
            body["packed_sha256"] = self.packed_sha256
        body["samples"] = self.samples
        body["shards"] = [
            {
                "name": shard.name, "url": shard.url, "split": shard.split,
                "bytes": shard.bytes, "sha256": shard.sha256, "samples": shard.samples, "images": shard.images,
                "index_sha256": shard.index_sha256, "members_sha256": shard.members_sha256,
                "void": list(shard.void), "chunks": shard.chunks.to_json(),
            } | ({"erased": shard.erased} if shard.erased else {})
            for shard in self.shards
        ]  # fmt: skip
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "manifest.json") -> Manifest:
        """Parse and check. Raises DataError naming `name` and what is wrong."""
        try:
            body = json.loads(data)
        except ValueError as error:
            raise DataError(f"{name}: not JSON ({type(error).__name__}); is it a Roentgen manifest?") from None
        if not isinstance(body, dict) or body.get("format") != "roentgen-manifest":
            raise DataError(
                f"{name}: not a Roentgen manifest; make one with launchers/pack.py (adopt for foreign tars)"
            )
        version = body.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise DataError(
                f"{name}: manifest version {version}, this program reads up to {FORMAT_VERSION}; upgrade roentgen"
            )
        try:
            shards = tuple(
                Shard(
                    name=row["name"], url=row.get("url"), split=row["split"], bytes=row["bytes"], sha256=row["sha256"],
                    samples=row["samples"], images=row["images"], index_sha256=row["index_sha256"],
                    members_sha256=row["members_sha256"], void=tuple(row.get("void", ())),
                    chunks=ChunkTable.from_json(row["chunks"]),
                    erased=tuple((digest, start, length) for digest, start, length in row.get("erased", ())),
                )
                for row in body["shards"]
            )  # fmt: skip
            manifest = cls(
                shards=shards, labels=tuple(body["labels"]), masks=body["masks"], fields=body["fields"],
                sections=body["sections"], patients=body["patients"], refused=body["refused"], source=body["source"],
                tokenizer=body["tokenizer"], key_fingerprint=body["key_fingerprint"], creator=body["creator"],
                adopted=body["adopted"], noted=body.get("noted", {}), packed_sha256=body.get("packed_sha256"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{name}: broken manifest, {type(error).__name__} at {error}; write it anew with pack.py"
            ) from None
        for shard in manifest.shards:
            if int(shard.chunks.samples.sum()) != shard.samples or int(shard.chunks.images.sum()) != shard.images:
                raise DataError(
                    f"{name}: chunk table of shard {shard.name} does not add up to its {shard.samples} samples"
                )
        if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
            raise DataError(f"{name}: a shard name stands twice")
        return manifest
