"""What contrastive pre-training learns from the chest phantom: the demo's run on three seeds, `easy` and `standard`.

By the rules for learning experiments: the phantom is fixed first and its hash stands in every figure; a seed changes
data, initialisation and order together; every run is printed; beside it stand the ceiling (a reader who knows the
scenes) and the same image encoder trained on the labels for the same steps on the same images. The programs are the
user's own: pack.py, pretrain.py under the deepspeed runner, evaluate.py.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ci.bench.figure import REPOSITORY, Figure, figure
from ci.bench.learning import Experiment, macro
from ci.demo import QUICK, RANKS, RECIPE, Size
from configs import schema
from configs.schema import TrainConfig
from core import optim
from core.evaluation.statistics import area_under_curve
from core.models.vision import VisionEncoder
from shards.batch import Batch
from shards.ingest.phantom_chest import generator_hash, split_seed
from shards.ingest.phantom_chest_scene import DIFFICULTIES, ceiling
from shards.loader import Loader

DESCRIPTION = "zero-shot and probe AUC of the demo's run on phantoms, three seeds, easy and standard (about 40 minutes)"

SEEDS = (0, 1, 2)
FOLDER = REPOSITORY / "runs" / "bench_clip"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Macro AUC over the eight findings on held-out patients, of one seed, and the wall seconds of its training."""

    zero_shot: float
    probe: float
    supervised: float
    ceiling: float
    train_s: float


def run(quick: bool) -> list[Figure]:
    """Both difficulties, all seeds. Leaves shards and run directories under runs/bench_clip."""
    size, seeds = (QUICK, SEEDS[:1]) if quick else (Size(), SEEDS)
    console = Console(stderr=True, highlight=False)
    figures = []
    for difficulty in DIFFICULTIES:
        started = time.perf_counter()
        scores = []
        for seed in seeds:
            scores.append(run_seed(difficulty, seed, size))
            one = scores[-1]
            console.print(
                f"{difficulty} seed {seed}: zero-shot {one.zero_shot:.3f}, probe {one.probe:.3f}, supervised "
                f"{one.supervised:.3f}, ceiling {one.ceiling:.3f}, trained in {one.train_s:.0f} s"
            )
        figures += summary(difficulty, seeds, scores, time.perf_counter() - started)
    return figures


def summary(difficulty: str, seeds: tuple[int, ...], scores: list[Scores], wall_s: float) -> list[Figure]:
    """Figures of one difficulty: the lowest seed where a bar must hold for each, else the mean; all in the note."""
    judged = min if difficulty == "easy" else statistics.fmean
    make = partial(figure, repeats=len(seeds), seeds=seeds, threads=RANKS, wall_s=wall_s, unit="AUC", better="higher")

    def note(name: str) -> str:
        each = ", ".join(f"{getattr(one, name):.3f}" for one in scores)
        return f"seeds {each}; {'lowest' if judged is min else 'mean'}; generator {generator_hash()}"

    result = []
    for name in ("zero_shot", "probe"):
        value = judged([getattr(one, name) for one in scores])
        result.append(make(f"clip.{difficulty}_{name}_auc", value, note=note(name)))
    for name in ("supervised", "ceiling"):
        value = statistics.fmean(getattr(one, name) for one in scores)
        each = ", ".join(f"{getattr(one, name):.3f}" for one in scores)
        result.append(make(f"clip.{difficulty}_{name}_auc", value, note=f"seeds {each}; mean"))
    return result


def run_seed(difficulty: str, seed: int, size: Size) -> Scores:
    """Pack, pre-train, evaluate, train the supervised twin. The seed is the phantom's, the weights' and the order's."""
    experiment = Experiment(folder=FOLDER / f"{difficulty}-{seed}", seed=seed, size=size)
    shutil.rmtree(experiment.folder, ignore_errors=True)
    experiment.pack(difficulty)
    overrides = experiment.overrides()
    train_s = experiment.pretrain(RECIPE, overrides)
    reports = experiment.evaluate(["zero_shot", "linear_probe"])
    config = schema.apply_overrides(schema.load_recipe(RECIPE), overrides)
    areas = ceiling(split_seed(seed, "test"), size.samples[2], DIFFICULTIES[difficulty])
    return Scores(
        zero_shot=macro(reports, "zero_shot"), probe=macro(reports, "linear_probe"), supervised=supervised(config),
        ceiling=float(np.nanmean(list(areas.values()))), train_s=train_s,
    )  # fmt: skip


class _Supervised(nn.Module):
    """The recipe's image encoder with one logit a label."""

    def __init__(self, config: VisionEncoder.Config, labels: int) -> None:
        super().__init__()
        self.vision = VisionEncoder(config)
        self.head = nn.Linear(config.width, labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[V, C, H, W] -> [V, K] float32."""
        with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16):
            pooled = self.vision(pixel_values).pooled
        return self.head(pooled.float())


def supervised(config: TrainConfig) -> float:
    """Macro AUC on the test split of the recipe's image encoder trained on labels: same images, order, steps, schedule.

    One process: what it is compared with differs in objective only, not in time.
    """
    fields = ("pixel_values", "study_index", "valid", "labels")
    loader = Loader(config.data, global_batch_size=config.global_batch_size, seed=config.seed, fields=fields)
    torch.manual_seed(config.seed)
    model = _Supervised(config.task.vision, len(loader.labels))
    optimizer = optim.build(model, config.optim)
    steps = config.trainer.steps
    with loader.start(0) as batches:
        for step, batch in zip(range(steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = config.optim.learning_rate * optim.schedule_factor(config.optim, step, steps)
            optimizer.zero_grad()
            loss = _loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clipping)
            optimizer.step()
    scores, truth = _predict(model, loader.evaluate("test"))
    return float(np.nanmean([area_under_curve(scores[:, k], truth[:, k] == 1) for k in range(truth.shape[1])]))


def _loss(model: _Supervised, batch: Batch) -> Tensor:
    rows = batch["study_index"]
    known = (batch["labels"][rows] >= 0) & batch["valid"][rows][:, None]
    logits, target = model(batch["pixel_values"]), batch["labels"][rows].clamp(min=0).float()
    return binary_cross_entropy_with_logits(logits[known], target[known])


@torch.no_grad()
def _predict(model: _Supervised, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels [n, K] of the valid studies; phantoms have one view each."""
    model.eval()
    logits, labels = [], []
    for batch in batches:
        valid = batch["valid"]
        logits.append(model(batch["pixel_values"])[valid[batch["study_index"]]])
        labels.append(batch["labels"][valid])
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()
