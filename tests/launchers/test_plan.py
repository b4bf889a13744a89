"""Planning: what is counted is linear in studies, what is assumed moves what it should, errors name the option."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from configs import schema
from core import cost
from launchers import plan

TINY = ["--recipe", "chest:clip_tiny", "--gpus", "4"]


def lines(tmp_path: Path, *arguments: str) -> dict[str, float]:
    file = tmp_path / "plan.json"
    assert plan.main([*TINY, *arguments, "--json", str(file)]) == 0
    return {name: line["value"] for name, line in json.loads(file.read_text()).items()}


def test_every_study_costs_the_same_and_recomputing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    config = schema.load_recipe("chest:clip_tiny")
    few = plan.counted(config)
    monkeypatch.setattr(cost, "FEW", 3)
    monkeypatch.setattr(cost, "MORE", 9)
    many = plan.counted(config)
    assert many.kept_bytes == pytest.approx(few.kept_bytes, rel=0.02)
    assert many.flop == pytest.approx(few.flop, rel=1e-4)
    assert few.trained == sum(few.parameters.values()) == sum(p.numel() for p in config.task.build(
        vocab_size=plan.vocabulary(config)).parameters())  # fmt: skip
    assert few.gathered_bytes == 2 * 128 * 4 + 8 + 1  # two embeddings in fp32, a key, valid
    recomputed = schema.apply_overrides(config, ["engine.activation_checkpointing=true"])
    assert plan.counted(recomputed).kept_bytes < 0.5 * few.kept_bytes


def test_the_plan_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = lines(tmp_path, "--study-bytes", "1000", "--studies", "960", "--epochs", "10", "--price", "2")
    assert one["run/steps"] == 100
    assert one["run/price"] == pytest.approx(2 * one["run/gpu_hours"]) and one["run/gpu_hours"] == pytest.approx(
        4 * one["run/hours"]
    )
    assert one["store/mb_per_s"] == pytest.approx(96 * 1e-3 / one["step/seconds"])
    memory = [value for name, value in one.items() if name.startswith("memory/") and name != "memory/total"]
    assert one["memory/total"] == pytest.approx(sum(memory))
    assert one["network/seconds"] == 0  # one node
    shown = capsys.readouterr().out
    assert "(counted)" in shown and "(assumed)" in shown and "fits" in shown

    two = lines(tmp_path, "--nodes", "2", "--utilisation", "0.7", "--set", "engine.zero_stage=3")
    assert two["compute/seconds"] == pytest.approx(one["compute/seconds"] / 4)
    assert two["memory/weights"] == pytest.approx(one["memory/weights"] / 8)
    assert two["network/seconds"] > 0


def test_what_the_store_costs_is_counted_where_prices_are_given(tmp_path: Path) -> None:
    data = ["--study-bytes", "1e6", "--studies", "960", "--epochs", "10"]
    prices = ["--price-per-gb-month", "0.5", "--price-per-million-reads", "3", "--price-per-gb-read", "0.25"]
    one = lines(tmp_path, *data, "--price-per-gpu-hour", "2", *prices)
    parts = {name: value for name, value in one.items() if name.startswith("run/price_") and "epoch" not in name}
    assert set(parts) == {"run/price_gpus", "run/price_storage", "run/price_requests", "run/price_bytes"}
    assert one["run/price"] == pytest.approx(sum(parts.values()))
    assert one["run/price_per_epoch"] == pytest.approx(one["run/price"] / 10)
    assert one["run/price_bytes"] == pytest.approx(0.25 * 9.6)  # 9,600 studies of 1 MB
    assert one["run/price_requests"] == pytest.approx(3 * 9600e6 / 2**21 / 1e6)
    twice = lines(tmp_path, *data, "--price-per-gb-month", "1.0")
    assert twice["run/price"] == pytest.approx(2 * one["run/price_storage"])
    assert plan.main([*TINY, "--price-per-gb-read", "1"]) == 2  # of what?
    assert "run/price" not in lines(tmp_path, *data)


def test_loaders_that_do_not_keep_up_set_the_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = lines(tmp_path, "--loader-ms", "0.001")
    assert fast["step/seconds"] == fast["compute/seconds"] > fast["loader/seconds"]
    assert fast["loader/cores_per_gpu"] == pytest.approx(1e-6 * 96 / fast["step/seconds"] / 4)
    assert "keeps up with data.decode.threads=1" in " ".join(capsys.readouterr().out.split())
    slow = lines(tmp_path, "--loader-ms", "500", "--cores", "8")
    assert slow["step/seconds"] == slow["loader/seconds"] == pytest.approx(0.5 * 96 / 8)
    assert slow["step/studies_per_s"] == pytest.approx(16)
    assert "does NOT keep up" in " ".join(capsys.readouterr().out.split())


def test_a_crop_costs_the_loader_by_its_voxels() -> None:
    config = schema.load_recipe("ct:fvlm_b")
    site = plan.Site(
        nodes=4, gpus=8, gpu="H100", network_gbit=400, utilisation=0.35, study_bytes=0, studies=None, epochs=None,
        price=None,
    )  # fmt: skip
    full = {line.name: line for line in plan._loader(config, site, 1.0)}
    assert full["loader/cpu_ms"].value == pytest.approx(102)
    assert full["loader/cores_per_gpu"].value == pytest.approx(0.102 * 48 / 32)
    assert "keeps up with data.volume.threads=1" in full["loader/cores_per_gpu"].formula
    half = schema.apply_overrides(config, ["data.volume.cut=[56,256,352]"])
    assert plan._loader(half, site, 1.0)[0].value == pytest.approx(51)


def test_what_does_not_fit_says_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(plan.GPU_GB, "L4", 0.1)
    lines(tmp_path, "--gpu", "L4")
    assert "engine.micro_batch=12" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be above 0"),
        (["--utilisation", "35"], "--utilisation 35.0: a share"),
        (["--gpus", "5"], "does not divide"),
        (["--cores", "0"], "--cores 0.0: must be above 0"),
        (["--epochs", "3"], "--studies, or a manifest"),
        (["--data", "/nowhere/manifest.json"], "/nowhere"),
    ],
)
def test_errors_name_the_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*TINY, *arguments]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["ct:fvlm_tiny", "ct:supervised_tiny"])
def test_a_study_of_a_volume_can_be_counted(recipe: str) -> None:
    config = schema.load_recipe(recipe)
    found = plan.counted(config)
    tokens, vision = 6 * 8 * 8, config.task.vision
    of_blocks = 2 * 12 * vision.width**2 * tokens * vision.depth  # multiply and add, all matrices of the blocks
    channels = (vision.channels, *vision.stem)
    kernels = [27 * before * after for before, after in itertools.pairwise(channels)]
    of_stem = sum(2 * kernel * 48 * 64 * 64 // 8**n for n, kernel in enumerate(kernels, start=1))
    assert of_blocks + of_stem < found.flop < 2.5 * of_blocks + of_stem
    assert found.kept_bytes > 0 and found.trained > 12 * vision.width**2 * vision.depth + sum(kernels)
