"""The harness: bars decide, peers divide, the JSON has the promised form, the program returns the promised codes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ci.bench as package
from ci.bench import __main__ as program
from ci.bench.figure import alternate, bars, figure, print_table, ratio, write_json
from shards.errors import ConfigError

MEMBERS = {
    "value", "unit", "better", "ours", "peer", "peer_name", "bar", "holds", "repeats", "seeds", "threads", "commit",
    "wall_s", "note",
}  # fmt: skip


def test_every_bar_is_complete() -> None:
    for name, bar in bars().items():
        assert "." in name
        assert bar.what, name
        assert bar.unit, name
        assert bar.better in ("higher", "lower"), name


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("demo.phantom_zero_shot_auc", 0.80, True),
        ("demo.phantom_zero_shot_auc", 0.799, False),
        ("demo.phantom_zero_shot_auc", math.nan, False),
        ("demo.seconds", 360.0, True),
        ("demo.seconds", 360.1, False),
        ("demo.seconds", math.nan, False),
        ("resume.bytes_skipped_read", 0, True),
        ("resume.bytes_skipped_read", 1, False),
        ("demo.nih_probe_auc", 0.1, None),
    ],
)
def test_bar_decides(name: str, value: float, holds: bool | None) -> None:
    assert figure(name, value).holds is holds


def test_unlisted_figure_has_no_bar_and_names_its_unit() -> None:
    one = figure("loader.folder_images_per_s", 1200, unit="images/s", better="higher")
    assert (one.bar, one.holds) == (None, None)
    with pytest.raises(ConfigError, match=r"not in bars\.toml"):
        figure("loader.unheard_of", 1.0)
    with pytest.raises(ConfigError, match="lower is better"):
        figure("demo.seconds", 1.0, better="higher")


def test_ratio_is_the_median_of_rounds() -> None:
    # A machine twice as slow in the second round changes neither ratio.
    one = ratio("loader.folder_vs_best_peer", [110.0, 55.0, 120.0], [100.0, 50.0, 100.0], peer_name="dali")
    assert one.value == pytest.approx(1.1)
    assert (one.ours, one.peer, one.repeats, one.holds) == (110.0, 100.0, 3, True)
    with pytest.raises(ConfigError, match="2 rounds"):
        ratio("loader.folder_vs_best_peer", [1.0, 2.0], [1.0], peer_name="dali")


def test_alternate_turns_the_order() -> None:
    calls: list[str] = []

    def contestant(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    results = alternate({name: (lambda name=name: contestant(name)) for name in "abc"}, rounds=3)
    assert calls == list("abcbcacab")
    assert results == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}


def test_json_form(tmp_path: Path) -> None:
    figures = [figure("demo.seconds", 300, wall_s=300, seeds=(1, 2)), figure("demo.nih_probe_auc", math.nan)]
    write_json(figures, tmp_path / "deep" / "figures.json")
    body = json.loads((tmp_path / "deep" / "figures.json").read_text("utf-8"))
    assert set(body) == {"demo.seconds", "demo.nih_probe_auc"}
    assert all(set(entry) == MEMBERS for entry in body.values())
    assert body["demo.seconds"]["seeds"] == [1, 2]
    assert body["demo.nih_probe_auc"]["value"] is None
    with pytest.raises(ConfigError, match="twice"):
        write_json([figures[0], figures[0]], tmp_path / "x.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write figures"):
        write_json(figures, tmp_path / "file" / "x.json")


def test_table_ends_with_the_figure(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    print_table([figure("demo.seconds", 301.0)], "demo", Console(width=200))
    heading, row = [line for line in capsys.readouterr().out.splitlines() if "holds" in line or "demo.seconds" in line]
    assert heading.split()[-1] == "value"
    assert row.split()[-1] == "301"


BENCHMARK = '''"""A benchmark."""
DESCRIPTION = "counts to one"
def run(quick):
    from ci.bench.figure import figure
    return [figure("demo.seconds", {value})]
'''


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A folder of one benchmark, put where the program looks for them."""

    def write(value: float) -> None:
        (tmp_path / "counting.py").write_text(BENCHMARK.format(value=value))
        monkeypatch.setattr("ci.bench.__path__", [str(tmp_path), *package.__path__])
        monkeypatch.setattr(program, "descriptions", lambda: real(tmp_path))
        monkeypatch.delitem(sys.modules, "ci.bench.counting", raising=False)

    real = program.descriptions
    return write


@pytest.mark.parametrize(("value", "options", "code"), [(10, [], 0), (1000, [], 1), (1000, ["--quick"], 0)])
def test_exit_code_follows_the_bar(benchmark, value: float, options: list[str], code: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    benchmark(value)
    assert program.main(["counting", *options, "--json", str(tmp_path / "out.json")]) == code
    entry = json.loads((tmp_path / "out.json").read_text())["demo.seconds"]
    assert entry["holds"] is (None if options else value <= 360)


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["no-such-benchmark"]) == 2
    assert "no benchmark is called 'no-such-benchmark'" in capsys.readouterr().err


def test_listing_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    listed = capsys.readouterr().out
    for name, description in program.descriptions().items():
        assert f"{name} " in listed
        assert "\n" not in description


def test_figures_are_frozen() -> None:
    one = figure("demo.seconds", 1.0)
    assert replace(one, note="again").value == one.value
    with pytest.raises(AttributeError):
        one.value = 2.0  # type: ignore[misc]
