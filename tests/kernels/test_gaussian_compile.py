"""Every kernel compiles for GPUs that are not here: no spills, tensor cores in use, shared memory within limits.

The launches that the sweeps would make are recorded and compiled instead of started. A spilled register would show as
stack in the cubin.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gaussian_similarity import kernel
from kernels.gaussian_similarity.expansion import Precision
from kernels.gaussian_similarity.problem import Teacher
from tests.kernels.kernel_parity import on, problem

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STACK_BYTES = {"fp32": 16}  # without tensor cores products need more registers; of all others 0
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
ROWS, COLUMNS, K = 300, 200, 1024


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


def launches(
    monkeypatch: pytest.MonkeyPatch, architecture: int, precision: Precision, taught_in: Precision
) -> list[Launch]:
    """All that the sweeps start, once each, with a teacher of its own precision."""
    found: dict[str, Launch] = {}

    def record(called: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        one = Launch(called, arguments, constants)
        found.setdefault(one.name, one)

    monkeypatch.setattr(kernel, "_launch", record)
    monkeypatch.setattr(kernel, "_capability", lambda _: architecture)
    monkeypatch.setattr(kernel, "STRIP_ELEMENTS", 128 * COLUMNS)  # two strips: the second adds to the first
    bias = torch.zeros(())
    for groups in (0, 5):
        one = on("cpu", problem(ROWS, COLUMNS, K, precision=precision, groups=groups))
        shifts = {"row_shift": one.row_bias, "column_shift": one.column_bias}
        targets = {"row_target": one.row_bias, "column_target": one.column_bias}
        other = on("cpu", problem(ROWS, COLUMNS, K, precision=taught_in, groups=groups))
        for teacher in (None, Teacher(problem=other, **shifts)):
            kernel.statistics(one, teacher=teacher)
            kernel.gradients(one, **shifts, **targets, teacher=teacher)
        kernel.sigmoid_statistics(one, bias)
        kernel.sigmoid_gradients(one, bias)
    four = (torch.zeros(9, 512),) * 4
    kernel.density("bhattacharyya", four)
    kernel.density_gradients("bhattacharyya", four, torch.zeros(9, 9))
    return list(found.values())


def compiled(launch: Launch, architecture: int) -> Any:
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


def faults(launch: Launch, architecture: int, cubin: Path, stack_bytes: int = 0) -> Iterator[str]:
    binary = compiled(launch, architecture)
    cubin.write_bytes(binary.asm["cubin"])
    shown = subprocess.run(
        [BINARIES / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    stack = re.search(r"STACK:(\d+)", shown)
    assert stack is not None, shown
    if int(stack[1]) > stack_bytes:
        yield f"{launch.name}: {stack[1]} bytes of stack a thread"
    if binary.metadata.shared > SHARED_BYTES[architecture]:
        yield f"{launch.name}: {binary.metadata.shared} bytes of shared memory, {SHARED_BYTES[architecture]} are there"
    # Products of bf16 or tf32 values; those of fp32 are for other cores, and the densities have none.
    multiplies = launch.arguments[0].dtype == torch.bfloat16 or launch.constants.get("INPUT") == "tf32"
    if multiplies and TENSOR_CORES[architecture] not in binary.asm["ptx"]:
        yield f"{launch.name}: no {TENSOR_CORES[architecture]}"


def check(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    architecture: int,
    precision: Precision,
    names: set[str] | None,
    taught_in: Precision | None = None,
) -> None:
    every = launches(monkeypatch, architecture, precision, taught_in or precision)
    chosen = [each for each in every if names is None or each.name in names]
    assert len(chosen) == (18 + 2 if names is None else len(names)), [each.name for each in chosen]
    cubin, stack_bytes = folder / "kernel.cubin", STACK_BYTES.get(precision, 0)
    found = [fault for launch in chosen for fault in faults(launch, architecture, cubin, stack_bytes)]
    assert not found, "\n".join(found)


def test_default_precision_on_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(monkeypatch, tmp_path, 90, "bf16", None)


@pytest.mark.parametrize("architecture", [80, 100])
def test_a_contrast_alone_on_its_neighbours(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(monkeypatch, tmp_path, architecture, "bf16", {"_statistics", "_times_strip", "_times_strip TRANSPOSED"})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSOR_CORES)
@pytest.mark.parametrize(("precision", "taught_in"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_teacher_of_another_precision(
    precision: Precision, taught_in: Precision, architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {f"{name} TEACHER" for name in ("_statistics", "_seed", "_statistics GROUPED", "_seed GROUPED")}
    check(monkeypatch, tmp_path, architecture, precision, names, taught_in)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSOR_CORES)
@pytest.mark.parametrize("precision", kernel.SHAPES)
def test_all_variants(architecture: int, precision: Precision, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(monkeypatch, tmp_path, architecture, precision, None)
