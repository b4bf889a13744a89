"""One training run that is broken on purpose: started under restart.py, hurt, and read from what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
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

from ci.bench.figure import REPOSITORY
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
    ray: bool = False
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
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
        program = "launchers/ray_pretrain.py" if self.ray else "launchers/pretrain.py"
        where = ["--workers", str(self.ranks)] if self.ray else []
        ranks = [] if self.ray else ["--ranks", str(self.ranks)]
        return [
            sys.executable, "launchers/restart.py", "--restarts", str(restarts), *ranks, "--log", str(self.log), "--",
            sys.executable, program, "--recipe", "tiny:clip", "--run-dir", str(self.folder), *where, "--set", *settings,
            *self.overrides,
        ]  # fmt: skip

    @contextmanager
    def running(self, restarts: int = 3) -> Iterator[psutil.Process]:
        """The process of restart.py; whatever of it still runs at the end is killed."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **self.environment}
        path = [str(Path(sys.executable).parent), environment.get("PATH", "")]
        environment |= {"PYTHONPATH": str(REPOSITORY), "PATH": os.pathsep.join(path)}
        with open(self.folder.with_suffix(".log"), "ab") as log:
            command = self.command(restarts)
            if self.file_bytes is not None:
                command = ["prlimit", f"--fsize={self.file_bytes}", *command]
            process = psutil.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            for each in family(process):
                with_suppressed(each.kill)
            process.wait()

    def finish(self, restarts: int = 3) -> int:
        """Start it and wait; the exit code."""
        with self.running(restarts) as process:
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

    def step_s(self) -> float:
        """Median seconds of a step."""
        found = [seconds for _, seconds, kind in self.goodput()[1] if kind == "step"]
        return statistics.median(found) if found else float("nan")


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
    """Below restart.py: its ranks, or Ray's workers that hold one."""
    found = []
    for each in family(process)[1:]:
        try:
            command = " ".join(each.cmdline())
            is_rank = "launchers/pretrain.py" in command or ("ray::" in command and "TrainWorker" in command)
        except psutil.Error:
            continue
        if is_rank:
            found.append(each)
    return found


def kill(run: Broken, who: str, dice: random.Random, *, unbroken: str) -> Outcome:
    """SIGKILL in the middle of a random step; the run must end by itself with the weights of the `unbroken` one.

    `who`: one rank, all ranks, or `head`: the driver with its whole cluster, which is then submitted again.
    """
    with run.running() as process:
        run.wait_for_step(dice.randrange(1, run.steps - 1), process)
        time.sleep(dice.random() * 0.2)
        at = time.time()
        ranks = ranks_of(process)
        victims = [dice.choice(ranks)] if who == "one" else ranks if who == "all" else family(process)[1:]
        for victim in victims:
            with_suppressed(lambda victim=victim: victim.send_signal(signal.SIGKILL))  # type: ignore[misc]
        code = int(process.wait(LIMIT_S))
    identical = bool(run.weights()) and run.weights() == unbroken
    victim_name = {"one": "one rank", "all": "all ranks", "head": "the head, submitted again"}[who]
    return Outcome(
        fault=f"SIGKILL of {victim_name}" + (" (Ray)" if run.ray else ""),
        survived=code == 0,
        identical=identical,
        lost_steps=run.lost_steps(),
        text=f"ended with {code}, weights {'identical' if identical else 'DIFFER'}, {run.lost_steps()} steps again",
        **run.seconds_after(at),  # type: ignore[arg-type]
    )


def alone(command: list[str]) -> None:
    """Run a program of the repository, silent. Raises RoentgenError with its last line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RoentgenError(f"{' '.join(command[:2])} ended with {done.returncode}: {last[:300]}")
