"""The programs of one learning experiment, run as a user runs them: pack phantoms, pre-train, evaluate."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.bench.figure import REPOSITORY
from ci.demo import RANKS, Size, free_port
from configs.schema import TrainConfig
from shards.errors import ConfigError

Reports = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything of one seed, under `folder`. The seed is the phantom's, the weights' and the order's."""

    folder: Path
    seed: int
    size: Size

    @property
    def manifest(self) -> Path:
        """Of the phantoms that `pack` makes."""
        return self.folder / "shards" / "manifest.json"

    def pack(self, difficulty: str, *flags: str, source: str = "phantom") -> None:
        """Phantoms of one difficulty; `flags` are further arguments of pack.py."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._launch(
            [sys.executable, "launchers/pack.py", "--source", source, "--difficulty", difficulty, *flags,
             "--seed", str(self.seed), "--samples", ",".join(map(str, self.size.samples)),
             "--output", str(self.manifest.parent), "--workers", str(RANKS)],
        )  # fmt: skip

    def overrides(self, *more: str) -> list[str]:
        """What makes a recipe this experiment's run."""
        return [
            f"data.train={self.manifest}",
            f"seed={self.seed}",
            f"trainer.steps={self.size.steps}",
            f"trainer.evaluate_every={self.size.steps}",
            f"optim.warmup_steps={self.size.warmup_steps}",
            *more,
        ]

    def pretrain(self, recipe: str, overrides: Sequence[str], run: str = "run") -> float:
        """Train on RANKS processes into `folder / run`; returns wall seconds."""
        started = time.perf_counter()
        self._launch(
            [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(RANKS),
             "--master_port", str(free_port()), "launchers/pretrain.py",
             "--recipe", recipe, "--run-dir", str(self.folder / run), "--set", *overrides],
            DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
        )  # fmt: skip
        return time.perf_counter() - started

    def evaluate(self, protocols: Sequence[str], run: str = "run", flags: Sequence[str] = ()) -> Reports:
        """What evaluate.py, with further `flags`, says of a run on the test split: protocol -> its report."""
        target = self.folder / run / "scores.json"
        self._launch(
            [sys.executable, "launchers/evaluate.py", "--run-dir", str(self.folder / run), "--protocol", *protocols,
             "--json", str(target), *flags],
        )  # fmt: skip
        reports: Reports = json.loads(target.read_text("utf-8"))
        return reports

    def _launch(self, command: list[str], **environment: str) -> None:
        """Run one program from the repository root, its output in a log. Raises ConfigError with the log's end."""
        log = self.folder / "log.txt"
        with open(log, "ab") as output:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                check=False,
            )
        if done.returncode:
            end = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            program = next(part for part in command if part.endswith(".py"))
            raise ConfigError(f"{program} ended with {done.returncode}: {''.join(end)}; see {log}")


def processor_seconds(of: Callable[[], object]) -> float:
    """What the programs that `of` runs take of each rank's core, which others at work on the machine do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    of()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / RANKS


def kept_row(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished run of the same settings, else None."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.pop("settings", None) == settings else None


def keep_row(path: Path, figures: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Keep a run's figures for `kept_row`."""
    path.write_text(json.dumps({**figures, "settings": settings}, indent=1), "utf-8")


def settings_of(config: TrainConfig, generator: str) -> dict[str, Any]:
    """What decides what a run shows, as JSON reads it back."""
    found: dict[str, Any] = json.loads(json.dumps({"generator": generator, **config.identity()}))
    return found


def macro(reports: Reports, protocol: str) -> float:
    """Macro AUC of a report; NaN where no label has both classes."""
    value = reports[protocol]["macro"]["value"]
    return float("nan") if value is None else float(value)
