"""WebDataset tars from elsewhere: indexed in one streaming pass where they lie, never rewritten."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from braceexpand import braceexpand

from shards.errors import ConfigError, DataError
from shards.manifest import Manifest, Shard
from shards.store import Stores, open_store, split_url
from shards.tar_index import CHUNK_BYTES, StoreStream, describe_shard, index_tar

logger = logging.getLogger(__name__)


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
            with open_store(root) as store:
                found = sorted(other for other in store.list("") if fnmatch.fnmatchcase(other, name))
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
    with open_store(output, create=True) as store, Stores() as inputs:
        if store.exists("manifest.json") and not overwrite:
            raise ConfigError(
                f"{store.url} already holds a manifest.json; choose an empty --output or give --overwrite"
            )
        if headers_only:
            logger.warning("--headers-only: members of the adopted tars carry no checksum and are used unverified")
        shards: list[Shard] = []
        refused: Counter[str] = Counter()
        fields: Counter[str] = Counter()
        taken: Counter[str] = Counter()
        for split, patterns in splits.items():
            for url in expand_urls(patterns):
                tars, name = inputs.of(url)
                stream = StoreStream(tars, name, digest=not headers_only)
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
