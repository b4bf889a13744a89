"""One attempt at reading or writing a file below a folder: what `shards.store` repeats, and calls a store."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import shutil
import socket
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import ConfigError, DataError, MissingObjectError, RoentgenError, StoreFullError

_OPEN_FILES = 128  # descriptors a folder keeps open
_OWN_PAGES_BYTES = 1 << 17  # smaller bodies lie in the heap: the system allows some 65,000 mappings a process
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>[0-9]+)-[0-9]+\.part$")
# errno values of network file systems that pass with time.
_TRANSIENT_ERRNO = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO})
_FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class TransientError(Exception):
    """An attempt that may succeed when repeated."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


class Piece(NamedTuple):
    """Bytes of a range, with the size and version (ETag; None for files) of the object they are from."""

    data: bytes | memoryview
    object_bytes: int
    version: str | None


def changed_object(what: str) -> DataError:
    """The error for an object that is not the one whose first part was read."""
    return DataError(f"{what}: changed while it was read; stop what writes it and start again")


def source_file(path: Path) -> BinaryIO:
    """A local file that is to be uploaded. Raises DataError."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it was to be written to a store") from None


def _write_error(target: str, error: OSError) -> RoentgenError:
    if error.errno in _FULL_ERRNO:
        return StoreFullError(f"{target}: no room left ({error.strerror}); free space or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(
            f"{target}: may not be written ({error.strerror}); give this user the right or choose another folder"
        )
    return ConfigError(f"{target}: cannot be written ({error.strerror or type(error).__name__}); choose another place")


_host_tag = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_temporary_count = iter(range(1 << 62))


@contextlib.contextmanager
def atomic_file(target: Path, what: str) -> Iterator[int]:
    """A descriptor of a new file that becomes `target` on a clean exit and vanishes on any other.

    Its name tells host and process, so that what a killed process left is removed by the next writer of `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{_host_tag}-{os.getpid()}-{next(_temporary_count)}.part"
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(what, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that dead processes of this host left in `folder`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.match(entry.name)
            if match and match["host"] == _host_tag and not os.path.exists(f"/proc/{match['process']}"):
                os.unlink(entry.path)


class _OpenFile:
    """A descriptor shared by readers; closed by the last one after it was dropped from the table."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.readers, self.dropped = descriptor, 0, False


class Folder:
    """A directory tree. Descriptors of files read by range stay open, least recently used out."""

    splits = False

    def __init__(self, root: Path, create: bool) -> None:
        self._root = root
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._swept: set[Path] = set()
        try:
            if create:
                root.mkdir(parents=True, exist_ok=True)
            with os.scandir(root):
                pass
        except FileNotFoundError:
            raise ConfigError(f"{root}: no such folder; check the path") from None
        except (NotADirectoryError, FileExistsError):
            raise ConfigError(f"{root}: is a file, a folder is needed; give the folder it lies in") from None
        except OSError as error:
            raise ConfigError(
                f"{root}: folder cannot be read ({error.strerror}); give this user the right to read it"
            ) from None

    def size(self, name: str, attempt: int) -> int:
        try:
            status = os.stat(self._root / name)
        except OSError as error:
            raise self._read_error(name, error) from None
        if not stat.S_ISREG(status.st_mode):
            raise MissingObjectError(f"{self._root / name}: is not a file")
        return status.st_size

    def read(self, name: str, offset: int, length: int | None, version: str | None, attempt: int) -> Piece:
        try:
            if length is None:
                # Whole files may have been replaced (`latest`, manifests): never through a kept descriptor.
                with open(self._root / name, "rb", buffering=0) as file:
                    whole = file.readall() or b""
                    return Piece(whole, len(whole), None)
            for fresh in (False, True):
                with self._descriptor(name) as descriptor:
                    data = pread_all(descriptor, offset, length)
                    object_bytes = os.fstat(descriptor).st_size if len(data) < length else offset + length
                if len(data) == length or fresh:
                    break
                self._drop(name)  # it may have been replaced since it was opened
            return Piece(data, object_bytes, None)
        except OSError as error:
            self._drop(name)
            raise self._read_error(name, error) from None

    def write(self, name: str, data: bytes | Path, attempt: int) -> int:
        target = self._root / name
        if target.parent not in self._swept:
            self._swept.add(target.parent)
            _remove_leftovers(target.parent)
        try:
            with contextlib.ExitStack() as stack:
                source = stack.enter_context(source_file(data)) if isinstance(data, Path) else None
                descriptor = stack.enter_context(atomic_file(target, str(target)))
                file = stack.enter_context(open(descriptor, "wb", closefd=False))
                if source is not None:
                    shutil.copyfileobj(source, file, 1 << 20)
                else:
                    assert isinstance(data, bytes)
                    file.write(data)
                written = file.tell()
        except OSError as error:  # making the folder
            raise _write_error(str(target), error) from None
        self._drop(name)
        return written

    def list(self, prefix: str, attempt: int) -> list[str]:
        top = prefix.rpartition("/")[0]
        names = []
        for folder, _, files in os.walk(self._root / top):
            below = Path(folder).relative_to(self._root).as_posix()
            for file in files:
                name = file if below == "." else f"{below}/{file}"
                if name.startswith(prefix) and not _TEMPORARY.match(file):
                    names.append(name)
        return names

    def delete(self, name: str, attempt: int) -> None:
        self._drop(name)
        path = self._root / name
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _write_error(str(path), error) from None
        with contextlib.suppress(OSError):  # not empty, or not ours
            for parent in path.parents:
                if parent == self._root:
                    break
                parent.rmdir()

    def close(self) -> None:
        with self._lock:
            names = list(self._open)
        for name in names:
            self._drop(name)

    @contextlib.contextmanager
    def _descriptor(self, name: str) -> Iterator[int]:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = _OpenFile(os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC))
            self._open.move_to_end(name)
            file.readers += 1
            while len(self._open) > _OPEN_FILES:
                self._close_if_unused(self._open.popitem(last=False)[1])
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1
                if file.dropped:
                    self._close_if_unused(file)

    def _drop(self, name: str) -> None:
        with self._lock:
            file = self._open.pop(name, None)
            if file is not None:
                self._close_if_unused(file)

    @staticmethod
    def _close_if_unused(file: _OpenFile) -> None:
        file.dropped = True
        if file.readers == 0:
            os.close(file.descriptor)

    def _read_error(self, name: str, error: OSError) -> Exception:
        path = self._root / name
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return MissingObjectError(f"{path}: no such file; restore it, or write the set anew")
        if isinstance(error, IsADirectoryError):
            return MissingObjectError(f"{path}: is a folder, a file was expected")
        if isinstance(error, PermissionError):
            return ConfigError(f"{path}: may not be read ({error.strerror}); give this user the right to read it")
        if error.errno in _TRANSIENT_ERRNO:
            return TransientError("file", error.strerror or "read error")
        return DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__}); check the disk")


def room_for(length: int) -> memoryview:
    """Writable room for a body; a large one in pages of its own, which the system has back when the last view goes.

    A training run holds thousands of bodies, of all sizes and for very different times. In the heap they leave holes
    between them that no later one fits, and its memory grows (`python -m ci.bench loader` prints memory by epoch).
    """
    if length >= _OWN_PAGES_BYTES:
        with contextlib.suppress(OSError):  # no mapping left
            return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(bytearray(length))


def pread_all(descriptor: int, offset: int, length: int) -> memoryview:
    """`length` bytes, or fewer at the end of the file."""
    room = room_for(length)
    got = 0
    # A single read gives at most 2 GiB.
    while got < length and (more := os.preadv(descriptor, [room[got:]], offset + got)):
        got += more
    return room[:got]


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """All of `data`: a single write may stop early, at 2 GiB or where the disk becomes full."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)
    return written
