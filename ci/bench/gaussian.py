"""All-pairs similarity of Gaussians: the streaming InfoNCE against the stored and the broadcast form.

Forward and backward of symmetric InfoNCE on squared 2-Wasserstein distances, D = 512, on the CPU. `stored` is the
matrix-product form with its N x N logits, cross-entropy both ways and autograd; `broadcast` is the formula as papers
print it, N x N x D. `pcmepp` and `prolip` are the losses of those two papers with their closed-form sampled distance as
their public code lays it out, N x N x D as well; ours beside them is the pairwise sigmoid on the same distance.

Each measurement has a process of its own, so that its peak memory is its own. Small batches are over in milliseconds:
contestants take turns in one process, and the shortest of many rounds counts.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from ci.bench.figure import Figure, alternate, figure, ratio
from kernels.gaussian_similarity import expansion, op, reference

DESCRIPTION = "contrast of Gaussian embeddings, seconds and memory: streaming against stored and broadcast (15 minutes)"

DIMENSIONS = 512
SCALE = 0.02
WARM_UP_ROWS = 256


def _ours(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    return op.info_nce(expansion.squared_wasserstein(*four), scale, keys, keys)


def _streaming(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    return op.info_nce(expansion.squared_wasserstein(*four), scale, keys, keys, stored=False)


def _stored(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    a, b = (torch.cat([mean, torch.exp(logvar / 2)], 1) for mean, logvar in (four[:2], four[2:]))
    distance = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return _cross_entropy(-scale * distance, keys)


def _broadcast(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    return _cross_entropy(-scale * reference.squared_wasserstein(*four), keys)


def _sigmoid(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    return op.pairwise_sigmoid(expansion.sampled_distance(*four), scale, torch.zeros(()), keys, keys, stored=False)


def _unit_sigmoid(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    return _sigmoid([normalize(four[0]), four[1], normalize(four[2]), four[3]], scale, keys)


def _pcmepp(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    """Squared distance of means plus both variances, matched by a sigmoid (arXiv 2305.18171, equations 1 and 2)."""
    mean = (four[0][:, None] - four[2][None]) ** 2
    variance = four[1].exp()[:, None] + four[3].exp()[None]
    return _matching(-scale * (mean.sum(-1) + variance.sum(-1)), keys)


def _prolip(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    """Cosine less half of both variances, twice: minus the same distance for means of length 1 (arXiv 2410.18857)."""
    cosine = normalize(four[0]) @ normalize(four[2]).T
    variance = (four[1].exp()[:, None] + four[3].exp()[None]).sum(-1)
    return _matching(2 * scale * (cosine - variance / 2 - 1), keys)


def _matching(logits: Tensor, keys: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, (keys[:, None] == keys[None]).float(), reduction="sum") / len(keys)


def _cross_entropy(logits: Tensor, keys: Tensor) -> Tensor:
    return 0.5 * (cross_entropy(logits, keys) + cross_entropy(logits.T, keys))


FORMS: dict[str, Callable[[list[Tensor], Tensor, Tensor], Tensor]] = {
    "ours": _ours,
    "streaming": _streaming,
    "stored": _stored,
    "broadcast": _broadcast,
    "sigmoid": _sigmoid,
    "pcmepp": _pcmepp,
    "unit_sigmoid": _unit_sigmoid,
    "prolip": _prolip,
}
# Ours, the published form, and the paper's name.
PUBLISHED = (("sigmoid", "pcmepp", "PCME++"), ("unit_sigmoid", "prolip", "ProLIP"))


def _step(form: str, rows: int) -> float:
    """Wall seconds of forward and backward; the loss and all gradients are asked to be finite."""
    generator = torch.Generator().manual_seed(0)
    four = [
        (spread * torch.randn(rows, DIMENSIONS, generator=generator)).requires_grad_() for spread in (1, 0.3, 1, 0.3)
    ]
    scale = torch.tensor(SCALE, requires_grad=True)
    keys = torch.arange(rows)
    started = time.perf_counter()
    FORMS[form](four, scale, keys).backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    for leaf in (*four, scale):
        assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()), f"{form}: gradient not finite"
    return seconds


def _measure(form: str, rows: int) -> tuple[float, float]:
    """(seconds, GB that the step added to the peak of its process beyond inputs and their gradients)."""
    _step(form, WARM_UP_ROWS)
    inputs_gb = 2 * 4 * rows * DIMENSIONS * 4 / 1e9
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = _step(form, rows)
    added_gb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) * 1024 / 1e9
    return seconds, max(0.0, added_gb - inputs_gb)


def _in_own_process(memory_gb: dict[str, list[float]], form: str, rows: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, gb = pool.apply(_measure, (form, rows))
    memory_gb.setdefault(form, []).append(gb)
    return seconds


def _compare(rows: int, forms: tuple[str, str], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    memory_gb: dict[str, list[float]] = {}
    seconds = alternate({form: partial(_in_own_process, memory_gb, form, rows) for form in forms}, rounds, log=_log)
    return seconds, {form: statistics.median(values) for form, values in memory_gb.items()}


def _rounds_of(rows: int, rounds: int) -> tuple[float, float]:
    """(seconds of ours, of stored), the shortest of `rounds` in turn."""
    forms = ("ours", "stored")
    for form in forms:
        _step(form, rows)
    seconds = alternate({form: partial(_step, form, rows) for form in forms}, rounds)
    return min(seconds["ours"]), min(seconds["stored"])


def _shortest(rows: int, rounds: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ours, stored = pool.apply(_rounds_of, (rows, rounds))
    _log(f"{rows} rows  ours: {ours:.4g}  stored: {stored:.4g}")
    return ours, stored


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(quick: bool) -> list[Figure]:
    """Small batches, 8,192 and 16,384 rows against stored, 1,024 against broadcast, 65,536 alone."""
    threads = torch.get_num_threads()
    rounds = 1 if quick else 3
    figures = []
    for rows in (512, 1024, 2048):
        began = time.perf_counter()
        ours, stored = _shortest(rows, 3 if quick else 40 * 512 // rows)
        figures.append(
            figure(
                f"gaussian.time_vs_stored_{rows}",
                ours / stored,
                ours=ours,
                peer=stored,
                peer_name="stored (s)",
                threads=threads,
                wall_s=time.perf_counter() - began,
                note="the path that the size chooses; shortest of many rounds",
            )
        )
    for rows in (8192, 16384):
        size = rows // 8 if quick else rows
        began = time.perf_counter()
        seconds, memory_gb = _compare(size, ("streaming", "stored"), rounds)
        wall_s = time.perf_counter() - began
        named = {"peer_name": "stored (s)", "threads": threads, "wall_s": wall_s, "note": f"{size:,} rows"}
        figures.append(ratio(f"gaussian.time_vs_stored_{rows}", seconds["streaming"], seconds["stored"], **named))  # type: ignore[arg-type]
        if rows == 16384:
            figures.append(
                figure(
                    "gaussian.memory_vs_stored_16384",
                    memory_gb["streaming"] / memory_gb["stored"],
                    ours=memory_gb["streaming"],
                    peer=memory_gb["stored"],
                    peer_name="stored (GB)",
                    repeats=rounds,
                    threads=threads,
                    note="beyond inputs and their gradients",
                )
            )
    size = 128 if quick else 1024
    seconds, memory_gb = _compare(size, ("streaming", "broadcast"), rounds)
    figures.append(
        figure(
            "gaussian.speedup_vs_broadcast_1024",
            statistics.median(b / a for a, b in zip(seconds["streaming"], seconds["broadcast"], strict=True)),
            ours=statistics.median(seconds["streaming"]),
            peer=statistics.median(seconds["broadcast"]),
            peer_name="broadcast (s)",
            repeats=rounds,
            threads=threads,
            note=f"memory added: broadcast {memory_gb['broadcast']:.2f} GB, ours {memory_gb['streaming']:.3f}",
        )
    )
    figures.append(
        figure(
            "gaussian.memory_vs_broadcast_1024",
            memory_gb["broadcast"] / max(memory_gb["streaming"], 1e-3),
            ours=memory_gb["streaming"],
            peer=memory_gb["broadcast"],
            peer_name="broadcast (GB)",
            repeats=rounds,
            threads=threads,
            note="beyond inputs and their gradients; ours counts as a MB at least",
        )
    )
    for form, published, name in PUBLISHED:
        seconds, memory_gb = _compare(size, (form, published), rounds)
        figures.append(
            figure(
                f"gaussian.speedup_vs_{published}_1024",
                statistics.median(b / a for a, b in zip(seconds[form], seconds[published], strict=True)),
                ours=statistics.median(seconds[form]),
                peer=statistics.median(seconds[published]),
                peer_name=f"{name} (s)",
                unit="ratio",
                better="higher",
                repeats=rounds,
                threads=threads,
                note=f"memory added: theirs {memory_gb[published]:.2f} GB, ours {memory_gb[form]:.3f}",
            )
        )
    size = 2048 if quick else 65536
    gb: dict[str, list[float]] = {}
    alone_s = _in_own_process(gb, "streaming", size)
    figures.append(
        figure("gaussian.gb_65536", gb["streaming"][0], threads=threads, wall_s=alone_s, note=f"{alone_s:.0f} s")
    )
    return figures
