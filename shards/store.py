"""Bytes of shards, manifests and checkpoints, from a folder or from S3.

A `Store` reads ranges in parallel with bounded bytes in flight, retries what a network does to a request, and writes
atomically. It does not know what the bytes mean: checksums of members belong to the reader.

Errors: `ConfigError` for what the user must change (folder, bucket, credentials, region, endpoint),
`MissingObjectError` and `DataError` for objects that are absent, too short or changed under us,
`StoreUnreachableError` when retries are used up, `StoreFullError` when there is no room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

from shards.encryption import Encryption
from shards.errors import (
    ConfigError,
    DataError,
    MissingObjectError,
    RoentgenError,
    StoreUnreachableError,
)
from shards.folder import Folder, Piece, TransientError, atomic_file, changed_object, pread_all, pwrite_all, source_file

if TYPE_CHECKING:
    from shards.bucket import Bucket

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Ranges = list[tuple[str, int, int]]  # name, offset, length
_Body = bytes | memoryview
_Futures = list[Future[_Body]]

SMALLEST_PART_BYTES = 5 << 20  # S3 refuses smaller parts of a multipart upload
MOST_PARTS = 10_000


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How hard a store is used and how long it is waited for. Endpoint, region and credentials come from boto3's chain
    (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_REGION, ~/.aws, instance roles), encryption from `Encryption`'s variables."""

    connections: int = 16
    bytes_in_flight: int = 128 << 20  # asked for and not yet complete; one larger request is admitted alone
    part_bytes: int = 8 << 20  # larger reads and writes are split into parallel parts
    connect_timeout_s: float = 5.0
    # Silence that ends an attempt: the first attempt gives up early, since one stalled connection says little about the
    # next; every further attempt waits twice as long, up to `read_timeout_s`, so that a slow store is still read.
    stall_timeout_s: float = 2.0
    read_timeout_s: float = 20.0
    least_bytes_per_s: int = 8 << 10  # a body slower than this over `read_timeout_s` counts as stalled
    retry_limit_s: float = 120.0  # of one request, first attempt to last; no attempt starts later
    first_contact_limit_s: float = 15.0  # for an endpoint that nobody answers at when the store is opened
    encryption: Encryption = field(default_factory=Encryption.of_environment)  # of objects in S3, by the server

    def __post_init__(self) -> None:
        for name in ("connections", "bytes_in_flight", "part_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"store.{name}={getattr(self, name)} must be at least 1")
        for name in ("connect_timeout_s", "stall_timeout_s", "read_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"store.{name}={getattr(self, name)} must be above 0")
        if self.retry_limit_s < 0:
            raise ConfigError(f"store.retry_limit_s={self.retry_limit_s} must not be negative")


@dataclass(frozen=True, kw_only=True)
class StoreRetry:
    """One failed attempt that will be repeated after `wait_s`; for `events.jsonl`."""

    name: str
    attempt: int  # 1 for the first failure
    cause: str  # connect, throttled, server, reset, short, stall, file, credentials, clock
    detail: str
    wait_s: float


@dataclass
class StoreStats:
    """Counters since the store was opened; written under `lock`, read at any time."""

    requests: int = 0  # attempts, failed ones too
    retries: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    most_bytes_in_flight: int = 0
    retries_by_cause: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class _Workers:
    """Daemon threads, started as work comes.

    Not a ThreadPoolExecutor: that one works off its whole queue, back-offs included, before the interpreter may exit.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the store is closed")
            self._queue.put((future, function, arguments))
            if self._idle < self._queue.qsize() and self._threads < self._count:
                self._threads += 1
                threading.Thread(target=self._work, name=f"store-{self._threads}", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            work = self._queue.get()
            with self._lock:
                self._idle -= 1
            if work is None:
                return
            future, function, arguments = work
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # whatever it is belongs to whoever waits
                future.set_exception(error)
            del work, future, function, arguments  # an idle thread must not keep the last range alive

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._queue.put(None)


class _ByteBudget:
    """Admits requests in the order they came while their bytes fit; one larger than the limit is admitted alone."""

    def __init__(self, limit_bytes: int, stats: StoreStats) -> None:
        self._limit_bytes, self._stats = limit_bytes, stats
        self._in_flight = 0
        self._waiting: deque[object] = deque()
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size_bytes: int) -> Iterator[None]:
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            while self._waiting[0] is not ticket or (
                self._in_flight and self._in_flight + size_bytes > self._limit_bytes
            ):
                self._condition.wait()
            self._waiting.popleft()
            self._in_flight += size_bytes
            self._stats.most_bytes_in_flight = max(self._stats.most_bytes_in_flight, self._in_flight)
            self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._in_flight -= size_bytes
                self._condition.notify_all()


class Store:
    """A folder or an S3 prefix. Safe to use from many threads; call `close` when done. Opened by `open_store`.

    Names are relative POSIX paths below `url`. Callbacks on returned futures run in the store's own threads and must
    not call the store.
    """

    Config = StoreConfig

    def __init__(
        self,
        url: str,
        backend: Folder | Bucket,
        config: StoreConfig,
        on_retry: Callable[[StoreRetry], None] | None = None,
    ) -> None:
        self.url, self.config, self.on_retry = url, config, on_retry
        self.stats = StoreStats()
        self._backend = backend
        self._workers = _Workers(config.connections)
        self._budget = _ByteBudget(config.bytes_in_flight, self.stats)
        self._closing = threading.Event()
        # Spreads retries of ranks in time; it never touches data, so it is seeded by the system and not by the run.
        self._jitter = random.Random()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    def size(self, name: str) -> int:
        """Bytes of an object. Raises MissingObjectError."""
        clean = _checked_name(name)
        return self._retry(clean, lambda attempt: self._backend.size(clean, attempt))

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except MissingObjectError:
            return False
        return True

    def get(self, name: str) -> bytes:
        """The whole object."""
        clean = _checked_name(name)
        if not self._backend.splits:
            return bytes(self._read(clean, 0, None, None).data)
        first = self._workers.submit(self._read, clean, 0, None, None).result()
        if first.object_bytes <= len(first.data):
            return bytes(first.data)
        rest = self._split(clean, len(first.data), first.object_bytes - len(first.data))
        return b"".join([first.data, *self._parts(clean, rest, first.version)])

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises DataError naming the object when it ends before that."""
        if not self._backend.splits:
            return bytes(self._read(_checked_name(name), offset, length, None).data) if length else b""
        return bytes(self.get_ranges([(name, offset, length)])[0].result())

    def get_ranges(self, requests: Sequence[tuple[str, int, int]]) -> _Futures:
        """A future for each (name, offset, length), fetched in this order by at most `connections` threads.

        At most `bytes_in_flight` are asked for at a time; what is complete and not yet dropped by the caller does not
        count, so ask only for what may be held, or use `iterate_ranges`.
        """
        return [self._submit(_checked_name(name), offset, length) for name, offset, length in requests]

    def iterate_ranges(self, requests: Sequence[tuple[str, int, int]]) -> Iterator[_Body]:
        """The ranges in order, read ahead of the caller by at most `bytes_in_flight`, unconsumed ones included."""
        ahead: deque[tuple[int, Future[_Body]]] = deque()
        held_bytes = 0
        for name, offset, length in requests:
            while ahead and held_bytes + length > self.config.bytes_in_flight:
                done_bytes, future = ahead.popleft()
                yield future.result()
                held_bytes -= done_bytes
            ahead.append((length, self._submit(_checked_name(name), offset, length)))
            held_bytes += length
        while ahead:
            yield ahead.popleft()[1].result()

    def get_to_file(self, name: str, path: Path | str) -> int:
        """The whole object into a local file, in parallel parts, never whole in memory; returns its bytes.

        `path` appears only when complete. Raises StoreFullError when the disk is full.
        """
        clean, target = _checked_name(name), Path(path)
        with atomic_file(target, f"{self.url}/{clean}") as descriptor:
            if not self._backend.splits:
                copied = 0
                size_bytes = self.size(clean)
                for part in self._split(clean, 0, size_bytes):
                    copied += pwrite_all(descriptor, self._read(clean, part[1], part[2], None).data, part[1])
                return copied
            first = self._workers.submit(self._read, clean, 0, None, None).result()
            pwrite_all(descriptor, first.data, 0)
            rest = self._split(clean, len(first.data), first.object_bytes - len(first.data))

            def copy(offset: int, length: int) -> None:
                pwrite_all(descriptor, self._read(clean, offset, length, first.version).data, offset)

            _results([self._workers.submit(copy, offset, length) for _, offset, length in rest])
            return first.object_bytes

    def read_ranges(self, requests: Sequence[tuple[str, int, int]]) -> list[_Body]:
        """All of these (name, offset, length) at once: in parallel from a bucket, in the calling thread from a folder.

        A local read is shorter than waking another thread for it.
        """
        if not self._backend.splits:
            return [self._read_body(_checked_name(name), offset, length) for name, offset, length in requests]
        return _results(self.get_ranges(requests))

    # Writing

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object atomically: it appears whole or not at all, and survives a crash once this returns.

        A `Path` is streamed. Raises StoreFullError, ConfigError for a refused permission.
        """
        clean = _checked_name(name)
        if self._backend.splits and isinstance(data, Path):
            with source_file(data) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes > max(self.config.part_bytes, SMALLEST_PART_BYTES):
                    self._put_parts(clean, file, size_bytes)
                    self.stats.add(bytes_written=size_bytes)
                    return
        written = self._retry(clean, lambda attempt: self._backend.write(clean, data, attempt))
        self.stats.add(bytes_written=written)

    def _put_parts(self, name: str, file: BinaryIO, size_bytes: int) -> None:
        bucket = cast("Bucket", self._backend)
        part_bytes = max(self.config.part_bytes, SMALLEST_PART_BYTES, -(-size_bytes // MOST_PARTS))
        upload = self._retry(name, lambda attempt: bucket.start_upload(name, attempt))

        def send(number: int, offset: int, length: int) -> str:
            with self._budget.hold(length):
                part = bytes(pread_all(file.fileno(), offset, length))
                if len(part) != length:
                    raise DataError(f"{file.name}: shrank while it was uploaded; write it anew and repeat")
                return self._retry(name, lambda attempt: bucket.send_part(name, upload, number, part, attempt))

        try:
            futures = [
                self._workers.submit(send, number, offset, min(part_bytes, size_bytes - offset))
                for number, offset in enumerate(range(0, size_bytes, part_bytes), start=1)
            ]
            tags = _results(futures)
            self._retry(name, lambda attempt: bucket.finish_upload(name, upload, tags, size_bytes, attempt))
        except BaseException:
            # Parts without an end cost money and are invisible. When the store is gone, a lifecycle rule must do it.
            with contextlib.suppress(RoentgenError, TransientError):
                bucket.abort_upload(name, upload)
            raise

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that start with `prefix`, at any depth. Half-written files are not listed."""
        clean = _checked_name(prefix) + "/" * prefix.endswith("/") if prefix.strip("/") else ""
        return sorted(self._retry(prefix or "listing", lambda attempt: self._backend.list(clean, attempt)))

    def delete(self, name: str) -> None:
        """Remove an object; one that is absent already is no error, so that a repeated delete is none either."""
        clean = _checked_name(name)
        self._retry(clean, lambda attempt: self._backend.delete(clean, attempt))

    def close(self) -> None:
        """Cancel what has not begun, end waits between retries, close descriptors. Idempotent."""
        self._closing.set()
        self._workers.close()
        self._backend.close()

    # Machinery

    def _submit(self, name: str, offset: int, length: int) -> Future[_Body]:
        if offset < 0 or length < 0:
            raise DataError(
                f"{self.url}/{name}: range of {length} bytes at {offset} is impossible; is the index broken?"
            )
        if length == 0:
            empty: Future[_Body] = Future()
            empty.set_result(b"")
            return empty
        if not self._backend.splits or length <= self.config.part_bytes:
            return self._workers.submit(self._read_body, name, offset, length)
        whole: Future[_Body] = Future()
        whole.set_running_or_notify_cancel()
        parts = [self._workers.submit(self._read, *part, None) for part in self._split(name, offset, length)]
        left = [len(parts)]
        lock = threading.Lock()

        def finish(_: Future[Piece]) -> None:
            with lock:
                left[0] -= 1
                if left[0]:
                    return
            try:
                pieces = [part.result() for part in parts]
                if len({piece.version for piece in pieces}) > 1:
                    raise changed_object(f"{self.url}/{name}")
                whole.set_result(b"".join(piece.data for piece in pieces))
            except BaseException as error:  # also the cancellation of a part
                whole.set_exception(error)

        for part in parts:
            part.add_done_callback(finish)
        return whole

    def _split(self, name: str, offset: int, length: int) -> _Ranges:
        end = offset + length
        step = self.config.part_bytes
        return [(name, start, min(step, end - start)) for start in range(offset, end, step)]

    def _parts(self, name: str, parts: _Ranges, version: str | None) -> Iterator[_Body]:
        futures = [self._workers.submit(self._read, *part, version) for part in parts]
        return (piece.data for piece in _results(futures))

    def _read_body(self, name: str, offset: int, length: int) -> _Body:
        return self._read(name, offset, length, None).data

    def _read(self, name: str, offset: int, length: int | None, version: str | None) -> Piece:
        """One range with retries. `length` None: a whole file, or the first `part_bytes` of an object from S3.

        Raises DataError when the object is too short or no longer of `version`.
        """
        with self._budget.hold(self.config.part_bytes if length is None else length):
            piece = self._retry(name, lambda attempt: self._backend.read(name, offset, length, version, attempt))
        if version is not None and piece.version != version:
            raise changed_object(f"{self.url}/{name}")
        if length is not None and len(piece.data) < length:
            raise DataError(
                f"{self.url}/{name}: has {piece.object_bytes} bytes, {length} were wanted at {offset}; it is truncated"
                " or older than its index: write or copy it anew"
            )
        self.stats.add(bytes_read=len(piece.data))
        return piece

    def _retry(self, name: str, call: Callable[[int], T], connect_limit_s: float | None = None) -> T:
        """`call(attempt)` until it succeeds, with full-jitter exponential back-off, for at most `retry_limit_s`."""
        began = time.monotonic()
        attempt = 0
        while True:
            if self._closing.is_set():
                raise StoreUnreachableError(f"{self.url}/{name}: the store was closed while it was asked for this")
            self.stats.add(requests=1)
            try:
                return call(attempt)
            except TransientError as error:
                failure = error
            attempt += 1
            limit_s = self.config.retry_limit_s
            if connect_limit_s is not None and failure.cause == "connect":
                limit_s = min(limit_s, connect_limit_s)
            wait_s = self._jitter.uniform(0.0, min(10.0, 0.05 * 2.0 ** min(attempt, 10)))
            if failure.cause == "throttled":
                wait_s += 0.1
            elapsed_s = time.monotonic() - began
            if elapsed_s + wait_s > limit_s:
                unreachable = StoreUnreachableError(
                    f"{self.url}/{name}: the store gave no usable answer for {elapsed_s:.0f} s in {attempt} attempts"
                    f" (last: {failure.detail}); mend the store or the network, or raise store.retry_limit_s"
                    f" (now {self.config.retry_limit_s:g})"
                )
                unreachable.__cause__ = failure
                raise unreachable
            with self.stats.lock:
                self.stats.retries += 1
                self.stats.retries_by_cause[failure.cause] += 1
            if self.on_retry is not None:
                self.on_retry(
                    StoreRetry(name=name, attempt=attempt, cause=failure.cause, detail=failure.detail, wait_s=wait_s)
                )
            if attempt in (4, 8) or attempt % 16 == 0:  # the first ones are everyday life
                logger.warning("%s/%s: attempt %d failed (%s), trying on", self.url, name, attempt, failure.detail)
            self._closing.wait(wait_s)


def open_store(
    url: str | Path,
    config: StoreConfig | None = None,
    *,
    create: bool = False,
    on_retry: Callable[[StoreRetry], None] | None = None,
) -> Store:
    """Open a folder (path or file:// URL) or s3://bucket/prefix and check that it can be used.

    `create` makes a missing folder (for outputs); a bucket is never created. Raises ConfigError naming what is wrong:
    no such folder or bucket, no permission, wrong credentials, region or endpoint.
    """
    config = config or StoreConfig()
    text = str(url)
    if text.startswith("s3://"):
        bucket_name, _, prefix = text.removeprefix("s3://").partition("/")
        text = f"s3://{bucket_name}/{prefix.strip('/')}".rstrip("/")
        from shards.bucket import Bucket  # boto3 takes long to import, and a folder needs none of it

        bucket = Bucket(text, bucket_name, prefix.strip("/"), config)
        store = Store(text, bucket, config, on_retry)
        try:
            store._retry("", bucket.check, connect_limit_s=config.first_contact_limit_s)
        except StoreUnreachableError as error:
            store.close()
            if isinstance(error.__cause__, TransientError) and error.__cause__.cause == "connect":
                raise ConfigError(
                    f"{text}: no S3 server at {bucket.endpoint} ({error.__cause__.detail}); start the server, or"
                    " correct AWS_ENDPOINT_URL, the region or the network"
                ) from None
            raise
        except BaseException:
            store.close()
            raise
        return store
    folder = _folder_of(text)
    return Store(str(folder), Folder(folder, create), config, on_retry)


class Stores:
    """Stores opened as their URLs are met, each root once, closed together. May be asked from several threads."""

    def __init__(
        self, config: StoreConfig | None = None, *, on_retry: Callable[[StoreRetry], None] | None = None
    ) -> None:
        self._config, self._on_retry = config, on_retry
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()

    def of(self, url: str) -> tuple[Store, str]:
        """The store that `url` lies in, and its name there. Raises what `open_store` raises."""
        root, name = split_url(url)
        with self._lock:
            if root not in self._stores:
                self._stores[root] = open_store(root, self._config, on_retry=self._on_retry)
            return self._stores[root], name

    @property
    def opened(self) -> list[Store]:
        with self._lock:
            return list(self._stores.values())

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for store in self.opened:
            store.close()


def split_url(url: str | Path) -> tuple[str, str]:
    """(store, name) of a file or object: `s3://b/p/manifest.json` -> (`s3://b/p`, `manifest.json`)."""
    text = str(url)
    if text.startswith("s3://"):
        bucket_and_key = text.removeprefix("s3://").rstrip("/")
        root, slash, name = bucket_and_key.rpartition("/")
        if not slash or not root:
            raise ConfigError(f"{text}: names no object; write s3://bucket/name")
        return f"s3://{root}", name
    path = _folder_of(text)
    return str(path.parent), path.name


def _folder_of(url: str) -> Path:
    if url.startswith("file://"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{url}: a file URL has three slashes, file:///folder")
        return Path(unquote(parts.path))
    # `pipe:` is webdataset's, and would be a shell command.
    if "://" in url or url.startswith("pipe:"):
        raise ConfigError(f"{url}: unknown kind of store; use a folder, file:///folder or s3://bucket/prefix")
    if not url:
        raise ConfigError("the store is an empty string; use a folder, file:///folder or s3://bucket/prefix")
    return Path(url)


def _checked_name(name: str) -> str:
    """Names come from manifests, so one that leaves the store is refused."""
    parts = name.rstrip("/").split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise DataError(
            f"{name!r}: not a name below the store (relative, no '..'); is the manifest from a trusted source?"
        )
    return "/".join(parts)


def _results(futures: list[Future[T]]) -> list[T]:
    """All results, or the first error once nothing of this call is at work any more."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        wait_for_futures(futures)
        raise
