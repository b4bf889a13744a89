"""Towers of one run as the first weights of another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import tiny
from core.checkpoint_files import LATEST, SUMS, WEIGHTS, sha256
from core.first_weights import InitConfig, load_towers
from core.tasks import Task
from core.tasks.mae import MAE
from shards.errors import ConfigError


def small_mae() -> MAE:
    of = tiny.ecamp().task
    return MAE.Config(vision=of.vision, decoder=of.decoder).build(seed=1)


def saved(task: Task, run_dir: Path) -> str:
    """A run directory whose newest checkpoint holds the weights of `task`."""
    folder = run_dir / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    save_file(dict(task.named_parameters()), folder / WEIGHTS)
    (folder / SUMS).write_text(f"{sha256(folder / WEIGHTS)}  {WEIGHTS}\n")
    (run_dir / LATEST).write_text("step-3\n")
    return str(run_dir)


def test_an_encoder_comes_from_a_run_of_another_task(tmp_path: Path) -> None:
    mae = small_mae()
    ecamp = tiny.ecamp().task.build(vocab_size=40, seed=2)
    before = {name: value.clone() for name, value in ecamp.named_parameters()}
    said = load_towers(ecamp, InitConfig(vision=saved(mae, tmp_path)))
    theirs = dict(mae.image.vision.named_parameters())
    assert f"{len(theirs)} " in said
    for name, value in ecamp.named_parameters():
        own = name.removeprefix("image.vision.")
        expected = theirs[own] if own != name else before[name]
        assert torch.equal(value, expected), name


def test_text_comes_from_a_run_too(tmp_path: Path) -> None:
    one, other = (tiny.clip().task.build(vocab_size=40, seed=seed) for seed in (1, 2))
    load_towers(other, InitConfig(text=saved(one, tmp_path)))
    for ours, theirs in zip(other.towers.text.parameters(), one.towers.text.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(one.towers.vision.patch.weight, other.towers.vision.patch.weight)


def test_a_run_without_such_a_tower_is_refused(tmp_path: Path) -> None:
    run = saved(small_mae(), tmp_path)
    clip = tiny.clip().task.build(vocab_size=40)
    with pytest.raises(ConfigError, match="0 towers in it have the parts of this task's TextEncoder"):
        load_towers(clip, InitConfig(text=run))
