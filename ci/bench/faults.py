"""Every fault that a run must survive, done to real runs on this machine: what came of it, and after how many seconds.

Each fault breaks a run of `tiny:clip` started by launchers/restart.py (and by launchers/ray_pretrain.py), at a moment
drawn from a seed. Only processes that the bench started are hurt. The table, a page and two pictures are written to
runs/bench_faults.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console

from ci.bench import faults_report
from ci.bench import faults_scenes as scenes
from ci.bench.fault_proxy import Plan
from ci.bench.faults_run import Broken, Outcome, alone
from ci.bench.figure import REPOSITORY, Figure, figure
from shards.errors import RoentgenError

DESCRIPTION = "kills, hangs, stops, resizing, bad checkpoints, stores and samples done to real runs (80 minutes)"

REPORT = REPOSITORY / "runs" / "bench_faults"
STEPS, SAVE_EVERY = 24, 4
LONGER_STEPS = 240  # of runs whose store goes away, so that they still read when it does
KILLS = {"quick": ("one", "all"), "full": ("one", "all") * 5}
RAY_KILLS = {"quick": (), "full": ("one", "all", "node", "head") * 2 + ("one", "node")}
OUTAGE_S = {"quick": 20.0, "full": 600.0}
GOODPUT_S, FAULT_EVERY_S, SAVED_EVERY_S = 1800.0, 180.0, 15.0
RAY_TURNS, RAY_STEPS = 5, 400  # of the comparison of steps under Ray
BROKEN_BODIES = ("truncate", "short", "reset_midway", "flip")
MANY = "many"  # folder of the set of 20 small shards
SEED = 0


def run(quick: bool) -> list[Figure]:
    """All faults in turn; those that could not be brought about are outcomes, too."""
    began, size = time.perf_counter(), "quick" if quick else "full"
    console = Console(stderr=True)
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        console.print(f"{'ok  ' if outcome.survived else 'FAIL'} {outcome.fault}: {outcome.text}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        pack = ["launchers/pack.py", "--source", "phantom", "--samples", "96,12,12", "--size", "48"]
        alone([*pack, "--output", str(root / "set")])
        alone([*pack, "--shard-samples", "5", "--output", str(root / MANY)])
        base = Broken(
            folder=root / "unbroken", manifest=str(root / "set" / "manifest.json"), steps=STEPS, save_every=SAVE_EVERY
        )
        longer = replace(base, folder=root / "longer", steps=LONGER_STEPS, save_every=LONGER_STEPS // 8)
        for unbroken in (base, longer):
            if unbroken.finish() != 0:
                raise RoentgenError("the unbroken run did not end well; without it nothing can be compared")
        for place, scene in enumerate((*(kills := _kills(size, base)), *_others(size, base, longer))):
            try:
                tell(scene.play(replace(scene.run, folder=root / f"scene-{place}")))
            except (RoentgenError, OSError, psutil.Error, LookupError, StopIteration) as error:
                # It stood, or had ended before it was hurt.
                tell(Outcome(fault=scene.fault, survived=False, text=f"could not be brought about: {error}"))
        long, ray_overhead = base, None
        if not quick:
            dice = random.Random(SEED + 1000)
            endless = replace(base, folder=root / "goodput", steps=10**6, save_every=int(SAVED_EVERY_S / base.step_s()))
            long = scenes.long_run(endless, GOODPUT_S, FAULT_EVERY_S, dice)
            try:
                seconds = scenes.step_seconds(base, root, ("restart.py", "ray"), RAY_TURNS, RAY_STEPS)
                ray_overhead = statistics.median(seconds["ray"]) / statistics.median(seconds["restart.py"]) - 1.0
            except RoentgenError as error:  # an hour's outcomes are not lost for it
                tell(Outcome(fault="nothing but steps under Ray", survived=False, text=str(error)))
        figures = _figures(outcomes[: len(kills)], outcomes, long, ray_overhead, quick, time.perf_counter() - began)
        faults_report.write(REPORT, outcomes, figures, long.goodput()[1])
        console.print(f"report in {REPORT}", highlight=False)
    return figures


class Scene(NamedTuple):
    """A fault, the run that it befalls, which gets a folder of its own, and what brings it about."""

    fault: str
    run: Broken
    play: Callable[[Broken], Outcome]


def _kills(size: str, base: Broken) -> list[Scene]:
    unbroken = base.weights()
    found: list[Scene] = []
    for by, victims in (("restart.py", KILLS[size]), ("ray", RAY_KILLS[size])):
        for who in victims:
            dice = random.Random(SEED + len(found))
            play = partial(scenes.kill_node, dice=dice, unbroken=unbroken)
            if who != "node":
                play = partial(scenes.kill, who=who, dice=dice, unbroken=unbroken)
            found.append(Scene(f"SIGKILL of {scenes.VICTIMS[who]} ({by})", replace(base, by=by), play))
    return found


def _others(size: str, base: Broken, longer: Broken) -> list[Scene]:
    unbroken, away_s = base.weights(), OUTAGE_S[size]
    stops = [("restart.py", "one"), ("restart.py", "starter"), ("restart.py", "group"), ("deepspeed", "group")]
    stops += [("ray", "starter")] if size == "full" else []
    fifth = partial(
        scenes.bad_store, base=base, plan=Plan(rate=0.2, stall_s=2.0), fault="S3: a fifth of requests fails"
    )
    changed = Plan(rate=0.2, kinds=BROKEN_BODIES, methods=("GET",), match="/set/train")
    bodies = partial(scenes.bad_store, base=base, plan=changed, fault="S3: bodies cut and changed")
    wait, give_up = (partial(scenes.outage, base=longer, seconds=away_s, limit_s=limit_s) for limit_s in (900.0, 5.0))
    return [
        Scene("a rank that is stopped", base, partial(scenes.hang, unbroken=unbroken)),
        *(
            Scene(f"SIGTERM to {who} ({by})", replace(base, by=by), partial(scenes.stop, who=who, unbroken=unbroken))
            for by, who in stops
        ),
        *([Scene("4, 2, 3, 4 workers (Ray)", base, partial(scenes.resize, fixed=base))] if size == "full" else []),
        Scene("newest checkpoint cut short", base, partial(scenes.bad_checkpoint, base=base, unbroken=unbroken)),
        Scene("disk full at every save", base, partial(scenes.full_disk, base=base, unbroken=unbroken)),
        *_poisons(base),
        Scene("loss not finite", base, scenes.not_finite),
        Scene("S3: a fifth of requests fails", base, fifth),
        Scene("S3: bodies cut and changed", base, bodies),
        Scene("S3: credentials end and are renewed", longer, partial(scenes.renewed_credentials, base=longer)),
        Scene(f"S3: away for {away_s:g} s", longer, wait),
        Scene("S3: away for longer than the limit", longer, give_up),
    ]


def _poisons(base: Broken) -> list[Scene]:
    """A quarter of the only shard, and all of one of 20, each with a limit above and one below what it comes to."""
    twenty = replace(base, manifest=str(Path(base.manifest).parent.with_name(MANY) / "manifest.json"))
    whole = partial(scenes.poison, what="poison shard, 1 of 20", part=(0.0, 1.0))
    some = partial(scenes.poison, what="poison samples", part=(0.25, 0.5))
    return [
        Scene("poison samples above the limit", base, partial(some, limit=0.0, code=3)),
        Scene("poison samples below the limit", base, partial(some, limit=0.5, code=0)),
        Scene("poison shard, 1 of 20, above the limit", twenty, partial(whole, limit=0.001, code=3)),
        Scene("poison shard, 1 of 20, below the limit", twenty, partial(whole, limit=0.2, code=0)),
    ]


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
        found.append(figure("faults.ray_overhead", ray_overhead, repeats=RAY_TURNS, threads=2))
    return found
