"""Runs on Ray: what the driver decides, without a cluster; and, slow, on clusters of this machine that lose workers."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ci.bench.figure import REPOSITORY
from ci.bench.ray_cluster import RayCluster, end_all, environment, family, terminate
from core.checkpoint_files import find_weights, steps_in
from core.trainer import StopRequest
from launchers import ray_pretrain, submit
from launchers.elastic import Ended, Restarts
from tests.launchers.past_runs import pack

TIMEOUT_S = 240
DONE, SAVED = (0, "", True), (143, "", True)


# ---- the driver alone ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "tiny:clap", "--run-dir", "x"], "did you mean"),
        (["--recipe", "tiny:clip"], "--run-dir is missing"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--workers", "5"], "use 4 or 6"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--workers", "many"], "such as 4 or 2:8"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--cpus-per-worker", "0"], "--cpus-per-worker 0"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--max-restarts", "-1"], "--max-restarts -1"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--wait-s", "-1"], "--wait-s -1"),
        (["--recipe", "tiny:clip", "--run-dir", "x", "--grow-every-s", "0"], "--grow-every-s 0"),
        (
            ["--recipe", "tiny:clip", "--run-dir", "x", "--address", "127.0.0.1:1"],
            "no cluster there (Connection",
        ),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ray_pretrain.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_the_run_is_shown_as_pretrain_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert ray_pretrain.main(["--recipe", "tiny:clip", "--print", "--set", "seed=3"]) == 0
    assert "* seed: 3" in capsys.readouterr().out


class Scripted(ray_pretrain.Driver):
    """A driver whose attempts end as told, on the numbers of workers that have room then."""

    def __init__(self, folder: Path, attempts: list[Ended], room: list[int], *, limit: int = 5) -> None:
        self._arguments = argparse.Namespace(recipe="tiny:clip", overrides=[], run_dir=str(folder))
        self._folder, self._stop, self._restarts = folder, StopRequest(), Restarts(limit)
        self._ends, self._room = iter(attempts), iter(room)
        self.restarts: list[dict[str, Any] | None] = []

    def _place(self, *, first: bool) -> int | None:
        return next(self._room)

    def _attempt(self, number: int, count: int, restart: Any) -> Ended:
        assert number == len(self.restarts)
        self.restarts.append(restart)
        return next(self._ends)


def test_a_dead_worker_is_followed_by_a_restart_on_what_has_room(tmp_path: Path) -> None:
    driver = Scripted(
        tmp_path,
        [
            Ended(workers=4, start=0, failure="rank 2 died"),
            Ended(workers=2, start=4, ranks={0: SAVED, 1: SAVED}, resizing=True),
            Ended(workers=3, start=8, ranks=dict.fromkeys(range(3), DONE)),
        ],
        [4, 2, 3],
    )
    assert driver.run() == 0
    assert driver.restarts[0] is None
    told = [(each["cause"], each["workers_before"], each["workers_after"]) for each in driver.restarts[1:] if each]
    assert told == [("rank 2 died", 4, 2), ("more workers have room", 2, 3)]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_errors_of_the_run_end_it_at_once(tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    ended = Ended(workers=2, start=0, ranks={0: (code, "what was wrong", True), 1: (code, "what was wrong", True)})
    assert Scripted(tmp_path, [ended], [2]).run() == code
    assert capsys.readouterr().err == "error: what was wrong\n"


def test_a_run_that_dies_again_and_again_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dies = Ended(workers=2, start=0, failure="rank 0: KeyError")
    assert Scripted(tmp_path, [dies] * 3, [2] * 3, limit=2).run() == 1
    assert "gave up after 2 restarts" in capsys.readouterr().err
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["cause"], event["restarts"]) == ("gave_up", "rank 0: KeyError", 2)


# ---- on clusters ----


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("set"))


def arguments(workers: str, run_dir: Path, manifest: Path, *overrides: str) -> list[str]:
    settings = [f"data.train={manifest}", 'data.sections=["findings"]', "data.max_skip_rate=0.5"]
    quick = ["evaluation.protocols=[]", "trainer.save_every=2", *overrides]
    return ["--workers", workers, "--recipe", "tiny:clip", "--run-dir", str(run_dir), "--set", *settings, *quick]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts ray_pretrain.py, by default on a cluster of its own; what is left of it ends with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"driver{len(started)}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "launchers/ray_pretrain.py", *words],
                    cwd=REPOSITORY, env=env or environment(), stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        end_all(family(process.pid))
        process.wait()


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for line in lines if kind in (None, (event := json.loads(line))["event"])]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.2)


def rank_processes(pid: int) -> list[psutil.Process]:
    return [process for process in family(pid) if any("RayTrainWorker" in word for word in process.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_costs_no_bit(tmp_path: Path, manifest: Path, launch: Any) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = "trainer.steps=60"
    assert launch("--address", "local", *arguments("2", whole, manifest, steps)).wait(timeout=TIMEOUT_S) == 0
    driver = launch("--address", "local", *arguments("2", broken, manifest, steps))
    wait_for(lambda: 4 in steps_in(broken), driver)
    rank_processes(driver.pid)[1].kill()
    assert driver.wait(timeout=TIMEOUT_S) == 0
    assert find_weights(whole).read_bytes() == find_weights(broken).read_bytes()
    (restart,) = events(broken, "restart")
    assert re.fullmatch(r"rank \d (died|was lost)", restart["cause"])
    assert (restart["workers_before"], restart["workers_after"]) == (2, 2)
    assert restart["seconds"] > 0
    starts = [event["step"] for event in events(broken, "start")]
    assert starts[0] == 0 and starts[1] >= 4
    assert events(broken)[-1]["code"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_saves_and_leaves_no_process(tmp_path: Path, manifest: Path, launch: Any) -> None:
    run_dir = tmp_path / "run"
    driver = launch("--address", "local", *arguments("2", run_dir, manifest, "trainer.steps=100000"))
    wait_for(lambda: steps_in(run_dir), driver)
    processes = family(driver.pid)
    assert len(rank_processes(driver.pid)) == 2
    assert terminate(driver, TIMEOUT_S) == 143
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    (stopped,) = events(run_dir, "stopped")
    assert (stopped["code"], stopped["step"]) == (143, steps_in(run_dir)[-1])
    assert events(run_dir, "restart") == []
    # The same run directory with another recipe: the ranks refuse it, and nobody tries again.
    driver = launch("--address", "local", *arguments("2", run_dir, manifest, "seed=7"))
    assert driver.wait(timeout=TIMEOUT_S) == 2
    said = (tmp_path / "driver1.log").read_text()
    assert "error: " in said and "checkpoint of another recipe" in said and "restarting" not in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, manifest: Path, launch: Any) -> None:
    run_dir = tmp_path / "run"
    driver = launch("--address", "local", *arguments("2", run_dir, manifest, "optim.learning_rate=1e30"))
    assert driver.wait(timeout=TIMEOUT_S) == 4
    assert "launchers/replay.py --step" in (tmp_path / "driver0.log").read_text()
    assert len(events(run_dir, "start")) == 1
    assert events(run_dir, "error")[0]["kind"] == "NonFiniteError"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_two_three_four_workers_see_the_same_batches(tmp_path: Path, manifest: Path, launch: Any) -> None:
    fixed, elastic = tmp_path / "fixed", tmp_path / "elastic"
    # Sums in another order differ in their last bits; training at the recipe's rate makes 1e-3 of them in 160 steps.
    endless = ("trainer.steps=100000", "optim.schedule=constant", "optim.learning_rate=1e-5")
    with RayCluster() as cluster:
        nodes = [cluster.add_node() for _ in range(4)]
        options = ["--address", cluster.address, "--grow-every-s", "5"]
        driver = launch(*options, *arguments("2:4", elastic, manifest, *endless), env=cluster.environment())

        def trains_on(ranks: int) -> None:
            """Until the last start was on so many ranks and has saved since."""

            def there() -> bool:
                lines = [event for event in events(elastic) if event["event"] in ("start", "save")]
                return len(lines) > 2 and lines[-1]["event"] == "save" and starts()[-1]["ranks"] == ranks

            def starts() -> list[dict[str, Any]]:
                return events(elastic, "start")

            wait_for(there, driver)

        trains_on(4)
        for node in nodes[:2]:
            cluster.end_node(node)
        trains_on(2)
        cluster.add_node()
        trains_on(3)
        cluster.add_node()
        trains_on(4)
        assert terminate(driver, TIMEOUT_S) == 143
    assert events(elastic, "start")[0]["ranks"] == 4
    changes = [(event["workers_before"], event["workers_after"]) for event in events(elastic, "restart")]
    assert [(2, 3), (3, 4)] == changes[-2:] and changes[0][0] == 4 and changes[-3][1] == 2
    last = steps_in(elastic)[-1]
    driver = launch("--address", "local", *arguments("1", fixed, manifest, *endless))
    wait_for(lambda: any(event["step"] >= last for event in events(fixed, "batch")), driver)
    assert terminate(driver, TIMEOUT_S) == 143

    def hashes(run_dir: Path) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for event in events(run_dir, "batch"):
            found.setdefault(event["step"], set()).add(event["batch_hash"])
        return found

    of_fixed, of_elastic = hashes(fixed), hashes(elastic)
    assert {step: of_fixed[step] for step in range(last)} == {step: of_elastic[step] for step in range(last)}
    assert all(len(keys) == 1 for keys in of_fixed.values())
    losses = [curve(run_dir) for run_dir in (fixed, elastic)]
    assert all(losses[1][step] == pytest.approx(losses[0][step], rel=1e-4) for step in range(1, last + 1))


def curve(run_dir: Path) -> dict[int, float]:
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars("loss/total")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_jobs_are_sent_followed_and_stopped(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with RayCluster(dashboard=True, cpus=1) as cluster:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 10)
        assert submit.main(["list", "--address", cluster.dashboard]) == 2
        assert "wrong token" in capfd.readouterr().err
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        at = ["--address", cluster.dashboard]
        run_dir = tmp_path / "short"
        short = arguments("1", run_dir, manifest, "trainer.steps=2")
        assert submit.main(["submit", "--follow", *at, *short]) == 0
        shown = capfd.readouterr()
        assert "step 2/2" in shown.out
        assert cluster.token not in shown.out + shown.err + (run_dir / "events.jsonl").read_text()
        assert steps_in(run_dir) == [2]
        # More workers than the cluster will ever have.
        wide = [*arguments("4", tmp_path / "wide", manifest), "--wait-s", "3"]
        assert submit.main(["submit", "--follow", *at, *wide]) == 2
        assert "4 workers need 4 CPU, 1 of 1 are free, 3 missing" in capfd.readouterr().out
        run_dir = tmp_path / "long"
        assert submit.main(["submit", *at, *arguments("1", run_dir, manifest, "trainer.steps=100000")]) == 0
        job = capfd.readouterr().out.strip()
        wait_for(lambda: steps_in(run_dir))
        assert submit.main(["stop", *at, job]) == 0
        assert f"{job}  STOPPED" in capfd.readouterr().out
        (stopped,) = events(run_dir, "stopped")
        assert (stopped["code"], stopped["step"]) == (143, steps_in(run_dir)[-1])
        assert submit.main(["logs", *at, "--follow", job]) == 143
        assert "the ranks save first" in capfd.readouterr().out
