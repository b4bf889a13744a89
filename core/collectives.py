"""Communication between ranks: rows gathered, summed and passed round a ring, sums, votes, and rank 0's word.

With one process, or before a process group exists, every function is the identity. All ranks must call each of them in
the same order. What it does not do: decide who computes what; the losses own that.

Ranks may have different numbers of rows, none included, where `counts` says how many each has; rows travel padded to
the largest.

Letters: W = ranks, b = rows of one rank, B = rows of all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.tasks import Exchange, Gathered
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


def row_counts(rows: int, device: torch.device) -> tuple[int, ...]:
    """Rows of every rank, in rank order; waits for the device. `device`: where the backend wants its tensors."""
    if world_size() == 1:
        return (rows,)
    return tuple(_gather(torch.tensor([rows], device=device)).tolist())


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """[b, ...] on each rank -> [sum of counts, ...] on all, in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    most = max(1, *counts)
    received = _gather(padded(x.detach(), most))
    if min(counts) == most:
        return received
    return torch.cat([piece[:count] for piece, count in zip(received.split(most), counts, strict=True)])


def sum_to_owners(x: Tensor, counts: Sequence[int]) -> Tensor:
    """What all ranks say about all rows, [sum of counts, ...] -> what they say together about own rows [b, ...]."""
    if world_size() == 1:
        return x
    # fp32 at least: a sum over many ranks in bf16 would lose the small shares.
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if wide.is_cuda:
        most = max(1, *counts)
        sent = torch.cat([padded(piece, most) for piece in wide.split(list(counts))])
        own = sent.new_empty((most, *sent.shape[1:]))
        dist.reduce_scatter_tensor(own, sent)
        return own[: counts[rank()]].to(x.dtype)
    # gloo's all-reduce adds in an order fixed by the number of ranks alone; its reduce-scatter is this too.
    wide = wide.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(wide)
    return wide.split(list(counts))[rank()].to(x.dtype)


def padded(x: Tensor, rows: int) -> Tensor:
    """[b, ...] -> [rows, ...] with zeros at the end."""
    return x if len(x) == rows else torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


def pass_on(tensors: Sequence[Tensor], *, tag: int) -> Callable[[], list[Tensor]]:
    """Start to send tensors to the next rank; the result, once called, waits for those of the rank before.

    Their shapes are alike on all ranks. `tag` tells messages under way at the same time apart.
    """
    if not tensors:
        return list
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    operations = [
        operation
        for place, (going, coming) in enumerate(zip(sent, received, strict=True))
        for operation in (
            dist.P2POp(dist.isend, going, after, tag=tag + place),
            dist.P2POp(dist.irecv, coming, before, tag=tag + place),
        )
    ]
    under_way = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for work in under_way:
            work.wait()
        sent.clear()  # until here the backend read from them
        return received

    return wait


class _AllGatherRows(torch.autograd.Function):
    """Backward sums what each rank's share says about this rank's rows: the exact gradient of the summed shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return sum_to_owners(grad, [ctx.rows] * world_size())


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


class _Everyone(Mapping[str, Tensor]):
    """Own rows by name -> those of all ranks, gathered when they are first asked for."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self._own = own
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._gathered:
            self._gathered[name] = all_gather_rows(self._own[name])
        return self._gathered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def gather(tensors: dict[str, Tensor], *, exchange: Exchange = "gather") -> Gathered:
    """`Encoded.gather` of this rank -> the global batch; every rank has the same number of rows, void ones included."""
    rows = {tensor.shape[0] for tensor in tensors.values()}
    assert len(rows) == 1, f"tensors to gather differ in rows: { ({k: tuple(v.shape) for k, v in tensors.items()}) }"
    return Gathered(own=tensors, all=_Everyone(tensors), ranks=world_size(), exchange=exchange)


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
