"""A run on a GPU proves its fast paths before it trains: most changes to them are made on machines that have none.

Each part is computed twice on small random inputs, by the path that the run would take and by its plain twin, and the
two must agree within a stated bound. A part that does not agree, or does not run, refuses to train and says how it is
switched off. The device is an argument: on the CPU the same comparisons hold between the CPU's own paths.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import normalize

from core import collectives
from core.losses.contrast import Similarity
from core.models.attention import DenseLayout, Layout, PackedLayout, dense_attention
from core.world import World
from kernels.gaussian_similarity import expansion, op, reference, sweep
from kernels.gaussian_similarity.expansion import Precision
from shards.errors import ConfigError

log = logging.getLogger(__name__)

# Relative errors (Frobenius norms) that rounding explains, with room; a wrong part is off by a tenth and more.
KERNEL_BOUND: dict[Precision, float] = {"fp32": 1e-4, "split": 1e-4, "tf32": 3e-3, "bf16": 1e-2}
ATTENTION_BOUND = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
KERNEL_ROWS, KERNEL_COLUMNS = 203, 331  # no multiple of any tile
# Of the sweeps' own bounds on what is held at once: under these, the rows above are several slabs, strips and tiles.
SMALL_PIECES = {"SLAB_ROWS": 128, "STRIP_ELEMENTS": 128 * 256, "TILE_ROWS": 64, "TILE_COLUMNS": 128}
ATTENTION_LENGTHS = (7, 130, 64, 1, 45, 197)


class Difference(NamedTuple):
    """`error` of a quantity between two paths, and what it may be."""

    what: str
    error: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that a run can do without. `switch`: what a user does to take the plain path."""

    name: str
    switch: str
    compare: Callable[[], Iterator[Difference]]


def prove(parts: Sequence[Part], world: World) -> None:
    """Compare all parts and log each. Collective.

    Raises:
        ConfigError: on all ranks, where a part differs by more than its bound or fails, on any rank.
    """
    problems = [problem for part in parts if (problem := _problem(part)) is not None]
    for problem in problems:  # said before the vote: what comes after it may not be reached on a broken device
        log.error("self-proof: %s", problem)
    own = ConfigError("; ".join(problems)) if problems else None
    stand_in = ConfigError("another rank's device computes something wrong; its message says what to switch off")
    collectives.raise_together(own, stand_in, device=_voting_device(world))


def _voting_device(world: World) -> torch.device:
    """The CPU where ranks can meet there: a kernel that failed may have left a GPU that takes no further work."""
    meets_on_cpu = torch.distributed.is_initialized() and "cpu:" in torch.distributed.get_backend_config()
    return torch.device("cpu") if meets_on_cpu else world.device


def _problem(part: Part) -> str | None:
    started = time.perf_counter()
    try:
        found = list(part.compare())
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{part.name} fails on this device ({type(error).__name__}: {error}); switch it off with {part.switch}"
    worst = max(found, key=lambda each: each.error / each.bound)
    agrees = all(each.error <= each.bound for each in found)  # NaN does not
    log.info(
        "self-proof: %s %s after %.1f s: %d comparisons, worst %.1e of %.0e (%s)",
        part.name, "agrees" if agrees else "DIFFERS", time.perf_counter() - started, len(found), worst.error,
        worst.bound, worst.what,
    )  # fmt: skip
    if agrees:
        return None
    wrong = next(each for each in found if not each.error <= each.bound)
    return (
        f"{part.name} computes something wrong on this device: {wrong.what} is off by {wrong.error:.1e}, "
        f"{wrong.bound:.0e} is rounding; switch it off with {part.switch}"
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in fp64 on the host."""
    exact = expected.detach().double().cpu()
    difference = found.detach().double().cpu() - exact
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(exact).clamp_min(1e-30))


def kernel_part(device: torch.device, dimensions: int, contrasts: Sequence[tuple[Similarity, Precision]]) -> Part:
    """The all-pairs losses of embeddings in `dimensions`, tile by tile, against the stored formulas in fp64.

    `contrasts`: the similarities that the run's task takes, each with the precision of its product; both losses of each
    are compared, in several slabs of rows and strips of seeds, which else only a large batch has.
    """

    def compare() -> Iterator[Difference]:
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, spread: float) -> Tensor:
            return spread * torch.randn(rows, dimensions, generator=generator, dtype=torch.float64)

        # Distances of 2 to 4 at any size, so that logits have the spread of those in training.
        width, logvar = dimensions**-0.5, -math.log(dimensions)
        gaussians = [draw(KERNEL_ROWS, width), draw(KERNEL_ROWS, 0.5) + logvar]
        gaussians += [draw(KERNEL_COLUMNS, width), draw(KERNEL_COLUMNS, 0.5) + logvar]
        vectors = [normalize(mean, dim=1) for mean in gaussians[::2]]
        keys = torch.arange(KERNEL_ROWS) % 150, torch.arange(KERNEL_COLUMNS) % 150
        own = [each.to(device) for each in keys]
        for similarity, precision in contrasts:
            # Cosines of random vectors spread by 1 / sqrt(D).
            scale = 2 * dimensions**0.5 if similarity == "cosine" else 3.0
            exact = [torch.tensor(value, dtype=torch.float64) for value in (scale, -1.0)]
            exact = [*(vectors if similarity == "cosine" else gaussians), *exact]

            *embeddings, scale_of, bias = leaves = [value.clone().requires_grad_() for value in exact]
            logits = scale_of * _PAIRS[similarity](*embeddings, precision="fp32").similarity()
            wanted = _with_gradients(
                reference.info_nce(logits, *keys), reference.pairwise_sigmoid(logits + bias, *keys), leaves
            )
            *embeddings, scale_of, bias = leaves = [value.float().to(device).requires_grad_() for value in exact]
            with _small_pieces(device):
                pairs = _PAIRS[similarity](*embeddings, precision=precision)
                found = _with_gradients(
                    op.info_nce(pairs, scale_of, *own, stored=False),
                    op.pairwise_sigmoid(pairs, scale_of, bias, *own, stored=False),
                    leaves,
                )
            for name, value in wanted.items():
                what = f"{name} of {similarity} in {precision}"
                yield Difference(what, relative(found[name], value), KERNEL_BOUND[precision])

    return Part(name="the kernel of Gaussian similarities", switch="--set engine.kernel=pytorch", compare=compare)


_PAIRS: dict[Similarity, Callable[..., expansion.Expansion]] = {
    "cosine": expansion.inner_product,
    "wasserstein": expansion.squared_wasserstein,
    "sampled": expansion.sampled_distance,
}


@contextmanager
def _small_pieces(device: torch.device) -> Iterator[None]:
    """Have the sweeps of this device cut what they walk over into pieces of a few tiles."""
    path = sweep.path_of(torch.empty(0, device=device))
    before = {name: getattr(path, name) for name in SMALL_PIECES if hasattr(path, name)}
    vars(path).update({name: SMALL_PIECES[name] for name in before})
    try:
        yield
    finally:
        vars(path).update(before)


def _with_gradients(info_nce: Tensor, sigmoid: Tensor, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """Both losses and their gradients by name; the bias, which comes last, has none in the first."""
    sides = ("row mean", "row logvar", "column mean", "column logvar") if len(leaves) > 4 else ("row", "column")
    of = (*sides, "scale", "bias")
    found = {}
    for name, loss, inputs in (("InfoNCE", info_nce, leaves[:-1]), ("pairwise sigmoid", sigmoid, leaves)):
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        found[name] = loss.detach()
        found |= {f"{name}, gradient of {each}": gradient for each, gradient in zip(of, gradients, strict=False)}
    return found


def attention_part(device: torch.device, *, half_precision: bool, heads: int = 3, size: int = 64) -> Part:
    """The attention that a run takes, dense and packed, forward and backward, against SDPA in fp32."""
    dtype = torch.bfloat16 if half_precision else torch.float32

    def compare() -> Iterator[Difference]:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor(ATTENTION_LENGTHS)
        length = int(lengths.max())
        mask = (torch.arange(length)[None] < lengths[:, None]).to(device)
        layouts: dict[str, tuple[Layout, Tensor | None]] = {
            "dense": (DenseLayout(len(lengths), length), None),
            "packed": (PackedLayout.from_mask(mask), mask),
        }
        for name, (layout, seen) in layouts.items():
            qkv = torch.randn(len(lengths), length, 3, heads, size, generator=generator).to(dtype)
            weight = torch.randn(len(lengths) * length, heads * size, generator=generator).to(device)
            plain, fast = qkv.float().to(device).requires_grad_(), qkv.to(device).requires_grad_()
            expected = dense_attention(plain, key_mask=seen, implementation="sdpa").flatten(0, 1)
            rows = fast.flatten(0, 1)
            if isinstance(layout, PackedLayout):
                rows, expected, weight = (each[layout.token_index] for each in (rows, expected, weight))
            found = layout.attend(rows)
            (ours,) = torch.autograd.grad((found.float() * weight).sum(), fast)
            (theirs,) = torch.autograd.grad((expected * weight).sum(), plain)
            yield Difference(f"{name} attention", relative(found, expected), ATTENTION_BOUND[dtype])
            yield Difference(f"gradient of {name} attention", relative(ours, theirs), ATTENTION_BOUND[dtype])

    return Part(name="fused attention", switch="--set engine.attention=sdpa, or =matmul", compare=compare)
