"""What `launchers/plan.py` predicts against what a run on this machine takes: memory of states and of a study, bytes.

A process of its own trains `chest:clip_b16` for two steps on noise, on one rank, once for each of two batch sizes. The
difference of their peak memory is what a study costs; the tensors that live between two steps are the states.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import time
import warnings
from dataclasses import replace

import torch

from ci.bench.figure import Figure, figure
from configs import schema
from configs.schema import TrainConfig
from core.engine import Engine, join_world, leave_world
from launchers import plan

DESCRIPTION = "what plan.py predicts of a run against one on this machine: memory of states and studies (4 minutes)"

FULL, QUICK = "chest:clip_b16", "chest:clip_tiny"
STUDIES = (24, 40)  # with fewer the peak is that of the gradients
STEPS = 2


def run(quick: bool) -> list[Figure]:
    """The predictions of one recipe."""
    started = time.perf_counter()
    config = schema.load_recipe(QUICK if quick else FULL)
    # A GPU's attention; torch's own on the CPU keeps what a fused kernel keeps.
    config = replace(config, engine=replace(config.engine, attention="sdpa", zero_stage=1))
    site = plan.Site(
        nodes=1, gpus=1, gpu="H100", network_gbit=400, utilisation=0.35, study_bytes=0, studies=None, epochs=None,
        price=None,
    )  # fmt: skip
    counted = plan.counted(config)
    lines = {line.name: line.value for line in plan.plan(config, site, counted)}
    # Gradients are gone between two steps.
    predicted_states = sum(lines[f"memory/{part}"] for part in ("weights", "optimizer"))
    few, more = (_in_its_own_process(config, studies) for studies in STUDIES)
    study_mb = (more[1] - few[1]) / (STUDIES[1] - STUDIES[0]) / 1e6
    wall_s = time.perf_counter() - started
    return [
        _error("plan.states_error", predicted_states, few[0] / 1e9, "GB", wall_s),
        _error("plan.study_error", counted.kept_bytes / 1e6, study_mb, "MB", wall_s),
        _error("plan.flop_error", 3 * counted.flop / 1e9, few[2] / STUDIES[0] / 1e9, "GFLOP", wall_s),
    ]


def _error(name: str, predicted: float, measured: float, unit: str, wall_s: float) -> Figure:
    note = f"predicted {predicted:.4g} {unit}, measured {measured:.4g} {unit}"
    return figure(name, abs(predicted / measured - 1), wall_s=wall_s, note=note)


def _in_its_own_process(config: TrainConfig, studies: int) -> tuple[int, int, int]:
    """(bytes of tensors between two steps, peak bytes of the process, operations of a step)."""
    # What is freed goes back to the system at once, so that the peak is that of what lives.
    changed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_train, (schema.to_json(config), studies))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _train(tree: dict[str, object], studies: int) -> tuple[int, int, int]:
    from torch.utils.flop_counter import FlopCounterMode

    config = schema.from_json(tree)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    world = join_world()
    vocabulary = plan.vocabulary(config)
    task = config.task.build(vocab_size=vocabulary, seed=0)
    engine = Engine(config.engine, task, world, optim=config.optim, total_steps=STEPS, seed=0)
    batch = plan.synthetic_batch(config, studies, vocabulary)
    engine.train_step(batch, step=0)
    with FlopCounterMode(display=False) as counter:
        engine.train_step(batch, step=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del batch
    gc.collect()
    warnings.simplefilter("ignore")  # of torch's, about old names that a walk over all objects touches
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor)
    }
    leave_world()
    return sum(held.values()), peak, counter.get_total_flops()
