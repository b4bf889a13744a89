"""What are the tiny encoders worth on real radiographs? Four public sets, a linear probe and 10 % fine-tuning.

Every recipe of `configs.chest` that is tiny pre-trains an encoder on the same chest phantoms for the same number of
steps; one that was never trained stands beside them. Sets are split by patient and judged with intervals by patient;
all is printed as it is, and no bar is held against it: these encoders have never seen a radiograph. Finished runs of
the same settings are kept, and so is every head that was learned: an experiment that was cut off goes on. Delete
runs/bench_transfer after a change of code.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from ci.bench.figure import LOG_COLUMNS, REPOSITORY, Figure, figure
from ci.bench.learning import Experiment, keep_row, kept_row, settings_of
from ci.bench.reports_data import folder
from ci.demo import RANKS, Size
from configs import chest, schema
from launchers.transfer import tables
from shards.errors import ConfigError
from shards.ingest.phantom_chest import generator_hash

DESCRIPTION = "tiny encoders of every task and a random one on NIH, Kermany, covid_cxr and PneumoniaMNIST (hours)"

FOLDER = REPOSITORY / "runs" / "bench_transfer"
DIFFICULTY, SEED = "standard", 0
FULL = Size(samples=(3000, 200, 400), steps=400, warmup_steps=40)
QUICK = Size(samples=(192, 12, 24), steps=2, warmup_steps=1, log_every=1)
RECIPES = tuple(
    sorted(name for name, of in vars(chest).items() if name.endswith("_tiny") and of.__module__ == chest.__name__)
)
FRACTIONS = "train=0.6,validation=0.1,test=0.3"
REPORTS = {"covid_cxr": "published figures, notes written for publication"}  # how the text of a set was cleared
SETS = ("nih_cxr", "kermany_peds_cxr", "covid_cxr", "pneumoniamnist")
# Task -> shares of the patients' labels, in percent.
TASKS = {"linear_probe": (10.0, 100.0), "fine_tune": (10.0,)}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Of one judgement: which recipes and sets, and how long heads learn."""

    size: Size = FULL
    recipes: tuple[str, ...] = RECIPES
    sets: tuple[str, ...] = SETS
    seeds: int = 3
    steps: int = 200
    replicates: int = 1000
    limit: int | None = None


BRIEF = Effort(size=QUICK, sets=("pneumoniamnist",), seeds=1, steps=2, replicates=50, limit=96)


def run(quick: bool) -> list[Figure]:
    """Pack, pre-train, judge, print. Leaves everything under runs/bench_transfer."""
    started = time.perf_counter()
    effort = BRIEF if quick else Effort()
    base = FOLDER / ("quick" if quick else f"{effort.size.steps}-steps")
    console = Console(stderr=True, highlight=False)
    manifests = {name: pack(name, base / "shards" / name) for name in effort.sets}
    encoders = {}
    for recipe in effort.recipes:
        encoders[recipe] = pretrained(recipe, base, effort.size)
        console.print(f"{recipe}: pre-trained {effort.size.steps} steps")
    found: list[Figure] = []
    shown = Console()
    if not shown.is_terminal:
        shown.width = max(shown.width, LOG_COLUMNS)
    for name, manifest in manifests.items():
        for task in TASKS:
            report = judge(task, encoders, manifest, base / "judged" / name / task, effort)
            for table in tables(report):
                table.title = f"{name}, {table.title}"
                shown.print(table)
            found += figures_of(name, task, report, time.perf_counter() - started)
    return found


def pack(name: str, target: Path) -> Path:
    """Shards of one public set, split by patient; returns the manifest. Raises ConfigError where the set is missing."""
    manifest = target / "manifest.json"
    if manifest.exists():
        return manifest
    source, mapping = REPOSITORY / "ci" / "data" / name, None
    if name == "pneumoniamnist":
        source = as_table(folder(name) / f"{name}.npz", target.parent / f"{name}_table")
    elif not source.is_dir():
        source, mapping = folder(name), REPOSITORY / "ci" / "data" / "mappings" / f"{name}.toml"
    command = [
        sys.executable, "launchers/pack.py", "--source", "table", "--public", "--input", str(source),
        "--fractions", FRACTIONS, "--output", str(target), "--workers", str(RANKS), "--side-min", "16",
    ]  # fmt: skip
    command += ["--mapping", str(mapping)] if mapping else []
    command += ["--deidentified", REPORTS[name]] if name in REPORTS else []
    launch(command)
    return manifest


def as_table(archive: Path, target: Path) -> Path:
    """PneumoniaMNIST's arrays as images beside a table, in its own splits; it does not say who the patients are."""
    (target / "images").mkdir(parents=True, exist_ok=True)
    with np.load(archive, allow_pickle=False) as arrays, open(target / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "patient", "split", "pneumonia"])
        for part, split in (("train", "train"), ("val", "validation"), ("test", "test")):
            labels = arrays[f"{part}_labels"][:, 0].tolist()
            for number, (pixels, label) in enumerate(zip(arrays[f"{part}_images"], labels, strict=True)):
                path = f"images/{split}_{number:05d}.png"
                Image.fromarray(pixels).save(target / path)
                rows.writerow([path, f"{split} {number}", split, label])
    (target / "mapping.toml").write_text(
        'table = "labels.csv"\n[columns]\nfile = "file"\npatient = "patient"\nsplit = "split"\n'
        '[labels.columns.Pneumonia]\ncolumn = "pneumonia"\n'
        '[template]\npresent = ["There is {label}."]\n[provenance]\ncollection = "PneumoniaMNIST"\n'
    )
    return target


def pretrained(recipe: str, base: Path, size: Size) -> Path:
    """The run directory of a recipe on phantoms, trained unless these settings were run before."""
    experiment = Experiment(folder=base / "pretraining", seed=SEED, size=size)
    overrides = experiment.overrides("trainer.evaluate_every=None", "engine.precision=fp32")
    config = schema.apply_overrides(schema.load_recipe(f"chest:{recipe}"), overrides)
    settings = settings_of(config, generator_hash())
    run_dir = experiment.folder / recipe
    if kept_row(run_dir / "row.json", settings) is None:
        if not experiment.manifest.exists():
            experiment.pack(DIFFICULTY, "--structured", "--entities")  # all recipes read the same
        shutil.rmtree(run_dir, ignore_errors=True)
        seconds = experiment.pretrain(f"chest:{recipe}", overrides, recipe)
        keep_row(run_dir / "row.json", {"seconds": seconds}, settings)
    return run_dir


def judge(task: str, encoders: dict[str, Path], manifest: Path, target: Path, effort: Effort) -> dict[str, Any]:
    """What transfer.py says of the encoders on one set. The random one is of the first one's shape."""
    command = [
        sys.executable, "launchers/transfer.py", "--data", str(manifest), "--output", str(target), "--task", task,
        "--percents", *map(str, TASKS[task]), "--seeds", str(effort.seeds), "--steps", str(effort.steps),
        "--replicates", str(effort.replicates), "--random",
        "--encoder", *(f"{name}={path}" for name, path in encoders.items()),
    ]  # fmt: skip
    command += ["--limit", str(effort.limit)] if effort.limit else []
    launch(command)
    report: dict[str, Any] = json.loads((target / "transfer.json").read_text("utf-8"))
    return report


def launch(command: Sequence[str]) -> None:
    """Run one of our programs from the repository root. Raises ConfigError with the end of what it said."""
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        end = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"{command[1]} ended with {done.returncode}: {''.join(end)}")


def figures_of(name: str, task: str, report: dict[str, Any], wall_s: float) -> list[Figure]:
    """One figure for each encoder and share."""
    found = []
    for percent, of in report["tasks"][task].items():
        for encoder, estimate in of["figures"].items():
            value = math.nan if estimate["value"] is None else estimate["value"]
            low, high = (math.nan if estimate[side] is None else estimate[side] for side in ("low", "high"))
            found.append(
                figure(
                    f"transfer.{name}.{task}_{percent}.{encoder}", value, unit=of["figure"], better="higher",
                    repeats=of["seeds"], seeds=tuple(range(of["seeds"])), threads=RANKS, wall_s=wall_s,
                    note=f"95 % interval by patient {low:.3f} to {high:.3f}, {report['images']['test']} images",
                )
            )  # fmt: skip
    return found
