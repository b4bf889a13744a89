"""A rank that computes or waits longer than the others is named once it lasts; so is a store that all wait for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.slow_ranks import PATIENCE, SlowRanks
from core.world import World
from tests.core.runs import Options, in_ranks, run


def two_ranks(world: World) -> tuple[list[dict[str, Any]], dict[str, float]]:
    events: list[Any] = []
    ranks = SlowRanks(world, events.append)
    curves: dict[str, float] = {}
    for step in range(1, 2 * PATIENCE + 1):
        compute_s = 0.3 if world.rank == 1 else 0.1
        curves = ranks.look(step, compute_s=compute_s, data_s=0.001, step_s=0.4)
    return events, curves


def test_the_slow_one_of_two_ranks_says_so_once() -> None:
    (quick, curves), (slow, also) = in_ranks(2, two_ranks)
    assert quick == []
    assert [(event["event"], event["of"], event["step"]) for event in slow] == [("slow_rank", "compute", PATIENCE)]
    assert (slow[0]["seconds"], slow[0]["median_s"]) == (0.3, 0.1)
    assert curves == also
    assert curves["ranks/compute_slowest_rank"] == 1.0
    assert curves["ranks/compute_slowest_s"] == pytest.approx(0.3)


def test_what_does_not_last_or_is_short_is_not_said_and_a_slow_store_is() -> None:
    events: list[Any] = []
    ranks = SlowRanks(World(), events.append)
    for step in range(1, 12):
        waits = step >= 6 or step % PATIENCE  # not at step 3, all the time from step 4 on
        ranks.look(step, compute_s=0.1, data_s=0.9 if waits else 0.1, step_s=1.0)
    assert [(event["event"], event["step"]) for event in events] == [("slow_store", 6)]


def test_the_loop_names_a_rank_whose_data_come_late(tmp_path: Any) -> None:
    options = Options(run_dir=str(tmp_path), steps=6, save_every=6, late_s=0.5)
    assert run(2, options) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    # Of computing on a busy machine nothing is promised.
    said = [event["rank"] for event in lines if event["event"] == "slow_rank" and event["of"] == "data"]
    assert said == [1]
