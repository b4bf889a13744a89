"""The demo's own parts, and in the slow tier the demo itself with a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ci import demo
from ci.bench.figure import bars
from core.metrics import Metrics
from core.world import World


def test_wait_is_the_median_over_intervals(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, World(), first_step=0)
    for step, fraction in enumerate((0.9, 0.01, 0.02, 0.03, 0.04), start=1):
        metrics.scalars(step, {"time/data_wait_fraction": fraction})
    metrics.close()
    assert demo.data_wait_fraction(tmp_path) == pytest.approx(0.03)


def test_auc_is_the_macro_with_its_interval() -> None:
    one = demo.auc("demo.phantom_probe_auc", {"macro": {"value": 0.9, "low": 0.85, "high": 0.94}}, 1.0)
    assert (one.value, one.holds) == (0.9, True)
    assert "0.850 to 0.940" in one.note
    none = demo.auc("demo.phantom_probe_auc", {"macro": {"value": None, "low": None, "high": None}}, 1.0)
    assert math.isnan(none.value)
    assert none.holds is False


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert demo.main(["--run-dir", str(tmp_path)]) == 2
    assert "holds something else than a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_failed_program_gives_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: demo.Demo) -> None:
        self._launch("failing", "bash", "-c", "exit 3", "pack.py")

    monkeypatch.setattr(demo.Demo, "pack", fail)
    assert demo.main(["--run-dir", str(tmp_path / "run")]) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo_twice(tmp_path: Path) -> None:
    for _ in range(2):  # the second starts from nothing again
        assert demo.main(["--quick", "--run-dir", str(tmp_path / "run")]) == 0
    figures = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert set(figures) == {name for name in bars() if name.startswith("demo.")}
    assert all(entry["value"] is not None and entry["holds"] is None for entry in figures.values())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "latest", "checkpoints", "tb", "events.jsonl", "eval", "shards", "summary.json"} <= names
