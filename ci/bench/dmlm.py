"""Does D-MLM know when an image is bad, and at what price? Five seeds against CLIP, and a table of its variants.

Phantoms of `standard` difficulty, 20 % of them degraded in graded ways with hedged reports. Every run sees the same
images in the same order for the same number of steps; processor seconds are printed beside, and CLIP is given those of
D-MLM too. A variant changes one thing of the recipe. The judged runs come first and are printed before the variants
start; finished runs of the same settings are kept, so an experiment that was cut off goes on: delete runs/bench_dmlm
after a change of code.

By the rules for learning experiments: every run is printed, normals and abnormals apart; what does not need a
distribution (maximum probability, a fit of it on validation labels) stands beside as the control.
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
from ci.bench.learning import Experiment, Reports, keep_row, kept_row, macro, processor_seconds, settings_of
from ci.demo import QUICK, RANKS, Size
from configs import schema
from shards.ingest.phantom_chest import generator_hash

DESCRIPTION = "D-MLM against CLIP on degraded phantoms: zero-shot, degraded_auc, abstention, variants (hours)"

SEEDS = (0, 1, 2, 3, 4)
FEWER_SEEDS = (0, 1)  # of the variants
DIFFICULTY, DEGRADED_SHARE = "standard", 0.2
PROTOCOLS = ("zero_shot", "uncertainty")
FOLDER = REPOSITORY / "runs" / "bench_dmlm"
CLIP, DMLM, CLIP_LONGER = "clip", "dmlm", "clip, seconds of dmlm"
# Name -> what it changes of chest:dmlm_tiny.
VARIANTS: dict[str, tuple[str, ...]] = {
    "no forecast": ("task.weights.excess=0",),
    "masked views are held to nothing": ("task.weights.kl=0",),
    "masked views by KL": ("task.kl=consistency",),
    "masked views by KL, reversed": ("task.kl=reversed",),
    "W2 contrast": ("task.contrast.similarity=wasserstein", "task.contrast.scale_init=7"),
    "W2 contrast, no forecast": (
        "task.contrast.similarity=wasserstein", "task.contrast.scale_init=7", "task.weights.excess=0",
    ),
    "variances by CSD + sigmoid": ("task.weights.excess=0", "task.weights.variance=1", "task.embedding.logvar_init=-7"),
    "equal reports as positives": ("task.positives=report",),
    "no words or patches predicted": ("task.weights.mlm=0", "task.weights.mim=0"),
    "words and patches in full": ("task.weights.mlm=1", "task.weights.mim=1"),
    "linear log-variances": ("task.embedding.kind=linear",),
    "no samples": ("task.samples=0",),
    "five samples": ("task.samples=5",),
    "structured reports": ("data.report=structured", "data.text_length=200", "task.text.max_length=200"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run showed on held-out patients. AUCs in [0, 1]; areas under risk-coverage curves, lower is better."""

    variant: str
    seed: int
    zero_shot: float
    degraded: float  # AUC of image log-variance, degraded above clean
    degraded_normal: float
    degraded_abnormal: float
    degraded_max_probability: float  # the same by the control
    area_logvar: float
    area_max_probability: float
    area_fitted_probability: float
    area_oracle: float
    logvar_spread: float
    train_s: float  # processor time of each rank
    commit: str  # that it was run at

    @property
    def gain(self) -> float:
        """Area saved by abstaining by log-variance instead of maximum probability."""
        return self.area_max_probability - self.area_logvar


def run(quick: bool) -> list[Figure]:
    """All seeds and variants. Leaves shards and run directories under runs/bench_dmlm."""
    started = time.perf_counter()
    size = QUICK if quick else Size()
    console = Console(stderr=True, highlight=False)

    def made(name: str, recipe: str, change: Sequence[str], seed: int) -> Row:
        row = run_one(name, recipe, change, seed, size)
        console.print(
            f"seed {seed}, {row.variant}: zero-shot {row.zero_shot:.3f}, degraded {row.degraded:.3f}, "
            f"gain {row.gain:.3f}, trained in {row.train_s:.0f} s of each rank"
        )
        return row

    seeds = SEEDS[:1] if quick else SEEDS
    clip = {seed: made(CLIP, "chest:clip_tiny", (), seed) for seed in seeds}
    ours = {seed: made(DMLM, "chest:dmlm_tiny", (), seed) for seed in seeds}
    rows = [*clip.values(), *ours.values()]
    figures = summary(rows, time.perf_counter() - started)
    if not quick:
        print_rows(rows)
        for seed in FEWER_SEEDS:
            longer = round(size.steps * ours[seed].train_s / clip[seed].train_s)
            rows.append(made(CLIP_LONGER, "chest:clip_tiny", (f"trainer.steps={longer}",), seed))
            rows += [made(name, "chest:dmlm_tiny", change, seed) for name, change in VARIANTS.items()]
    print_rows(rows)
    return figures


def summary(rows: Sequence[Row], wall_s: float) -> list[Figure]:
    """The figures that are judged: of D-MLM on all seeds, beside CLIP on the same ones."""
    ours = {row.seed: row for row in rows if row.variant == DMLM}
    clip = {row.seed: row for row in rows if row.variant == CLIP}
    make = partial(figure, repeats=len(ours), seeds=tuple(ours), threads=RANKS, wall_s=wall_s)

    at = sorted({row.commit for row in (*ours.values(), *clip.values())})

    def each(values: Sequence[float]) -> str:
        return "seeds " + ", ".join(f"{value:.3f}" for value in values)

    degraded = [row.degraded for row in ours.values()]
    apart = "; ".join(
        f"{name} {statistics.fmean(getattr(row, f'degraded_{name}') for row in ours.values()):.3f}"
        for name in ("normal", "abnormal")
    )
    control = statistics.fmean(row.degraded_max_probability for row in ours.values())
    less = [row.zero_shot - clip[seed].zero_shot for seed, row in ours.items()]
    gain = [row.gain for row in ours.values()]
    over_fitted = statistics.fmean(row.area_fitted_probability - row.area_logvar for row in ours.values())
    return [
        make("dmlm.degraded_auc", statistics.fmean(degraded), peer=control, peer_name="by max. probability",
             ours=statistics.fmean(degraded), note=f"{each(degraded)}; {apart}; runs of {', '.join(at)}"),
        make("dmlm.degraded_auc_worst_seed", min(degraded)),
        make("dmlm.zero_shot_minus_clip", statistics.fmean(less), peer_name="CLIP, same images and steps",
             ours=statistics.fmean(row.zero_shot for row in ours.values()),
             peer=statistics.fmean(clip[seed].zero_shot for seed in ours),
             note=f"{each(less)}; positives are equal sets of findings here, equal reports in CLIP"),
        make("dmlm.risk_coverage_gain", statistics.fmean(gain), peer_name="max. probability",
             ours=statistics.fmean(row.area_logvar for row in ours.values()),
             peer=statistics.fmean(row.area_max_probability for row in ours.values()),
             note=f"{each(gain)}; over a fit on validation labels {over_fitted:.3f}"),
    ]  # fmt: skip


def run_one(variant: str, recipe: str, change: Sequence[str], seed: int, size: Size) -> Row:
    """Train and evaluate one run, or read what it showed when these settings were run before."""
    experiment = Experiment(folder=FOLDER / f"{size.steps}-steps" / str(seed), seed=seed, size=size)
    name = variant.replace(" ", "_").replace(",", "")
    kept = experiment.folder / name / "row.json"
    overrides = experiment.overrides("trainer.evaluate_every=None", *change)
    config = schema.apply_overrides(schema.load_recipe(recipe), overrides)
    settings = settings_of(config, generator_hash())
    found = kept_row(kept, settings)
    if found is not None:
        return Row(**found)
    if not experiment.manifest.exists():
        experiment.pack(DIFFICULTY, "--degraded", str(DEGRADED_SHARE), "--structured")
    shutil.rmtree(experiment.folder / name, ignore_errors=True)
    train_s = processor_seconds(lambda: experiment.pretrain(recipe, overrides, name))
    row = row_of(variant, seed, experiment.evaluate(PROTOCOLS, name, ("--corruption-studies", "32")), train_s)
    keep_row(kept, asdict(row), settings)
    return row


def row_of(variant: str, seed: int, reports: Reports, train_s: float) -> Row:
    """The figures of a run out of evaluate.py's reports; NaN for those that a task does not have."""
    figures = reports["uncertainty"]["figures"]

    def value(name: str) -> float:
        found = figures.get(name, {}).get("value")
        return math.nan if found is None else float(found)

    return Row(
        variant=variant, seed=seed, zero_shot=macro(reports, "zero_shot"), degraded=value("degraded_auc"),
        degraded_normal=value("degraded_auc_normal"), degraded_abnormal=value("degraded_auc_abnormal"),
        degraded_max_probability=value("degraded_auc_max_probability"), area_logvar=value("area_logvar"),
        area_max_probability=value("area_max_probability"), area_fitted_probability=value("area_fitted_probability"),
        area_oracle=value("area_oracle"), logvar_spread=value("logvar_spread"), train_s=train_s,
        commit=commit(),
    )  # fmt: skip


def print_rows(rows: Sequence[Row]) -> None:
    """Every run, variant by variant."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    table = Table(title="every run; areas: lower is better", title_justify="left", show_edge=False, pad_edge=False)
    headings = (
        "variant", "seed", "zero-shot", "degraded", "normal", "abnormal", "by max. p", "area logvar", "max. p",
        "fitted p", "oracle", "spread", "seconds", "commit",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in sorted(rows, key=lambda row: [one.variant for one in rows].index(row.variant)):
        name, seed, *values, train_s, made_at = asdict(row).values()
        shown = ("-" if math.isnan(value) else f"{value:.3f}" for value in values)
        table.add_row(name, str(seed), *shown, f"{train_s:.0f}", made_at)
    console.print(table)
