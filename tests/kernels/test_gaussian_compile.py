"""Every kernel compiles for GPUs that are not here: no spills, tensor cores in use, shared memory within limits.

The launches that the sweeps would make are recorded and compiled instead of started. A spilled register would show as
stack in the cubin.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from kernels.gaussian_similarity import kernel
from kernels.gaussian_similarity.ahead import Launch, compile_contrast, compiled, recorded
from kernels.gaussian_similarity.expansion import Precision
from kernels.gaussian_similarity.problem import Teacher
from tests.kernels.kernel_parity import on, problem

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STACK_BYTES = {"fp32": 16}  # without tensor cores products need more registers; of all others 0
ROWS, COLUMNS, K = 300, 200, 1024


def launches(architecture: int, precision: Precision, taught_in: Precision) -> list[Launch]:
    """All that the sweeps start, once each, with a teacher of its own precision."""
    with recorded(architecture) as found:
        _start_all(precision, taught_in)
    return list(found.values())


def _start_all(precision: Precision, taught_in: Precision) -> None:
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
    folder: Path,
    architecture: int,
    precision: Precision,
    names: set[str] | None,
    taught_in: Precision | None = None,
) -> None:
    every = launches(architecture, precision, taught_in or precision)
    chosen = [each for each in every if names is None or each.name in names]
    assert len(chosen) == (18 + 2 if names is None else len(names)), [each.name for each in chosen]
    cubin, stack_bytes = folder / "kernel.cubin", STACK_BYTES.get(precision, 0)
    found = [fault for launch in chosen for fault in faults(launch, architecture, cubin, stack_bytes)]
    assert not found, "\n".join(found)


def test_default_precision_on_hopper(tmp_path: Path) -> None:
    check(tmp_path, 90, "bf16", None)


@pytest.mark.parametrize("architecture", [80, 100])
def test_a_contrast_alone_on_its_neighbours(architecture: int, tmp_path: Path) -> None:
    check(tmp_path, architecture, "bf16", {"_statistics", "_times_strip", "_times_strip TRANSPOSED"})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSOR_CORES)
@pytest.mark.parametrize(("precision", "taught_in"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_teacher_of_another_precision(
    precision: Precision, taught_in: Precision, architecture: int, tmp_path: Path
) -> None:
    names = {f"{name} TEACHER" for name in ("_statistics", "_seed", "_statistics GROUPED", "_seed GROUPED")}
    check(tmp_path, architecture, precision, names, taught_in)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TENSOR_CORES)
@pytest.mark.parametrize("precision", kernel.SHAPES)
def test_all_variants(architecture: int, precision: Precision, tmp_path: Path) -> None:
    check(tmp_path, architecture, precision, None)


def test_what_doctor_compiles() -> None:
    launch = kernel._launch
    turned = "_times_strip TRANSPOSED"
    assert compile_contrast(90) == ["_seed", "_statistics", "_times_strip", turned, f"{turned} ADD"]
    assert kernel._launch is launch
