"""Kill a training run with SIGKILL at a random instant, start it again, compare the final weights bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ci.bench.figure import REPOSITORY, Figure, figure

DESCRIPTION = (
    "SIGKILL at a random instant, 1 and 2 ranks, ZeRO 0/1/2/3: are the final weights those of the unbroken run?"
)

STEPS, SAVE_EVERY = 20, 3
KILLS_PER_CELL = 3
TIMEOUT_S = 300.0
CELLS = tuple((ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One kind of run. Even stages train in bf16, odd ones in fp32."""

    ranks: int
    zero_stage: int
    manifest: Path

    def start(self, run_dir: Path) -> list[subprocess.Popen[bytes]]:
        """The ranks, started the way a launcher starts them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        precision = "bf16" if self.zero_stage % 2 == 0 else "fp32"
        command = [
            sys.executable, "launchers/pretrain.py", "--recipe", "tiny:clip", "--run-dir", str(run_dir), "--set",
            f"data.train={self.manifest}", f"trainer.steps={STEPS}", f"trainer.save_every={SAVE_EVERY}",
            f"engine.zero_stage={self.zero_stage}", f"engine.precision={precision}",
        ]  # fmt: skip
        ranks = []
        for rank in range(self.ranks):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            log = open(run_dir.with_suffix(f".{rank}.log"), "ab")  # noqa: SIM115  (closed with the process)
            ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
            log.close()
        return ranks


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    deadline = time.monotonic() + TIMEOUT_S
    try:
        return [rank.wait(timeout=max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _steps_begun(run_dir: Path) -> int:
    """Steps that this run directory has seen, over all its starts."""
    try:
        lines = (run_dir / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return len({json.loads(line)["step"] for line in lines if '"event": "batch"' in line and line.endswith("}")})


def _final_weights(run_dir: Path) -> str:
    path = run_dir / "checkpoints" / f"step-{STEPS}" / "weights.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no final checkpoint"


def _kill_and_resume(cell: Cell, run_dir: Path, seed: int) -> str:
    """Kill one rank, or all at once, at a random instant of a random step; go on; hash of the final weights."""
    dice = random.Random(seed)
    at_step, all_ranks = dice.randrange(1, STEPS), dice.random() < 0.5
    ranks = cell.start(run_dir)
    deadline = time.monotonic() + TIMEOUT_S
    while _steps_begun(run_dir) < at_step and all(rank.poll() is None for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    time.sleep(dice.random() * 0.1)
    for rank in ranks if all_ranks else [dice.choice(ranks)]:
        rank.send_signal(signal.SIGKILL)
    _wait(ranks)  # the others notice that a peer is gone
    if any(code != 0 for code in _wait(cell.start(run_dir))):
        return "the resumed run failed"
    return _final_weights(run_dir)


def run(quick: bool) -> list[Figure]:
    """Every cell: one unbroken run, then several killed ones."""
    started = time.perf_counter()
    console = Console(stderr=True)
    cells, kills = (((2, 2),), 1) if quick else (CELLS, KILLS_PER_CELL)
    same, total, failed = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        root = Path(folder)
        subprocess.run(
            [sys.executable, "launchers/pack.py", "--source", "phantom", "--samples", "96,12,12", "--size", "48",
             "--output", str(root / "set")],
            cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for ranks, stage in cells:
            cell = Cell(ranks=ranks, zero_stage=stage, manifest=root / "set" / "manifest.json")
            unbroken = root / f"unbroken-{ranks}-{stage}"
            codes = _wait(cell.start(unbroken))
            assert set(codes) == {0}, f"{unbroken}: the unbroken run ended with {codes}"
            wanted = _final_weights(unbroken)
            for kill in range(kills):
                name = f"{ranks} ranks, ZeRO {stage}, kill {kill}"
                found = _kill_and_resume(
                    cell, root / f"killed-{ranks}-{stage}-{kill}", seed=1000 * ranks + 10 * stage + kill
                )
                total += 1
                same += found == wanted
                if found != wanted:
                    failed.append(f"{name}: {found[:20]}")
                console.print(f"{name}: {'identical' if found == wanted else found}", highlight=False)
    note = "; ".join(failed) if failed else f"{total} runs, {STEPS} steps, saved every {SAVE_EVERY}"
    wall_s = time.perf_counter() - started
    return [figure("restart.bit_identical", same / total, repeats=kills, threads=1, wall_s=wall_s, note=note)]
