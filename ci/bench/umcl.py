"""Do labels without reports teach, and do learned prompts beat written ones? Three seeds of chest phantoms, ablations.

Phantoms of `standard` difficulty: 40 % are seen with their report alone, 40 % with their labels alone, 20 % with both.
Every run takes as many images in as many steps; processor seconds stand beside. CLIP sees the pairs, or all images, a
written sentence standing for each label. Variants take one of three targets, learned or written prompts, pairs (with
the labels that some have) or all. The judged runs come first and are printed before variants start; finished runs of
the same settings are kept, so an experiment that was cut off goes on: delete runs/bench_umcl after a change of code.

By the rules for learning experiments: every run is printed. Classes that are asked for are those that labels name, so
this is no zero-shot of unseen classes.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ci.bench.figure import LOG_COLUMNS, REPOSITORY, Figure, commit, figure
from ci.bench.learning import Experiment, Reports, keep_row, kept_row, processor_seconds, settings_of
from ci.demo import QUICK, RANKS, Size
from configs import schema
from configs.chest import umcl_tiny
from configs.prompts import LABEL_SENTENCES
from shards.ingest.phantom_chest import generator_hash

DESCRIPTION = "UMCL against CLIP on pairs, and on all images with written prompts: zero-shot, spread, ablations (hours)"

SEEDS = (0, 1, 2)
DIFFICULTY = "standard"
FULL = Size(steps=600)
FOLDER = REPOSITORY / "runs" / "bench_umcl"
OURS, CLIP_PAIRS, CLIP_HAND = "umcl", "clip on pairs", "clip, written prompts"
# Share of the phantoms; rows of a batch of all, and of pairs.
SHARES = {"report": 0.4, "labels": 0.4, "both": 0.2}
ALL, PAIRS = {"report": 38, "labels": 38, "both": 20}, {"report": 64, "both": 32}

CLASSES = umcl_tiny().task.classes
SENTENCES = {name: LABEL_SENTENCES[name] for name in CLASSES}
WRITTEN = ("task.prompts=hand", f"data.label_text.sentences={json.dumps(SENTENCES)}")
CLIP_TEXTS = f"data.label_text={json.dumps({'classes': CLASSES, 'sentences': SENTENCES})}"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A recipe, what is changed of it, and the rows of a batch by what is read of them."""

    recipe: str = "chest:umcl_tiny"
    change: tuple[str, ...] = ()
    quotas: dict[str, int]
    reads_labels: bool = True  # of those that have both


JUDGED = {
    OURS: Contestant(quotas=ALL),
    CLIP_PAIRS: Contestant(recipe="chest:clip_tiny", change=(CLIP_TEXTS,), quotas=PAIRS, reads_labels=False),
    CLIP_HAND: Contestant(recipe="chest:clip_tiny", change=(CLIP_TEXTS,), quotas=ALL),
}
VARIANTS = {
    f"{target}, {prompts} prompts, {data}": Contestant(
        change=(f"task.target={target}", *(WRITTEN if prompts == "written" else ())),
        quotas=ALL if data == "all" else PAIRS,
    )
    for data, prompts, target in product(("all", "pairs"), ("learned", "written"), ("soft", "hard", "one_hot"))
    if (data, prompts, target) != ("all", "learned", "soft")
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run showed on held-out patients: macro AUCs, learned prompts' NaN where there are none."""

    contestant: str
    seed: int
    written: float
    learned: float
    paraphrases: float  # mean
    spread: float  # standard deviation over paraphrases
    pushed_apart: float  # share of the pairs of like labels
    train_s: float  # processor time of each rank
    commit: str  # that it was run at

    @property
    def zero_shot(self) -> float:
        """By the prompts that the run was taught with."""
        return self.written if math.isnan(self.learned) else self.learned


def run(quick: bool) -> list[Figure]:
    """All seeds and variants. Leaves shards and run directories under runs/bench_umcl."""
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False)
    size, seeds = (QUICK, SEEDS[:1]) if quick else (FULL, SEEDS)

    def made(name: str, seed: int) -> Row:
        row = run_one(name, seed, size)
        console.print(
            f"seed {seed}, {name}: macro AUC {row.zero_shot:.3f}, other wordings {row.paraphrases:.3f} ± "
            f"{row.spread:.3f}, trained in {row.train_s:.0f} s of each rank"
        )
        return row

    rows = [made(name, seed) for seed in seeds for name in JUDGED]
    figures = summary(rows, time.perf_counter() - started)
    if not quick:
        print_rows(rows)
        rows += [made(name, seed) for name in VARIANTS for seed in seeds]
    print_rows(rows)
    return figures


def sets_of(folder: Path, seed: int, size: Size) -> dict[str, Path]:
    """Manifests by what is read of their studies; phantoms of other generator seeds. Packed where they are missing."""
    found = {}
    for number, (kind, share) in enumerate(SHARES.items()):
        held_out = size.samples[1:] if kind == "both" else (0, 0)
        samples = (round(share * size.samples[0]), *held_out)
        experiment = Experiment(
            folder=folder / kind, seed=len(SHARES) * seed + number, size=replace(size, samples=samples)
        )  # fmt: skip
        if not experiment.manifest.exists():
            experiment.pack(DIFFICULTY)
        found[kind] = experiment.manifest
    return found


def mixture(contestant: Contestant, manifests: dict[str, Path]) -> list[dict[str, Any]]:
    """`data.train` of a run."""
    both = "everything" if contestant.reads_labels else "report"
    return [
        {"manifest": str(manifests[kind]), "quota": quota, "reads": both if kind == "both" else kind}
        for kind, quota in contestant.quotas.items()
    ]


def run_one(name: str, seed: int, size: Size) -> Row:
    """Train and evaluate one run, or read what it showed when these settings were run before."""
    contestant = (JUDGED | VARIANTS)[name]
    experiment = Experiment(folder=FOLDER / f"{size.steps}-steps" / str(seed), seed=seed, size=size)
    run_name = name.replace(" ", "_").replace(",", "")
    kept = experiment.folder / run_name / "row.json"
    manifests = sets_of(experiment.folder, seed, size)
    overrides = experiment.overrides(
        *contestant.change,
        f"data.train={json.dumps(mixture(contestant, manifests))}",
        f"data.validation={manifests['both']}",
        "trainer.evaluate_every=None",
    )
    config = schema.apply_overrides(schema.load_recipe(contestant.recipe), overrides)
    quotas = f"{contestant.quotas} {contestant.reads_labels}"  # of data.train the identity of a run says nothing
    settings = settings_of(config, f"{generator_hash()} {quotas}")
    found = kept_row(kept, settings)
    if found is not None:
        return Row(**found)
    shutil.rmtree(experiment.folder / run_name, ignore_errors=True)
    train_s = processor_seconds(lambda: experiment.pretrain(contestant.recipe, overrides, run_name))
    row = row_of(name, seed, experiment.evaluate(["wording"], run_name), train_s)
    keep_row(kept, asdict(row), settings)
    return row


def row_of(name: str, seed: int, reports: Reports, train_s: float) -> Row:
    """The figures of a run out of evaluate.py's report; NaN for those that it does not have."""
    figures = reports["wording"]["figures"]

    def value(of: str) -> float:
        found = figures.get(of, {}).get("value")
        return math.nan if found is None else float(found)

    return Row(
        contestant=name, seed=seed, written=value("written"), learned=value("learned"),
        paraphrases=value("paraphrases_mean"), spread=value("paraphrases_deviation"),
        pushed_apart=value("false_negatives_pushed_apart"), train_s=train_s, commit=commit(),
    )  # fmt: skip


def summary(rows: Sequence[Row], wall_s: float) -> list[Figure]:
    """The figures that are judged: means over seeds."""
    of = {name: [row for row in rows if row.contestant == name] for name in JUDGED}
    ours, pairs, hand = of[OURS], of[CLIP_PAIRS], of[CLIP_HAND]
    seeds = tuple(row.seed for row in ours)
    make = partial(figure, repeats=len(seeds), seeds=seeds, threads=RANKS, wall_s=wall_s)
    at = ", ".join(sorted({row.commit for row in rows}))
    mean = {name: statistics.fmean(row.zero_shot for row in found) for name, found in of.items()}

    def gain(figure_id: str, peer: str, theirs: Sequence[Row]) -> Figure:
        each = [one.zero_shot - other.zero_shot for one, other in zip(ours, theirs, strict=True)]
        return make(
            figure_id, statistics.fmean(each), ours=mean[OURS], peer=mean[peer], peer_name=peer,
            note=f"{_each(each)}; runs of {at}",
        )  # fmt: skip

    spread, theirs = (statistics.fmean(row.spread for row in found) for found in (ours, hand))
    means = ", ".join(f"{name} {statistics.fmean(row.paraphrases for row in of[name]):.3f}" for name in of)
    pushed, others = (statistics.fmean(row.pushed_apart for row in found) for found in (ours, hand))
    return [
        gain("umcl.zero_shot_minus_clip_pairs", CLIP_PAIRS, pairs),
        gain("umcl.zero_shot_minus_clip_hand", CLIP_HAND, hand),
        make("umcl.spread_vs_hand", spread / theirs, ours=spread, peer=theirs, peer_name=CLIP_HAND,
             note=f"mean AUC over wordings: {means}"),
        make("umcl.pushed_apart_minus_clip", pushed - others, ours=pushed, peer=others, peer_name=CLIP_HAND),
    ]  # fmt: skip


def _each(values: Sequence[float]) -> str:
    return "seeds " + ", ".join(f"{value:+.3f}" for value in values)


def print_rows(rows: Sequence[Row]) -> None:
    """Every run, contestant by contestant."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    table = Table(title="every run", title_justify="left", show_edge=False, pad_edge=False)
    headings = ("contestant", "seed", "written", "learned", "wordings", "spread", "pushed apart", "seconds", "commit")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    order = list(JUDGED | VARIANTS)
    for row in sorted(rows, key=lambda row: (order.index(row.contestant), row.seed)):
        name, seed, *values, train_s, made_at = asdict(row).values()
        shown = ("-" if math.isnan(value) else f"{value:.3f}" for value in values)
        table.add_row(name, str(seed), *shown, f"{train_s:.0f}", made_at)
    console.print(table)
