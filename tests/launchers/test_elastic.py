"""Numbers of workers, what follows from how ranks ended, what they are told: no cluster needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchers.elastic import OUTDATED, Board, Ended, Restarts, Workers, describe, fitting, shortage, verdict
from shards.errors import ConfigError

DONE = (0, "", True)
SAVED = (143, "", True)


@pytest.mark.parametrize(("text", "range_"), [("4", (4, 4)), ("2:8", (2, 8)), ("1:1", (1, 1))])
def test_workers_are_a_number_or_a_range(text: str, range_: tuple[int, int]) -> None:
    assert Workers.parse(text) == Workers(minimum=range_[0], maximum=range_[1])


@pytest.mark.parametrize("text", ["", "0", "0:4", "8:2", "-1", "two", "2:", "2:4:8", "1.5"])
def test_other_words_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--workers .*(2:8|MIN <= MAX)"):
        Workers.parse(text)


def test_only_numbers_that_divide_the_lanes_are_used() -> None:
    assert fitting(Workers.parse("1:12"), 12) == [12, 6, 4, 3, 2, 1]
    assert fitting(Workers.parse("2:5"), 12) == [4, 3, 2]
    assert fitting(Workers.parse("16"), 48) == [16]


@pytest.mark.parametrize(
    ("workers", "lanes", "near"), [("5", 12, "4 or 6"), ("9:11", 48, "8 or 12"), ("13:99", 12, "use 12$")]
)
def test_a_misfit_names_the_nearest(workers: str, lanes: int, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        fitting(Workers.parse(workers), lanes)


def test_a_shortage_says_what_is_missing_and_what_is_free() -> None:
    text = shortage({"GPU": 1.0, "CPU": 4.0}, 8, {"GPU": 3.0, "CPU": 64.0}, {"GPU": 16.0, "CPU": 128.0})
    assert "8 workers need 8 GPU, 3 of 16 are free, 5 missing" in text
    assert "need 32 CPU, 64 of 128 are free" in text and "CPU, 64 of 128 are free, " not in text
    assert "nodes that cannot hold a whole worker" in shortage({"CPU": 4.0}, 2, {"CPU": 8.0}, {"CPU": 8.0})


def test_all_done_ends_the_run() -> None:
    decision = verdict(Ended(workers=2, start=0, ranks={0: DONE, 1: DONE}), stop=0)
    assert decision.code == 0
    late = Ended(workers=2, start=0, ranks={0: DONE, 1: DONE}, failure="rank 1 died")
    assert verdict(late, stop=0).code == 0


@pytest.mark.parametrize("code", [2, 3, 4])
def test_errors_that_would_come_again_are_never_tried_again(code: int) -> None:
    agreed = {rank: (code, f"what rank {rank} says", True) for rank in (0, 1)}
    decision = verdict(Ended(workers=2, start=0, ranks=agreed), stop=0)
    assert (decision.code, decision.message) == (code, "what rank 0 says")
    # One rank's own trouble, which Ray sees as a failed group.
    alone = {1: (code, "its shard is gone", False), 0: (1, "lost another rank; its message says why", False)}
    decision = verdict(Ended(workers=2, start=0, ranks=alone, failure="rank 1: RankEndedError"), stop=0)
    assert (decision.code, decision.message) == (code, "its shard is gone")


def test_the_rank_that_has_the_trouble_is_heard_not_its_stand_ins() -> None:
    ranks = {0: (2, "/a: cannot be written by another rank", True), 1: (2, "/a: cannot be written on node7", True)}
    assert verdict(Ended(workers=2, ranks=ranks), stop=0).message == "/a: cannot be written on node7"


def test_a_dead_worker_starts_the_others_again() -> None:
    ended = Ended(
        workers=2, start=4, ranks={0: (1, "lost another rank; its message says why", False)}, failure="rank 1 died"
    )
    decision = verdict(ended, stop=0)
    assert decision.code is None and decision.is_failure
    assert decision.cause == "rank 1 died"
    # The others often tell of it before Ray does.
    ended = replace(ended, failure="rank 0: RankEndedError")
    assert verdict(ended, stop=0).cause == "rank 1 was lost"


def test_a_stop_ends_with_its_code_only_if_all_saved() -> None:
    whole = Ended(workers=2, start=0, ranks={0: SAVED, 1: SAVED})
    assert verdict(whole, stop=143).code == 143
    decision = verdict(Ended(workers=2, start=0, ranks={0: SAVED}, failure="rank 1 died"), stop=143)
    assert decision.code == 1 and "rank 1 died" in decision.message
    assert verdict(Ended(workers=2, stopped_early=True), stop=130).code == 130
    assert verdict(Ended(workers=2, start=0, ranks={0: DONE, 1: DONE}), stop=143).code == 0


def test_a_leaving_node_and_more_room_are_no_failures() -> None:
    ranks = {0: SAVED, 1: SAVED}
    assert verdict(Ended(workers=2, start=0, ranks=ranks, notice=True), stop=0).cause == "a node leaves"
    grown = verdict(Ended(workers=2, start=0, ranks=ranks, resizing=True), stop=0)
    assert grown.code is None and not grown.is_failure
    # The node was faster than the ranks.
    gone = verdict(Ended(workers=2, start=0, ranks={0: SAVED}, notice=True, failure="rank 1 died"), stop=0)
    assert gone.code is None and not gone.is_failure
    # Nobody asked: then it counts, or a worker that is terminated again and again would never end.
    assert verdict(Ended(workers=2, start=0, ranks=ranks), stop=0).is_failure


def test_restarts_without_progress_are_limited_and_progress_forgives() -> None:
    restarts = Restarts(2)
    assert [restarts.count(Ended(workers=1, start=step)) for step in (0, 0, 4, 4)] == [None] * 4
    assert restarts.count(Ended(workers=1, start=4), counts=False) is None
    said = restarts.count(Ended(workers=1, start=None))
    assert said is not None and "2 restarts" in said and "step 4" in said
    assert restarts.total == 5
    assert "their start" in str(Restarts(0).count(Ended(workers=1)))


def test_a_rank_that_died_is_named_before_those_that_lost_it() -> None:
    assert describe([(0, "RankEndedError"), (3, "died"), (1, "died")]) == "rank 1, 3 died"
    assert describe([(1, "KeyError")]) == "rank 1: KeyError"


def test_the_board_hands_on_stops_restarts_and_endings_of_the_present_attempt() -> None:
    board = Board()
    board.open(0, None)
    assert board.asked(0) == 0 and board.asked(1) == OUTDATED
    assert board.started(0, 0) == []
    board.ended(0, 1, 1, "", False)
    # The second attempt dies before it trains: its restart is written by the third, with the one after.
    board.open(1, {"event": "restart", "cause": "rank 1 died", "ended_at": 0.0})
    board.ended(0, 0, 0, "", True)  # too late to count
    assert board.state() == {"start": None, "ranks": {}, "notice": False}
    assert board.started(0, 9) == [] and board.asked(0) == OUTDATED
    board.open(2, {"event": "restart", "cause": "rank 0 died", "ended_at": 0.0})
    board.ask(15)
    assert board.asked(2) == 15
    written = board.started(2, 4)
    assert [event["cause"] for event in written] == ["rank 1 died", "rank 0 died"]
    assert all(event["seconds"] > 1e9 and "ended_at" not in event for event in written)
    assert board.started(2, 4) == []
    board.noticed(2)
    board.ended(2, 0, 143, "", True)
    assert board.state() == {"start": 4, "ranks": {0: (143, "", True)}, "notice": True}
    board.open(3, None)
    assert board.asked(3) == 0
