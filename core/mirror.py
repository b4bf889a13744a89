"""Copies of checkpoints in the store of an s3:// run, sent in the background."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.checkpoint_files import LATEST, STEP_NAME, SUMS
from core.world import World
from shards.errors import DataError, RoentgenError
from shards.store import Store

Event = dict[str, Any]


class Mirror:
    """Copies checkpoints to a store in the background, `latest` last, once every node has sent its part.

    Failures are events; the next save brings a newer checkpoint there.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        world: World,
        nodes: int,
        on_event: Callable[[Event], None],
        on_settled: Callable[[], None],
    ) -> None:
        self._store, self._folder, self._world, self._nodes = store, folder, world, nodes
        self._on_event, self._on_settled = on_event, on_settled
        self._jobs: queue.Queue[str | Callable[[set[int]], set[int]] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True)
        self._thread.start()

    def names(self) -> set[str]:
        """Checkpoints whose checksum list has arrived; it is sent after everything else."""
        found = set()
        for name in self._store.list("checkpoints/"):
            parts = name.split("/")
            if len(parts) == 3 and parts[2] == SUMS and STEP_NAME.fullmatch(parts[1]):
                found.add(parts[1])
        return found

    def latest(self) -> str:
        return self._store.get(LATEST).decode().strip() if self._store.exists(LATEST) else ""

    def fetch(self, name: str) -> None:
        """Bring a checkpoint here; what goes wrong shows when it is verified."""
        target = self._folder / "checkpoints" / name
        shutil.rmtree(target, ignore_errors=True)
        prefix = f"checkpoints/{name}/"
        for remote in self._store.list(prefix):
            relative = remote.removeprefix(prefix)
            if relative.startswith(".done-"):
                continue
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store.get_to_file(remote, path)

    def fetch_file(self, name: str) -> None:
        if self._store.exists(name):
            self._store.get_to_file(name, self._folder / name)

    def push(self, name: str) -> None:
        with self._lock:
            self._busy.add(name)
        self._jobs.put(name)

    def push_file(self, name: str) -> None:
        self._jobs.put(name)

    def is_busy(self, name: str) -> bool:
        """Whether it waits or is being sent."""
        with self._lock:
            return name in self._busy

    def prune(self, kept: Callable[[set[int]], set[int]]) -> None:
        """Delete from the store what `kept` does not choose among the checkpoints there, after what waits is sent."""
        self._jobs.put(kept)

    def close(self, limit_s: float | None = None) -> None:
        self._jobs.put(None)
        self._thread.join(limit_s)
        self._store.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not isinstance(job, str):
                    steps = {int(name.removeprefix("step-")) for name in self.names()}
                    for step in steps - job(steps):
                        self._delete(f"step-{step}")
                elif STEP_NAME.fullmatch(job):
                    self._send(job)
                else:
                    self._store.put(job, self._folder / job)
            except (OSError, RoentgenError) as error:
                self._on_event(
                    {"event": "mirror_failed", "what": job if isinstance(job, str) else "prune", "cause": str(error)}
                )
            finally:
                with self._lock:
                    self._busy.discard(str(job))

    def _send(self, name: str) -> None:
        folder = self._folder / "checkpoints" / name
        prefix = f"checkpoints/{name}"
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
            self._store.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path)
        if not self._world.is_first:
            self._store.put(f"{prefix}/.done-{self._world.rank}", b"")
            return
        deadline = time.monotonic() + 600
        while len([item for item in self._store.list(f"{prefix}/") if "/.done-" in item]) < self._nodes - 1:
            if time.monotonic() > deadline:
                raise DataError(f"{name}: not every node has sent its part within 10 minutes")
            time.sleep(1)
        self._store.put(f"{prefix}/{SUMS}", folder / SUMS)
        self._store.put(LATEST, f"{name}\n".encode())
        self._on_settled()
        self._on_event({"event": "mirrored", "checkpoint": name})

    def _delete(self, name: str) -> None:
        # The list goes first: without it the rest is no checkpoint.
        items = self._store.list(f"checkpoints/{name}/")
        for item in sorted(items, key=lambda item: not item.endswith(SUMS)):
            self._store.delete(item)
