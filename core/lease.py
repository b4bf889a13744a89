"""One run on one run directory: a lease that its first rank holds, and that the next start takes over when it is dead.

The holder counts beats into `lease.json`. Whether it lives is told from the list of processes where it runs on this
machine, elsewhere from its beats, watched with a monotonic clock: no two clocks are compared, so a wrong one does not
matter.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from shards.errors import ConfigError, MissingObjectError, RoentgenError
from shards.store import Store, open_store

LEASE = "lease.json"
BEAT_EVERY_S = 3.0
STALE_AFTER_S = 20.0  # without a beat, of a holder on another machine
PATIENCE_S = 10.0  # for a holder that lives: it may be about to end, as ranks do that lost another


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run directory. `machine` tells pids of this boot and container from others; `since` is for people."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    since: str
    beats: int = 0

    def is_gone(self) -> bool:
        """Whether it ran on this machine and has ended; of another machine nobody here can say."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return _started(self.pid) != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _started(pid: int) -> float:
    """When a process here began, in ticks since the boot: a time of day would move when the clock is set."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return float(after_name[19])  # field 22, `starttime`, of proc_pid_stat(5)
    except OSError:  # it has ended, or a system without /proc
        return psutil.Process(pid).create_time()


def _machine() -> str:
    """This boot and this space of process ids: the same pid elsewhere is another process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def _end_at_once(message: str) -> NoReturn:
    """Another run owns the directory now; whatever this one would still write would damage it."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(ConfigError.exit_code)


class Lease:
    """The right to write to `run_dir`, held from the constructor to `release` by beats of a thread of its own.

    `on_event` is told of a lease that was taken over. `on_lost` is called when another run took it over from this one,
    which a process that was frozen learns when it wakes; by default it ends the process.

    Raises:
        ConfigError: a run that lives holds it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
        on_lost: Callable[[str], None] = _end_at_once,
        beat_every_s: float = BEAT_EVERY_S,
        stale_after_s: float = STALE_AFTER_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._store: Store = open_store(run_dir, create=True)
        self._on_event, self._on_lost, self._beat_every_s = on_event, on_lost, beat_every_s
        self._own = Holder(
            token=os.urandom(8).hex(),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )
        try:
            before = self._wait_for_end(stale_after_s, patience_s)
            self._write()
            if before is not None:
                on_event({"event": "lease_taken_over", "from_host": before.host, "from_pid": before.pid})
        except BaseException:
            self._store.close()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the directory free, unless another run has taken it. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            holder = self._read()
            if holder is not None and holder.token == self._own.token:
                self._store.delete(LEASE)
        except RoentgenError:
            pass  # the next start finds this process gone
        self._store.close()

    def _wait_for_end(self, stale_after_s: float, patience_s: float) -> Holder | None:
        """The dead holder whose lease is free to take, or None where there is none."""
        first = self._read()
        began = time.monotonic()
        last, changed = first, began
        while last is not None:
            now = time.monotonic()
            if last.is_gone() or now - changed > stale_after_s:
                return last
            if changed > began and now - began > patience_s:
                raise ConfigError(
                    f"{self._store.url}: another run writes here: process {last.pid} on {last.host}, since {last.since}"
                    "; stop it, or choose another --run-dir"
                )
            time.sleep(min(0.5, self._beat_every_s))
            seen = self._read()
            if seen is not None and (seen.token, seen.beats) != (last.token, last.beats):
                changed = time.monotonic()
            last = seen
        return None

    def _read(self) -> Holder | None:
        try:
            content = json.loads(self._store.get(LEASE))
            return Holder(**content)
        except (MissingObjectError, ValueError, TypeError):
            return None  # none, or a damaged one, which no run of this version wrote

    def _write(self) -> None:
        self._store.put(LEASE, json.dumps(asdict(self._own)).encode())

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_every_s):
            try:
                holder = self._read()
                if holder is not None and holder.token != self._own.token:
                    message = f"{self._store.url}: process {holder.pid} on {holder.host} took this run directory over"
                    self._on_event({"event": "lease_lost", "to_host": holder.host, "to_pid": holder.pid})
                    self._on_lost(message)
                    return
                self._own = replace(self._own, beats=self._own.beats + 1)
                self._write()
            except RoentgenError:
                continue  # a silent store or a full disk: the next beat tries again
