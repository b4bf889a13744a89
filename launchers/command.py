"""What the programs share: one-line errors, exit codes, a stop on request, the secret of a key file, a
folder that is there whole or not at all, a look whether a cluster is there."""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import ParamSpec

from rich.console import Console
from rich.logging import RichHandler

from shards.errors import ConfigError, NonFiniteError, RoentgenError
from shards.ingest import read_key_file

P = ParamSpec("P")
KNOCK_S = 10.0


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder that becomes `output` at the end, or leaves nothing where something is raised.

    Raises ConfigError where `output` is not empty or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists and is not an empty folder; name a new one")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror}); name another") from None
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.replace(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def knock(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT: Ray would go on asking for many minutes. Its other addresses,
    such as `auto`, are left to it."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S):
            pass


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(number)


def errors_in_one_line(main: Callable[P, int]) -> Callable[P, int]:
    """A command's main function whose errors become one line and an exit code."""

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except RoentgenError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr)
            return NonFiniteError.exit_code
        except OSError as error:
            print(f"error: {error.filename}: {error.strerror}; free space or choose another place", file=sys.stderr)
            return ConfigError.exit_code

    return wrapped


def run(body: Callable[[Console], int], finished: str) -> int:
    """`body` with errors as one line and SIGTERM and Ctrl-C as a stop; `finished` names what the next run goes on
    behind. Returns the exit code."""
    console = Console()
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return body(console)
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _Interrupted as stop:
        print(f"interrupted; the same command goes on behind the finished {finished}", file=sys.stderr)
        return stop.exit_code
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def secret(arguments: argparse.Namespace, needs: str) -> bytes | None:
    """The secret of --key-file, None with --public. `needs` begins the error where there is neither: who needs one."""
    if arguments.public and arguments.key_file:
        raise ConfigError("--public and --key-file exclude each other; a secret names clinical sets only")
    if arguments.key_file:
        return read_key_file(arguments.key_file)
    if not arguments.public:
        raise ConfigError(
            f"{needs} --key-file, which names patients and studies by keyed hashes; "
            "for a set that anyone may download give --public instead"
        )
    return None
