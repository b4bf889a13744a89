"""What the bench of faults reads from a run directory, and makes of it; the faults themselves are run by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ci.bench import faults, faults_report
from ci.bench.faults_run import Broken, Outcome


def broken(folder: Path, events: list[dict[str, Any]], restarts: list[dict[str, Any]] | None = None) -> Broken:
    run = Broken(folder=folder / "run", manifest="m", steps=4, save_every=2)
    run.folder.mkdir()
    (run.folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "ba')
    run.log.write_text("".join(json.dumps(line) + "\n" for line in restarts or []))
    return run


def batch(at: float, step: int, batch_hash: int | None = None) -> dict[str, Any]:
    return {"time": at, "event": "batch", "step": step, "batch_hash": step if batch_hash is None else batch_hash}


KILLED = [
    {"time": 100.0, "event": "start", "step": 0},
    batch(105.0, 0),
    batch(106.0, 1),
    {"time": 106.5, "event": "save", "step": 2, "seconds": 0.5},
    batch(107.5, 2),  # done again
    {"time": 115.0, "event": "start", "step": 2},
    batch(118.0, 2),
    batch(119.0, 3),
    {"time": 120.0, "event": "save", "step": 4, "seconds": 1.0},
]


def test_time_is_told_apart_by_what_it_was_spent_on(tmp_path: Path) -> None:
    run = broken(tmp_path, KILLED, [{"time": 109.0, "event": "ended", "code": 137}])
    share, spans = run.goodput()
    seconds = {
        kind: sum(length for _, length, what in spans if what == kind) for kind in ("step", "again", "save", "down")
    }
    assert seconds == {"step": 2.0, "again": 1.0, "save": 1.5, "down": pytest.approx(15.5)}
    assert share == pytest.approx(2.0 / 20.0)
    assert run.step_s() == 1.0
    assert run.lost_steps() == 1
    assert run.seconds_after(108.0) == {"detected_s": 1.0, "restored_s": 7.0, "first_step_s": 10.0}
    assert run.seconds_after(200.0) == {"detected_s": None, "restored_s": None, "first_step_s": None}


def test_samples_that_changed_after_a_restart_show(tmp_path: Path) -> None:
    assert broken(tmp_path, [*KILLED, batch(121.0, 3, batch_hash=77)]).samples()[3] == {3, 77}


def test_the_full_form_kills_twenty_times(tmp_path: Path) -> None:
    kills = faults._kills("full", broken(tmp_path, KILLED))
    assert len(kills) == 20
    assert {(scene.run.by, scene.fault.split(" of ")[1].split(" (")[0]) for scene in kills} == {
        ("restart.py", "one rank"),
        ("restart.py", "all ranks"),
        ("ray", "one rank"),
        ("ray", "all ranks"),
        ("ray", "a node with its ranks"),
        ("ray", "the head, submitted again"),
    }


def test_a_run_is_started_by_whom_it_says(tmp_path: Path) -> None:
    run = Broken(folder=tmp_path / "a", manifest="m", steps=4, save_every=2, overrides=("seed=3",))
    plain, runner, ray = (replace(run, by=by).command(7) for by in ("restart.py", "deepspeed", "ray"))
    assert plain[1:6] == ["launchers/restart.py", "--restarts", "7", "--log", str(run.log)]
    assert plain[plain.index("--ranks") + 1] == "2" and "launchers/pretrain.py" in plain
    assert Path(runner[0]).name == "deepspeed" and "launchers/restart.py" not in runner
    assert ray[ray.index("--workers") + 1] == "2" and "launchers/ray_pretrain.py" in ray
    mirrored = replace(run, by="ray", workers="2:4", address="h:1", run_dir="s3://b/a", without=("HOME",))
    words = mirrored.command(0)
    assert words[words.index("--workers") + 1] == "2:4" and words[words.index("--address") + 1] == "h:1"
    assert all(command[-1] == "seed=3" for command in (plain, runner, ray, words))
    assert words[words.index("--run-dir") + 1] == "s3://b/a"
    assert "HOME" not in mirrored.variables() and run.variables()["DS_ACCELERATOR"] == "cpu"


def test_figures_count_what_survived_and_what_lost_more_than_a_save(tmp_path: Path) -> None:
    kills = [
        Outcome(fault="SIGKILL of one rank", survived=True, identical=True, first_step_s=10.0, lost_steps=3, text=""),
        Outcome(fault="SIGKILL of all ranks", survived=True, identical=False, first_step_s=20.0, text=""),
        Outcome(fault="SIGKILL of one rank", survived=True, identical=True, lost_steps=99, text=""),
    ]
    others = [Outcome(fault="loss not finite", survived=False, text="code 1")]
    run = broken(tmp_path, KILLED)
    found = {one.id: one for one in faults._figures(kills, [*kills, *others], run, 0.01, False, 1.0)}
    assert found["faults.kills_survived"].value == 2
    assert found["faults.bit_identical"].value == pytest.approx(2 / 3)
    assert (found["faults.others_survived"].value, found["faults.others_survived"].note) == (0, "loss not finite")
    assert found["faults.fault_to_first_step_s"].value == 15.0
    assert found["faults.checkpoint_overhead"].value == pytest.approx(1.5 / 3.0)
    assert found["faults.goodput"].holds is False
    assert found["faults.ray_overhead"].holds is True
    assert all(math.isfinite(one.value) for one in found.values())
    faults_report.write(tmp_path / "report", kills, list(found.values()), run.goodput()[1])
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| SIGKILL of one rank | survived |  |  | 10.0 | 3 |" in page
    for picture in ("seconds.png", "timeline.png"):
        assert (tmp_path / "report" / picture).read_bytes()[1:4] == b"PNG"
