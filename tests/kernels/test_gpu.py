"""The same parity as in the interpreter, compiled, on a CUDA device: `pytest -m gpu tests/kernels/test_gpu.py`."""

from __future__ import annotations

import pytest
import torch

from kernels.gaussian_similarity import expansion, op, sweep
from tests.kernels import kernel_parity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", kernel_parity.CASES)
def test_kernels_are_the_formulas(name: str) -> None:
    trouble = kernel_parity.run("cuda", [name])[name]
    assert trouble is None, trouble


def test_the_device_chooses_the_path() -> None:
    on_gpu = torch.zeros(1, device="cuda")
    assert [sweep.path_of(each).__name__.split(".")[-1] for each in (on_gpu, on_gpu.double(), on_gpu.cpu())] == [
        "kernel",
        "blocked",
        "blocked",
    ]


def test_fp64_has_the_same_bits_every_time() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    four = [torch.randn(1500, 8, generator=generator, device="cuda", dtype=torch.float64) for _ in range(4)]
    pairs, scale = expansion.squared_wasserstein(*four), torch.tensor(0.1, device="cuda", dtype=torch.float64)
    keys = torch.randint(3, (1500,), generator=generator, device="cuda")
    for stored in (True, False):
        losses = [op.info_nce(pairs, scale, keys, keys, stored=stored) for _ in range(5)]
        assert all(torch.equal(each, losses[0]) for each in losses)


def test_memory_grows_with_rows_and_not_with_pairs() -> None:
    def added(n: int) -> int:
        four = [torch.randn(n, 64, device="cuda").requires_grad_() for _ in range(4)]
        keys = torch.arange(n, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        op.info_nce(expansion.squared_wasserstein(*four), torch.tensor(0.1, device="cuda"), keys, keys).backward()
        return torch.cuda.max_memory_allocated() - before

    added(1024)
    assert added(65536) < 1 << 30, "16 GiB are the logits alone"
