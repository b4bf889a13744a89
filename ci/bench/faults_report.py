"""The page and the pictures of `python -m ci.bench faults`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ci.bench.faults_run import Outcome
from ci.bench.figure import Figure

COLOURS = {"step": "tab:green", "again": "tab:orange", "save": "tab:blue", "down": "tab:red"}
STAGES = (("detected_s", "ranks ended"), ("restored_s", "checkpoint read"), ("first_step_s", "first step"))


def write(
    folder: Path, outcomes: Sequence[Outcome], figures: Sequence[Figure], spans: Sequence[tuple[float, float, str]]
) -> None:
    """`report.md`, `outcomes.json`, `seconds.png`, `timeline.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcomes.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    rows = [
        "| fault | outcome | detected s | restored s | first step s | steps again | |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        seconds = " | ".join(_number(getattr(each, name)) for name, _ in STAGES)
        good = "survived" if each.survived else "**NOT survived**"
        rows.append(f"| {each.fault} | {good} | {seconds} | {each.lost_steps or ''} | {each.text} |")
    lines = ["| figure | value | bar |", "|---|---|---|"]
    lines += [f"| `{one.id}` | {one.value:.4g} {one.unit} | {'' if one.bar is None else one.bar} |" for one in figures]
    page = [
        "# Faults", "", *rows, "", "Seconds count from the fault.", "", "![seconds](seconds.png)", "",
        "![timeline](timeline.png)", "", *lines, "",
    ]  # fmt: skip
    (folder / "report.md").write_text("\n".join(page))
    _bars(outcomes, folder / "seconds.png")
    _timeline(spans, folder / "timeline.png")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _bars(outcomes: Sequence[Outcome], path: Path) -> None:
    from matplotlib.figure import Figure as Drawing

    timed = [each for each in outcomes if each.first_step_s is not None]
    drawing = Drawing(figsize=(8, 1.5 + 0.35 * len(timed)), layout="constrained")
    axes = drawing.add_subplot()
    left = [0.0] * len(timed)
    for name, label in STAGES:
        ends = [getattr(each, name) or before for each, before in zip(timed, left, strict=True)]
        widths = [max(0.0, end - before) for end, before in zip(ends, left, strict=True)]
        axes.barh(range(len(timed)), widths, left=left, label=label)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(timed)), [each.fault for each in timed])
    axes.invert_yaxis()
    axes.set(xlabel="seconds after the fault", title="From a fault to the next step")
    if timed:
        axes.legend()
    drawing.savefig(path, dpi=130)


def _timeline(spans: Sequence[tuple[float, float, str]], path: Path) -> None:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 2.2), layout="constrained")
    axes = drawing.add_subplot()
    for kind, colour in COLOURS.items():
        axes.broken_barh(
            [(at, seconds) for at, seconds, what in spans if what == kind], (0, 1), color=colour, label=kind
        )
    axes.set(xlabel="seconds", title="What the time went to: steps that count, done again, saves, nothing")
    axes.set_yticks([])
    drawing.legend(ncols=4, loc="outside lower center")
    drawing.savefig(path, dpi=130)
