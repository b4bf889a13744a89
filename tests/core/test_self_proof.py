"""The proof of a run's fast paths: it holds between the CPU's own, and a wrong or broken part is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from core import self_proof
from core.losses.contrast import Similarity
from core.models import attention
from core.self_proof import Difference, Part, attention_part, kernel_part, prove
from core.world import World
from kernels.gaussian_similarity import blocked
from kernels.gaussian_similarity.expansion import Precision
from shards.errors import ConfigError
from tests.distributed import run_distributed

CPU = torch.device("cpu")
CONTRASTS: list[tuple[Similarity, Precision]] = [("cosine", "fp32"), ("sampled", "bf16"), ("wasserstein", "bf16")]


@pytest.fixture(autouse=True)
def _default_attention() -> Iterator[None]:
    yield
    attention.take_only(None)


@pytest.mark.parametrize("half", [True, False])
def test_the_paths_of_the_cpu_agree_and_say_so(caplog: pytest.LogCaptureFixture, half: bool) -> None:
    with caplog.at_level(logging.INFO, logger=self_proof.__name__):
        prove([kernel_part(CPU, 20, CONTRASTS), attention_part(CPU, half_precision=half)], World())
    lines = [record.message for record in caplog.records if record.name == self_proof.__name__]
    assert [line.split(" agrees")[0] for line in lines] == [
        "self-proof: the kernel of Gaussian similarities",
        "self-proof: fused attention",
    ]


def test_the_kernel_is_proved_in_several_pieces_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen, before = blocked.statistics, [], (blocked.TILE_ROWS, blocked.TILE_COLUMNS)

    def statistics(problem: Any, **keywords: Any) -> Any:
        seen.append((len(problem.rows) > 2 * blocked.TILE_ROWS, len(problem.columns) > 2 * blocked.TILE_COLUMNS))
        return right(problem, **keywords)

    monkeypatch.setattr(blocked, "statistics", statistics)
    names = [difference.what for difference in kernel_part(CPU, 20, CONTRASTS).compare()]
    assert seen and all(rows and columns for rows, columns in seen)
    assert (blocked.TILE_ROWS, blocked.TILE_COLUMNS) == before
    for similarity, precision in CONTRASTS:
        assert f"pairwise sigmoid, gradient of scale of {similarity} in {precision}" in names


def wrong_gradients(**factors: float) -> Any:
    right = blocked.gradients

    def gradients(*arguments: Any, **keywords: Any) -> Any:
        found = right(*arguments, **keywords)
        return replace(found, **{name: getattr(found, name) * factor for name, factor in factors.items()})

    return gradients


@pytest.mark.parametrize("name", ["rows", "columns", "row_bias", "column_bias", "scale"])
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(blocked, "gradients", wrong_gradients(**{name: 1.05}))
    with pytest.raises(ConfigError, match=r"kernel of Gaussian.* wrong .*InfoNCE.*--set engine\.kernel=pytorch"):
        prove([kernel_part(CPU, 20, CONTRASTS)], World())


def test_a_kernel_that_leaves_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "gradients", wrong_gradients(rows=float("nan")))
    with pytest.raises(ConfigError, match=r"is off by nan"):
        prove([kernel_part(CPU, 20, CONTRASTS)], World())


@pytest.mark.parametrize("wrong", ["value", "mask", "gradient"])
def test_wrong_attention_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = attention._MatmulAttention

    class Wrong(right):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, qkv: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
            found = right.forward(ctx, qkv, None if wrong == "mask" else hidden)
            return found * (1.1 if wrong == "value" else 1.0)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            of_qkv, none = right.backward(ctx, grad)
            return of_qkv * (1.1 if wrong == "gradient" else 1.0), none

    monkeypatch.setattr(attention, "_MatmulAttention", Wrong)
    with pytest.raises(ConfigError, match=r"fused attention computes something wrong.*--set engine\.attention=sdpa"):
        prove([attention_part(CPU, half_precision=True)], World())


def test_a_part_that_does_not_run_is_refused_and_all_problems_are_named(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Iterator[Difference]:
        raise RuntimeError("no kernel image is available")

    def differs() -> Iterator[Difference]:
        yield Difference("fine", 0.0, 1.0)
        yield Difference("a sum", 3.0, 1.0)

    parts = [Part(name="one", switch="--set a=1", compare=fails), Part(name="two", switch="--set b=2", compare=differs)]
    with pytest.raises(ConfigError) as refusal, caplog.at_level(logging.ERROR, logger=self_proof.__name__):
        prove(parts, World())
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "; ".join(line.removeprefix("self-proof: ") for line in said) == str(refusal.value)
    assert str(refusal.value) == (
        "one fails on this device (RuntimeError: no kernel image is available); switch it off with --set a=1; "
        "two computes something wrong on this device: a sum is off by 3.0e+00, 1e+00 is rounding; "
        "switch it off with --set b=2"
    )


def on_rank(rank: int, world_size: int) -> str:
    part = Part(name="a part", switch="--set a=1", compare=lambda: iter([Difference("it", float(rank), 0.5)]))
    try:
        # No tensor can be made on this device, as on a GPU that a kernel has broken: ranks must meet elsewhere.
        prove([part], World(rank=rank, world_size=world_size, device=torch.device("cuda", 99)))
    except ConfigError as error:
        return str(error)
    return "trains"


def test_one_rank_that_differs_stops_all() -> None:
    first, second = run_distributed(on_rank, 2)
    assert "another rank's device" in first and "a part computes something wrong" in second


@pytest.mark.parametrize("implementation", ["sdpa", "matmul"])
def test_attention_takes_only_what_it_is_told(implementation: attention.Implementation) -> None:
    attention.take_only(implementation)
    assert {attention.choose("cpu", length, half) for length in (8, 4096) for half in (True, False)} == {implementation}
    attention.take_only(None)
    assert (attention.choose("cpu", 8, True), attention.choose("cpu", 4096, True)) == ("matmul", "sdpa")
