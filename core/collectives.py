"""Communication between ranks: row gathers with their exact gradient, sums, votes, and rank 0's word.

With one process, or before a process group exists, every function is the identity. All ranks must call each of them in
the same order. What it does not do: decide who computes what; the losses own that.

Letters: W = ranks, b = rows of one rank, B = W * b rows of the global batch.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.tasks import Gathered
from shards.errors import RoentgenError


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _gather(x: Tensor) -> Tensor:
    """[b, ...] -> [W * b, ...] in rank order, no gradient. Booleans travel as bytes: backends lack the type."""
    sent = x.detach().contiguous()
    if sent.dtype is torch.bool:
        return _gather(sent.to(torch.uint8)).to(torch.bool)
    received = sent.new_empty((world_size() * sent.shape[0], *sent.shape[1:]))
    dist.all_gather_into_tensor(received, sent)
    return received


class _AllGatherRows(torch.autograd.Function):
    """Backward sums what each rank's share says about this rank's rows: the exact gradient of the summed shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # fp32 at least: a sum over many ranks in bf16 would lose the small shares.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        if dist.get_backend() == "nccl":
            own = wide.new_empty((ctx.rows, *wide.shape[1:]))
            dist.reduce_scatter_tensor(own, wide)
        else:
            # gloo's all-reduce adds in an order fixed by the number of ranks alone; its reduce-scatter is this too.
            wide = wide.clone() if wide.data_ptr() == grad.data_ptr() else wide
            dist.all_reduce(wide)
            own = wide[rank() * ctx.rows : (rank() + 1) * ctx.rows]
        return own.to(grad.dtype)


def all_gather_rows(x: Tensor) -> Tensor:
    """[b, ...] on each rank -> [W * b, ...] on all, in rank order; b must be equal on all ranks.

    Floating-point tensors carry gradient: backward returns the SUM over ranks of the gradients of this rank's rows, so
    shares of a loss add up exactly (gaussian similarities 5.4, rule 1).
    """
    if world_size() == 1:
        return x
    if x.is_floating_point() and x.requires_grad and torch.is_grad_enabled():
        gathered: Tensor = _AllGatherRows.apply(x)
        return gathered
    return _gather(x)


def gather(tensors: dict[str, Tensor]) -> Gathered:
    """`Encoded.gather` of this rank -> the global batch. Tensors travel in sorted order of name, alike on all ranks."""
    rows = {tensor.shape[0] for tensor in tensors.values()}
    assert len(rows) == 1, f"tensors to gather differ in rows: { ({k: tuple(v.shape) for k, v in tensors.items()}) }"
    everyone = {name: all_gather_rows(tensors[name]) for name in sorted(tensors)}
    return Gathered(own=tensors, all=everyone, offset=rank() * rows.pop())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Element-wise sum over ranks, detached, in fp32 or wider for floating-point input; the input is left alone."""
    total = x.detach().clone()
    if total.is_floating_point():
        total = total.to(torch.promote_types(total.dtype, torch.float32))
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """True on all ranks if `flag` is true on any. `device`: where the backend wants its tensors (CUDA for nccl)."""
    if world_size() == 1:
        return flag
    vote = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def raise_together(
    problem: RoentgenError | None, otherwise: RoentgenError, *, device: torch.device | None = None
) -> None:
    """One rank's problem ends all: it raises its own, the ranks without one raise `otherwise`. Collective.

    Nothing is raised where no rank has a problem. `device`: as for `any_rank`.
    """
    if any_rank(problem is not None, device):
        raise problem or otherwise


def broadcast_json(value: Any, device: torch.device) -> Any:
    """Rank 0's value on all ranks, as JSON: nothing is pickled. `device`: of this rank."""
    if world_size() == 1:
        return value
    device = device if dist.get_backend() == "nccl" else torch.device("cpu")
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if rank() == 0 else None
    size = torch.tensor([0 if data is None else len(data)], device=device)
    dist.broadcast(size, 0)
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device) if data is None else data.to(device)
    dist.broadcast(buffer, 0)
    return json.loads(bytes(buffer.cpu().tolist()))
