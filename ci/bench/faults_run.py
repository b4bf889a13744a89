"""One training run that is broken on purpose: started under restart.py, hurt, and read from what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import trim_mean

from ci.bench.figure import REPOSITORY
from ci.bench.ray_cluster import free_port
from shards.errors import RoentgenError

LIMIT_S = 1200.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one fault came to. Seconds from the fault: `detected_s` until the ranks had ended, `restored_s` until the
    next start had its checkpoint, `first_step_s` until a step was done again. `lost_steps` were done twice."""

    fault: str
    survived: bool
    text: str
    identical: bool | None = None
    detected_s: float | None = None
    restored_s: float | None = None
    first_step_s: float | None = None
    lost_steps: int = 0


@dataclass(kw_only=True)
class Broken:
    """A run directory and how its run is started. `steps` and `save_every` are the recipe's."""

    folder: Path
    manifest: str
    steps: int
    save_every: int
    ranks: int = 2
    by: str = "restart.py"  # who starts the ranks: restart.py, the `deepspeed` runner, or the driver of `ray`
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables of the environment that it must not have
    run_dir: str = ""  # where it is not `folder`, which then holds what is written before it is mirrored
    address: str = "local"  # of Ray's cluster
    workers: str = ""  # of Ray's driver, where it is not `ranks`
    options: tuple[str, ...] = ()  # more of Ray's driver
    file_bytes: int | None = None  # largest file that its processes may write

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".restarts.jsonl")

    def command(self, restarts: int) -> list[str]:
        settings = [
            f"data.train={self.manifest}",
            f"trainer.steps={self.steps}",
            f"trainer.save_every={self.save_every}",
        ]
        run_dir = self.run_dir or str(self.folder)
        recipe = ["--recipe", "tiny:clip", "--run-dir", run_dir, "--set", *settings, *self.overrides]
        if self.by == "deepspeed":
            runner = ["--num_accelerators", str(self.ranks), "--master_port", str(free_port())]
            return [str(Path(sys.executable).with_name("deepspeed")), *runner, "launchers/pretrain.py", *recipe]
        again = [sys.executable, "launchers/restart.py", "--restarts", str(restarts), "--log", str(self.log)]
        if self.by == "ray":
            where = ["--address", self.address, "--workers", self.workers or str(self.ranks), *self.options]
            return [*again, "--", sys.executable, "launchers/ray_pretrain.py", *where, *recipe]
        return [*again, "--ranks", str(self.ranks), "--", sys.executable, "launchers/pretrain.py", *recipe]

    def variables(self) -> dict[str, str]:
        """The environment of its processes."""
        found = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **self.environment}
        path = [str(Path(sys.executable).parent), found.get("PATH", "")]
        found |= {"PYTHONPATH": str(REPOSITORY), "PATH": os.pathsep.join(path)}
        return {name: value for name, value in found.items() if name not in self.without}

    @contextmanager
    def running(self, restarts: int = 3) -> Iterator[psutil.Process]:
        """The process that was started, the first of its session; whatever of it still runs at the end is killed."""
        with open(self.folder.with_suffix(".log"), "ab") as log:
            command = self.command(restarts)
            if self.file_bytes is not None:
                command = ["prlimit", f"--fsize={self.file_bytes}", *command]
            process = psutil.Popen(
                command, cwd=REPOSITORY, env=self.variables(), stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield process
        finally:
            for each in family(process):
                with_suppressed(each.kill)
            process.wait()

    def finish(self) -> int:
        """Start it once and wait; the exit code."""
        with self.running(restarts=0) as process:
            return int(process.wait(LIMIT_S))

    # What it left.

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [event for event in lines_of(self.folder / "events.jsonl") if kind in ("", event["event"])]

    def batches(self) -> list[dict[str, Any]]:
        return self.events("batch")

    def wait_for_step(self, step: int, process: psutil.Process) -> None:
        """Until a batch of `step` or later is done. Raises RoentgenError when the run ends before."""
        deadline = time.monotonic() + LIMIT_S
        while not any(event["step"] >= step for event in self.batches()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RoentgenError(f"the run ended or stood before step {step}; see {self.folder.with_suffix('.log')}")
            time.sleep(0.02)

    def weights(self) -> str:
        """Hash of the final weights, "" without."""
        path = self.folder / "checkpoints" / f"step-{self.steps}" / "weights.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def samples(self) -> dict[int, set[int]]:
        """step -> hashes of its global batch, one unless something other was read after a restart."""
        found: dict[int, set[int]] = {}
        for event in self.batches():
            found.setdefault(event["step"], set()).add(event["batch_hash"])
        return found

    def seconds_after(self, fault_at: float) -> dict[str, float | None]:
        """What an Outcome says of time, of a fault at `fault_at` (time.time())."""
        lines = [line for line in lines_of(self.log) if line["event"] == "ended" and line["code"] != 0]
        ended = [line["time"] for line in lines if line["time"] > fault_at]
        # Ray's driver says how long ago the ranks had ended when the next ones start.
        times = [event["time"] - event["seconds"] for event in self.events("restart")]
        restarts = [ended_at for ended_at in times if ended_at > fault_at]
        starts = [event["time"] for event in self.events("start") if event["time"] > fault_at]
        steps = [event["time"] for event in self.batches() if starts and event["time"] > starts[0]]
        return {
            name: found[0] - fault_at if found else None
            for name, found in (
                ("detected_s", sorted(ended + restarts)),
                ("restored_s", starts),
                ("first_step_s", steps),
            )
        }

    def lost_steps(self) -> int:
        steps = [event["step"] for event in self.batches()]
        return len(steps) - len(set(steps))

    def goodput(self) -> tuple[float, list[tuple[float, float, str]]]:
        """Share of the time from the first start on that was spent on steps that count, and the spans of that time:
        (second, seconds, `step` that counts, `again`: done once more later, `save`, `down`)."""
        events = [event for event in self.events() if event["event"] in ("start", "batch", "save")]
        last_of = {event["step"]: place for place, event in enumerate(events) if event["event"] == "batch"}
        began = events[0]["time"]
        spans = []
        for place, (before, event) in enumerate(pairwise(events), start=1):
            kind = "save" if event["event"] == "save" else "down"
            if event["event"] == "batch" and before["event"] != "start":
                kind = "step" if last_of[event["step"]] == place else "again"
            spans.append((before["time"] - began, event["time"] - before["time"], kind))
        total = events[-1]["time"] - began
        return sum(seconds for _, seconds, kind in spans if kind == "step") / max(total, 1e-9), spans

    def losses(self) -> dict[int, float]:
        """step -> loss, from its curves."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        curves = EventAccumulator(str(self.folder / "tb"), size_guidance={"scalars": 0})
        curves.Reload()
        return {event.step: event.value for event in curves.Scalars("loss/total")}

    def step_s(self) -> float:
        """Seconds of a step: the mean of the middle half, since a median would be of the events' whole milliseconds."""
        found = [seconds for _, seconds, kind in self.goodput()[1] if kind == "step"]
        return float(trim_mean(found, 0.25)) if found else float("nan")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file that may be written to just now."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def with_suppressed(action: Callable[[], object]) -> None:
    """A process that has ended in between needs no more."""
    try:
        action()
    except psutil.Error:
        return


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process of ours and all below it."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Below a process that starts runs, or a node of Ray: ranks, or Ray's workers that hold one."""
    found = []
    for each in family(process)[1:]:
        try:
            command = " ".join(each.cmdline())
            is_ray = "ray::" in command and "TrainWorker" in command
            is_rank = is_ray or ("launchers/pretrain.py" in command and "deepspeed" not in command)
        except psutil.Error:
            continue
        if is_rank:
            found.append(each)
    return found


def alone(command: list[str]) -> None:
    """Run a program of the repository, silent. Raises RoentgenError with its last line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RoentgenError(f"{' '.join(command[:2])} ended with {done.returncode}: {last[:300]}")
