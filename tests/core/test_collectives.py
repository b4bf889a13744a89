"""Collectives: the identity alone; exact values, gradients, votes and errors on two gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core import collectives
from shards.errors import ConfigError, DataError
from tests.distributed import run_distributed

COUNTS = (3, 1)  # rows of two ranks


def errors_of(rank: int) -> list[str]:
    """What this rank raises when nobody, the other one, or it alone has a problem."""
    found = []
    for problem_of in (None, 0, 1):
        problem = DataError(f"of rank {rank}") if rank == problem_of else None
        try:
            collectives.raise_together(problem, ConfigError("another rank's"))
            found.append("")
        except (DataError, ConfigError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def uneven(rank: int) -> dict[str, Any]:
    rows = torch.full((COUNTS[rank], 2), float(rank))
    everyone = collectives.gather_rows(rows, COUNTS)
    own = collectives.sum_to_owners(torch.arange(8.0).reshape(4, 2) * (rank + 1), COUNTS)
    first, second = (collectives.pass_on([rows[:1] + hop, torch.tensor([rank])], tag=4 * hop) for hop in range(2))
    return {
        "counts": collectives.row_counts(COUNTS[rank], torch.device("cpu")),
        "everyone": everyone.tolist(),
        "none": [list(collectives.gather_rows(rows[:0], (0, 0)).shape), collectives.gather_rows(rows[:rank], (0, 1))],
        "own": own.tolist(),
        "from before": [[each.tolist() for each in received()] for received in (second, first)],
    }


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    votes = [collectives.any_rank(False), collectives.any_rank(rank == 1), collectives.any_rank(True)]
    flags = collectives.all_gather_rows(torch.tensor([rank == 0, True]))
    gathered = collectives.gather({"x": torch.full((2, 3), float(rank), requires_grad=True), "unread": torch.ones(2)})
    weights = torch.arange(float(2 * world_size))[:, None] * (rank + 1.0)
    (weights * gathered.all["x"]).sum().backward()
    half = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    collectives.all_gather_rows(half).sum().backward()
    of_uneven = uneven(rank)
    of_uneven["none"][1] = of_uneven["none"][1].tolist()
    return {
        "votes": votes,
        "flags": flags.tolist(),
        "ranks": gathered.ranks,
        "x": gathered.all["x"].tolist(),
        "again": gathered.all["x"] is gathered.all["x"],
        "x_grad": gathered.own["x"].grad.tolist(),
        "half_grad": half.grad.tolist(),
        "errors": errors_of(rank),
        "uneven": of_uneven,
    }


def test_alone_everything_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.all_gather_rows(x) is x
    assert collectives.any_rank(True) and not collectives.any_rank(False)
    total = collectives.sum_over_ranks(x)
    assert torch.equal(total, x) and not total.requires_grad and total.data_ptr() != x.data_ptr()
    gathered = collectives.gather({"x": x})
    assert gathered.own["x"] is x and gathered.all["x"] is x and gathered.ranks == 1
    assert collectives.row_counts(3, x.device) == (3,)
    assert torch.equal(collectives.gather_rows(x, (3,)), x) and collectives.sum_to_owners(x, (3,)) is x
    collectives.raise_together(None, ConfigError("nobody's"))
    with pytest.raises(DataError, match="mine"):
        collectives.raise_together(DataError("mine"), ConfigError("nobody's"))


def test_rows_must_agree() -> None:
    with pytest.raises(AssertionError, match="differ in rows"):
        collectives.gather({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_two_ranks() -> None:
    for place, rank in enumerate(run_distributed(on_rank, 2)):
        assert rank["votes"] == [False, True, True]
        assert rank["flags"] == [True, True, False, True]
        assert rank["ranks"] == 2 and rank["again"]
        assert rank["x"] == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        # d/dx of sum over ranks r of (r + 1) * row number * x
        assert rank["x_grad"] == [[3.0 * (2 * place + row)] * 3 for row in range(2)]
        assert rank["half_grad"] == [[2.0, 2.0]]
        own, other = f"DataError: of rank {place}", "ConfigError: another rank's"
        assert rank["errors"] == (["", own, other] if place == 0 else ["", other, own])

        found = rank["uneven"]
        assert found["counts"] == COUNTS
        assert found["everyone"] == [[0.0] * 2] * 3 + [[1.0] * 2]
        assert found["none"] == [[0, 2], [[1.0, 1.0]]]
        assert found["own"] == [[[0.0, 3.0], [6.0, 9.0], [12.0, 15.0]], [[18.0, 21.0]]][place]
        # Two messages under way at once, waited for in the other order.
        other_rank = 1 - place
        expected = [[[[other_rank + hop] * 2], [other_rank]] for hop in (1.0, 0.0)]
        assert found["from before"] == expected
