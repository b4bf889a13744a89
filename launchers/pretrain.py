"""Pre-train: recipe in, run directory out. The same command on one CPU, one node, a cluster, and after a crash.

    deepspeed launchers/pretrain.py --recipe chest:clip_b16 --run-dir runs/a --set data.train=shards/manifest.json
    python launchers/pretrain.py ...       one process
    torchrun --nproc-per-node 4 launchers/pretrain.py ...

Without a GPU the `deepspeed` runner needs to be told: DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 ...
It parses, joins loader and trainer, and exits with the code that scripts rely on.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import platform
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.logging import RichHandler

from configs import prompts, schema
from configs.schema import TrainConfig
from core import self_proof
from core.alerts import Webhook
from core.checkpoint import Checkpoints, TrainState, local_folder
from core.checkpoint_files import write_atomically
from core.collectives import raise_together
from core.engine import Engine, join_world, leave_world
from core.evaluation.anatomy import AnatomyZeroShot, LabelAreas
from core.evaluation.embed import (
    ANATOMY_PARTS,
    LABEL_PART,
    Encoders,
    GaussianTask,
    embed_split,
    parts_of_retrieval,
    parts_of_uncertainty,
)
from core.evaluation.heat_map import Explained, HeatMaps
from core.evaluation.retrieval import Retrieval
from core.evaluation.uncertainty import Uncertainty
from core.evaluation.zero_shot import ZeroShot
from core.hang_watch import HangWatch
from core.lease import Lease
from core.losses.contrast import DEFAULT_PRECISION, Similarity
from core.metrics import Events, Metrics, Uploader
from core.models.contrast import GaussianContrast
from core.profiling import StepProfiler
from core.trainer import Evaluator, Pictures, StopRequest, TooManySkipsError, train, validation_loss
from core.world import World
from kernels.gaussian_similarity.expansion import Precision
from launchers import past_run
from shards.collate import VOLUME_FIELDS
from shards.dataset import DataSet
from shards.decode import Decoder
from shards.decode_check import levels_apart
from shards.errors import ConfigError, NonFiniteError, RoentgenError, StoreFullError
from shards.loader import Loader, as_mixture, corpus, find_tokenizer, reads_text
from shards.store import open_store
from shards.tokenizer import Tokenizer, load_tokenizer, train_wordpiece

log = logging.getLogger("roentgen")

TOKENIZER = "tokenizer"
EVALUATION_LIMIT = 5000  # studies embedded for the curves during training; launchers/evaluate.py takes all


def parser() -> argparse.ArgumentParser:
    """The command line; everything else is in the recipe."""
    names = "\n".join(f"  {name:20} {about}" for name, about in schema.recipes().items())
    result = argparse.ArgumentParser(
        prog="pretrain.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"recipes:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--recipe", required=True, metavar="FIELD:RUN", help="what to run, see below")
    result.add_argument("--run-dir", metavar="DIR", help="folder or s3://bucket/prefix; a run found there is continued")
    result.add_argument(
        "--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe"
    )
    result.add_argument("--print", action="store_true", help="show the whole run and exit; * marks what --set changed")
    result.add_argument(
        "--allow-changed",
        nargs="+",
        default=[],
        metavar="KEY",
        help="continue although these keys of the recipe changed",
    )
    result.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed runner passes it
    return result


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended. `agreed`: all ranks end with this code; otherwise it is one rank's own trouble."""

    code: int
    message: str = ""
    agreed: bool = True


# Called on rank 0 with the step from which the ranks are about to train; the events that it returns are written.
OnStart = Callable[[int], Sequence[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    rank = int(os.environ.get("RANK", "0") or 0)
    # Before anything slow, so that a signal during start-up ends with the same code as one during training.
    stop = StopRequest()
    before = stop.install()
    try:
        if arguments.print:
            if rank == 0:
                config, changed = recipe_of(arguments)
                print(schema.to_text(changed, base=config))
            return 0
        ending = run_rank(arguments, stop)
    except ConfigError as error:
        ending = Ending(code=error.exit_code, message=str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    if ending.message and (rank == 0 or not ending.agreed):
        print(f"error: {ending.message}" if rank == 0 else f"error (rank {rank}): {ending.message}", file=sys.stderr)
        sys.stderr.flush()
    return ending.code


def recipe_of(arguments: argparse.Namespace) -> tuple[TrainConfig, TrainConfig]:
    """The recipe that `parser` was given, and the run: the recipe with its changes. Raises ConfigError."""
    config = schema.load_recipe(arguments.recipe)
    return config, schema.apply_overrides(config, arguments.overrides)


def run_rank(arguments: argparse.Namespace, stop: StopRequest, *, on_start: OnStart = lambda step: ()) -> Ending:
    """This process's rank of the run that `parser` was given, whoever started it. Errors of ours become its ending."""
    try:
        _, config = recipe_of(arguments)
        if arguments.run_dir is None:
            raise ConfigError("--run-dir is missing; name a folder or s3://bucket/prefix")
        world = join_world()
        _log_to_screen(world)
        return Ending(code=_run(config, arguments.run_dir, arguments.allow_changed, world, stop, on_start))
    except RoentgenError as error:
        # These are agreed on by all ranks, so one of them speaks; the others are one rank's own trouble.
        agreed = isinstance(error, ConfigError | NonFiniteError | StoreFullError | TooManySkipsError)
        return Ending(code=error.exit_code, message=str(error), agreed=agreed)
    except RuntimeError as error:
        # A rank that dies takes its connections with it. Its own message is the one to read, not a trace from here.
        if not any(word in str(error) for word in ("Connection closed by peer", "Connection reset by peer", "NCCL")):
            raise
        return Ending(code=1, message="lost another rank; its message says why", agreed=False)
    finally:
        leave_world()


def _log_to_screen(world: World) -> None:
    handler = RichHandler(show_path=False, show_time=False, markup=False)
    handler.console.stderr = True
    level = logging.INFO if world.is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _run(
    config: TrainConfig,
    run_dir: str,
    allow_changed: Sequence[str],
    world: World,
    stop: StopRequest,
    on_start: OnStart,
) -> int:
    """The run, with its events from the first to the last, error included, where the run directory is."""
    folder = local_folder(run_dir, config.checkpoint)
    problem: ConfigError | None = None
    webhook = None
    try:
        webhook = Webhook(config.alerts, run_dir) if config.alerts.webhook_url else None
        events = Events(folder, world, on_alert=webhook.send if webhook is not None else lambda event: None)
    except ConfigError as error:
        problem = error
    except OSError as error:
        problem = ConfigError(
            f"{folder}: cannot be written on {socket.gethostname()} ({error.strerror}); choose another --run-dir"
        )
    stand_in = ConfigError(f"{folder}: another rank cannot use it or its settings; its message says why")
    raise_together(problem, stand_in, device=world.device)
    lease = _lease(run_dir, events, world)
    uploader = None
    try:
        uploader = _uploader(run_dir, folder, events, world)
        code = _train(config, run_dir, folder, allow_changed, world, events, stop, on_start)
        if world.is_first:
            events.write({"event": "end", "code": code})
        return code
    except RoentgenError as error:
        if isinstance(error, NonFiniteError):  # ends with the command that shows the batch, of which this is the rest
            error.args = (f"{error} --run-dir {shlex.quote(run_dir)}",)
        event: dict[str, Any] = {"event": "error", "kind": type(error).__name__, "message": str(error)}
        if isinstance(error, NonFiniteError):
            event["samples"] = list(error.sample_ids)
        if world.is_first or not isinstance(error, NonFiniteError):
            events.write(event)
        raise
    finally:
        if uploader is not None:
            uploader.close()
        if webhook is not None:
            webhook.close()
        if lease is not None:
            lease.release()


def _lease(run_dir: str, events: Events, world: World) -> Lease | None:
    """Rank 0's right to write to the run directory. Collective: where another run holds it, all ranks end."""
    lease, problem = None, None
    if world.is_first:
        try:
            lease = Lease(run_dir, on_event=events.write)
        except RoentgenError as error:
            problem = error
    raise_together(problem, ConfigError(f"{run_dir}: rank 0 cannot hold the run directory"), device=world.device)
    return lease


def _uploader(run_dir: str, folder: Path, events: Events, world: World) -> Uploader | None:
    """One a node, for an s3:// run. Collective, so that a store that cannot be used ends all ranks."""
    if not run_dir.startswith("s3://"):
        return None
    uploader, problem = None, None
    if world.local_rank == 0:
        try:
            uploader = Uploader(run_dir, folder, world, events.write)
        except RoentgenError as error:
            problem = error
    try:
        stand_in = ConfigError(f"{run_dir}: another rank cannot use the run directory")
        raise_together(problem, stand_in, device=world.device)
    except RoentgenError:
        if uploader is not None:
            uploader.close()
        raise
    return uploader


def _train(
    config: TrainConfig,
    run_dir: str,
    folder: Path,
    allow_changed: Sequence[str],
    world: World,
    events: Events,
    stop: StopRequest,
    on_start: OnStart,
) -> int:
    if world.device.type == "cuda":
        self_proof.prove(_parts_to_prove(config, world.device), world)
    tokenizer = _tokenizer(config, run_dir, folder, world)
    loader = Loader(
        config.data,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        fields=schema.task_class(config.task).fields,
        tokenizer=tokenizer,
        on_event=events.write,
    )
    vocab_size = loader.tokenizer.vocab_size if loader.tokenizer is not None else None
    task = config.task.build(vocab_size=vocab_size, seed=config.seed)
    if loader.tokenizer is not None:
        task.take_tokenizer(loader.tokenizer)
    has_validation = _has_validation(config, loader)
    checkpoints = Checkpoints(
        run_dir,
        config.checkpoint,
        world,
        recipe=_identity(config, loader),
        seed=config.seed,
        init=config.init,
        allow_changed=allow_changed,
        on_event=events.write,
    )
    try:
        source = checkpoints.prepare(task)
        log.info("starting from %s", source.description)
        engine = Engine(
            config.engine,
            task,
            world,
            optim=config.optim,
            total_steps=config.trainer.steps,
            seed=config.seed,
            load_universal=source.universal,
        )
        state = checkpoints.resume(engine, source)
        if world.is_first:
            text = schema.dumps(config)
            write_atomically(folder / "config.json", text.encode())
            start = {"event": "start", "step": state.step, "ranks": world.world_size, "from": source.description}
            events.write({**start, "threads": torch.get_num_threads(), "versions": past_run.versions()})
            for event in on_start(state.step):
                events.write(event)
        profiler = StepProfiler(folder, world, config.trainer.profiled_steps())
        with closing(Metrics(folder, world, first_step=state.step, events=events.path)) as metrics, closing(profiler):
            metrics.run(state.step, schema.shown(config), schema.to_text(config), _environment(world))
            code = train(
                config.trainer,
                engine,
                loader,
                checkpoints,
                state,
                world=world,
                metrics=metrics,
                global_batch_size=config.global_batch_size,
                max_skip_rate=config.data.max_skip_rate + loader.forgotten_share,
                evaluators=_evaluators(config, engine, loader, world, stop) if has_validation else [],
                pictures=_heat_maps(config, engine, loader, world) if has_validation else None,
                on_event=events.write if world.is_first else lambda event: None,
                stop=stop,
                on_rank_event=events.write,
                watch=HangWatch(config.trainer.hang_after_s, folder, world, on_event=events.write),
                profiler=profiler,
            )
    except Exception:
        checkpoints.abandon()
        raise
    checkpoints.close()
    return code


def _environment(world: World) -> dict[str, Any]:
    """What the run runs on, for its page in TensorBoard."""
    on_gpu = world.device.type == "cuda"
    return {
        "ranks": world.world_size,
        "device of rank 0": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "host of rank 0": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **past_run.versions(),
    }


def _parts_to_prove(config: TrainConfig, device: torch.device) -> list[self_proof.Part]:
    """The fast paths that this run would take."""
    parts = []
    embed_dim: int | None = getattr(config.task, "embed_dim", None)
    if embed_dim is None:
        log.warning("self-proof: the task has no embed_dim, so its losses over all pairs, if any, are not compared")
    elif config.engine.kernel == "auto":
        parts.append(self_proof.kernel_part(device, embed_dim, _contrasts(config.task)))
    if config.engine.attention == "auto":
        parts.append(self_proof.attention_part(device, half_precision=config.engine.precision != "fp32"))
    decode = config.data.decode
    if decode.device == "mixed":

        def compare() -> Iterator[self_proof.Difference]:
            apart = levels_apart(Decoder(decode), Decoder(replace(decode, device="cpu")))
            yield from (self_proof.Difference(f"{kind}, grey levels", levels, 2.0) for kind, levels in apart.items())

        parts.append(
            self_proof.Part(name="decoding on the GPU", switch="--set data.decode.device=cpu", compare=compare)
        )
    return parts


def _contrasts(task: object) -> list[tuple[Similarity, Precision]]:
    """Similarity and precision of each loss over all pairs: as the task's config says, else cosines."""
    chosen = [value for value in vars(task).values() if isinstance(value, GaussianContrast.Config)]
    named = {(each.similarity, each.precision or DEFAULT_PRECISION[each.similarity]) for each in chosen}
    return sorted(named) or [("cosine", getattr(task, "precision", None) or DEFAULT_PRECISION["cosine"])]


def _tokenizer(config: TrainConfig, run_dir: str, folder: Path, world: World) -> Tokenizer | None:
    """The run's own from before, else the recipe's or the manifest's, else one trained on the reports. Kept in the run.

    The loader would find the second kind itself; the run keeps a copy, so that it can be evaluated without its data.
    """
    if not reads_text(schema.task_class(config.task).fields):
        return None
    path = folder / TOKENIZER
    leads = world.is_first if not run_dir.startswith("s3://") else world.local_rank == 0
    problem: RoentgenError | None = None
    if leads and not path.is_dir():
        try:
            _make_tokenizer(config, run_dir, path, world)
        except RoentgenError as error:
            problem = error
    raise_together(problem, ConfigError("rank 0 has no tokenizer"), device=world.device)
    return load_tokenizer(path)


def _make_tokenizer(config: TrainConfig, run_dir: str, path: Path, world: World) -> None:
    tokenizer = _mirrored_tokenizer(run_dir) if run_dir.startswith("s3://") else None
    if tokenizer is None:
        sets = [
            DataSet(part.manifest, part.split, store=config.data.store)
            for part in as_mixture(config.data, config.global_batch_size)
        ]
        if config.data.tokenizer or any(data.whole.tokenizer for data in sets):
            tokenizer = find_tokenizer(config.data, sets)
        else:
            # A set that cannot be trained on is refused before its text is learned, which the run would keep.
            Loader(
                config.data,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                rank=world.rank,
                world_size=world.world_size,
                fields=sorted(VOLUME_FIELDS.intersection(schema.task_class(config.task).fields)),
            )
            log.info("no tokenizer named: training WordPiece on the reports")
            tokenizer = train_wordpiece(corpus(config.data, config.global_batch_size), config.tokenizer_words)
    temporary = path.with_name(f".{path.name}.tmp")
    tokenizer.save(temporary)
    os.replace(temporary, path)


def _mirrored_tokenizer(run_dir: str) -> Tokenizer | None:
    """The one that an s3:// run sent to its store before it lost this disk, if it did."""
    with open_store(run_dir) as store:
        names = store.list(f"{TOKENIZER}/")
        files = {name.rsplit("/", 1)[-1]: store.get(name) for name in names}
    return Tokenizer.from_files(files, run_dir) if files else None


def _identity(config: TrainConfig, loader: Loader) -> dict[str, Any]:
    """What decides what is learned: recipe, and the content of data and vocabulary wherever they lie."""
    content = {"manifests_sha256": [data.whole.origin for data in loader.sets]}
    tokenizer = loader.tokenizer
    return {**config.identity(), **content, "tokenizer_sha256": tokenizer.sha256 if tokenizer is not None else None}


def _has_validation(config: TrainConfig, loader: Loader) -> bool:
    """Whether there is held-out data. One that is named but not there must show now, not at the first evaluation."""
    split = config.data.validation_split
    if config.data.validation is not None:
        with closing(DataSet(config.data.validation, split, store=config.data.store)):
            return True
    splits = loader.sets[0].whole.splits
    if split not in splits:
        log.warning("no validation: the manifest has no split %r (it has %s)", split, ", ".join(splits))
    return split in splits


def _evaluators(
    config: TrainConfig, engine: Engine, loader: Loader, world: World, stop: StopRequest
) -> list[Evaluator]:
    """Validation loss always; the recipe's protocols on the held-out split where the task embeds both sides."""
    batches = partial(loader.evaluate, batch_size=config.global_batch_size)
    limit = config.trainer.validation_batches
    studies = None if limit is None else limit * config.global_batch_size
    found = [validation_loss(engine, partial(batches, limit=studies), stop=stop)]
    task = engine.task
    tokenizer = loader.tokenizer
    protocols = config.evaluation.protocols
    if LabelAreas.protocol in protocols:
        return [*found, _held_out_labels(config, engine, loader, world, stop)]
    if tokenizer is None or not all(callable(getattr(task, name, None)) for name in ("embed_images", "embed_texts")):
        return found
    chosen, _ = prompts.choose(loader.labels, config.evaluation.prompts, config.data.report)
    parts = parts_of_retrieval(task) if Retrieval.protocol in protocols else set()
    if {ZeroShot.protocol, Uncertainty.protocol} & set(protocols):
        parts |= {"image_embeds"} | ({"text_embeds"} if "input_ids" in task.fields else set())
    if AnatomyZeroShot.protocol in protocols:
        parts |= set(ANATOMY_PARTS)
        if chosen:  # labels of which none has an anatomy show now, not after the steps before the first evaluation
            AnatomyZeroShot(chosen, config.evaluation.anatomy_of).asked(loader.labels, config.task.anatomies)
    if Uncertainty.protocol in protocols:
        parts |= parts_of_uncertainty(task) | ({"text_logvar"} if isinstance(task, GaussianTask) else set())
    common: dict[str, Any] = {"text_length": config.data.text_length, "replicates": 1}  # curves need no intervals

    def held_out(_state: TrainState) -> Iterator[tuple[str, float | torch.Tensor]]:
        limited = partial(loader.evaluate, batch_size=config.global_batch_size, limit=EVALUATION_LIMIT)
        with engine.evaluating() as evaluated:
            model = cast(Encoders, evaluated)
            split = embed_split(
                model,
                limited(),
                world.device,
                parts=sorted(parts),
                on_batch=lambda studies: stop.leave_evaluation(world.device),
            )
            labels, device = loader.labels, world.device
            measured: dict[str, Iterator[tuple[str, float]]] = {}
            if Retrieval.protocol in protocols:
                measured[Retrieval.protocol] = Retrieval(Retrieval.Config(replicates=1)).run(split)
            if ZeroShot.protocol in protocols and chosen:
                asked = ZeroShot.Config(temperature=config.evaluation.prompt_temperature, **common)
                zero_shot = ZeroShot(chosen, asked)
                measured[ZeroShot.protocol] = zero_shot.run(model, tokenizer, split, labels, device)
            if AnatomyZeroShot.protocol in protocols and chosen:
                by_anatomy = AnatomyZeroShot(chosen, config.evaluation.anatomy_of, ZeroShot.Config(**common))
                measured[AnatomyZeroShot.protocol] = by_anatomy.run(
                    model, tokenizer, split, labels, config.task.anatomies, device
                )
            uncertainty = Uncertainty(chosen, Uncertainty.Config(**common))
            if Uncertainty.protocol in protocols and chosen:
                measured[Uncertainty.protocol] = uncertainty.run(
                    model, tokenizer, split, labels, device, with_text=split
                )
            for protocol, figures in measured.items():
                for name, value in figures:
                    yield f"{protocol}/{name}", value
            for name, image in uncertainty.pictures().items():
                yield f"{Uncertainty.protocol}/{name}", image

    return [*found, held_out]


def _heat_maps(config: TrainConfig, engine: Engine, loader: Loader, world: World) -> Pictures | None:
    """Of studies of rank 0's share of the first held-out batch: where in an anatomy the scores of diseases come from.

    None where the task cannot say, and under ZeRO 3, which has no whole weights outside of a module's forward.
    """
    asked = config.evaluation
    explains = callable(getattr(engine.task, "evidence", None)) and AnatomyZeroShot.protocol in asked.protocols
    tokenizer = loader.tokenizer
    if not world.is_first or not explains or tokenizer is None or config.engine.zero_stage == 3:
        return None
    chosen, _ = prompts.choose(loader.labels, asked.prompts, config.data.report)
    if not chosen or not config.trainer.picture_every:
        return None
    zero_shot = AnatomyZeroShot(chosen, asked.anatomy_of, ZeroShot.Config(text_length=config.data.text_length))
    anatomies = config.task.anatomies
    names = zero_shot.asked(loader.labels, anatomies).names
    maps = HeatMaps(names, asked.anatomy_of, anatomies)

    def pictures() -> Iterator[tuple[str, torch.Tensor]]:
        size = config.global_batch_size
        batches = loader.evaluate(batch_size=size, limit=size, more_fields=("anatomy_labels",))
        with engine.evaluating() as task:
            directions = zero_shot.directions(cast(Encoders, task), tokenizer, names, world.device)
            size_of_place = config.task.vision.fine_size
            drawn = maps.run(cast(Explained, task), directions, batches, loader.labels, size_of_place, world.device)
            for name, image in drawn:
                yield f"eval/{HeatMaps.name_of(name)}", image

    return pictures


def _held_out_labels(config: TrainConfig, engine: Engine, loader: Loader, world: World, stop: StopRequest) -> Evaluator:
    """How well a task that was taught labels predicts them."""

    def held_out(_state: TrainState) -> Iterator[tuple[str, float | torch.Tensor]]:
        batches = loader.evaluate(batch_size=config.global_batch_size, limit=EVALUATION_LIMIT)
        with engine.evaluating() as evaluated:
            split = embed_split(
                cast(Encoders, evaluated),
                batches,
                world.device,
                parts=(LABEL_PART,),
                on_batch=lambda studies: stop.leave_evaluation(world.device),
            )
        for name, value in LabelAreas(ZeroShot.Config(replicates=1)).run(split, loader.labels):
            yield f"{LabelAreas.protocol}/{name}", value

    return held_out


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
