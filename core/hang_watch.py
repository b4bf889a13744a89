"""Ends a run that makes no progress: every rank writes its stacks, an event names who was waited for, exit code 5.

A thread looks at what the loop said last and when, by a monotonic clock. It works while the main thread waits inside a
collective; a process that is stopped as a whole writes nothing, and is named for its silence. Who launched the ranks
starts them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from core.checkpoint_files import write_atomically
from core.world import World

EXIT_CODE = 5
FOLDER = "hang"
# A first step (compilers, caches), an evaluation and a save have no length of their own: so many times a step's limit.
PATIENT_FACTOR = 6
# How much later than this rank another may notice: those that wait began to a moment after the one they wait for.
GATHER_SHARE, GATHER_AT_LEAST_S = 0.1, 2.0
LOOK_EVERY_S = 0.25  # far below the time of gathering, or ranks that hang at once would not notice at once
ALERT_S = 1.0

Place = Literal["data", "step", "evaluation", "save"]


class HangWatch:
    """Watches one rank from `start` to `close`; what it finds lies in `folder`/hang, which the ranks of a node share.

    `limit_s`: longest time between two calls of `at`, `PATIENT_FACTOR` times that for a first step, an evaluation or a
    save; None: there is no limit.
    """

    def __init__(
        self,
        limit_s: float | None,
        folder: Path,
        world: World,
        *,
        on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._limit_s, self._folder, self._world = limit_s, folder / FOLDER, world
        self._on_event, self._end = on_event, end
        # When, where, at which step, after how many; one tuple, so that the thread never sees half of a change.
        self._last: tuple[float, Place, int, int] = (time.monotonic(), "data", 0, 0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """From here on `at` must be called."""
        if self._limit_s is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks().unlink(missing_ok=True)
        self._say({"watching": True})
        self._last = (time.monotonic(), "data", step, 0)
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)
        self._thread.start()

    def at(self, place: Place, step: int) -> None:
        """The loop goes on: from now on it is at `place` of `step`."""
        _, _, before, steps = self._last
        self._last = (time.monotonic(), place, step, steps + (step != before))

    def close(self) -> None:
        """Idempotent. No other rank waits for this one any more."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._report().unlink(missing_ok=True)

    def __enter__(self) -> HangWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        assert self._limit_s is not None
        while not self._stop.wait(min(LOOK_EVERY_S, self._limit_s / 4)):
            now = time.monotonic()
            since, place, step, steps = self._last
            patient = steps == 0 or place in ("evaluation", "save")
            limit_s = self._limit_s * (PATIENT_FACTOR if patient else 1)
            silent_s = now - since
            # What hangs in the first step may be a rank that never came to it: all have the same patience then.
            if silent_s > limit_s:
                self._end_run(place, step, silent_s)
                return

    def _end_run(self, place: Place, step: int, silent_s: float) -> None:
        """Must end the process, whatever fails on the way: a full disk, or a folder that went with its node."""
        try:
            waits = _waits_for_others()
            with open(self._stacks(), "w") as file:
                file.write(f"rank {self._world.rank}: {silent_s:.0f} s at {place} of step {step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._say({"step": step, "place": place, "waits": waits, "silent_s": round(silent_s, 1)})
            self._stop.wait(max(GATHER_AT_LEAST_S, GATHER_SHARE * (self._limit_s or 0.0)))
            self._name_ranks(step)
            self._stop.wait(ALERT_S)  # for an alert to be sent
        except OSError as error:
            print(f"hang watch of rank {self._world.rank}: {error}", file=sys.stderr, flush=True)
        finally:
            self._end(EXIT_CODE)

    def _name_ranks(self, step: int) -> None:
        """One event of all ranks here, by the first that noticed."""
        found = self._reports()
        noticed = {rank: each for rank, each in found.items() if "place" in each}
        if self._world.rank != min(noticed, default=-1):
            return
        arrived = sorted(rank for rank, each in noticed.items() if each["waits"])
        missing = [
            {"rank": rank, "place": found[rank].get("place", "silent: stopped, or never came back from a call")}
            for rank in sorted(found)
            if rank not in arrived
        ]
        event = {"event": "hang", "step": step, "arrived": arrived, "missing": missing, "stacks": FOLDER}
        self._on_event(event)
        waited_for = ", ".join(f"rank {each['rank']} ({each['place']})" for each in missing) or "no rank: all wait"
        print(
            f"error: no progress at step {step}; ranks {arrived} wait for {waited_for}; stacks in {self._folder}; "
            "start it again, or raise trainer.hang_after_s if a step may take that long",
            file=sys.stderr,
            flush=True,
        )

    def _reports(self) -> dict[int, dict[str, Any]]:
        found = {}
        for path in self._folder.glob("rank-*.json"):
            rank = int(path.stem.removeprefix("rank-"))
            if rank < self._world.world_size:  # not of an earlier start on more ranks
                with contextlib.suppress(OSError, ValueError):
                    found[rank] = json.loads(path.read_text())
        return found

    def _report(self) -> Path:
        return self._folder / f"rank-{self._world.rank}.json"

    def _stacks(self) -> Path:
        return self._folder / f"rank-{self._world.rank}.txt"

    def _say(self, content: dict[str, Any]) -> None:
        write_atomically(self._report(), json.dumps(content).encode() + b"\n")


def _waits_for_others() -> bool:
    """Whether a thread of this process stands in a collective, or waits for the device behind one."""

    def in_collective(frame: FrameType | None) -> bool:
        while frame is not None:
            code = frame.f_code
            if "torch/distributed/" in code.co_filename.replace(os.sep, "/") or code.co_name == "_add_up":
                return True
            frame = frame.f_back
        return False

    return any(in_collective(frame) for frame in sys._current_frames().values())
