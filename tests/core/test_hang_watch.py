"""A rank that stops moving is named, the stacks of the others are written, and all end with code 5."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core import hang_watch
from core.hang_watch import EXIT_CODE, HangWatch
from core.world import World
from tests.core.runs import Options, run


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize(("how", "said"), [("sleep", "data"), ("stop", "silent")])
def test_the_rank_that_others_wait_for_is_named(tmp_path: Path, how: str, said: str) -> None:
    options = Options(run_dir=str(tmp_path), steps=6, save_every=2, hang_at=3, hang_how=how, hang_after_s=3.0)
    codes = run(2, options)
    assert codes[0] == EXIT_CODE
    assert codes[1] == (EXIT_CODE if how == "sleep" else -signal.SIGKILL)  # a stopped process is killed by who waits
    (hang,) = events(tmp_path, "hang")
    assert (hang["step"], hang["arrived"]) == (3, [0])
    assert [each["rank"] for each in hang["missing"]] == [1]
    assert said in hang["missing"][0]["place"]
    stacks = (tmp_path / "hang" / "rank-0.txt").read_text()
    assert "engine.py" in stacks
    assert "train_step" in stacks
    # What the run saved before is whole, and it goes on from there.
    resumed = Options(run_dir=str(tmp_path), steps=6, save_every=2, hang_after_s=60)
    assert run(2, resumed) == [0, 0]
    assert not list((tmp_path / "hang").glob("*.json"))


class Watched:
    """A watch in this process, whose end is noted instead of done and whose clock, `now`, stands until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, limit_s: float | None) -> None:
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.now = 1000.0
        monkeypatch.setattr(hang_watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.watch = HangWatch(limit_s, folder, World(), end=self.end)

    def end(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()


def test_steps_that_go_on_are_left_alone_and_evaluations_may_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, tmp_path, 0.4)
    watched.watch.start(0)
    watched.now += 2.0  # a first step
    for step in range(1, 4):
        assert not watched.ended.wait(0.2)  # two looks
        watched.watch.at("step", step)
        watched.now += 0.3
    watched.watch.at("evaluation", 4)
    watched.now += 2.0
    assert not watched.ended.wait(0.3)
    watched.watch.at("step", 4)
    watched.now += 0.5
    assert watched.ended.wait(60)
    assert watched.codes == [EXIT_CODE]
    watched.watch.close()


def test_without_a_limit_nothing_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, tmp_path, None)
    watched.watch.start(0)
    watched.watch.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_does_not_keep_a_hung_run_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, tmp_path, 0.4)
    watched.watch.start(0)
    (tmp_path / "hang" / "rank-0.json").unlink()
    os.rmdir(tmp_path / "hang")
    watched.now += 60
    assert watched.ended.wait(60)
    watched.watch.close()
