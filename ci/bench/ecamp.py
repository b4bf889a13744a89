"""Does ECAMP teach an encoder more than masked images, or uniformly masked words, do? Five seeds of chest phantoms.

Phantoms of `standard` difficulty. As published, every contestant starts from the encoder of one MAE, taught by the same
phantoms for as many steps again; from there all see the same studies in the same order for the same number of steps;
processor seconds stand beside. Encoders are judged frozen, at their own 64 px: a linear probe taught with the labels of
1 % of the patients (macro AUC over findings, mean of PROBE_DRAWS draws of them), and a decoder of the structures (Dice,
mean over structures). `mae` goes on as ECAMP's image part alone, `uniform` is MRM (`chest:mrm_tiny`). A step of `mae`
is cheaper, so that it runs once more, for as many steps as fill ECAMP's processor time: that pair is printed, not
judged, since there it sees more images.

Three seeds were judged first, and the intervals of two of the three gains held 0: an interval of three has Student's t
of two degrees of freedom, 4.3. Seeds 3 and 4 were added after that look, once, whatever they would show. Two looks are
two chances, so that intervals of 97.5 % are judged (Bonferroni); those of 95 %, and of the first three alone, are
printed beside.

The judged runs come first and are printed before the ablations start; finished runs of the same settings are kept, so
an experiment that was cut off goes on: delete runs/bench_ecamp after a change of code.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from ci.bench.figure import LOG_COLUMNS, REPOSITORY, Figure, commit, figure
from ci.bench.learning import Experiment, keep_row, kept_row, processor_seconds, settings_of
from ci.demo import RANKS, Size
from configs import schema
from core.evaluation.classification import Features, probe_at_share
from core.evaluation.fitting import FitConfig
from core.evaluation.images import ImageSplit
from core.evaluation.segmentation import SegmentationConfig, segment
from core.evaluation.statistics import area_under_curve
from launchers.transfer_data import open_encoder, read_images
from shards.ingest.phantom_chest import generator_hash

DESCRIPTION = "ECAMP against masked images alone and uniform masking, with its ablations: frozen encoders (hours)"

SEEDS, FIRST_SEEDS = (0, 1, 2, 3, 4), 3
JUDGED_CONFIDENCE = 1 - 0.05 / 2
DIFFICULTY = "standard"
FULL = Size(samples=(3000, 600, 600), steps=750, warmup_steps=40)
QUICK = Size(samples=(96, 24, 24), steps=3, warmup_steps=1, log_every=1)
FOLDER = REPOSITORY / "runs" / "bench_ecamp"
SHARE, PROBE_DRAWS = 0.01, 100
SHARED = ("trainer.evaluate_every=None", "engine.precision=fp32")  # bf16 is slower on a CPU without AMX
LEARNING_RATE = "optim.learning_rate=2e-3"  # behind the start; found on a seed of its own
STRUCTURES = ("right lung", "left lung", "heart", "consolidation", "effusion")
OURS, MAE, UNIFORM = "ecamp", "mae", "uniform"
EQUAL_TIME = "mae, equal time"

# Name -> recipe and what is changed of it.
JUDGED: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("chest:ecamp_tiny", ()),
    MAE: ("chest:mae_tiny", ()),
    UNIFORM: ("chest:mrm_tiny", ()),
}
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no distilled sentences": ("chest:ecamp_tiny", ("data.entity_masking.distilled=0",)),
    "descriptors as other words": ("chest:ecamp_tiny", ("data.entity_masking.descriptor=0.7",)),
    "no re-balancing": ("chest:ecamp_tiny", ("data.entity_masking.rebalance=false",)),
    "no super-resolution": (
        "chest:ecamp_tiny",
        ("task.weights.sr=0", "data.decode.image_size=64", "data.masking.patch_size=8"),
    ),
    "fine scale alone": ("chest:ecamp_tiny", ("task.fusion=fine",)),
    "coarse scale alone": ("chest:ecamp_tiny", ("task.fusion=coarse",)),
    "as released": ("chest:ecamp_tiny", ("task.compat=original", "data.entity_masking.compat=original")),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run showed on held-out patients."""

    contestant: str
    seed: int
    probe: float  # macro AUC of the probe at 1 % of labels
    dice: float  # mean over structures
    train_s: float  # processor time of each rank
    commit: str  # that it was run at


def run(quick: bool) -> list[Figure]:
    """All seeds and ablations. Leaves shards and run directories under runs/bench_ecamp."""
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False)
    size, seeds = (QUICK, SEEDS[:1]) if quick else (FULL, SEEDS)

    def made(name: str, seed: int, steps: int | None = None) -> Row:
        row = run_one(name, seed, size, quick=quick, steps=steps)
        console.print(
            f"seed {seed}, {name}: probe {row.probe:.3f}, Dice {row.dice:.3f}, trained in {row.train_s:.0f} s of a rank"
        )
        return row

    rows = [made(name, seed) for seed in seeds for name in JUDGED]
    figures = summary(rows, time.perf_counter() - started)
    if not quick:
        print_rows(rows)
        rows += [made(EQUAL_TIME, seed, equal_time_steps(rows, seed, size.steps)) for seed in seeds]
        print(equal_time_line(rows))
        rows += [made(name, seed) for name in VARIANTS for seed in seeds[:FIRST_SEEDS]]
    print_rows(rows)
    return figures


def equal_time_steps(rows: Sequence[Row], seed: int, steps: int) -> int:
    """Steps of MAE that take the processor time of ECAMP's `steps`, by what both took of this seed."""
    took = {row.contestant: row.train_s for row in rows if row.seed == seed}
    return max(1, round(steps * took[OURS] / took[MAE]))


def equal_time_line(rows: Sequence[Row]) -> str:
    """ECAMP's paired gains over MAE at equal processor time, with the times that make them equal."""
    of = {name: {row.seed: row for row in rows if row.contestant == name} for name in (OURS, EQUAL_TIME)}
    pairs = [(row, of[EQUAL_TIME][seed]) for seed, row in of[OURS].items()]
    gains = {"probe": [a.probe - b.probe for a, b in pairs], "Dice": [a.dice - b.dice for a, b in pairs]}
    said = []
    for metric, values in gains.items():
        low, mean, high = interval(values)
        said.append(f"{metric} {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    seconds = [statistics.fmean(row.train_s for row in column) for column in zip(*pairs, strict=True)]
    return f"ecamp minus {EQUAL_TIME}: {', '.join(said)}; {seconds[0]:.0f} s against {seconds[1]:.0f} s of a rank"


def run_one(name: str, seed: int, size: Size, *, quick: bool, steps: int | None = None) -> Row:
    """Train and judge one run, or read what it showed when these settings were run before. `steps`: instead of
    `size`'s, on the same studies."""
    recipe, change = (JUDGED | {EQUAL_TIME: JUDGED[MAE]} | VARIANTS)[name]
    own = size if steps is None else replace(size, steps=steps)
    experiment = Experiment(folder=FOLDER / f"{size.steps}-steps" / str(seed), seed=seed, size=own)
    run_name = name.replace(", ", "_").replace(" ", "_")
    kept = experiment.folder / run_name / "row.json"
    start = experiment.folder / "start"
    overrides = experiment.overrides(*SHARED, LEARNING_RATE, f"init.vision={start}", *change)
    config = schema.apply_overrides(schema.load_recipe(recipe), overrides)
    settings = settings_of(config, generator_hash())
    found = kept_row(kept, settings)
    if found is not None:
        return Row(**found)
    if not experiment.manifest.exists():
        experiment.pack(DIFFICULTY, "--entities")
    first_weights(replace(experiment, size=size), start)
    shutil.rmtree(experiment.folder / run_name, ignore_errors=True)
    train_s = processor_seconds(lambda: experiment.pretrain(recipe, overrides, run_name))
    probe, dice = judged(experiment, run_name, quick=quick)
    row = Row(contestant=name, seed=seed, probe=probe, dice=dice, train_s=train_s, commit=commit())
    keep_row(kept, asdict(row), settings)
    return row


def first_weights(experiment: Experiment, start: Path) -> None:
    """The MAE that all contestants of a seed start from, trained unless it was."""
    recipe, change = JUDGED[MAE]
    overrides = experiment.overrides(*SHARED, *change)
    settings = settings_of(schema.apply_overrides(schema.load_recipe(recipe), overrides), generator_hash())
    if kept_row(start / "row.json", settings) is None:
        shutil.rmtree(start, ignore_errors=True)
        experiment.pretrain(recipe, overrides, start.name)
        keep_row(start / "row.json", {}, settings)


def judged(experiment: Experiment, run_name: str, *, quick: bool) -> tuple[float, float]:
    """Macro AUC of the probe at 1 % of labels and mean Dice, of a run's frozen encoder on the test split."""
    torch.set_num_threads(RANKS)
    encoder = open_encoder(str(experiment.folder / run_name))
    splits = {
        split: read_images(str(experiment.manifest), split, encoder.decode, structures=STRUCTURES)
        for split in ("train", "validation", "test")
    }
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    features = Features.of(encoder.vision, train, validation, test)
    share = 0.25 if quick else SHARE
    areas = [
        macro_auc(probe_at_share(features, train, validation, share, 1000 * experiment.seed + draw).scores, test)
        for draw in range(1 if quick else PROBE_DRAWS)
    ]
    fitted = FitConfig(batch_size=16, seed=experiment.seed, **({"steps": 5} if quick else {}))
    dice = segment(encoder.vision, train, test, SegmentationConfig(fit=fitted))
    return statistics.fmean(areas), float(dice.mean())


def macro_auc(scores: np.ndarray, test: ImageSplit) -> float:
    """Mean over the labels that the test split has both classes of."""
    areas = []
    for column in range(len(test.label_names)):
        truth = test.labels[:, column].numpy()
        known = (truth == 0) | (truth == 1)
        if len(np.unique(truth[known])) == 2:
            areas.append(area_under_curve(scores[known, column], truth[known] == 1))
    return statistics.fmean(areas) if areas else math.nan


def summary(rows: Sequence[Row], wall_s: float) -> list[Figure]:
    """The figures that are judged: the lower end of the interval of the mean paired gain over the seeds."""
    of = {name: {row.seed: row for row in rows if row.contestant == name} for name in JUDGED}
    ours = of[OURS]
    make = partial(figure, repeats=len(ours), seeds=tuple(ours), threads=RANKS, wall_s=wall_s)
    seconds = "; ".join(f"{name} {statistics.fmean(row.train_s for row in of[name].values()):.0f} s" for name in JUDGED)
    figures = []
    for name, peer, metric in (
        ("ecamp.probe1_minus_mae", MAE, "probe"),
        ("ecamp.probe1_minus_uniform", UNIFORM, "probe"),
        ("ecamp.dice_minus_mae", MAE, "dice"),
    ):
        pairs = [(getattr(row, metric), getattr(of[peer][seed], metric)) for seed, row in ours.items()]
        gains = [one - other for one, other in pairs]
        low, mean, high = interval(gains, JUDGED_CONFIDENCE)
        beside = ((f"{len(gains)} seeds", gains), (f"the first {FIRST_SEEDS} alone", gains[:FIRST_SEEDS]))
        note = (
            f"mean gain {mean:+.4f}, {100 * JUDGED_CONFIDENCE:g} % interval {low:+.4f} to {high:+.4f}, whose lower end "
            "counts; seeds " + ", ".join(f"{gain:+.3f}" for gain in gains) + "; at 95 % "
            + ", ".join("{0}: {2:+.4f} ({1:+.4f} to {3:+.4f})".format(of, *interval(some)) for of, some in beside)
            + f"; processor time of a rank: {seconds}"
        )  # fmt: skip
        mine, theirs = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        figures.append(make(name, low, ours=mine, peer=theirs, peer_name=peer, note=note))
    return figures


def interval(gains: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Lower end, mean and upper end of an interval over seeds by Student's t; a single gain has no ends but itself."""
    mean = statistics.fmean(gains)
    if len(gains) == 1:
        return mean, mean, mean
    half = float(student_t.ppf((1 + confidence) / 2, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return mean - half, mean, mean + half


def print_rows(rows: Sequence[Row]) -> None:
    """Every run, contestant by contestant."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    table = Table(title="every run", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("contestant", "seed", "probe at 1 %", "Dice", "seconds", "commit"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    order = [*JUDGED, EQUAL_TIME, *VARIANTS]
    for row in sorted(rows, key=lambda row: (order.index(row.contestant), row.seed)):
        table.add_row(
            row.contestant, str(row.seed), f"{row.probe:.3f}", f"{row.dice:.3f}", f"{row.train_s:.0f}", row.commit
        )
    console.print(table)
