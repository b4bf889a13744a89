"""The kernels compiled for GPUs that are not here: launches are recorded instead of started, then compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gaussian_similarity import expansion, kernel
from kernels.gaussian_similarity.problem import Problem

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
_ROWS, _COLUMNS, _K = 300, 200, 256


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: arguments as they were given, constants and options."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        named = [word for word in ("GROUPED", "TEACHER", "SIGMOID", "TRANSPOSED", "ADD") if self.constants.get(word)]
        return " ".join([self.kernel.__name__, *named])


@contextmanager
def recorded(architecture: int) -> Iterator[dict[str, Launch]]:
    """By name, what the sweeps of this process would start on a GPU of compute capability `architecture` (80, 90, 100).

    Tensors may lie on the CPU; what the sweeps give back inside is undefined.
    """
    found: dict[str, Launch] = {}

    def record(called: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        one = Launch(called, arguments, constants)
        found.setdefault(one.name, one)

    changed = {"_launch": record, "_capability": lambda _: architecture, "STRIP_ELEMENTS": 128 * _COLUMNS}
    before = {name: getattr(kernel, name) for name in changed}  # two strips: the second adds to the first
    vars(kernel).update(changed)
    try:
        yield found
    finally:
        vars(kernel).update(before)


def compiled(launch: Launch, architecture: int) -> Any:
    """Triton's compiled kernel: `asm["cubin"]`, `asm["ptx"]`, `metadata.shared`."""
    signature, constants, aligned = {}, {}, {}
    options = {name: launch.constants[name] for name in ("num_warps", "num_stages") if name in launch.constants}
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name], aligned[place,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    for name in launch.kernel.arg_names[len(launch.arguments) :]:
        signature[name], constants[name] = "constexpr", launch.constants[name]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_contrast(architecture: int) -> list[str]:
    """Compile what a contrast of cosines in bf16 starts, forward and backward; the kernels' names.

    Raises whatever Triton raises for a kernel that does not compile.
    """
    keys = torch.arange(_ROWS)
    pairs = expansion.inner_product(torch.ones(_ROWS, _K), torch.ones(_COLUMNS, _K))
    problem = Problem.of(pairs, torch.tensor(1.0), keys, keys[:_COLUMNS])
    with recorded(architecture) as launches:
        kernel.statistics(problem)
        of_rows, of_columns = problem.row_bias, problem.column_bias
        kernel.gradients(
            problem, row_shift=of_rows, column_shift=of_columns, row_target=of_rows, column_target=of_columns
        )
    for launch in launches.values():
        compiled(launch, architecture)
    return sorted(launches)
