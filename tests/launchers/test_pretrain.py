"""The real program, started as users start it: runner, ranks, shards, run directory, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ci.bench.ray_cluster import free_port
from configs import ct, schema
from configs.schema import TrainConfig
from core import self_proof
from core.checkpoint import TrainState
from core.checkpoint_files import find_weights, steps_in
from core.engine import Engine
from core.evaluation.embed import protocols_in_training
from core.trainer import StopRequest
from core.world import World
from launchers import pretrain
from shards.errors import ConfigError
from shards.ingest.phantom_ct import CtPhantom
from shards.loader import Loader
from shards.tokenizer import train_wordpiece
from shards.writer import write_shards
from tests.launchers.past_runs import pack

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("set"))


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def command(ranks: int, run_dir: Path, manifest: Path, *overrides: str) -> list[str]:
    runner = [sys.executable]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        runner = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    settings = [f"data.train={manifest}", 'data.sections=["findings"]', "data.max_skip_rate=0.5", *overrides]
    return [*runner, "launchers/pretrain.py", "--recipe", "tiny:clip", "--run-dir", str(run_dir), "--set", *settings]


def events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_two_ranks_under_the_runner(tmp_path: Path, manifest: Path) -> None:
    protocols = 'evaluation.protocols=["zero_shot", "retrieval", "uncertainty"]'
    done = subprocess.run(
        command(2, tmp_path, manifest, "trainer.steps=4", "trainer.save_every=2", protocols),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = done.stdout + done.stderr
    assert "step 4/4  loss" in shown
    assert "data wait" in shown
    assert "Warning" not in shown
    config = schema.read((tmp_path / "config.json").read_text(), "config.json")
    assert config.trainer.steps == 4
    assert config.recipe == "tiny:clip"
    assert steps_in(tmp_path) == [2, 4]
    assert find_weights(tmp_path, "best").is_file()
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    curves = EventAccumulator(str(tmp_path / "tb"))
    curves.Reload()
    assert {"eval/retrieval/image_to_text_r1", "eval/uncertainty/area_norm"} <= set(curves.Tags()["scalars"])
    assert curves.Tags()["images"] == ["eval/uncertainty/risk_coverage"]
    kinds = [event["event"] for event in events(tmp_path)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("save") == 2


@pytest.mark.slow
def test_one_process_goes_on_where_two_ranks_ended(tmp_path: Path, manifest: Path) -> None:
    for ranks, steps, allowed in ((2, 2, []), (1, 3, ["--allow-changed", "trainer.steps"])):
        done = subprocess.run(
            [*command(ranks, tmp_path, manifest, f"trainer.steps={steps}"), *allowed],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert steps_in(tmp_path)[-1] == 3
    starts = [(event["step"], event["ranks"]) for event in events(tmp_path) if event["event"] == "start"]
    assert starts == [(0, 2), (2, 1)]


@pytest.fixture
def running(tmp_path: Path, manifest: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks in the middle of a long run, in their own process group."""
    process = subprocess.Popen(
        command(2, tmp_path, manifest, "trainer.steps=100000", "optim.schedule=constant"),
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not steps_in(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rank", "launcher", "runner", "group"])
def test_sigterm_to_anyone_saves_and_stops_all(tmp_path: Path, running: subprocess.Popen[bytes], target: str) -> None:
    family = psutil.Process(running.pid).children(recursive=True)
    launcher = next(member for member in family if "deepspeed.launcher.launch" in member.cmdline())
    rank = next(member for member in family if "--local_rank=1" in member.cmdline())
    if target == "group":
        os.killpg(running.pid, signal.SIGTERM)
    else:
        {"rank": rank, "launcher": launcher, "runner": psutil.Process(running.pid)}[target].send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    code = running.wait(timeout=60)
    assert code == (143 if target == "rank" else code)
    assert code != 0
    last = [event for event in events(tmp_path) if event["event"] != "batch"]
    stopped = next(event for event in last if event["event"] == "stopped")
    assert stopped["code"] == 143
    assert steps_in(tmp_path)[-1] == stopped["step"]


@pytest.mark.parametrize(
    ("split", "named"),
    [("validation", "missing"), pytest.param("exam", "split 'exam'", marks=pytest.mark.slow)],
)
def test_held_out_data_that_is_not_there_shows_before_training(
    tmp_path: Path, manifest: Path, split: str, named: str
) -> None:
    wanted = tmp_path / "missing" / "manifest.json" if split == "validation" else manifest
    done = subprocess.run(
        command(1, tmp_path / "run", manifest, f"data.validation={wanted}", f"data.validation_split={split}"),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode in (2, 3)
    assert named in done.stderr
    assert "Traceback" not in done.stderr and not steps_in(tmp_path / "run")
    assert [event["event"] for event in events(tmp_path / "run")] == ["error"]


def test_a_task_of_anatomies_is_asked_by_every_protocol_that_it_allows_while_it_trains(tmp_path: Path) -> None:
    """Its batches hold texts of anatomies and no whole report."""
    write_shards(CtPhantom(CtPhantom.Config(train=4, validation=8, test=0, shape=(16, 32, 32))), str(tmp_path))
    config = small_volumes(str(tmp_path))
    asked = protocols_in_training(schema.task_class(config.task))
    assert asked == {"zero_shot", "retrieval", "uncertainty", "anatomy"}
    config = replace(config, evaluation=replace(config.evaluation, protocols=tuple(sorted(asked))))
    words = train_wordpiece(["The liver is normal."] * 4, 80)
    fields = schema.task_class(config.task).fields
    loader = Loader(config.data, global_batch_size=4, seed=0, fields=fields, tokenizer=words)
    task = config.task.build(vocab_size=words.vocab_size)
    engine = cast(Engine, SimpleNamespace(task=task, evaluating=lambda: nullcontext(task)))
    _, held_out = pretrain._evaluators(config, engine, loader, World(), StopRequest())
    found = {name for name, _ in held_out(TrainState(step=0, samples_seen=0, seed=0, recipe_hash=""))}
    assert {name.partition("/")[0] for name in found} == asked, found
    elsewhere = replace(config, evaluation=replace(config.evaluation, anatomy_of={"cardiomegaly": "brain"}))
    with pytest.raises(ConfigError, match=r"no label of this data .* set evaluation\.anatomy_of"):
        pretrain._evaluators(elsewhere, engine, loader, World(), StopRequest())  # before any step


def small_volumes(manifest: str) -> TrainConfig:
    """`ct:fvlm_tiny` on crops of 16 x 32 x 32 voxels."""
    base = ct.fvlm_tiny()
    vision = replace(base.task.vision, volume_size=(16, 32, 32), width=32, heads=2, depth=1, levels=(1,))
    data = replace(base.data, train=manifest, lanes=2, volume=replace(base.data.volume, size=vision.volume_size))
    return replace(base, task=replace(base.task, vision=vision), data=data, global_batch_size=4)


def test_print_shows_the_run_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert pretrain.main(["--recipe", "chest:clip_b16", "--print", "--set", "optim.learning_rate=0.125", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "*   learning_rate: 0.125" in shown
    assert "* seed: 3" in shown
    assert "zero_stage: 1" in shown
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "chest:clip_b61"], "did you mean chest:clip_b16"),
        (["--recipe", "chest:clip_tiny"], "--run-dir is missing"),
        (["--recipe", "chest:clip_tiny", "--run-dir", "x", "--set", "optim.lr=1"], "--set optim.lr: unknown"),
        (["--recipe", "chest:clip_tiny", "--run-dir", "x", "--set", "global_batch_size=7"], "use 48"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_a_set_that_does_not_fit_leaves_no_tokenizer_of_its_own(tmp_path: Path, manifest: Path) -> None:
    for recipe, batch, said in (
        ("ct:fvlm_tiny", 48, "label maps do not know lung"),
        ("chest:clip_tiny", 96, "60 units"),
    ):
        overrides = [f"data.train={manifest}", f"global_batch_size={batch}"]
        config = schema.apply_overrides(schema.load_recipe(recipe), overrides)
        with pytest.raises(ConfigError, match=said):
            pretrain._make_tokenizer(config, str(tmp_path), tmp_path / "tokenizer", World())
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    assert "chest:siglip_b16" in capsys.readouterr().out


def test_a_run_proves_the_fast_paths_that_it_would_take() -> None:
    config = schema.load_recipe("tiny:clip")
    cpu = torch.device("cpu")

    def names(*overrides: str) -> list[str]:
        return [part.name for part in pretrain._parts_to_prove(schema.apply_overrides(config, overrides), cpu)]

    assert names("data.decode.device=mixed") == [
        "the kernel of Gaussian similarities",
        "fused attention",
        "decoding on the GPU",
    ]
    assert pretrain._contrasts(config.task) == [("cosine", "fp32")]
    rounded = schema.apply_overrides(config, ["task.precision=tf32"])
    assert pretrain._contrasts(rounded.task) == [("cosine", "tf32")]
    of_gaussians = schema.load_recipe("tiny:dmlm").task
    assert pretrain._contrasts(of_gaussians) == [("sampled", "bf16"), ("wasserstein", "bf16")]
    # What a refusal tells users to set leaves the part out, and but for the pixels is no other run.
    assert names("engine.kernel=pytorch", "engine.attention=sdpa") == []
    changed = schema.apply_overrides(config, ["engine.kernel=pytorch", "engine.attention=matmul"])
    assert changed.identity() == config.identity()
    # Without a GPU the decoder cannot be made: that, too, refuses to train and names the switch.
    (decoding,) = pretrain._parts_to_prove(
        schema.apply_overrides(config, ["engine.kernel=pytorch", "engine.attention=sdpa", "data.decode.device=mixed"]),
        cpu,
    )
    with pytest.raises(ConfigError, match=r"decoding on the GPU fails .*--set data\.decode\.device=cpu"):
        self_proof.prove([decoding], World())
