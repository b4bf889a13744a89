"""Run one function on several processes of this machine, as ranks of a process group."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ci.bench.ray_cluster import free_port

TIMEOUT_S = 120.0
# What the server of forked ranks imports once. There is one such server a test process, so all tests share the list.
PRELOAD = ["torch", "torch.distributed", "numpy", "tests.core.runs"]


def _enter(
    rank: int, world_size: int, backend: str, port: int, func: Callable[..., Any], args: tuple, queue: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
        result = func(rank, world_size, *args)
        dist.barrier()
        queue.put((rank, result, None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_distributed(func: Callable[..., Any], world_size: int, backend: str = "gloo", args: tuple = ()) -> list[Any]:
    """`func(rank, world_size, *args)` on each rank of a spawned group; its results by rank.

    `func` must be importable (defined at module level), its results picklable: return NumPy arrays or lists, not
    tensors, which would leave files in shared memory. The first rank's exception is raised here with its traceback.
    """
    # One server process imports torch, each rank is a fork of it: a second group starts in a fraction of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_enter, args=(rank, world_size, backend, port, func, args, queue))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, result, error = queue.get(timeout=TIMEOUT_S)
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
            results[rank] = result
    finally:
        for process in ranks:
            process.join(timeout=5 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]
