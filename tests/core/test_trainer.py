"""The loop: stops together, counts voids, draws under fixed names, and its curves do not double after a restart."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, patch

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core import trainer
from core.checkpoint import TrainState
from core.checkpoint_files import steps_in
from core.metrics import NAMES, Metrics, contact_sheet, peak_flops
from core.models.heads import LogitScale
from core.trainer import (
    ScaleWatch,
    SkipRate,
    StopRequest,
    TooManySkipsError,
    TrainerConfig,
    _evaluate,
    _has_ended,
    _is_better,
    _Progress,
)
from core.world import World
from shards.errors import DataError
from tests.core.runs import Options, Source, build, in_ranks, run


def curves(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def validated(run_dir: Path) -> list[int]:
    """Steps with a validation loss."""
    found = curves(run_dir)
    name = "eval/validation/loss"
    return [point.step for point in found.Scalars(name)] if name in found.Tags()["scalars"] else []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_stops_all_after_saving(tmp_path: Path, ranks: int) -> None:
    options = Options(run_dir=str(tmp_path), zero_stage=2, steps=50, save_every=50, stop_at=3, kill_rank=ranks - 1)
    assert run(ranks, options) == [128 + signal.SIGTERM] * ranks
    # The signal comes while the batch of step 3 is fetched, and is agreed on in that step.
    assert steps_in(tmp_path) == [4]
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "event": "stopped", "step": 4, "code": 143}
    resumed = replace(options, stop_at=None, steps=6, allow_changed=("trainer.steps",))
    assert run(ranks, resumed) == [0] * ranks
    assert steps_in(tmp_path)[-1] == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path, ranks: int) -> None:
    options = Options(
        run_dir=str(tmp_path), steps=50, save_every=2, validate=True, stop_in_evaluation=True, kill_rank=ranks - 1
    )
    assert run(ranks, options) == [128 + signal.SIGTERM] * ranks
    assert events(tmp_path)[-1] == {**events(tmp_path)[-1], "event": "stopped", "step": 2, "code": 143}
    assert steps_in(tmp_path) == [2] and not validated(tmp_path)
    # The evaluation that was left is the first thing that the next start does.
    assert (
        run(ranks, replace(options, stop_in_evaluation=False, steps=2, allow_changed=("trainer.steps",))) == [0] * ranks
    )
    assert validated(tmp_path) == [2]


def test_a_stop_with_an_evaluation_due_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=4, save_every=4, validate=True, stop_at=3)
    assert run(1, options) == [128 + signal.SIGTERM]
    assert steps_in(tmp_path) == [4] and not validated(tmp_path)
    for _ in range(2):
        assert run(1, replace(options, stop_at=None)) == [0]
    assert set(validated(tmp_path)) == {4} and json.loads((tmp_path / "best").read_text())["step"] == 4


def test_a_failing_evaluation_costs_no_step_and_is_done_once_by_the_next_start(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=4, save_every=4, validate=True, fail_in_evaluation=True)
    assert run(1, options) == [DataError.exit_code]
    assert steps_in(tmp_path) == [4] and not validated(tmp_path)
    for _ in range(2):
        assert run(1, replace(options, fail_in_evaluation=False)) == [0]
        assert validated(tmp_path) == [4] and json.loads((tmp_path / "best").read_text())["step"] == 4


def test_pictures_of_an_evaluation_are_drawn_beside_its_figures(tmp_path: Path) -> None:
    def evaluator(_state: TrainState) -> Iterator[tuple[str, float | torch.Tensor]]:
        yield "uncertainty/gain", 0.25
        yield "uncertainty/risk_coverage", torch.rand(3, 20, 30)

    world = World()
    metrics = Metrics(tmp_path, world, first_step=0)
    config = TrainerConfig(steps=3)
    found = _evaluate(
        [evaluator], TrainState(step=2, samples_seen=0, seed=0, recipe_hash=""), metrics, _Progress(config, world, 1, 0)
    )
    metrics.close()
    assert found == ({"eval/uncertainty/gain": 0.25}, 0)
    drawn = curves(tmp_path)
    assert drawn.Tags()["scalars"] == ["eval/uncertainty/gain"]
    (image,) = drawn.Images("eval/uncertainty/risk_coverage")
    assert (image.step, image.height, image.width) == (2, 20, 30)


def test_names_of_curves_and_no_doubling_after_a_kill(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=6, save_every=2, validate=True)
    assert run(1, replace(options, kill_at=5)) == [-signal.SIGKILL]
    assert run(1, options) == [0]
    found = curves(tmp_path)
    names = set(found.Tags()["scalars"])
    missing = {name for name in NAMES if name not in names} - {"memory/device_gb"}  # there is no device
    assert not missing
    assert {"loss/image_to_text", "loss/text_to_image", "eval/validation/loss"} <= names
    steps = [point.step for point in found.Scalars("loss/total")]
    assert steps == [1, 2, 3, 4, 5, 6]
    skipped = [point.value for point in found.Scalars("data/skipped")]
    assert skipped[:2] == [1, 2]  # one void row a batch
    batches = {event["step"]: event["batch_hash"] for event in events(tmp_path) if event["event"] == "batch"}
    assert sorted(batches) == list(range(6))
    assert len(set(batches.values())) == 6


def test_nan_loss_ends_with_code_4_and_the_checkpoint_stays(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), zero_stage=1, steps=6, nan_at=3)
    assert run(2, options) == [4, 4]
    assert steps_in(tmp_path) == [2]
    message = (tmp_path / "error-0.txt").read_text()
    assert message.startswith("step 3: loss=nan; no weight was moved")
    assert message == (tmp_path / "error-1.txt").read_text()
    assert run(2, replace(options, nan_at=None)) == [0, 0]


def test_a_scale_at_its_bound_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    task = torch.nn.ModuleDict({"logit_scale": LogitScale(10.0, 100.0), "towers": torch.nn.Linear(2, 2)})
    said: list[dict[str, object]] = []
    watch = ScaleWatch(task, said.append)
    values = [99.5] * 99 + [50.0] + [99.5] * 99  # never a hundred in a row
    for step, value in enumerate(values, 1):
        watch.look(step, {"optim/logit_scale": value, "loss/total": 1.0})
    assert not said and not caplog.records
    for step in range(200, 500):
        watch.look(step, {"optim/logit_scale": 99.5})
    (event,) = said
    assert event == {"event": "scale_at_bound", "step": 200, "metric": "optim/logit_scale", "bound": pytest.approx(100)}
    assert len(caplog.records) == 1 and "at its bound 100 for 100 steps" in caplog.text


def scale_events(world: World) -> list[dict[str, object]]:
    """Of a run whose scale starts beyond any slope, with 3 steps in place of 100."""
    options = Options(run_dir="", zero_stage=0, steps=5, learning_rate=1e-6)
    config, task, engine = build(options, world)
    with torch.no_grad():
        task.logit_scale.log_scale.fill_(50.0)  # type: ignore[union-attr, operator]
    written: list[dict[str, object]] = []
    checkpoints = MagicMock(lag_s=0.0, **{"best.return_value": None})
    state = TrainState(step=0, samples_seen=0, seed=0, recipe_hash="")
    with (
        patch.object(trainer, "SCALE_AT_BOUND_STEPS", 3),
        closing(Metrics(Path(), World(rank=1), first_step=0)) as drawn,
    ):
        trainer.train(
            config.trainer, engine, Source(options, world), checkpoints, state, world=world,
            metrics=drawn, global_batch_size=12, max_skip_rate=1.0, on_event=written.append,
        )  # fmt: skip
    return [event for event in written if event["event"] != "batch"]


def test_the_loop_watches_the_scale_of_its_task() -> None:
    (events_written,) = in_ranks(1, scale_events)
    assert [(event["event"], event["step"]) for event in events_written] == [("scale_at_bound", 3)]


def add_many(rate: SkipRate, void: int, batches: int) -> None:
    for _ in range(batches):
        rate.add(void)


def test_too_many_void_slots_end_with_code_3(tmp_path: Path) -> None:
    # 12 slots a batch, 20 % of 10,000 slots allowed: 2,001 voids are reached after 181 all-void batches.
    rate = SkipRate(0.2, 12)
    add_many(rate, 2, 833)
    with pytest.raises(TooManySkipsError, match=r"void \(\d+\.\d%\), data.max_skip_rate allows 20.0%"):
        add_many(rate, 12, 200)
    assert rate.total > 2000


def test_skip_rate_waits_for_enough_slots() -> None:
    rate = SkipRate(0.01, 96)
    rate.add(1)  # 1 of 96 is above 1 %, but says nothing yet
    with pytest.raises(TooManySkipsError):
        add_many(rate, 96, 3)


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    assert not _has_ended(process)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert _has_ended(process)
    child.wait()
    assert _has_ended(process)


def test_stop_request_remembers_the_first_signal() -> None:
    request = StopRequest()
    assert request.code == 0
    request._note(signal.SIGTERM, None)
    request._note(signal.SIGINT, None)
    assert request.code == 143
    interrupted = StopRequest()
    interrupted._note(signal.SIGINT, None)
    assert interrupted.code == 130
    with pytest.raises(KeyboardInterrupt):
        interrupted._note(signal.SIGINT, None)
    orphan = StopRequest()
    orphan._parent = -1
    assert orphan.code == 143


def test_contact_sheet_places_images_row_by_row() -> None:
    images = torch.zeros(5, 1, 2, 3)
    images[:, :, 0, 0] = 1.0  # so that each is stretched to [0, 1]
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape == (1, 4, 9)
    assert sheet[0, 0, [0, 3, 6]].tolist() == [1, 1, 1]
    assert sheet[0, 2, [0, 3, 6]].tolist() == [1, 1, 0]


def test_peak_of_the_cpu_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), half_precision=False) > 1e8


def test_a_figure_that_is_not_a_number_is_never_the_best() -> None:
    config = TrainerConfig()
    name = str(config.best_metric)
    nan = {"metric": name, "value": float("nan")}
    assert _is_better(config, {name: 3.0}, nan) and not _is_better(config, {name: float("nan")}, nan)
    assert not _is_better(config, {name: float("nan")}, {"metric": name, "value": 3.0})
    assert not _is_better(config, {name: float("nan")}, None)
