"""Copies of checkpoints in the store of an s3:// run, sent in the background."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.checkpoint_files import LATEST, STEP_NAME, SUMS, write_atomically
from core.world import World
from shards.errors import DataError, RoentgenError
from shards.store import Store

Event = dict[str, Any]
FOLLOWED = ".follows"  # the store's `latest` that the checkpoints here go on from


class Mirror:
    """Copies checkpoints to a store in the background, `latest` last, once every node has sent its part.

    Failures are events, and what failed is sent again after `again_s`. On one node a checkpoint that still waits when a
    newer one comes is left out: a slow or silent store makes the copy older, never the queue longer.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        world: World,
        nodes: int,
        on_event: Callable[[Event], None],
        on_settled: Callable[[], None],
        *,
        again_s: float = 15.0,
    ) -> None:
        self._again_s = again_s
        self._unsent_since: float | None = None
        self._newest_pushed = self._newest_sent = 0
        self._closing = threading.Event()
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
        return self._store.get(LATEST).decode(errors="replace").strip() if self._store.exists(LATEST) else ""

    def follows(self, latest: str) -> bool:
        """Whether what was saved here goes on from what the store's `latest` names now, and nobody moved that since."""
        path = self._folder / FOLLOWED
        return latest == (path.read_text(errors="replace").strip() if path.is_file() else "")

    def follow(self, latest: str, here: str | None = None) -> None:
        """What is saved here from now on goes on from `latest` of the store. `here`: the checkpoint that the run starts
        from; newer ones that lie here were left behind. On a full disk the store's `latest` will count."""
        with contextlib.suppress(OSError):
            if here is not None:
                write_atomically(self._folder / LATEST, f"{here}\n".encode())
            write_atomically(self._folder / FOLLOWED, f"{latest}\n".encode())

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
            self._newest_pushed = max(self._newest_pushed, _step_of(name))
            if self._unsent_since is None:
                self._unsent_since = time.monotonic()
        self._jobs.put(name)

    @property
    def behind_s(self) -> float:
        """Seconds since the oldest save after which no checkpoint has arrived; 0 when all have."""
        with self._lock:
            return 0.0 if self._unsent_since is None else time.monotonic() - self._unsent_since

    def push_file(self, name: str) -> None:
        self._jobs.put(name)

    def is_busy(self, name: str) -> bool:
        """Whether it waits or is being sent."""
        with self._lock:
            return name in self._busy

    def prune(self, kept: Callable[[set[int]], set[int]]) -> None:
        """Delete from the store what `kept` does not choose among the checkpoints there, after what waits is sent."""
        self._jobs.put(kept)

    def close(self, limit_s: float | None = None) -> bool:
        """Send what waits, each thing tried once more; whether every checkpoint has arrived."""
        self._closing.set()
        self._jobs.put(None)
        self._thread.join(limit_s)
        self._store.close()
        return self.behind_s == 0.0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None or not self._jobs.empty():
            if job is None:  # something came back into the queue behind it
                self._jobs.put(None)
                continue
            if isinstance(job, str) and self._is_superseded(job):
                self._on_event({"event": "mirror_left_out", "checkpoint": job})
                self._settle(job, None)
                continue
            pushed = time.monotonic()
            try:
                self._do(job)
                self._settle(job, pushed)
            except (OSError, RoentgenError) as error:
                self._on_event(
                    {"event": "mirror_failed", "what": job if isinstance(job, str) else "prune", "cause": str(error)}
                )
                # A checkpoint that is not there when the node goes is lost; the rest comes again by itself.
                if isinstance(job, str) and not self._closing.wait(self._again_s):
                    self._jobs.put(job)
                else:
                    self._settle(job, None)

    def _do(self, job: str | Callable[[set[int]], set[int]]) -> None:
        if not isinstance(job, str):
            steps = {_step_of(name) for name in self.names()}
            for step in steps - job(steps):
                self._delete(f"step-{step}")
        elif STEP_NAME.fullmatch(job):
            self._send(job)
        else:
            self._store.put(job, self._folder / job)

    def _is_superseded(self, job: str) -> bool:
        """Whether a newer checkpoint waits or has arrived. With several nodes only the latter: all parts must come."""
        if not STEP_NAME.fullmatch(job):
            return False
        with self._lock:
            waiting = {_step_of(name) for name in self._busy if STEP_NAME.fullmatch(name)} if self._nodes == 1 else ()
            return _step_of(job) < max(self._newest_sent, *waiting, 0)

    def _settle(self, job: object, began: float | None) -> None:
        """`job` is done with; sent since `began`, or not sent."""
        with self._lock:
            self._busy.discard(str(job))
            if began is not None and isinstance(job, str) and STEP_NAME.fullmatch(job):
                self._newest_sent = max(self._newest_sent, _step_of(job))
                # Of what was saved after it nothing has arrived, even where it is not tried again.
                self._unsent_since = began if self._newest_sent < self._newest_pushed else None

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
        self.follow(name)
        self._on_settled()
        self._on_event({"event": "mirrored", "checkpoint": name})

    def _delete(self, name: str) -> None:
        # The list goes first: without it the rest is no checkpoint.
        items = self._store.list(f"checkpoints/{name}/")
        for item in sorted(items, key=lambda item: not item.endswith(SUMS)):
            self._store.delete(item)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))
