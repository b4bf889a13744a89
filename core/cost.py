"""What a study costs a task: memory that its forward pass leaves for the backward, arithmetic, bytes for other ranks.

Counted on a synthetic batch of the recipe's shapes, on the CPU and without data; what a GPU's fused attention keeps is
what torch's own does here. Planning multiplies these figures; nothing here knows machines or prices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from core.tasks import Task
from shards.batch import Batch

FEW, MORE = 2, 4  # studies of the two passes whose difference is one study's cost


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one task. `flop`: floating-point operations of a study's forward pass, multiply and add counted apart.

    `kept_bytes`: what a study's forward pass leaves for the backward; `fixed_bytes`: what any pass leaves, whatever the
    number of studies (copies of the weights in bf16, positions). `gathered_bytes`: a study's row that travels to other
    ranks. `parameters` by module of the task, `trained` those with a gradient.
    """

    parameters: dict[str, int]
    trained: int
    flop: float
    kept_bytes: float
    fixed_bytes: float
    gathered_bytes: float


def measure(task: Task, batch_of: Callable[[int], Batch], *, half_precision: bool) -> Cost:
    """The cost of a study, from one forward pass of `FEW` and one of `MORE` of them; takes seconds.

    `batch_of(studies)` makes a batch on the CPU. Studies are taken to cost alike, and attention to be fused.
    """
    few, more = (_forward(task, batch_of(studies), half_precision=half_precision) for studies in (FEW, MORE))
    (kept, flop, gathered), step = few, MORE - FEW
    kept_each = (more[0] - kept) / step
    parts: dict[str, int] = {}
    for name, weight in task.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + weight.numel()
    return Cost(
        parameters=parts,
        trained=sum(weight.numel() for weight in task.parameters() if weight.requires_grad),
        flop=(more[1] - flop) / step,
        kept_bytes=kept_each,
        fixed_bytes=max(0.0, kept - FEW * kept_each),
        gathered_bytes=(more[2] - gathered) / step,
    )


def _forward(task: Task, batch: Batch, *, half_precision: bool) -> tuple[int, int, int]:
    """(bytes alive after the pass that were not before, operations, bytes to gather)."""
    precision = torch.autocast("cpu", torch.bfloat16) if half_precision else nullcontext()
    with _Alive() as alive, FlopCounterMode(display=False) as counter, precision:
        encoded = task.encode(batch)
        kept = alive.bytes
    gathered = sum(value.nbytes for value in encoded.gather.values())
    return kept, counter.get_total_flops(), gathered


class _Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs | self._known:  # not a view of what was there
                    self._known.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.bytes -= size
