"""One training step on any number of processes, CPU or GPU. The only module that imports DeepSpeed.

It owns both schedules of a step (direct, and cached in two passes), the agreement of all ranks before weights move,
and every DeepSpeed setting. It knows no loss, no data and no file layout.

Letters: B studies of the global batch, b of this rank, m of a micro-batch, V images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import logging
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed
from torch import Tensor, nn

from core import collectives
from core.models import attention
from core.optim import OptimConfig, keeping_compiler_out, schedule_factor, turn_of
from core.optim import build as build_optimizer
from core.tasks import Encoded, Exchange, LossOutput, Task
from core.world import World
from kernels.gaussian_similarity import sweep
from shards.batch import FIELDS, Batch
from shards.errors import ConfigError, NonFiniteError

# What the engine decides from the recipe; `engine.deepspeed` may set anything else.
OWNED_OPTIONS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16.enabled",
    "bf16.check_grad_overflow",
    "torch_autocast.enabled",
    "torch_autocast.dtype",
    "zero_optimization.stage",
    "zero_optimization.compute_grad_norm",
    "zero_force_ds_cpu_optimizer",
    "checkpoint.load_universal",
)
# What DeepSpeed imports of its Muon optimizer while it runs another.
MUON_NAMES = {"muon_optimizer": ("MuonWithAuxAdam",), "original_muon": ("muon_update",)}
NAMED_SAMPLES = 8  # sample ids spelt out in an error line; the rest goes to events.jsonl


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed; what is learned does not depend on it, up to rounding.

    `micro_batch`: studies encoded at a time on one rank. Below the rank's share of the global batch it switches on the
    cached two-pass schedule, whose memory does not grow with the batch and whose gradients are those of the whole
    batch. None: one pass.
    `precision`: `fp32`; `bf16`: fp32 parameters, bf16 products (autocast); `bf16_master`: bf16 parameters with fp32
    master weights in the optimizer (needs ZeRO).
    `exchange`: how a loss over all pairs reaches the rows of other ranks. `gather`: every rank holds all columns.
    `ring`: one rank's columns at a time, which travel from rank to rank; for batches whose columns do not fit.
    `attention`: `sdpa` and `matmul` are torch's own and the plain form; `auto`: the fastest for device and length.
    `kernel`: of losses over all pairs; `pytorch` takes no Triton on a GPU. Both hold for the whole process.
    `deepspeed`: any other DeepSpeed option, merged last.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "bf16_master"] = "bf16"
    micro_batch: int | None = None
    exchange: Exchange = "gather"
    attention: Literal["auto", "sdpa", "matmul"] = "auto"
    kernel: Literal["auto", "pytorch"] = "auto"
    gradient_clipping: float = 1.0
    activation_checkpointing: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is unknown; use 0, 1, 2 or 3")
        if self.precision not in ("fp32", "bf16", "bf16_master"):
            raise ConfigError(f"engine.precision={self.precision!r} is unknown; use fp32, bf16 or bf16_master")
        if self.precision == "bf16_master" and self.zero_stage == 0:
            raise ConfigError("engine.precision='bf16_master' keeps its fp32 weights in ZeRO; set engine.zero_stage=1")
        if self.exchange not in ("gather", "ring"):
            raise ConfigError(f"engine.exchange={self.exchange!r} is unknown; use gather or ring")
        if self.attention not in ("auto", "sdpa", "matmul"):
            raise ConfigError(f"engine.attention={self.attention!r} is unknown; use auto, sdpa or matmul")
        if self.kernel not in ("auto", "pytorch"):
            raise ConfigError(f"engine.kernel={self.kernel!r} is unknown; use auto or pytorch")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"engine.micro_batch={self.micro_batch} must be at least 1; None encodes in one pass")
        if not self.gradient_clipping >= 0:
            raise ConfigError(f"engine.gradient_clipping={self.gradient_clipping} is negative; 0 switches it off")
        refused = [name for name in OWNED_OPTIONS if _lookup(self.deepspeed, name) is not None]
        if refused:
            hint = ""
            if "gradient_accumulation_steps" in refused:
                hint = "; accumulation would shrink the negatives of a contrastive loss, engine.micro_batch does not"
            raise ConfigError(f"engine.deepspeed may not set {', '.join(refused)}: the recipe decides them{hint}")


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a finished step says, equal on all ranks. `sums`: the caller's own numbers, added up over the ranks.

    `compute_s`: of this rank alone, up to its first exchange with others; host time, behind which a GPU may lag.
    """

    metrics: dict[str, float]
    sums: dict[str, float]
    compute_s: float = 0.0


def _lookup(tree: Mapping[str, Any], dotted: str) -> Any:
    node: Any = tree
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def deepspeed_options(config: EngineConfig, world: World, *, load_universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed dictionary. Gradients are averaged over ranks; the task's shares are scaled to undo that.

    Nothing overlaps on the CPU: gloo's threads would take the cores that compute. Gradients are exchanged in fp32
    (`lower_precision_safe_modules` empty), so that the number of ranks does not change the rounding of bf16.
    """
    on_gpu = world.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": on_gpu,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    options: dict[str, Any] = {
        "train_batch_size": world.world_size,  # accounting only; batches are split here
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the engine clips, since it needs the norm before DeepSpeed would move the weights.
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": load_universal},
    }
    if config.precision == "bf16":
        options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.precision == "bf16_master":
        options["bf16"] = {"enabled": True, "check_grad_overflow": True}
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(options, config.deepspeed)


def _import_deepspeed() -> Any:
    """DeepSpeed, silent below warnings, on the accelerator this machine has."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), keeping_compiler_out():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.comm

        # Its shared-memory kernel serves inference only. It would cost 75 s of compilation at first use and leave
        # segments in /dev/shm when a rank is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # To tell that our AdamW is not its Muon it would import torch's compiler: three seconds at every start.
        # (`optimizer` is the engine's, so Muon cannot be asked for.)
        for module, names in MUON_NAMES.items():
            stand_in = types.ModuleType(f"deepspeed.runtime.zero.muon.{module}")
            vars(stand_in).update({name: type(name, (), {}) for name in names})
            sys.modules.setdefault(stand_in.__name__, stand_in)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch has begun to rename, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed


def join_world(*, timeout_s: float = 1800.0) -> World:
    """Join the ranks that the launcher started (`deepspeed`, `torchrun`, Ray), or be the only one.

    Raises:
        ConfigError: the launcher's environment is incomplete, or there are more local ranks than GPUs.
    """
    try:
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from None
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank} but this node has {torch.cuda.device_count()} GPUs; start fewer ranks per node"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed = _import_deepspeed()
    # DeepSpeed reads these itself in places.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if world_size == 1:
            torch.distributed.init_process_group(
                backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                raise ConfigError("MASTER_ADDR and MASTER_PORT are not set; start several ranks with `deepspeed`")
            torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return World(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


def leave_world() -> None:
    """End the process group, if there is one, so that exit prints no warning."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def take_paths(config: EngineConfig) -> None:
    """Have the whole process take the attention and the kernel that `config` names from now on."""
    attention.take_only(None if config.attention == "auto" else config.attention)
    sweep.take_only_pytorch(config.kernel == "pytorch")


def split(batch: Batch, rows: int) -> list[Batch]:
    """The batch as micro-batches of at most `rows` studies, each with its own images and `study_index` from 0."""
    studies = len(batch["valid"])
    parts = []
    for start in range(0, studies, rows):
        stop = min(start + rows, studies)
        part: Batch = {}
        first, last = 0, 0
        if "study_index" in batch:
            edges = torch.searchsorted(batch["study_index"], torch.tensor([start, stop], device=batch["valid"].device))
            first, last = (int(edge) for edge in edges)
        for name, values in batch.items():
            per_image = FIELDS.get(name, "[B").startswith("[V")
            part[name] = values[first:last] if per_image else values[start:stop]
        if "study_index" in part:
            part["study_index"] = part["study_index"] - start
        parts.append(part)
    return parts


class _Dispatch(nn.Module):
    """The task behind one `forward`, since DeepSpeed's ZeRO-3 gathers and frees weights around `forward` calls."""

    def __init__(self, task: Task, world: World) -> None:
        super().__init__()
        self.task = task
        self.world = world

    def forward(self, call: Callable[[Task], Any]) -> Any:
        return call(self.task)


def _seed_of(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


class Engine:
    """DeepSpeed around one task. Every method is collective: all ranks call it together.

    `task` may hold initial weights; the engine owns it from then on. `total_steps` and `optim` fix the learning rate
    of every step; `seed` the dropout masks, which are keyed by (seed, step, rank), so nothing random is saved.
    """

    Config = EngineConfig

    def __init__(
        self,
        config: EngineConfig,
        task: Task,
        world: World,
        *,
        optim: OptimConfig,
        total_steps: int,
        seed: int,
        load_universal: bool = False,
    ) -> None:
        self.config = config
        self.world = world
        self.task = task
        self._optim = optim
        self._total_steps = total_steps
        self._seed = seed
        self._arrived = 0.0  # when this rank began to exchange with others, in this step
        self._embeddings: list[Tensor] = []  # of the last step, so that a bad one can be named
        scalars = [name for name, parameter in task.named_parameters() if parameter.ndim == 0]
        assert not scalars, f"DeepSpeed cannot send parameters without dimensions: give {scalars} the shape [1]"
        if config.activation_checkpointing:
            checkpoint_activations(task)
        take_paths(config)
        self._deepspeed = _import_deepspeed()
        options = deepspeed_options(config, world, load_universal=load_universal)
        task.to(world.device)
        # The optimizer's class matters to DeepSpeed, its groups to us; both are fixed before ZeRO takes the tensors.
        optimizer = build_optimizer(task, optim, task.turns)
        own = ("weight_decay", "multiplier", "turn")
        self._group_settings = [{name: group[name] for name in own} for group in optimizer.param_groups]
        with _quiet():
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=_Dispatch(task, world), optimizer=optimizer, config=options, dist_init_required=False
            )
        if config.zero_stage == 3:
            # ZeRO-3 gathers a module's weights again for backward only if its forward returns tensors, or tuples and
            # dictionaries of them. Encoders return dataclasses: what they hold themselves (positions, tokens) is
            # gathered around the whole call instead.
            for module in task.modules():
                if next(module.children(), None) is not None:
                    for parameter in module.parameters(recurse=False):
                        self._deepspeed.zero.register_external_parameter(self._engine.module, parameter)

    # ---- a step ----

    def train_step(self, batch: Batch, *, step: int, sums: Mapping[str, float] | None = None) -> StepOutput:
        """Move the weights from `step` to `step + 1` by this rank's part of the global batch.

        Args:
            batch: this rank's studies, on the host or on the device; the same number on every rank.
            sums: numbers to add up over the ranks on the way (the same names on every rank).

        Raises:
            NonFiniteError: on all ranks, before any weight moved.
        """
        started = time.perf_counter()
        self._arrived = started
        batch = {name: values.to(self.world.device, non_blocking=True) for name, values in batch.items()}
        self._engine.train()
        torch.manual_seed(_seed_of(self._seed, step, self.world.rank))
        factor = schedule_factor(self._optim, step, self._total_steps)
        turns = self.task.turns
        self.task.turn = step % len(turns) if turns else 0
        for group in self._optimizer.param_groups:
            group["lr"] = self._optim.learning_rate * group["multiplier"] * factor
            group["rests"] = group["turn"] not in (None, self.task.turn)
        parts = self._micro_batches(batch)
        with self._others_resting():
            output = self._direct(batch) if len(parts) == 1 else self._cached(parts)
        totals = self._add_up({"loss": output.loss, **output.metrics}, sums or {})
        metrics = {name: totals[f"task/{name}"] for name in output.metrics}
        metrics["loss/total"] = totals["task/loss"]
        if not _finite(metrics["loss/total"]):
            self._stop(batch, step, f"loss={metrics['loss/total']}")
        norm = self._move()
        if norm is None:
            self._stop(batch, step, "gradient norm is not finite")
        with torch.no_grad():
            self.task.after_step(self._whole)
        metrics["optim/grad_norm"] = norm
        metrics["optim/lr"] = self._optim.learning_rate * factor
        added = {name: totals[f"sum/{name}"] for name in sums or {}}
        return StepOutput(metrics=metrics, sums=added, compute_s=self._arrived - started)

    @contextlib.contextmanager
    def _others_resting(self) -> Iterator[None]:
        """Parameters whose turn it is not ask for no gradient: ZeRO-3 would take that of an earlier step for theirs."""
        turns = self.task.turns
        resting = [
            parameter
            for name, parameter in (self.task.named_parameters() if turns else ())
            if turn_of(name, turns) not in (None, self.task.turn) and parameter.requires_grad
        ]
        for parameter in resting:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        rows = self.config.micro_batch
        return [batch] if rows is None or rows >= len(batch["valid"]) else split(batch, rows)

    def _encode(self, part: Batch) -> Encoded:
        # Through the engine's `forward`, around which ZeRO-3 gathers and frees weights.
        encoded: Encoded = self._engine(lambda task: task.encode(part))
        return encoded

    def _direct(self, batch: Batch) -> LossOutput:
        def call(task: Task) -> tuple[Tensor, dict[str, Tensor]]:
            encoded = task.encode(batch)
            self._embeddings = [rows.detach() for rows in encoded.gather.values() if rows.is_floating_point()]
            output = self._objective(task, encoded)
            return output.loss, output.metrics

        loss, metrics = self._engine(call)
        self._backward(loss)
        return LossOutput(loss=loss.detach(), metrics=metrics)

    def _cached(self, micro_batches: list[Batch]) -> LossOutput:
        """Two passes: embeddings without graph, their gradients from the loss, then the graph piece by piece.

        (GradCache, arXiv 2101.06983.) The second pass of a micro-batch replays the random state of its first.
        """
        states, pieces = [], []
        for micro_batch in micro_batches:
            states.append(self._random_state())
            with torch.no_grad():
                pieces.append(self._encode(micro_batch))
        after = self._random_state()
        leaves = _joined(pieces)
        for leaf in (*leaves.gather.values(), *leaves.local.values()):
            leaf.requires_grad_(leaf.is_floating_point())
        self._embeddings = [leaf.detach() for leaf in leaves.gather.values() if leaf.is_floating_point()]

        def objective(task: Task) -> tuple[LossOutput, dict[str, Tensor], list[tuple[str, Tensor]]]:
            output = self._objective(task, leaves)
            wanted = {
                **{f"gather/{name}": leaf for name, leaf in leaves.gather.items() if leaf.requires_grad},
                **{f"local/{name}": leaf for name, leaf in leaves.local.items() if leaf.requires_grad},
            }
            own = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
            with torch.autocast(self.world.device.type, enabled=False):  # of a loss in fp32, so is this
                grads = torch.autograd.grad(output.loss, [*wanted.values(), *own.values()], allow_unused=True)
            of_leaves = {name: grad for name, grad in zip(wanted, grads, strict=False) if grad is not None}
            of_parameters = [
                (name, grad) for name, grad in zip(own, grads[len(wanted) :], strict=True) if grad is not None
            ]
            return LossOutput(loss=output.loss.detach(), metrics=output.metrics), of_leaves, of_parameters

        output, of_leaves, of_parameters = self._engine(objective)
        start = 0
        for index, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
            self._set_random_state(state)
            rows = slice(start, start + len(micro_batch["valid"]))
            start = rows.stop

            def replay(task: Task, part: Batch = micro_batch, rows: slice = rows) -> Tensor:
                encoded = task.encode(part)
                tensors = {
                    **{f"gather/{name}": values for name, values in encoded.gather.items()},
                    **{f"local/{name}": values for name, values in encoded.local.items()},
                }
                # A scalar whose gradient is the one wanted. An embedding that the loss did not use adds zero, so that
                # every parameter has a gradient in every micro-batch, on every rank.
                surrogate = torch.zeros((), device=self.world.device)
                for name, values in tensors.items():
                    if values.requires_grad:
                        grad = of_leaves.get(name)
                        weight = torch.zeros_like(values) if grad is None else grad[rows].to(values.dtype)
                        surrogate = surrogate + (values * weight).sum()
                # The objective's own parameters join the first pass: ZeRO-3 overwrites its gradient buffers there, and
                # adds to whatever an earlier step left in them afterwards.
                if rows.start == 0:
                    parameters = dict(task.named_parameters())
                    for name, grad in of_parameters:
                        surrogate = surrogate + (parameters[name] * grad).sum()
                return surrogate

            loss = self._engine(replay)
            self._backward(loss, boundary=index == len(micro_batches) - 1)
        self._set_random_state(after)
        return output

    def _objective(self, task: Task, encoded: Encoded) -> LossOutput:
        self._arrived = time.perf_counter()
        with torch.autocast(self.world.device.type, enabled=False):  # logits and losses are fp32
            gathered = collectives.gather(encoded.gather, exchange=self.config.exchange)
            return task.objective(gathered, encoded.local)

    def _backward(self, share: Tensor, *, boundary: bool = True) -> None:
        self._engine.set_gradient_accumulation_boundary(boundary)
        # DeepSpeed averages over the ranks; the shares of the ranks add up.
        self._engine.backward(share * self.world.world_size)

    def _move(self) -> float | None:
        """The optimizer's step, after which the gradient norm is returned; None if it is not finite: nothing moved."""
        if self.config.zero_stage == 0:
            parameters = [parameter for parameter in self.task.parameters() if parameter.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, self.config.gradient_clipping or float("inf")))
            if not _finite(norm):
                return None
            self._engine.step()
            return norm
        # ZeRO computes the norm over all ranks and skips the step if it is not finite: that skip is our stop.
        with _quiet():
            self._engine.step()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    def _add_up(self, of_task: Mapping[str, Tensor], of_caller: Mapping[str, float]) -> dict[str, float]:
        """One small all-reduce a step, and the only wait for the device before the optimizer moves."""
        names = [f"task/{name}" for name in of_task] + [f"sum/{name}" for name in of_caller]
        values = [value.detach().double().reshape(()) for value in of_task.values()]
        own = torch.tensor([*of_caller.values()], dtype=torch.float64, device=self.world.device)
        packed = torch.cat([torch.stack(values), own]) if values else own
        if self.world.world_size > 1:
            torch.distributed.all_reduce(packed)
        return dict(zip(names, packed.tolist(), strict=True))

    def _stop(self, batch: Batch, step: int, what: str) -> NoReturn:
        """Raise on all ranks, naming the step and the samples: those with bad embeddings, else the whole batch."""
        finite = torch.ones_like(batch["valid"])
        for rows in self._embeddings:
            finite &= rows.isfinite().flatten(1).all(dim=1)
        ids = collectives.all_gather_rows(batch.get("sample_id", torch.arange(len(finite), device=finite.device)))
        everywhere_finite = collectives.all_gather_rows(finite)
        bad = ids[~everywhere_finite].tolist()
        named = bad or ids.tolist()
        listed = ", ".join(map(str, named[:NAMED_SAMPLES])) + (", ..." if len(named) > NAMED_SAMPLES else "")
        subject = "embeddings are not finite for samples" if bad else "samples of the batch:"
        error = NonFiniteError(
            f"step {step}: {what}; no weight was moved; {subject} {listed}; "
            f"look at them with launchers/replay.py --step {step}"
        )
        error.sample_ids = named
        raise error

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        on_gpu = self.world.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.world.device) if on_gpu else None

    def _set_random_state(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.world.device)

    # ---- evaluation ----

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Task]:
        """The task in evaluation mode, without gradients, in the run's precision. Ranks make the same calls inside."""
        self._engine.eval()
        bf16 = self.config.precision == "bf16"
        try:
            with torch.no_grad(), torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
                yield self.task
        finally:
            self._engine.train()

    def validation_step(self, batch: Batch) -> dict[str, float]:
        """The loss of a global batch and its parts, summed over the ranks; moves nothing.

        Encodes `micro_batch` studies at a time, as training does: what fits there fits here.
        """
        batch = {name: values.to(self.world.device, non_blocking=True) for name, values in batch.items()}
        with self.evaluating():
            encoded = _joined([self._encode(part) for part in self._micro_batches(batch)])
            output = self._engine(lambda task: self._objective(task, encoded))
        totals = self._add_up({"loss": output.loss, **output.metrics}, {})
        metrics = {name: totals[f"task/{name}"] for name in output.metrics}
        metrics["loss/total"] = totals["task/loss"]
        return metrics

    # ---- weights and state ----

    def full_weights(self) -> dict[str, Tensor]:
        """Every weight and buffer in full precision (fp32), on the host. Collective; only rank 0 gets them."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.task.named_parameters():
            value = self._whole(parameter)
            if self.world.is_first:
                weights[name] = value.to("cpu", torch.float32, copy=True).contiguous()
        if self.world.is_first:
            for name, buffer in self.task.named_buffers():
                weights[name] = buffer.detach().to("cpu", copy=True).contiguous()
        return weights

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A weight in one piece, in the optimizer's precision where it is trained. Collective; every rank gets it."""
        if self.config.zero_stage != 3 and self.config.precision != "bf16_master":
            return parameter.detach()
        if not parameter.requires_grad:
            with self._deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor | None = safe_get_full_fp32_param(parameter)
        assert value is not None
        return value.detach()

    def save(self, folder: Path) -> list[OSError]:
        """Write DeepSpeed's state into `folder`; every rank writes its part. Collective.

        Returns:
            What this rank could not write (disk full, ...). It is not raised here, since the other ranks would wait.
        """
        writer = self._engine.checkpoint_engine
        failures: list[OSError] = []
        original = writer.save

        def save(state_dict: Any, path: str) -> None:
            try:
                original(state_dict, path)
            except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into a RuntimeError
                failures.append(error if isinstance(error, OSError) else OSError(str(error)))

        writer.save = save
        try:
            with _quiet():
                self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
            for script in folder.parent.glob("zero_to_*.py"):  # its own tools, which weights.safetensors replaces
                script.unlink(missing_ok=True)
        finally:
            writer.save = original
        return failures

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on the same number of ranks (or what `to_universal` made of it). Collective."""
        with _quiet():
            path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert path is not None, f"DeepSpeed found no state in {folder}"
        # Its universal form gives every group the first group's settings, and all of them one counter to share.
        for group, settings in zip(self._optimizer.param_groups, self._group_settings, strict=True):
            group.update(settings)
        for state in self._optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def to_universal(source: Path, target: Path) -> None:
    """Turn the state that `Engine.save` wrote into DeepSpeed's universal form, readable on any number of ranks.

    Runs on one process, without collectives; writes about three times the weights.
    """
    _import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def checkpoint_activations(task: Task) -> None:
    """Have every stack of blocks keep only the blocks' inputs for backward and compute the rest again."""
    stacks = [module for module in task.modules() if isinstance(getattr(module, "checkpoint_activations", None), bool)]
    if not stacks:
        raise ConfigError("engine.activation_checkpointing=True, but this task has no stack of blocks; set it to False")
    for stack in stacks:
        stack.checkpoint_activations = True  # type: ignore[assignment]


def _joined(pieces: list[Encoded]) -> Encoded:
    """What micro-batches contribute, in their order, as one batch would; without graph."""
    return Encoded(
        gather={name: torch.cat([piece.gather[name].detach() for piece in pieces]) for name in pieces[0].gather},
        local={name: torch.cat([piece.local[name].detach() for piece in pieces]) for name in pieces[0].local},
    )


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints and its advice for other users off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
