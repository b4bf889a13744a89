"""The Triton kernels in Triton's interpreter, on the CPU, against stored fp64 logits (`kernel_parity`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# The kernels are told what they are when they are defined, so the interpreter needs a process of its own; here
# each case needs seconds, so the default tier takes those that differ, each precision, group and teacher among them.
QUICK = (
    "contrast-fp32-one-alone",
    "contrast-fp32-groups-teacher",
    "columns_alone",
    "contrast-tf32-one-alone",
    "contrast-split-one-teacher",
    "contrast-bf16-one-alone",
    "contrast-bf16-groups-teacher",
    "sigmoid-fp32-one",
    "sigmoid-split-one",
    "sigmoid-bf16-groups",
    "nothing-0-7",
    "nothing-7-0",
    "density-bhattacharyya",
    "density-hellinger",
    "density-expected_likelihood",
    "wasserstein-fp32",
    "wasserstein-bf16",
    "shifted_and_far",
)


def interpreted(*names: str) -> dict[str, str | None]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.kernel_parity", "cpu", *names],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def wrong(found: dict[str, str | None]) -> str:
    return "\n".join(f"{name}: {trouble}" for name, trouble in found.items() if trouble is not None)


def test_kernels_are_the_formulas() -> None:
    # One test, so that one process serves all cases: as a fixture, each worker of the test run would start its own.
    found = interpreted(*QUICK)
    assert found.keys() == set(QUICK)
    assert not wrong(found), wrong(found)


@pytest.mark.slow
def test_all_variants_of_the_kernels_are_the_formulas() -> None:
    found = wrong(interpreted())
    assert not found, found
