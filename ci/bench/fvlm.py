"""Does contrast by anatomy find diseases that whole reports do not teach? Three seeds of CT phantoms, with ablations.

Phantoms of `standard` difficulty, 90 % of organs normal. Every run sees the same volumes in the same order for the same
number of steps; processor seconds stand beside. `no normal correction` is fVLM with each study its own only positive.
The judged runs come first and are printed before variants, and other shares of normal organs, start; finished runs of
the same settings are kept, so an experiment that was cut off goes on: delete runs/bench_fvlm after a change of code.

By the rules for learning experiments: every run is printed; the same encoder taught by labels alone stands beside.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from ci.bench.figure import LOG_COLUMNS, REPOSITORY, Figure, commit, figure
from ci.bench.learning import Experiment, keep_row, kept_row, macro, processor_seconds, settings_of
from ci.demo import RANKS, Size
from configs import schema
from shards.ingest.phantom_ct import generator_hash

DESCRIPTION = "fVLM against CLIP on whole reports and its own ablations: zero-shot by anatomy on CT phantoms (hours)"

SEEDS = (0, 1, 2)
DIFFICULTY, NORMAL = "standard", 0.9
OTHER_NORMALS = (0.8, 0.95)
FULL = Size(samples=(1200, 120, 400), steps=240, warmup_steps=30)
QUICK = Size(samples=(96, 12, 48), steps=4, warmup_steps=1, log_every=1)
FOLDER = REPOSITORY / "runs" / "bench_fvlm"
OURS, CLIP, UNCORRECTED = "fvlm", "clip on whole reports", "no normal correction"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A recipe, the protocol that judges it, and what is changed of it."""

    recipe: str
    protocol: str
    change: tuple[str, ...] = ()


JUDGED = {
    OURS: Contestant(recipe="ct:fvlm_tiny", protocol="anatomy"),
    CLIP: Contestant(recipe="ct:clip_tiny", protocol="zero_shot"),
    UNCORRECTED: Contestant(recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.positives=study",)),
}
NO_SOFT_TARGETS = "no soft targets"
VARIANTS = {
    NO_SOFT_TARGETS: Contestant(recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.soft=none",)),
    "equal texts alone as positives": Contestant(
        recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.positives=text",)
    ),
    "soft targets of a peer": Contestant(
        recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.soft=peer", "task.soft_weight=0.5")
    ),
    "pooling as in the paper": Contestant(
        recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.pool.weighting=flag", "task.pool.normalised=false")
    ),
    "Gaussians": Contestant(
        recipe="ct:fvlm_tiny", protocol="anatomy", change=("task.similarity=wasserstein", "task.scale_init=7")
    ),
    "labels alone": Contestant(recipe="ct:supervised_tiny", protocol="supervised"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run showed on held-out patients; `normal`: share of normal organs in its phantoms."""

    contestant: str
    seed: int
    normal: float
    macro: float  # AUC over diseases
    worst: float  # AUC of the disease found worst
    worst_name: str
    coverage: float
    train_s: float  # processor time of each rank
    commit: str  # that it was run at


def run(quick: bool) -> list[Figure]:
    """All seeds and variants. Leaves shards and run directories under runs/bench_fvlm."""
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False)
    size, seeds = (QUICK, SEEDS[:1]) if quick else (FULL, SEEDS)

    def made(name: str, seed: int, normal: float = NORMAL) -> Row:
        row = run_one(name, seed, normal, size)
        console.print(
            f"{normal:.0%} normal, seed {seed}, {name}: macro AUC {row.macro:.3f}, worst {row.worst:.3f} "
            f"({row.worst_name}), trained in {row.train_s:.0f} s of each rank"
        )
        return row

    rows = [made(name, seed) for seed in seeds for name in JUDGED]
    figures = summary(rows, time.perf_counter() - started)
    if not quick:
        print_rows(rows)
        rows += [made(name, seed) for seed in seeds for name in VARIANTS]
        figures.append(soft_targets(rows, time.perf_counter() - started))
        rows += [made(name, seed, normal) for normal in OTHER_NORMALS for seed in seeds for name in JUDGED]
    print_rows(rows)
    return figures


def run_one(name: str, seed: int, normal: float, size: Size) -> Row:
    """Train and evaluate one run, or read what it showed when these settings were run before."""
    contestant = (JUDGED | VARIANTS)[name]
    experiment = Experiment(folder=FOLDER / f"{size.steps}-steps-{normal:g}-normal" / str(seed), seed=seed, size=size)
    run_name = name.replace(" ", "_")
    kept = experiment.folder / run_name / "row.json"
    overrides = experiment.overrides("trainer.evaluate_every=None", *contestant.change)
    config = schema.apply_overrides(schema.load_recipe(contestant.recipe), overrides)
    settings = settings_of(config, generator_hash())
    found = kept_row(kept, settings)
    if found is not None:
        return Row(**found)
    if not experiment.manifest.exists():
        experiment.pack(DIFFICULTY, "--normal", str(normal), source="phantom_ct")
    shutil.rmtree(experiment.folder / run_name, ignore_errors=True)
    train_s = processor_seconds(lambda: experiment.pretrain(contestant.recipe, overrides, run_name))
    reports = experiment.evaluate([contestant.protocol], run_name)
    report = reports[contestant.protocol]
    areas = {label: area["value"] for label, area in report["labels"].items() if area["value"] is not None}
    worst_name = min(areas, key=areas.__getitem__, default="none")
    row = Row(
        contestant=name, seed=seed, normal=normal, macro=macro(reports, contestant.protocol),
        worst=areas.get(worst_name, math.nan), worst_name=worst_name,
        coverage=statistics.fmean(report.get("coverage", {"all": 1.0}).values()), train_s=train_s, commit=commit(),
    )  # fmt: skip
    keep_row(kept, asdict(row), settings)
    return row


def summary(rows: Sequence[Row], wall_s: float) -> list[Figure]:
    """The figures that are judged."""
    of = {name: {row.seed: row for row in rows if row.contestant == name} for name in JUDGED}
    ours = of[OURS]
    make = partial(figure, repeats=len(ours), seeds=tuple(ours), threads=RANKS, wall_s=wall_s)
    at = ", ".join(sorted({row.commit for row in rows}))

    def over(peer: str) -> tuple[float, str]:
        """In the seed where least was gained."""
        gains = [row.macro - of[peer][seed].macro for seed, row in ours.items()]
        return min(gains), f"{_each(gains)}, the lowest counts; mean {statistics.fmean(gains):+.3f}"

    mean = statistics.fmean(row.macro for row in ours.values())
    seconds = "; ".join(f"{name} {statistics.fmean(row.train_s for row in of[name].values()):.0f} s" for name in JUDGED)
    figures = [
        make("fvlm.zero_shot_auc", mean,
             note=f"{_each([row.macro for row in ours.values()])}; processor time of a rank: {seconds}; runs of {at}"),
    ]  # fmt: skip
    for name, peer in (("fvlm.minus_clip", CLIP), ("fvlm.minus_no_normal_correction", UNCORRECTED)):
        gain, note = over(peer)
        theirs = statistics.fmean(row.macro for row in of[peer].values())
        figures.append(make(name, gain, ours=mean, peer=theirs, peer_name=peer, note=note))
    return figures


def soft_targets(rows: Sequence[Row], wall_s: float) -> Figure:
    """What they gain on the mean of the seeds."""
    with_them = [row.macro for row in rows if row.contestant == OURS]
    without = [row.macro for row in rows if row.contestant == NO_SOFT_TARGETS]
    ours, peer = statistics.fmean(with_them), statistics.fmean(without)
    note = _each([one - other for one, other in zip(with_them, without, strict=True)])
    return figure(
        "fvlm.minus_no_soft_targets", ours - peer, ours=ours, peer=peer, peer_name=NO_SOFT_TARGETS, note=note,
        seeds=SEEDS, repeats=len(SEEDS), threads=RANKS, wall_s=wall_s,
    )  # fmt: skip


def _each(values: Sequence[float]) -> str:
    return "seeds " + ", ".join(f"{value:.3f}" for value in values)


def print_rows(rows: Sequence[Row]) -> None:
    """Every run, contestant by contestant."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    table = Table(title="every run", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("contestant", "seed", "normal", "macro AUC", "worst", "disease", "coverage", "seconds", "commit"):
        table.add_column(heading, justify="left" if heading in ("contestant", "disease") else "right")
    order = list(JUDGED | VARIANTS)
    for row in sorted(rows, key=lambda row: (row.normal, order.index(row.contestant), row.seed)):
        table.add_row(
            row.contestant, str(row.seed), f"{row.normal:g}", f"{row.macro:.3f}", f"{row.worst:.3f}", row.worst_name,
            f"{row.coverage:.3f}", f"{row.train_s:.0f}", row.commit,
        )  # fmt: skip
    console.print(table)
