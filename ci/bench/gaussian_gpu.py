"""`python -m ci.bench.gaussian_gpu`: the kernels on this GPU, with torch and triton alone; figures beside their limits.

A limit is what the device could do at best: floating-point operations over the rate that `torch.matmul` reaches here in
the form's precision, or bytes of rows and columns over the rate of a copy here, whichever is longer. Products count as
many times as the form makes them: ours one forward, one again and two more backward, split values three times as many,
stored logits one and two. Bytes of stored logits do not count. The first call compiles and is not timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels.gaussian_similarity import expansion, op
from kernels.gaussian_similarity.expansion import Precision

DIMENSIONS = 512
SIZES = (1024, 2048, 8192, 16384, 32768, 65536)
SECONDS_EACH = 1.0  # of repeats, after one to warm up
STORED_ROWS = 16384  # logits of more do not fit beside their gradients everywhere

Loss = Callable[[list[Tensor], Tensor, Tensor], Tensor]  # of four [rows, D], a scale and keys
Arithmetic = Literal["bf16", "tf32", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One line of the table for each of `sizes`.

    `width`: K of its product over D; `arithmetic` that its products run in, and how often forward and both ways.
    """

    name: str
    loss: Loss
    width: int = 2
    sizes: tuple[int, ...] = (8192,)
    arithmetic: Arithmetic = "bf16"
    products: tuple[int, int] = (1, 4)


def seconds_of(step: Callable[[], object]) -> float:
    """Median seconds of one call on the device."""
    step()
    torch.cuda.synchronize()
    marks, began = [torch.cuda.Event(enable_timing=True)], time.perf_counter()
    marks[0].record()
    while time.perf_counter() - began < SECONDS_EACH or len(marks) < 4:
        step()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        marks[-1].synchronize()
    spans = sorted(first.elapsed_time(second) for first, second in pairwise(marks))
    return spans[len(spans) // 2] / 1000


@contextmanager
def fp32_products(arithmetic: str) -> Iterator[None]:
    """torch.matmul of fp32 in this arithmetic: "ieee" or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = arithmetic
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def peaks() -> tuple[dict[Arithmetic, float], float]:
    """(FLOP/s of torch.matmul, bytes/s of a copy, reading and writing) of this device."""
    side = 8192
    a = torch.randn(side, side, device="cuda")
    half = a.bfloat16()
    seconds: dict[Arithmetic, float] = {"bf16": seconds_of(lambda: half @ half)}
    with fp32_products("tf32"):
        seconds["tf32"] = seconds_of(lambda: a @ a)
    with fp32_products("ieee"):
        seconds["fp32"] = seconds_of(lambda: a @ a)
    flops = {arithmetic: 2 * side**3 / each for arithmetic, each in seconds.items()}
    block = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(block)
    return flops, 2 * block.numel() / seconds_of(lambda: other.copy_(block))


def stored(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    """InfoNCE with its N x N logits, fp32 out of `fp32_products`."""
    a, b = (torch.cat([mean, torch.exp(logvar / 2)], 1) for mean, logvar in (four[:2], four[2:]))
    logits = -scale * ((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T)
    entropy = torch.nn.functional.cross_entropy
    return 0.5 * (entropy(logits, keys) + entropy(logits.T, keys))


def inputs(rows: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(means and log-variances of both sides [rows, D], scale, keys: row i belongs to column i)."""
    generator = torch.Generator("cuda").manual_seed(0)
    four = [
        (spread * torch.randn(rows, DIMENSIONS, generator=generator, device="cuda")).requires_grad_()
        for spread in (1, 0.3, 1, 0.3)
    ]
    return four, torch.tensor(0.02, device="cuda", requires_grad=True), torch.arange(rows, device="cuda")


def measure(loss: Loss, rows: int) -> tuple[float, float, float]:
    """(seconds forward, seconds forward and backward, GB added at the peak beyond inputs)."""
    four, scale, keys = inputs(rows)

    def forward() -> None:
        with torch.no_grad():
            loss(four, scale, keys)

    def both() -> None:
        for leaf in (*four, scale):
            leaf.grad = None
        loss(four, scale, keys).backward()  # type: ignore[no-untyped-call]

    both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = seconds_of(forward), seconds_of(both)
    return *times, (torch.cuda.max_memory_allocated() - before) / 1e9


def contrast(precision: Precision) -> Loss:
    """InfoNCE on squared Wasserstein distances in one precision."""
    return lambda four, scale, keys: op.info_nce(
        expansion.squared_wasserstein(*four, precision=precision), scale, keys, keys
    )


def cosine(precision: Precision) -> Loss:
    """CLIP's loss on the means."""
    return lambda four, scale, keys: op.info_nce(
        expansion.cosine(four[0], four[2], precision=precision), scale, keys, keys
    )


def sigmoid(four: list[Tensor], scale: Tensor, keys: Tensor) -> Tensor:
    """The pairwise sigmoid on sampled distances, bf16."""
    bias = torch.zeros((), device="cuda")
    return op.pairwise_sigmoid(expansion.sampled_distance(*four), scale, bias, keys, keys)


def density(rows: int) -> None:
    """Bhattacharyya similarity of all pairs, bound by arithmetic outside of the tensor cores."""
    four, _, _ = inputs(rows)
    values = [each.detach() for each in four]
    seconds = seconds_of(lambda: op.pairwise("bhattacharyya", *values))
    terms = rows * rows * DIMENSIONS / seconds
    print(f"{'bhattacharyya':<16}{rows:>8}  {seconds * 1e3:9.2f} ms  {terms / 1e9:9.1f} G terms a second")


def table(form: Form, flops: float, rate: float) -> None:
    """Lines of one form, for a device with so many FLOP/s and bytes/s."""
    for rows in form.sizes:
        forward, both, added_gb = measure(form.loss, rows)
        inner = form.width * DIMENSIONS
        product, read = 2 * rows * rows * inner / flops, 4 * rows * inner * 4 / rate
        limits = max(form.products[0] * product, read), max(form.products[1] * product, 3 * read)
        print(
            f"{form.name:<16}{rows:>8}  {forward * 1e3:>6.2f} ms  {limits[0] * 1e3:>6.2f} ms  {both * 1e3:>6.2f} ms  "
            f"{limits[1] * 1e3:>6.2f} ms  {limits[1] / both:>8.0%}  {added_gb:8.3f}",
            flush=True,
        )


def main() -> int:
    """Print the table; exit code 2 without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    began = time.perf_counter()
    flops, rate = peaks()
    shown = ", ".join(f"{each / 1e12:.0f} in {arithmetic}" for arithmetic, each in flops.items())
    print(f"peak measured here: TFLOP/s of torch.matmul {shown}; {rate / 1e12:.2f} TB/s of a copy")
    print(f"{'loss':<16}{'rows':>8}  {'forward':>9}  {'limit':>9}  {'both ways':>9}  {'limit':>9}  of limit  GB added")
    forms = (
        Form(name="w2 bf16", loss=contrast("bf16"), sizes=SIZES),
        Form(name="csd sigmoid", loss=sigmoid, width=1, sizes=(8192, 32768)),
        Form(name="w2 tf32", loss=contrast("tf32"), arithmetic="tf32"),
        Form(name="w2 split", loss=contrast("split"), products=(3, 12)),
        Form(name="w2 fp32", loss=contrast("fp32"), arithmetic="fp32"),
        Form(name="cosine tf32", loss=cosine("tf32"), width=1, arithmetic="tf32"),
        Form(name="cosine fp32", loss=cosine("fp32"), width=1, arithmetic="fp32"),  # what CLIP and SigLIP take
    )
    for form in forms:
        table(form, flops[form.arithmetic], rate)
    sizes = tuple(size for size in SIZES if size <= STORED_ROWS)
    with fp32_products("tf32"):
        table(
            Form(name="w2 stored tf32", loss=stored, sizes=sizes, arithmetic="tf32", products=(1, 3)),
            flops["tf32"],
            rate,
        )
    density(2048)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
