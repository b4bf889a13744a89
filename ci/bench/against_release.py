"""A step of ours against one of a re-stated released algorithm: rate and memory, each in a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from ci.bench import process
from ci.bench.figure import Better, Figure, ratio

PEER = "the released algorithm"


def compare(
    ours: Any, *, bench: str, rate: tuple[str, int], rounds: int, threads: int, suffix: str = "", note: str = ""
) -> list[Figure]:
    """`vs_released` and `memory_vs_released` of `bench`, a module here that serves its contestants.

    `ours`: the contestant, a dataclass whose `system` is `ours` or `released`. `rate`: what is counted, and how many of
    it a step takes. `suffix`: of figures that no bar is set for; they are described here. One process after the other:
    together they may not fit.
    """
    started = time.perf_counter()
    counted, each_step = rate
    found = {}
    for system in ("released", "ours"):
        contestant = replace(ours, system=system)
        command = [sys.executable, "-m", f"ci.bench.{bench}", json.dumps(asdict(contestant))]
        with process.running(command, system, threads=threads) as measure:
            found[system] = [measure() for _ in range(rounds)]
        for answer in found[system]:
            line = f"{contestant}: {answer.seconds:.2f} s, {answer.peak_bytes / 1e9:.2f} GB"
            print(line, file=sys.stderr, flush=True)
    wall_s = time.perf_counter() - started
    rates = {system: [each_step / answer.seconds for answer in answers] for system, answers in found.items()}
    memory = {system: [answer.peak_bytes / 1e9 for answer in answers] for system, answers in found.items()}
    seconds = {system: statistics.median(answer.seconds for answer in answers) for system, answers in found.items()}

    def made(name: str, values: dict[str, list[float]], what: str, better: Better, said: str) -> Figure:
        return ratio(
            f"{bench}.{name}{suffix}", values["ours"], values["released"], peer_name=f"{PEER} ({what})",
            unit="ratio" if suffix else None, better=better if suffix else None, threads=threads, wall_s=wall_s,
            note=f"{note}{said}",
        )  # fmt: skip

    took = f"{seconds['ours']:.2f} s a step against {seconds['released']:.2f} s"
    return [
        made("vs_released", rates, f"{counted}/s", "higher", took),
        made("memory_vs_released", memory, "GB", "lower", "most resident, weights and optimizer included"),
    ]
