"""The demo: real radiographs and phantoms become shards, a small CLIP learns from both, held-out patients judge it.

It runs the programs a user would run, one after the other, prints a table, and writes `summary.json` into the run
directory. Exit code 0 when every bar of ci/bench/bars.toml holds, 1 when one does not, else that of the failed program.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ci.bench.figure import REPOSITORY, Figure, figure, print_table, write_json
from shards.errors import ConfigError, RoentgenError

RUN = REPOSITORY / "runs" / "demo"
RECIPE = "chest:clip_tiny"
RANKS = 2
SEED = 0
# Of a batch of 96 studies: mostly phantoms, whose truth is known; the real set is small and would only be memorised.
PHANTOM_QUOTA, NIH_QUOTA = 80, 16


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything. `samples`: phantoms for training, validation and test."""

    samples: tuple[int, int, int] = (3000, 200, 800)
    steps: int = 300  # of the recipe's 1,000: what two cores do in the time that a demo may take
    warmup_steps: int = 40
    log_every: int = 20


QUICK = Size(samples=(192, 24, 96), steps=6, warmup_steps=1, log_every=1)


class StepFailedError(RoentgenError):
    """One of the programs ended with `exit_code`; it has said why itself."""

    def __init__(self, program: str, exit_code: int) -> None:
        super().__init__(f"{program} ended with exit code {exit_code}; its own message stands above")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The steps. Everything lies under `run`, which is emptied first: a demo always starts from nothing."""

    run: Path
    size: Size
    console: Console

    @property
    def manifests(self) -> dict[str, Path]:
        return {name: self.run / "shards" / name / "manifest.json" for name in ("phantom", "nih")}

    def pack(self) -> None:
        """Both sets, split by patient. Shards are small, so that even sets of this size are mixed well."""
        samples = ",".join(map(str, self.size.samples))
        self._launch(
            "packing phantoms", sys.executable, "launchers/pack.py", "--source", "phantom", "--difficulty", "easy",
            "--seed", str(SEED), "--samples", samples, "--output", str(self.manifests["phantom"].parent),
        )  # fmt: skip
        self._launch(
            "packing NIH radiographs", sys.executable, "launchers/pack.py", "--source", "table", "--public",
            "--input", "ci/data/nih_cxr", "--fractions", "train=0.6,validation=0.1,test=0.3",
            "--output", str(self.manifests["nih"].parent),
        )  # fmt: skip

    def pretrain(self) -> None:
        """Two processes, ZeRO 2, one batch from both sets."""
        quotas = {"phantom": PHANTOM_QUOTA, "nih": NIH_QUOTA}
        mixture = [{"manifest": str(path), "quota": quotas[name]} for name, path in self.manifests.items()]
        overrides = [
            f"data.train={json.dumps(mixture)}",
            f"data.validation={self.manifests['phantom']}",
            f"seed={SEED}",
            "engine.zero_stage=2",
            f"trainer.steps={self.size.steps}",
            f"trainer.evaluate_every={max(1, self.size.steps // 2)}",
            f"trainer.log_every={self.size.log_every}",
            f"optim.warmup_steps={self.size.warmup_steps}",
        ]
        self._launch(
            f"pre-training {RECIPE} on {RANKS} processes, ZeRO 2",
            str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(RANKS),
            "--master_port", str(free_port()), "--log_level", "warning",
            "launchers/pretrain.py", "--recipe", RECIPE, "--run-dir", str(self.run), "--set", *overrides,
            DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // RANKS)),
        )  # fmt: skip

    def evaluate(self, name: str) -> dict[str, Any]:
        """Zero-shot and linear probe on the test patients of one set: protocol -> report."""
        result = self.run / f"scores_{name}.json"
        self._launch(
            f"evaluating on held-out patients of {name}", sys.executable, "launchers/evaluate.py",
            "--run-dir", str(self.run), "--data", str(self.manifests[name]),
            "--protocol", "zero_shot", "linear_probe", "--json", str(result),
        )  # fmt: skip
        reports: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return reports

    def _launch(self, title: str, *command: str, **environment: str) -> None:
        """Run one program from the repository root, its output going straight to the screen."""
        self.console.rule(f"[bold]{title}", align="left")
        program = next(Path(part).name for part in command if part.endswith(".py"))
        done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, check=False)
        if done.returncode:
            raise StepFailedError(program, done.returncode)


def free_port() -> int:
    """A port of this machine that nobody uses, since another run may hold DeepSpeed's usual one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_wait_fraction(run: Path) -> float:
    """Median over the logged intervals of the share of step time that was spent waiting for data."""
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return statistics.median(event.value for event in events.Scalars("time/data_wait_fraction"))


def auc(name: str, report: dict[str, Any], wall_s: float) -> Figure:
    """The macro AUC of one report, with its interval by patient in the note."""
    macro = report["macro"]
    known = macro["value"] is not None and macro["low"] is not None
    interval = f"95 % interval {macro['low']:.3f} to {macro['high']:.3f}" if known else "one class only"
    value = macro["value"] if macro["value"] is not None else math.nan
    return figure(name, value, seeds=(SEED,), threads=RANKS, wall_s=wall_s, note=interval)


def run_demo(demo: Demo) -> list[Figure]:
    """All steps; the figures in the order they are printed."""
    started = time.perf_counter()
    shutil.rmtree(demo.run, ignore_errors=True)
    demo.run.mkdir(parents=True)
    demo.pack()
    demo.pretrain()
    figures = []
    for name in demo.manifests:
        begun = time.perf_counter()
        reports = demo.evaluate(name)
        took = time.perf_counter() - begun
        figures.append(auc(f"demo.{name}_zero_shot_auc", reports["zero_shot"], took))
        figures.append(auc(f"demo.{name}_probe_auc", reports["linear_probe"], took))
    seconds = time.perf_counter() - started
    common: dict[str, Any] = {"seeds": (SEED,), "threads": RANKS, "wall_s": seconds}
    figures.append(figure("demo.data_wait_fraction", data_wait_fraction(demo.run), **common))
    figures.append(figure("demo.seconds", seconds, **common))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ci/demo.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see every part move; no bar is judged")
    parser.add_argument("--run-dir", type=Path, default=RUN, help="emptied first (default: runs/demo)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    demo = Demo(run=options.run_dir.resolve(), size=QUICK if options.quick else Size(), console=console)
    try:
        if demo.run.exists() and not (demo.run / "shards").is_dir() and any(demo.run.iterdir()):
            raise ConfigError(f"--run-dir {demo.run} holds something else than a demo; name an empty or new folder")
        figures = run_demo(demo)
        if options.quick:
            figures = [replace(one, holds=None, note=f"quick; {one.note}".rstrip("; ")) for one in figures]
        console.rule("[bold]results", align="left")
        print_table(figures, f"{RECIPE} on phantoms and NIH ChestX-ray14, held-out patients", console)
        write_json(figures, demo.run / "summary.json")
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console.print(f"figures: {demo.run}/summary.json", soft_wrap=True)
    console.print(f"curves and pictures: .venv/bin/tensorboard --logdir {demo.run}", soft_wrap=True)
    missed = [one.id for one in figures if one.holds is False]
    if missed:
        console.print(f"[bold red]bar missed:[/bold red] {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
