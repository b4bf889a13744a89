"""A contestant in a process of its own, which takes one step when it is asked to and waits while another is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ci.bench.figure import REPOSITORY
from shards.errors import RoentgenError

# Kernel's word for the most memory a process has had resident; a child does not inherit it, as it does `ru_maxrss`.
PEAK = "VmHWM:"


class Answer(NamedTuple):
    """Of one step. `peak_bytes`: resident at most, from the process's start on."""

    seconds: float
    loss: float
    peak_bytes: int


def serve(make: Callable[[], Callable[[], float]]) -> None:
    """In the contestant: `make` gives its step, which returns a loss; one step for every line read, till input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints goes to the log, not between the answers
    step = make()
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        answer = Answer(time.perf_counter() - started, loss, _peak_bytes())
        print(json.dumps(answer._asdict()), file=answers, flush=True)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(PEAK))
    return int(kilobytes) * 1024


@contextmanager
def running(command: Sequence[str], name: str, *, threads: int) -> Iterator[Callable[[], Answer]]:
    """The process of `command`, warmed by one step; yields a function that takes one more.

    Raises RoentgenError with the process's last word where it ends, or where its loss is no number.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        assert process.stdin is not None and process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def measure() -> Answer:
            try:
                asked.write("step\n")
                asked.flush()
                answer = Answer(**json.loads(answered.readline()))
            except (OSError, ValueError):
                process.kill()
                process.wait()
                errors.seek(0)
                lines = errors.read().strip().splitlines() or ["no message"]
                raise RoentgenError(f"{name} ended: {lines[-1]}") from None
            if not answer.loss < float("inf"):
                raise RoentgenError(f"{name}: loss {answer.loss}; the timing would mean nothing")
            return answer

        try:
            measure()
            yield measure
        finally:
            asked.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
