"""Every fault that a run must survive, done to real runs on this machine: what came of it, and after how many seconds.

Each fault breaks a run of `tiny:clip` started by launchers/restart.py (and by launchers/ray_pretrain.py), at a moment
drawn from a seed. Only processes that the bench started are hurt. The table, a page and two pictures are written to
runs/bench_faults.
"""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from rich.console import Console

from ci.bench import faults_report
from ci.bench.fault_proxy import FaultProxy, Plan
from ci.bench.faults_run import Broken, Outcome, alone, family, kill, ranks_of, with_suppressed
from ci.bench.figure import REPOSITORY, Figure, figure
from ci.bench.s3_server import S3Server
from core.checkpoint_files import defect
from shards.errors import RoentgenError

DESCRIPTION = "kills, hangs, stops, bad checkpoints, stores and samples done to real runs: what came of it, in how long"

REPORT = REPOSITORY / "runs" / "bench_faults"
STEPS, SAVE_EVERY = 24, 4
KILLS = {"quick": ("one", "all"), "full": ("one", "all") * 5}
RAY_KILLS = {"quick": (), "full": ("one", "all", "head") * 3 + ("one",)}
GOODPUT_S = {"quick": 0.0, "full": 1800.0}
FAULT_EVERY_S = 180.0
SAVED_WITHIN_S = 25.0
SEED = 0


def run(quick: bool) -> list[Figure]:
    """All faults in turn; those that could not be brought about are outcomes, too."""
    began, size = time.perf_counter(), "quick" if quick else "full"
    console = Console(stderr=True)
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        console.print(f"{'ok  ' if outcome.survived else 'FAIL'} {outcome.fault}: {outcome.text}", highlight=False)

    def attempt(fault: str, scene: Callable[[], Outcome]) -> None:
        try:
            tell(scene())
        except (RoentgenError, OSError, psutil.Error, IndexError) as error:  # it stood, or had ended before it was hurt
            tell(Outcome(fault=fault, survived=False, text=f"could not be brought about: {error}"))

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        pack = ["launchers/pack.py", "--source", "phantom", "--samples", "96,12,12", "--size", "48"]
        alone([*pack, "--output", str(root / "set")])
        base = Broken(
            folder=root / "unbroken", manifest=str(root / "set" / "manifest.json"), steps=STEPS, save_every=SAVE_EVERY
        )
        if base.finish(0) != 0:
            raise RoentgenError("the unbroken run did not end well; without it nothing can be compared")
        unbroken = base.weights()
        for place, who in enumerate(KILLS[size]):
            broken = replace(base, folder=root / f"kill-{place}")
            attempt(f"SIGKILL of {who}", lambda b=broken, w=who, p=place: _kill(b, w, p, unbroken))  # type: ignore[misc]
        for place, who in enumerate(RAY_KILLS[size]):
            broken = replace(base, folder=root / f"ray-{place}", ray=True)
            attempt(f"SIGKILL of {who} (Ray)", lambda b=broken, w=who, p=place: _kill(b, w, 100 + p, unbroken))  # type: ignore[misc]
        kills = list(outcomes)
        scenes: dict[str, Callable[[Broken], Outcome]] = {
            "a rank that is stopped": lambda b: _hang(b, unbroken),
            "SIGTERM to one rank": lambda b: _stop(b, "one", unbroken),
            "SIGTERM to restart.py": lambda b: _stop(b, "runner", unbroken),
            "newest checkpoint cut short, `latest` nowhere": lambda b: _bad_checkpoint(b, base, unbroken),
            "disk full at every save": lambda b: _full_disk(b, base, unbroken),
            "poison samples above the limit": lambda b: _poison(b, root, limit=0.0),
            "poison samples below the limit": lambda b: _poison(b, root, limit=0.5),
            "loss not finite": _not_finite,
            "S3: a fifth of all requests fails": lambda b: _bad_store(b, root, base, Plan(rate=0.2, stall_s=2.0)),
        }
        for place, (fault, scene) in enumerate(scenes.items()):
            broken = replace(base, folder=root / f"scene-{place}")
            attempt(fault, lambda s=scene, b=broken: s(b))  # type: ignore[misc]
        long = _goodput(base, root, GOODPUT_S[size]) if GOODPUT_S[size] else None
        ray_overhead = None if quick else _ray_overhead(base, root)
        figures = _figures(kills, outcomes, long or base, ray_overhead, quick, time.perf_counter() - began)
        faults_report.write(REPORT, outcomes, figures, (long or base).goodput()[1])
        console.print(f"report in {REPORT}", highlight=False)
    return figures


def _kill(broken: Broken, who: str, seed: int, unbroken: str) -> Outcome:
    return kill(broken, who, random.Random(SEED + seed), unbroken=unbroken)


def _hang(broken: Broken, unbroken: str) -> Outcome:
    """SIGSTOP: nothing ends, nothing moves. The others notice, and are started again with it."""
    limit_s = 8.0
    broken = replace(broken, overrides=(f"trainer.hang_after_s={limit_s}",))
    with broken.running() as process:
        broken.wait_for_step(STEPS // 2, process)
        at = time.time()
        ranks_of(process)[-1].send_signal(signal.SIGSTOP)
        code = int(process.wait(1200))
    hang, *_ = broken.events("hang") or [{"missing": "no event"}]
    same = broken.weights() == unbroken
    return Outcome(
        fault=f"a rank that is stopped (limit {limit_s:g} s)",
        survived=code == 0 and same and isinstance(hang["missing"], list),
        identical=same,
        lost_steps=broken.lost_steps(),
        text=f"ended with {code}, named {hang['missing']}",
        **broken.seconds_after(at),  # type: ignore[arg-type]
    )


def _stop(broken: Broken, who: str, unbroken: str) -> Outcome:
    with broken.running() as process:
        broken.wait_for_step(STEPS // 3, process)
        began, everybody = time.monotonic(), family(process)
        target = process if who == "runner" else ranks_of(process)[-1]
        target.send_signal(signal.SIGTERM)
        code = int(process.wait(600))
        seconds = time.monotonic() - began
        orphans = [each for each in everybody[1:] if each.is_running()]
    saved = [event["step"] for event in broken.events("save")]
    resumed = broken.finish(0)
    same = broken.weights() == unbroken
    good = code == 143 and seconds < SAVED_WITHIN_S and not orphans and resumed == 0 and same and bool(saved)
    return Outcome(
        fault=f"SIGTERM to {'restart.py' if who == 'runner' else 'one rank'}",
        survived=good,
        identical=same,
        lost_steps=broken.lost_steps(),
        text=f"code {code} after {seconds:.1f} s, {len(orphans)} processes left, resumed with {resumed}",
        detected_s=seconds,
    )


def _bad_checkpoint(broken: Broken, base: Broken, unbroken: str) -> Outcome:
    shutil.copytree(base.folder, broken.folder)
    newest = broken.folder / "checkpoints" / f"step-{STEPS}" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (broken.folder / "latest").write_text("step-999999\n")
    code = broken.finish(0)
    said = {event["event"] for event in broken.events()} & {"checkpoint_passed_over", "latest_points_nowhere"}
    same = broken.weights() == unbroken
    return Outcome(
        fault="newest checkpoint cut short, `latest` nowhere",
        survived=code == 0 and same and len(said) == 2,
        identical=same,
        lost_steps=SAVE_EVERY,
        text=f"ended with {code}; events {', '.join(sorted(said)) or 'none'}",
    )


def _full_disk(broken: Broken, base: Broken, unbroken: str) -> Outcome:
    """A limit on the size of files stands for a full disk: no checkpoint fits, smaller files do."""
    shutil.copytree(base.folder, broken.folder)
    shutil.rmtree(broken.folder / "checkpoints" / f"step-{STEPS}")
    before = STEPS - SAVE_EVERY
    (broken.folder / "latest").write_text(f"step-{before}\n")
    size = (broken.folder / "checkpoints" / f"step-{before}" / "weights.safetensors").stat().st_size
    code = replace(broken, file_bytes=size // 2).finish(0)
    whole = defect(broken.folder / "checkpoints" / f"step-{before}") is None
    failed, resumed = len(broken.events("save_failed")), broken.finish(0)
    same = broken.weights() == unbroken
    return Outcome(
        fault="disk full at every save",
        survived=code == 3 and whole and failed > 0 and resumed == 0 and same,
        identical=same,
        text=f"code {code}, {failed} events, checkpoint before {'whole' if whole else 'DAMAGED'}, then {resumed}",
    )


def _poison(broken: Broken, root: Path, *, limit: float) -> Outcome:
    """Members of one shard changed behind the manifest's back."""
    poisoned = root / f"poisoned-{limit}"
    shutil.copytree(root / "set", poisoned)
    tar = sorted(poisoned.glob("train*.tar"))[0]
    body = bytearray(tar.read_bytes())
    for place in range(len(body) // 4, len(body) // 2, 512):
        body[place] ^= 0xFF
    tar.write_bytes(body)
    code = replace(broken, manifest=str(poisoned / "manifest.json"), overrides=(f"data.max_skip_rate={limit}",)).finish(
        0
    )
    skipped = len(broken.events("skip"))
    wanted = 3 if limit == 0.0 else 0
    return Outcome(
        fault=f"poison samples {'above' if limit == 0.0 else 'below'} the limit",
        survived=code == wanted and skipped > 0,
        text=f"code {code}, {skipped} skips counted",
    )


def _not_finite(broken: Broken) -> Outcome:
    code = replace(broken, overrides=("optim.learning_rate=1e30", "optim.warmup_steps=0")).finish(0)
    errors = [event["message"] for event in broken.events("error")]
    named = any("launchers/replay.py --step" in message for message in errors)
    return Outcome(
        fault="loss not finite",
        survived=code == 4 and named,
        text=f"code {code}, replay command {'named' if named else 'NOT named'}",
    )


def _bad_store(broken: Broken, root: Path, base: Broken, plan: Plan) -> Outcome:
    """Data from a bucket behind a proxy that fails on purpose; every step's samples must be those of the folder."""
    (root / "buckets").mkdir()
    with S3Server("nanio", root / "buckets") as server, FaultProxy(server.endpoint) as proxy:
        server.create_bucket("set")
        for path in (root / "set").iterdir():
            if path.is_file():
                shutil.copy(path, root / "buckets" / "set" / path.name)
        proxy.plan(plan)
        broken = replace(
            broken, manifest="s3://set/manifest.json", environment=server.environment(proxy.endpoint), steps=STEPS
        )
        code = broken.finish(0)
        faults = sum(proxy.report()["faults"].values())
    same = broken.samples() == base.samples()
    return Outcome(
        fault="S3: a fifth of all requests fails",
        survived=code == 0 and same and faults > 0,
        text=f"code {code}, {faults} requests failed, samples of all steps {'the same' if same else 'DIFFER'}",
    )


def _goodput(base: Broken, root: Path, seconds: float) -> Broken:
    """A long run with a rank killed every `FAULT_EVERY_S` on average, stopped after `seconds`."""
    broken = replace(base, folder=root / "goodput", steps=10**6, save_every=max(1, int(15 / base.step_s())))
    dice = random.Random(SEED + 1000)
    with broken.running(restarts=1000) as process:
        broken.wait_for_step(1, process)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, dice.expovariate(1 / FAULT_EVERY_S)))
            if ranks := ranks_of(process):
                victim = dice.choice(ranks)
                with_suppressed(lambda victim=victim: victim.send_signal(signal.SIGKILL))  # type: ignore[misc]
        process.send_signal(signal.SIGTERM)
        process.wait(600)
    return broken


def _ray_overhead(base: Broken, root: Path) -> float:
    """Seconds of a step under Ray over those of the plain launcher, in turns."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(3):
        for ray in (False, True):
            broken = replace(base, folder=root / f"overhead-{turn}-{ray}", ray=ray, steps=200, save_every=200)
            broken.finish(0)
            seconds[ray].append(broken.step_s())
    return statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1.0


def _figures(
    kills: Sequence[Outcome],
    outcomes: Sequence[Outcome],
    long: Broken,
    ray_overhead: float | None,
    quick: bool,
    wall_s: float,
) -> list[Figure]:
    survived = [each for each in kills if each.survived and each.lost_steps <= SAVE_EVERY]
    identical = [each for each in kills if each.identical]
    first = [each.first_step_s for each in outcomes if each.first_step_s is not None]
    share, spans = long.goodput()
    saving = sum(seconds for _, seconds, kind in spans if kind == "save")
    steps = sum(seconds for _, seconds, kind in spans if kind in ("step", "again"))
    note = f"{len(kills)} kills of runs of {STEPS} steps on 2 ranks, saved every {SAVE_EVERY}"
    seldom = f"{saving:.1f} s of saving, every {long.save_every} steps of {long.step_s():.3g} s"
    found = [
        figure("faults.kills_survived", len(survived), repeats=len(kills), threads=2, wall_s=wall_s, note=note),
        figure("faults.bit_identical", len(identical) / max(1, len(kills)), repeats=len(kills), threads=2),
        figure(
            "faults.others_survived",
            sum(each.survived for each in outcomes[len(kills) :]),
            repeats=len(outcomes) - len(kills), unit="faults", better="higher",
            note="; ".join(each.fault for each in outcomes[len(kills) :] if not each.survived),
        ),
        figure("faults.checkpoint_overhead", saving / max(steps, 1e-9), threads=2, note=seldom),
    ]  # fmt: skip
    if first:
        worst = f"slowest {max(first):.1f} s"
        found.append(figure("faults.fault_to_first_step_s", statistics.median(first), repeats=len(first), note=worst))
    if not quick:
        found.append(figure("faults.goodput", share, note=f"{long.lost_steps()} steps done again"))
    if ray_overhead is not None:
        found.append(figure("faults.ray_overhead", ray_overhead, repeats=3, threads=2))
    return found
