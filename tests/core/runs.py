"""Whole small runs in killable processes: real CLIP towers, batches that are a pure function of the step."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as multiprocessing

from ci.bench.ray_cluster import free_port
from configs import tiny
from configs.schema import TrainConfig, apply_overrides
from core.checkpoint import Checkpoints
from core.engine import Engine, _import_deepspeed, join_world, leave_world
from core.first_weights import InitConfig
from core.hang_watch import EXIT_CODE, HangWatch
from core.metrics import Events, Metrics, Uploader
from core.tasks import Exchange, Task
from core.trainer import StopRequest, train, validation_loss
from core.world import World
from shards.batch import Batch
from shards.errors import RoentgenError, StoreUnreachableError
from tests.distributed import PRELOAD

VOCABULARY = 60
GLOBAL_BATCH = 12
TIMEOUT_S = 150.0

_import_deepspeed()  # once, in the server that ranks are forked from
import torch._dynamo  # noqa: E402  (ZeRO 3 and activation checkpointing import it on first use)


@dataclass(frozen=True, kw_only=True)
class Options:
    """One start of a run. `kill_at`: SIGKILL itself when it asks for the batch of this step."""

    run_dir: str
    recipe: str = "clip"  # of configs/tiny.py
    overrides: tuple[str, ...] = ()
    zero_stage: int = 1
    precision: str = "fp32"
    micro_batch: int | None = None
    exchange: Exchange = "gather"
    recompute: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)
    steps: int = 6
    save_every: int = 2
    learning_rate: float = 1e-2
    seed: int = 0
    validate: bool = False
    kill_at: int | None = None
    kill_rank: int | None = None  # None: all ranks
    stop_at: int | None = None  # SIGTERM itself at this step, on `kill_rank`
    stop_in_evaluation: bool = False  # SIGTERM itself while validating on batches without end, on `kill_rank`
    fail_in_evaluation: bool = False  # as when the store does not answer
    hang_at: int | None = None  # the last rank stays away from this step: it sleeps, or is stopped
    hang_how: str = "sleep"
    late_s: float = 0.0  # that the last rank's batches come late
    hang_after_s: float | None = None
    nan_at: int | None = None  # NaN pixels at this step, on the last rank
    void_from: int | None = None  # all rows void from this step on
    keep_last: int = 2
    keep_every: int | None = None
    init: str | None = None
    allow_changed: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)  # of an S3 server
    local_dir: str | None = None
    rank_is_node: bool = False  # every rank is a node of its own, which writes below `local_dir`
    nodes_share_disk: bool = False
    full_disk_at: int | None = None  # saving fails with ENOSPC from this step on


class Words:
    """One token a word, [CLS] and [SEP] around; the full stop is a word."""

    prefix, suffix = (1,), (2,)

    def encode(self, texts: Any, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[1, *(5 + sum(map(ord, word)) % 30 for word in text.split()), 2] for text in texts]
        longest = max(map(len, rows))
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), mask


def config_of(options: Options) -> TrainConfig:
    config = apply_overrides(getattr(tiny, options.recipe)(), options.overrides)
    return replace(
        config,
        seed=options.seed,
        optim=replace(config.optim, learning_rate=options.learning_rate, warmup_steps=1),
        engine=replace(
            config.engine,
            zero_stage=options.zero_stage,  # type: ignore[arg-type]
            precision=options.precision,  # type: ignore[arg-type]
            micro_batch=options.micro_batch,
            exchange=options.exchange,
            activation_checkpointing=options.recompute,
            deepspeed=options.deepspeed,
        ),
        trainer=replace(
            config.trainer,
            steps=options.steps,
            save_every=options.save_every,
            evaluate_every=options.save_every if options.validate else None,
            log_every=1,
            hang_after_s=options.hang_after_s,
        ),
        checkpoint=replace(
            config.checkpoint,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            local_dir=options.local_dir,
        ),
        init=InitConfig(checkpoint=options.init),
    )


def global_batch(step: int, seed: int = 0, rows: int = GLOBAL_BATCH) -> Batch:
    """[B] studies of one or two images with all fields that a task reads; row 3 is void, rows 1 and 2 equal reports."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    views = torch.arange(rows) % 2 + 1
    study_index = torch.repeat_interleave(torch.arange(rows), views)
    length = 8
    batch: Batch = {
        "pixel_values": torch.randn(len(study_index), 1, 32, 32, generator=generator),
        "study_index": study_index,
        "valid": torch.arange(rows) != 3,
        "input_ids": torch.randint(5, VOCABULARY, (rows, length), generator=generator),
        "attention_mask": torch.arange(length)[None] < torch.arange(rows)[:, None] % length + 1,
        "report_key": torch.arange(rows) + 100 * step,
        "labels": torch.stack([torch.arange(rows) % 3 == 0, torch.arange(rows) % 3 != 0], dim=1).to(torch.int8),
        "text_is_report": torch.arange(rows) % 4 != 0,
        "patient_key": torch.arange(rows),
        "sample_id": torch.arange(rows) + rows * step,
        "set_index": torch.zeros(rows, dtype=torch.int64),
        "epoch": torch.zeros(rows, dtype=torch.int64),
    }
    batch["report_key"][2] = batch["report_key"][1]
    batch["pixel_values"][study_index == 3] = 0
    real = batch["attention_mask"] & batch["valid"][:, None]
    batch["finding_key"] = batch["report_key"].clone()
    batch["draw_key"] = batch["sample_id"] * 7919 + seed
    batch["text_mask"] = real & (torch.rand(rows, length, generator=generator) < 0.4) & (torch.arange(length) > 0)
    hidden = torch.rand(len(study_index), 16, generator=generator).argsort(dim=1) < 10
    batch["patch_mask"] = hidden & batch["valid"][study_index][:, None]
    batch["token_weight"] = batch["text_mask"] * (0.5 + torch.rand(rows, length, generator=generator))
    batch["cut_tokens"], batch["dropped_sentences"] = torch.arange(rows) % 3, torch.arange(rows) % 2
    grid = torch.rand(len(study_index), 16, generator=generator)
    batch["attention_grid"] = grid / grid.mean(dim=1, keepdim=True) * batch["valid"][study_index][:, None]
    return batch


def own_rows(batch: Batch, world: World) -> Batch:
    from core.engine import split

    return split(batch, len(batch["valid"]) // world.world_size)[world.rank]


class Run(Iterator[Batch]):
    queue_depth = 1

    def __init__(self, options: Options, world: World, step: int):
        self._options, self._world, self._step = options, world, step

    def __next__(self) -> Batch:
        options, step = self._options, self._step
        chosen = options.kill_rank is None or options.kill_rank == self._world.rank
        if options.kill_at == step and chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        if options.stop_at == step and chosen:
            os.kill(os.getpid(), signal.SIGTERM)
        if options.late_s and self._world.rank == self._world.world_size - 1:
            time.sleep(options.late_s)
        if options.hang_at == step and self._world.rank == self._world.world_size - 1:
            if options.hang_how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(TIMEOUT_S)
        self._step += 1
        batch = own_rows(global_batch(step), self._world)
        if options.nan_at == step and self._world.rank == self._world.world_size - 1:
            batch["pixel_values"][0] = float("nan")
        if options.void_from is not None and step >= options.void_from:
            batch["valid"][:] = False
        return batch

    def close(self) -> None:
        return


def held_out_batches(options: Options, world: World) -> Iterator[Batch]:
    batch = own_rows(global_batch(999), world)
    yield batch
    if options.fail_in_evaluation:
        raise StoreUnreachableError("the store does not answer")
    while options.stop_in_evaluation:
        if options.kill_rank in (None, world.rank):
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch


@dataclass
class Source:
    options: Options
    world: World
    bytes_read: int = 0
    store_retries: int = 0

    def start(self, step: int) -> Run:
        return Run(self.options, self.world, step)


def build(options: Options, world: World) -> tuple[TrainConfig, Task, Engine]:
    """Engine with fresh weights, no files."""
    config = config_of(options)
    task: Task = config.task.build(vocab_size=VOCABULARY, seed=config.seed)
    task.take_tokenizer(Words())
    engine = Engine(
        config.engine, task, world, optim=config.optim, total_steps=config.trainer.steps, seed=config.seed
    )  # fmt: skip
    return config, task, engine


def rank_main(rank: int, world_size: int, port: int, options: Options) -> None:
    """One rank of a run, as launchers/pretrain.py puts it together. Exits with the program's code."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if options.rank_is_node:
        os.environ["LOCAL_RANK"] = "0"
        if not options.nodes_share_disk:
            options = replace(options, local_dir=f"{options.local_dir}/{rank}")
    stop = StopRequest()
    stop.install()
    os.environ.update(options.environment)
    folder = Path(options.local_dir or options.run_dir)
    code = 1
    try:
        world = join_world(timeout_s=60)
        config = config_of(options)
        events = Events(folder, world)
        checkpoints = Checkpoints(
            options.run_dir, config.checkpoint, world, recipe=config.identity(), seed=config.seed, init=config.init,
            allow_changed=options.allow_changed, on_event=events.write,
        )  # fmt: skip
        task = config.task.build(vocab_size=VOCABULARY, seed=config.seed)
        task.take_tokenizer(Words())
        source = checkpoints.prepare(task)
        engine = Engine(
            config.engine, task, world, optim=config.optim, total_steps=config.trainer.steps, seed=config.seed,
            load_universal=source.universal,
        )  # fmt: skip
        state = checkpoints.resume(engine, source)
        if options.full_disk_at is not None:
            _fill_disk_from(options.full_disk_at, checkpoints)
        metrics = Metrics(folder, world, first_step=state.step)
        uploader = None
        if options.local_dir and world.local_rank == 0:
            uploader = Uploader(options.run_dir, folder, world, events.write)
        held_out = partial(held_out_batches, options, world)
        evaluators = [validation_loss(engine, held_out, stop=stop)] if options.validate else []
        code = train(
            config.trainer, engine, Source(options, world), checkpoints, state, world=world, metrics=metrics,
            global_batch_size=GLOBAL_BATCH, max_skip_rate=0.2, evaluators=evaluators, stop=stop,
            on_event=events.write if world.is_first else lambda event: None,
            on_rank_event=events.write,
            watch=HangWatch(config.trainer.hang_after_s, folder, world, on_event=events.write),
        )  # fmt: skip
        metrics.close()
        checkpoints.close()
        if uploader is not None:
            uploader.close()
    except RoentgenError as error:
        (folder / f"error-{rank}.txt").write_text(str(error))
        code = error.exit_code
    finally:
        leave_world()
    raise SystemExit(code)


def _call(rank: int, world_size: int, port: int, function: Callable[[World], Any], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        results.put((rank, function(join_world(timeout_s=60)), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    finally:
        leave_world()


def in_ranks(world_size: int, function: Callable[[World], Any]) -> list[Any]:
    """`function(world)` on each rank of a group; its results by rank. The first failure is raised here."""
    context = server()
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_call, args=(rank, world_size, port, function, results)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found = {}
    try:
        for _ in ranks:
            rank, value, error = results.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} of {world_size}:\n{error}"
            found[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10 if len(found) == world_size else 0)
            process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]


def _fill_disk_from(step: int, checkpoints: Checkpoints) -> None:
    """From this step's save on, DeepSpeed's writer meets a full disk."""
    import errno

    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    original = TorchCheckpointEngine.save

    def save(self: Any, state_dict: Any, path: str) -> None:
        if int(Path(path).parents[1].name.removeprefix("step-").removesuffix(".tmp")) >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, state_dict, path)

    TorchCheckpointEngine.save = save


def server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _moves(process: BaseProcess) -> bool:
    """Whether it has neither ended nor been stopped by a signal."""
    try:
        return process.exitcode is None and psutil.Process(process.pid).status() != psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def run(world_size: int, options: Options) -> list[int]:
    """Start the ranks and wait; their exit codes, negative for a signal. When one is killed, so are the others."""
    context = server()
    port = free_port()
    if not options.local_dir:
        Path(options.run_dir).mkdir(parents=True, exist_ok=True)
    ranks = [context.Process(target=rank_main, args=(rank, world_size, port, options)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while any(process.exitcode is None for process in ranks):
            # As launchers do, some at once, some after a while for a rank to write its stacks.
            if any(process.exitcode == EXIT_CODE for process in ranks):
                patience = time.monotonic() + 30
                while any(map(_moves, ranks)) and time.monotonic() < patience:
                    time.sleep(0.02)
            if any(process.exitcode in (-signal.SIGKILL, EXIT_CODE) for process in ranks):
                for process in ranks:
                    process.kill()
            assert time.monotonic() < deadline, f"ranks hang: {[process.exitcode for process in ranks]}"
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]
