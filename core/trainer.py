"""The loop: batches in, steps, curves, evaluation, checkpoints; stops together on a signal, bad data or a dead parent.

It knows no objective, no DeepSpeed and no file format.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch
from rich.console import Console
from torch import nn

from core import metrics as measures
from core.checkpoint import Checkpoints, TrainState
from core.collectives import sum_over_ranks
from core.engine import Engine
from core.hang_watch import HangWatch
from core.metrics import Metrics
from core.models.heads import LogitScale
from core.optim import keeping_compiler_out
from core.profiling import StepProfiler
from core.slow_ranks import SlowRanks
from core.world import World
from shards.batch import Batch, batch_hash
from shards.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SKIP_WINDOW_SLOTS = 10_000
SCALE_AT_BOUND_STEPS = 100
EVALUATION_METRIC = "eval/validation/loss"
SHOWN_FIGURES = ("loss", "macro", "image_to_text_r1", "text_to_image_r1")  # on the screen; TensorBoard has all


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Durations in steps. `evaluate_every` and `save_every`: None means only at the end.

    `hang_after_s`: a step that takes longer ends the run with code 5 and the stacks of all ranks; None: never.

    `best_metric`: name of an evaluation figure; the checkpoint where it is best is kept and marked. None: none is.
    """

    steps: int = 1000
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    picture_every: int | None = None
    validation_batches: int | None = None
    best_metric: str | None = EVALUATION_METRIC
    best_is: Literal["lowest", "highest"] = "lowest"
    hang_after_s: float | None = 1200.0
    profile_steps: str | None = None  # FROM:TO, a timeline of every rank's steps from FROM on, before TO

    def __post_init__(self) -> None:
        self.profiled_steps()
        if self.hang_after_s is not None and not self.hang_after_s > 0:
            raise ConfigError(f"trainer.hang_after_s={self.hang_after_s} must be above 0; None sets no limit")
        for name in ("steps", "log_every", "evaluate_every", "save_every", "picture_every", "validation_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"trainer.{name}={value} must be at least 1")

    def profiled_steps(self) -> range:
        """Steps that are recorded. Raises ConfigError."""
        if self.profile_steps is None:
            return range(0)
        first, colon, end = self.profile_steps.partition(":")
        if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
            raise ConfigError(f"trainer.profile_steps={self.profile_steps}: write FROM:TO, two steps, e.g. 100:105")
        return range(int(first), int(end))


class Run(Protocol):
    """Batches from a step on, closed after use; `queue_depth` is how many wait."""

    @property
    def queue_depth(self) -> int: ...
    def __next__(self) -> Batch: ...
    def close(self) -> None: ...


class Source(Protocol):
    """What the trainer needs of a loader. Counters are this rank's."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def store_retries(self) -> int: ...
    def start(self, step: int) -> Run: ...


# Yields (`<protocol>/<name>`, value), or a picture [3, H, W] in [0, 1]; all ranks run it together and see the same.
Evaluator = Callable[[TrainState], Iterator[tuple[str, float | torch.Tensor]]]


# Yields (name, picture [3, H, W] in [0, 1]), asked every `picture_every` steps.
Pictures = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class EvaluationStoppedError(Exception):
    """Raised on all ranks by an evaluator that was asked to stop: the run saves and ends with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _agreed_code(codes: float, wanted: float) -> int:
    """Exit code of all ranks from the sum of their codes and the number of those that want to stop."""
    if not wanted:
        return 0
    return 128 + (signal.SIGINT if codes == wanted * (128 + signal.SIGINT) else signal.SIGTERM)


class StopRequest:
    """Notes SIGTERM, SIGINT or the death of the parent; the ranks agree on it in the next step or evaluation."""

    def __init__(self) -> None:
        self._signal = 0
        self._parent = os.getppid()
        self._runner = _deepspeed_runner()

    def install(self) -> dict[int, Any]:
        """Takes over the signals; returns what handled them before."""
        return {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number: int, _frame: object) -> None:
        # A second Ctrl-C means now.
        if self._signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def request(self, number: int) -> None:
        """Stop as if signal `number` had come; for ranks in threads, which get no signals."""
        self._signal = self._signal or number

    def leave_evaluation(self, device: torch.device) -> None:
        """Collective, to be called now and then by an evaluator. Raises EvaluationStoppedError on all ranks."""
        votes = sum_over_ranks(torch.tensor([self.code, int(self.code != 0)], device=device))
        if code := _agreed_code(*votes.tolist()):
            raise EvaluationStoppedError(code)

    @property
    def code(self) -> int:
        """Exit code wanted: 0 (go on), 143 or 130."""
        if self._signal:
            return 128 + self._signal
        orphan = os.getppid() != self._parent or (self._runner is not None and _has_ended(self._runner))
        return 128 + signal.SIGTERM if orphan else 0


def _has_ended(process: psutil.Process) -> bool:
    """Also when whoever started it has not yet asked how it ended, or never will."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _deepspeed_runner() -> psutil.Process | None:
    """The `deepspeed` command two generations up, if it is one: its launcher goes on when it is terminated."""
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "deepspeed.launcher.launch" not in launcher.cmdline():
            return None
        runner = launcher.parent()
        return runner if runner is not None and any("deepspeed" in word for word in runner.cmdline()[:2]) else None
    except psutil.Error:
        return None


class TooManySkipsError(DataError):
    """More void slots than allowed; raised on all ranks alike."""


class SkipRate:
    """Void slots among the last slots of all ranks since the start, counted alike on every rank."""

    def __init__(self, limit: float, batch_size: int) -> None:
        self._limit, self._batch_size = limit, batch_size
        self._void: deque[int] = deque(maxlen=max(1, -(-SKIP_WINDOW_SLOTS // batch_size)))
        self.total = 0

    def add(self, void: int) -> None:
        """Raises TooManySkipsError above the limit, once enough slots were seen for the rate to mean something."""
        self._void.append(void)
        self.total += void
        slots = len(self._void) * self._batch_size
        rate = sum(self._void) / slots
        # A lone bad sample in the first batch is no rate: wait for a window, or for more than the window would allow.
        allowed = self._limit * SKIP_WINDOW_SLOTS
        if rate > self._limit and (slots >= SKIP_WINDOW_SLOTS or sum(self._void) > allowed):
            raise TooManySkipsError(
                f"{sum(self._void)} of the last {slots} slots were void ({rate:.1%}), data.max_skip_rate allows "
                f"{self._limit:.1%}; events.jsonl names each, raise the limit only if that is what you expect"
            )


class ScaleWatch:
    """Says once of each logit scale that it has stayed at a bound for `SCALE_AT_BOUND_STEPS` steps since the start."""

    def __init__(self, task: nn.Module, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._scales = {
            f"optim/{name.replace('.', '_')}": module
            for name, module in task.named_modules()
            if isinstance(module, LogitScale)
        }
        self._steps_at_bound = dict.fromkeys(self._scales, 0)
        self._on_event = on_event

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of the step that led to `step`."""
        for name in self._scales.keys() & metrics.keys():
            bound = self._scales[name].bound_near(metrics[name])
            self._steps_at_bound[name] = 0 if bound is None else self._steps_at_bound[name] + 1
            if self._steps_at_bound[name] == SCALE_AT_BOUND_STEPS:
                del self._scales[name]
                log.warning(
                    "%s has been at its bound %g for %d steps: it learns no more, and similarities cannot be told "
                    "apart any better; look for duplicates with different keys, or change the bound in the recipe",
                    name, bound, SCALE_AT_BOUND_STEPS,
                )  # fmt: skip
                self._on_event({"event": "scale_at_bound", "step": step, "metric": name, "bound": bound})


def train(
    config: TrainerConfig,
    engine: Engine,
    loader: Source,
    checkpoints: Checkpoints,
    state: TrainState,
    *,
    world: World,
    metrics: Metrics,
    global_batch_size: int,
    max_skip_rate: float,
    evaluators: Sequence[Evaluator] = (),
    pictures: Pictures | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    stop: StopRequest | None = None,
    watch: HangWatch | None = None,
    on_rank_event: Callable[[dict[str, Any]], None] | None = None,
    profiler: StepProfiler | None = None,
) -> int:
    """Train from `state` to `config.steps`. Collective; returns 0 when done, 143 or 130 when stopped on request.

    `on_event` is told what all ranks know, so that one may write it; `on_rank_event` what one rank says of itself.

    Raises:
        NonFiniteError, DataError, StoreFullError: on all ranks; the last checkpoint stays as it was.
    """
    stop = stop or StopRequest()
    watch = watch or HangWatch(None, Path(), world)
    progress = _Progress(config, world, global_batch_size, state.step)
    skip_rate = SkipRate(max_skip_rate, global_batch_size)
    meter = _Meter(engine, world, global_batch_size)
    profiled = profiler.around if profiler is not None else contextlib.nullcontext
    scales = ScaleWatch(engine.task, on_event)
    slow_ranks = SlowRanks(world, on_rank_event or on_event)
    own = (0.0, 0.0, 0)  # of this rank since the last log: seconds of computing, of waiting for data, steps
    best = checkpoints.best()
    saved_step = state.step if state.step else None
    if state.evaluation_due and not checkpoints.is_evaluated(state):
        evaluated, code = _evaluate(evaluators, state, metrics, progress)
        if evaluated is None:
            on_event({"event": "stopped", "step": state.step, "code": code})
            return code
        if _is_better(config, evaluated, best):
            best = _mark_best(config, checkpoints, state, evaluated)
        checkpoints.mark_evaluated(state)
    state = replace(state, evaluation_due=False)
    if state.step >= config.steps:
        progress.say(f"nothing to do: step {state.step} of {config.steps} is reached")
        return 0
    with contextlib.closing(loader.start(state.step)) as run, watch:
        watch.start(state.step)
        while state.step < config.steps:
            watch.at("data", state.step)
            waited = time.perf_counter()
            batch = next(run)
            waited = time.perf_counter() - waited
            local = {
                "stop": float(stop.code),
                "wants_stop": float(stop.code != 0),
                "void": float((~batch["valid"]).sum()),
                "wait_s": waited,
                "bytes_read": float(loader.bytes_read),
                "retries": float(loader.store_retries),
                "queue": float(run.queue_depth),
                "batch_hash": float(batch_hash(batch, world.rank * len(batch["valid"]))),
            }
            watch.at("step", state.step)
            with profiled(state.step), meter.measuring(state.step):
                output = engine.train_step(batch, step=state.step, sums=local)
            # What replay.py compares with: which samples this step was made of.
            on_event({"event": "batch", "step": state.step, "batch_hash": round(output.sums["batch_hash"])})
            state = state.advance(samples=global_batch_size)
            skip_rate.add(round(output.sums["void"]))
            scales.look(state.step, output.metrics)
            meter.add(output.sums["wait_s"] / world.world_size)
            own = (own[0] + output.compute_s, own[1] + waited, own[2] + 1)

            last = state.step >= config.steps
            if last or state.step % config.log_every == 0:
                figures = {**output.metrics, **meter.figures(), **_data_figures(output.sums, skip_rate.total)}
                figures["checkpoint/lag_s"] = checkpoints.lag_s
                compute_s, data_s, steps = own
                figures |= slow_ranks.look(
                    state.step, compute_s=compute_s / steps, data_s=data_s / steps, step_s=figures["time/step_s"]
                )
                own = (0.0, 0.0, 0)
                metrics.scalars(state.step, figures)
                progress.show(state.step, figures)
            if config.picture_every and (state.step == 1 or state.step % config.picture_every == 0):
                metrics.picture(state.step, "batch/pixel_values", measures.contact_sheet(batch["pixel_values"]))
                if pictures is not None:
                    for name, image in pictures():
                        metrics.picture(state.step, name, image)

            # All ranks saw the same sums, so all leave here together.
            code = _agreed_code(output.sums["stop"], output.sums["wants_stop"])
            evaluation_due = _due(config.evaluate_every, state.step, last)
            tried = bool(code) or _due(config.save_every, state.step, last)
            watch.at("save", state.step)
            # Before the evaluation: a store that falls silent in there must not cost the steps.
            if tried and checkpoints.save(
                engine, replace(state, evaluation_due=evaluation_due), final=last or bool(code)
            ):
                saved_step = state.step
            if evaluation_due and not code:
                watch.at("evaluation", state.step)
                evaluated, code = _evaluate(evaluators, state, metrics, progress)
                better = evaluated is not None and _is_better(config, evaluated, best)
                if saved_step != state.step and (code or (better and not tried)):
                    saved = replace(state, evaluation_due=evaluated is None)
                    if checkpoints.save(engine, saved, final=bool(code)):
                        saved_step = state.step
                if evaluated is not None and saved_step == state.step:
                    if better:
                        best = _mark_best(config, checkpoints, state, evaluated)
                    checkpoints.mark_evaluated(state)
            if tried or evaluation_due:
                metrics.flush()
                meter.restart()
            if code:
                on_event({"event": "stopped", "step": state.step, "code": code})
                progress.say(f"stopped on request after step {state.step}, saved step {saved_step}")
                return code
    return 0


def _due(every: int | None, step: int, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def _is_better(config: TrainerConfig, figures: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    if config.best_metric is None or config.best_metric not in figures:
        return False
    value = figures[config.best_metric]
    if best is None or best.get("metric") != config.best_metric or math.isnan(float(best["value"])):
        return not math.isnan(value)
    before = float(best["value"])
    return value < before if config.best_is == "lowest" else value > before


def _mark_best(
    config: TrainerConfig, checkpoints: Checkpoints, state: TrainState, figures: Mapping[str, float]
) -> dict[str, Any]:
    """`best` of the run from now on: the checkpoint of this step, which is saved."""
    assert config.best_metric is not None
    checkpoints.mark_best(state, config.best_metric, figures[config.best_metric])
    return {"metric": config.best_metric, "value": figures[config.best_metric], "step": state.step}


def _evaluate(
    evaluators: Sequence[Evaluator], state: TrainState, metrics: Metrics, progress: _Progress
) -> tuple[dict[str, float] | None, int]:
    """(figures, 0), or (None, exit code) when a stop was requested on the way; then nothing of it is kept."""
    figures: dict[str, float] = {}
    pictures: dict[str, torch.Tensor] = {}
    try:
        for evaluator in evaluators:
            for name, value in evaluator(state):
                if isinstance(value, torch.Tensor):
                    pictures[f"eval/{name}"] = value
                else:
                    figures[f"eval/{name}"] = value
    except EvaluationStoppedError as stopped:
        progress.say("evaluation left unfinished: a stop was requested; the next start begins with it")
        return None, stopped.code
    metrics.scalars(state.step, figures)
    for name, image in pictures.items():
        metrics.picture(state.step, name, image)
    shown = [name for name in figures if name.rsplit("/", 1)[-1] in SHOWN_FIGURES]
    if shown:
        progress.say("  ".join(f"{name.removeprefix('eval/')} {figures[name]:.4f}" for name in shown))
    return figures, 0


def validation_loss(
    engine: Engine, batches: Callable[[], Iterator[Batch]], *, stop: StopRequest | None = None
) -> Evaluator:
    """An evaluator: the objective over held-out batches; the mean weighs studies equally.

    `batches` gives every rank its equal share of each global batch, void rows filling the last one. A requested `stop`
    ends it between two batches.
    """

    def run(_state: TrainState) -> Iterator[tuple[str, float]]:
        totals: dict[str, float] = {}
        studies = 0
        for batch in batches():
            if stop is not None:
                stop.leave_evaluation(engine.world.device)
            valid = int(sum_over_ranks(batch["valid"].sum().to(engine.world.device)))
            for name, value in engine.validation_step(batch).items():
                totals[name] = totals.get(name, 0.0) + value * valid
            studies += valid
        if not studies:
            raise DataError("the validation split holds no usable study; name another with data.validation_split")
        for name, value in totals.items():
            if name.startswith("loss/"):
                part = name.removeprefix("loss/")
                yield f"validation/{'loss' if part == 'total' else part}", value / studies

    return run


def _data_figures(sums: Mapping[str, float], skipped: int) -> dict[str, float]:
    return {
        "data/skipped": float(skipped),
        "data/store_retries": sums["retries"],
        "data/bytes_read": sums["bytes_read"],
        "data/queue_depth": sums["queue"],
    }


class _Meter:
    """Time, throughput and utilisation since the last time they were asked for."""

    def __init__(self, engine: Engine, world: World, global_batch_size: int) -> None:
        self._world, self._batch_size = world, global_batch_size
        self._engine = engine
        self._flops_per_step = 0.0
        self._peak: float | None = None
        self._cpu = measures.CPUMeter()
        self.restart()

    def restart(self) -> None:
        self._started, self._steps, self._waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Counts the first step's floating-point operations; later steps run untouched."""
        if self._flops_per_step:
            yield
            return
        with keeping_compiler_out():
            from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            yield
        self._flops_per_step = float(max(1, counter.get_total_flops()))

    def add(self, waited_s: float) -> None:
        self._steps += 1
        self._waited += waited_s

    def figures(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._started
        steps = max(1, self._steps)
        if self._peak is None:
            half = self._engine.config.precision != "fp32"
            self._peak = measures.peak_flops(self._world.device, half_precision=half)
        values = {
            "time/step_s": elapsed / steps,
            "time/data_wait_fraction": min(1.0, self._waited / max(elapsed, 1e-9)),
            "throughput/samples_per_s": steps * self._batch_size / max(elapsed, 1e-9),
            "throughput/mfu": self._flops_per_step * steps / max(elapsed, 1e-9) / self._peak,
            "device/utilisation": measures.utilisation(self._world.device, self._cpu),
            **measures.memory(self._world.device),
        }
        self.restart()
        return values


class _Progress:
    """One line on rank 0 per log interval; to a terminal or a file alike."""

    def __init__(self, config: TrainerConfig, world: World, batch_size: int, first_step: int) -> None:
        self._console = Console(file=sys.stderr, quiet=not world.is_first, highlight=False, soft_wrap=True)
        self._total = config.steps
        self._batch_size = batch_size

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        remaining_s = (self._total - step) * figures["time/step_s"]
        minutes, seconds = divmod(round(remaining_s), 60)
        hours, minutes = divmod(minutes, 60)
        self._console.print(
            f"step {step:>{len(str(self._total))}}/{self._total}  loss {figures['loss/total']:.4f}  "
            f"{figures['throughput/samples_per_s']:.1f} samples/s  "
            f"data wait {figures['time/data_wait_fraction']:.1%}  left {hours:d}:{minutes:02d}:{seconds:02d}"
        )

    def say(self, text: str) -> None:
        self._console.print(text)
