"""Ranges of remote shards kept on a local disk; knows nothing of stores, and never fails a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from awscrt.checksums import crc32c as crc32c_of

from shards.errors import ConfigError

logger = logging.getLogger(__name__)


class ChunkCache:
    """Ranges of remote shards kept in a local folder, least recently used out; shared by the ranks of a node.

    An entry is its crc32c and its bytes, checked at every read: a damaged one is deleted and reads as absent. The files
    never take more than `limit_bytes`, since writers take turns on one lock; what a killed writer left is removed by
    the next one that makes room. A disk that refuses a write costs the entry, never the run.
    """

    _HEADER_BYTES = 4

    def __init__(self, directory: Path | str, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ConfigError(f"data.cache_bytes={limit_bytes} must be at least 1")
        self._directory, self._limit_bytes = Path(directory), limit_bytes
        self._thread_lock = threading.Lock()
        self._warned = False
        self.hits = self.misses = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Holds the sum of the entries' bytes as text, so that not every write has to walk the folder.
            self._ledger = os.open(self._directory / "ledger", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{self._directory}: cache folder cannot be used ({error.strerror}); choose another one"
            ) from None

    def close(self) -> None:
        with self._thread_lock:
            if self._ledger >= 0:
                os.close(self._ledger)
                self._ledger = -1

    def get(self, identity: str, offset: int, length: int) -> bytes | None:
        """The range of the shard whose hash is `identity`, or None."""
        path = self._path(identity, offset, length)
        try:
            with open(path, "rb", buffering=0) as file:
                checksum = file.read(self._HEADER_BYTES)
                data = file.readall() or b""
            if len(data) == length and crc32c_of(data).to_bytes(4, "little") == checksum:
                os.utime(path)  # most recently used
                self.hits += 1
                return data
            path.unlink(missing_ok=True)
        except OSError:
            pass  # absent, evicted under us, or a disk that fails: the store has it
        self.misses += 1
        return None

    def put(self, identity: str, offset: int, length: int, data: bytes) -> bool:
        """Keep a range. False when it is larger than the whole cache or the disk refused it."""
        assert len(data) == length
        entry_bytes = length + self._HEADER_BYTES
        if entry_bytes > self._limit_bytes:
            return False
        path = self._path(identity, offset, length)
        temporary = path.with_suffix(".part")
        with self._thread_lock:  # flock does not tell threads of one process apart
            if self._ledger < 0:
                return False
            try:
                fcntl.flock(self._ledger, fcntl.LOCK_EX)
                if path.exists():
                    return True
                used_bytes = self._used_bytes()
                if used_bytes is None or used_bytes + entry_bytes > self._limit_bytes:
                    used_bytes = self._make_room(entry_bytes)
                # The sum is raised first: a writer killed in between leaves it too high, never too low.
                self._set_used_bytes(used_bytes + entry_bytes)
                path.parent.mkdir(exist_ok=True)
                with open(temporary, "wb", buffering=0) as file:
                    file.write(crc32c_of(data).to_bytes(4, "little"))
                    written = file.write(data)
                if written != length:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.replace(temporary, path)
                return True
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                if not self._warned:
                    self._warned = True
                    logger.warning("%s: cannot cache (%s); reading from the store", self._directory, error.strerror)
                return False
            finally:
                with contextlib.suppress(OSError):  # a file system that knows no locks
                    fcntl.flock(self._ledger, fcntl.LOCK_UN)

    def discard(self, identity: str, offset: int, length: int) -> None:
        """Remove a range, if it is there. The sum of bytes stays too high until room is made the next time."""
        with contextlib.suppress(OSError):
            self._path(identity, offset, length).unlink(missing_ok=True)

    def get_or_fetch(self, identity: str, offset: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        data = self.get(identity, offset, length)
        if data is None:
            data = fetch()
            self.put(identity, offset, length, data)
        return data

    def _path(self, identity: str, offset: int, length: int) -> Path:
        name = hashlib.sha256(f"{identity}:{offset}:{length}".encode()).hexdigest()
        return self._directory / name[:2] / f"{name}.range"

    def _used_bytes(self) -> int | None:
        text = os.pread(self._ledger, 32, 0).strip()
        return int(text) if text.isdigit() else None

    def _set_used_bytes(self, used_bytes: int) -> None:
        os.pwrite(self._ledger, b"%-32d" % used_bytes, 0)

    def _make_room(self, entry_bytes: int) -> int:
        """Delete the least recently used entries until a twentieth of the limit is free; returns the bytes left."""
        entries: list[tuple[int, int, str]] = []
        for folder in self._directory.iterdir():
            if not folder.is_dir():
                continue
            for file in os.scandir(folder):
                if file.name.endswith(".part"):
                    os.unlink(file.path)  # we hold the lock, so its writer is dead
                elif file.name.endswith(".range"):
                    with contextlib.suppress(FileNotFoundError):
                        status = file.stat()
                        entries.append((status.st_mtime_ns, status.st_size, file.path))
        used_bytes = sum(size for _, size, _ in entries)
        target_bytes = min(self._limit_bytes * 19 // 20, self._limit_bytes - entry_bytes)
        if used_bytes + entry_bytes > self._limit_bytes:
            for _, size, path in sorted(entries):
                if used_bytes <= target_bytes:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                used_bytes -= size
        return used_bytes
