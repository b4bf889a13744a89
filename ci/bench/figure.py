"""A measured figure, the bar it is held against, and the way repeats are taken; no benchmark lives here.

A figure's JSON is `id -> {"value", "unit", "better", "ours", "peer", ...}`. Bars, units and directions come from
`bars.toml` only, so that a benchmark cannot move its own bar.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, JustifyMethod
from rich.table import Table

from shards.errors import ConfigError

BARS_FILE = Path(__file__).with_name("bars.toml")
REPOSITORY = Path(__file__).resolve().parents[2]

LOG_COLUMNS = 150  # a table in a file or a pipe need not be as narrow as a terminal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure under its id.

    `value` is the figure itself; where there is a peer it is `ours / peer`, rates and times alike, and `better` says
    which way is good. `bar` is the last value that still passes (None: shown as it is), `holds` the verdict (None:
    not judged). `threads` counts the compute threads all contestants were given; `wall_s` is what the measurement took.
    """

    id: str
    value: float
    unit: str
    better: Better
    ours: float | None
    peer: float | None
    peer_name: str | None
    bar: float | None
    holds: bool | None
    repeats: int
    seeds: tuple[int, ...]
    threads: int
    commit: str
    wall_s: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """Everything except the id, which is the key it is written under; not-a-number becomes null."""
        body = asdict(self)
        del body["id"]
        body["seeds"] = list(self.seeds)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in body.items()}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One entry of `bars.toml`. `bar` None: the figure is printed as it is."""

    what: str
    unit: str
    better: Better
    bar: float | None = None

    def holds(self, value: float) -> bool | None:
        """None without a bar; a value that is not a number never holds."""
        if self.bar is None:
            return None
        return value >= self.bar if self.better == "higher" else value <= self.bar


@cache
def bars() -> dict[str, Bar]:
    """Every known figure id with its bar."""
    return {name: Bar(**entry) for name, entry in tomllib.loads(BARS_FILE.read_text("utf-8")).items()}


@cache
def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` when tracked files differ, `unknown` outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def figure(
    figure_id: str,
    value: float,
    *,
    ours: float | None = None,
    peer: float | None = None,
    peer_name: str | None = None,
    unit: str | None = None,
    better: Better | None = None,
    repeats: int = 1,
    seeds: Iterable[int] = (),
    threads: int | None = None,
    wall_s: float = math.nan,
    note: str = "",
) -> Figure:
    """A Figure judged against `bars.toml`.

    Ids listed there take unit, direction and bar from it. An id that is not listed carries no bar and must name `unit`
    and `better`: it is context beside the figures that count. Raises ConfigError otherwise.
    """
    entry = bars().get(figure_id)
    if entry is None:
        if unit is None or better is None:
            raise ConfigError(f"figure {figure_id!r} is not in {BARS_FILE.name}; list it there or give unit and better")
        entry = Bar(what="", unit=unit, better=better)
    elif (unit or entry.unit) != entry.unit or (better or entry.better) != entry.better:
        raise ConfigError(
            f"figure {figure_id!r} is {entry.unit}, {entry.better} is better in {BARS_FILE.name}; got {unit}, {better}"
        )
    return Figure(
        id=figure_id, value=float(value), unit=entry.unit, better=entry.better, ours=ours, peer=peer,
        peer_name=peer_name, bar=entry.bar, holds=entry.holds(float(value)), repeats=repeats, seeds=tuple(seeds),
        threads=threads if threads is not None else os.cpu_count() or 1, commit=commit(), wall_s=wall_s, note=note,
    )  # fmt: skip


def ratio(
    figure_id: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    peer_name: str,
    unit: str | None = None,
    better: Better | None = None,
    threads: int | None = None,
    wall_s: float = math.nan,
    note: str = "",
) -> Figure:
    """Ours over the peer's: the median over rounds of the ratio within a round, from two equally long lists.

    Dividing within a round cancels what the whole machine was doing at that minute. `ours` and `peer` of the figure
    are the medians of the two lists.
    """
    if len(ours) != len(peer) or not ours:
        raise ConfigError(f"figure {figure_id!r}: {len(ours)} rounds of ours against {len(peer)} of {peer_name}")
    return figure(
        figure_id,
        statistics.median(a / b for a, b in zip(ours, peer, strict=True)),
        ours=statistics.median(ours), peer=statistics.median(peer), peer_name=peer_name, unit=unit, better=better,
        repeats=len(ours), threads=threads, wall_s=wall_s, note=note,
    )  # fmt: skip


def alternate(
    contestants: Mapping[str, Callable[[], float]], rounds: int, *, log: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Measure every contestant once a round, `rounds` times: name -> [rounds] results (seconds or rates).

    The order turns by one place every round, so that nobody always runs on a warm cache or a hot processor. A
    contestant measures itself and returns one number; warm-up belongs to it, outside its clock.
    """
    names = list(contestants)
    results: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(rounds):
        turn = round_index % len(names)
        for name in names[turn:] + names[:turn]:
            result = contestants[name]()
            results[name].append(result)
            if log is not None:
                log(f"round {round_index + 1}/{rounds}  {name}: {result:.4g}")
    return results


def seconds_of(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def print_table(figures: Sequence[Figure], title: str, console: Console | None = None) -> None:
    """One row a figure; what ours and the peer did first, the figure itself last. Columns nobody fills are left out."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    rows = [
        (
            one.id,
            one.unit,
            _number(one.ours),
            f"{_number(one.peer)} {one.peer_name or ''}".strip(),
            one.note,
            "" if one.bar is None else ("≥ " if one.better == "higher" else "≤ ") + _number(one.bar),
            {True: "[green]yes[/green]", False: "[bold red]NO[/bold red]", None: "-"}[one.holds],
            _number(one.value),
        )
        for one in figures
    ]
    headings = ("figure", "unit", "ours", "peer", "note", "bar", "holds", "value")
    shown = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for place in shown:
        side: JustifyMethod = "right" if headings[place] in ("ours", "bar", "value") else "left"
        table.add_column(headings[place], justify=side, no_wrap=headings[place] != "note", overflow="fold")
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    console.print(table)


def write_json(figures: Sequence[Figure], path: Path) -> None:
    """One object, id -> figure. Raises ConfigError when an id stands twice or the folder cannot be written."""
    ids = [one.id for one in figures]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ConfigError(f"figure ids {', '.join(twice)} were reported twice in one run")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {one.id: one.to_json() for one in figures}
        path.write_text(json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write figures to {path}: {error.strerror}; name another --json file") from None
