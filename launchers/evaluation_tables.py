"""Reports of evaluators as tables on a terminal, and how every program shows an estimate there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from core.evaluation.generation import MEASURES


def tables(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """One table a protocol."""
    for protocol, report in reports.items():
        where = f"{report['split']} of {report['data']}, step {report['step']}"
        if "directions" in report:
            table = Table(
                title=f"{protocol}: {report['studies']} studies, {report['distinct_reports']} reports, {where}"
            )
            table.add_column("")
            for direction in report["directions"]:
                table.add_column(direction.replace("_", " "), justify="right")
            found = list(report["directions"].values())
            for name in found[0]:
                if name == "median_rank":
                    table.add_row("median rank", *(f"{one[name]:g}" for one in found))
                else:
                    table.add_row(f"R@{name.removeprefix('r')}", *(interval(one[name]) for one in found))
            for by, percent, name in _abstentions(report["abstention"]):
                found = [report["abstention"][direction].get(by) for direction in report["directions"]]
                shown = ("" if one is None else interval(one[percent][name]) for one in found)
                table.add_row(f"R@{name.removeprefix('r')}, surest {percent} % by {by}", *shown)
        elif "shares" in report:
            table = Table(title=f"{protocol}: AUC by share of labels, {where}")
            table.add_column("label")
            for percent in report["shares"]:
                table.add_column(f"{percent} %", justify="right")
            for label in report["anatomy_of"]:
                table.add_row(label, *(interval(one["labels"][label]) for one in report["shares"].values()))
            table.add_row("macro", *(interval(one["macro"]) for one in report["shares"].values()), style="bold")
        elif "less" in report:
            counts = report["studies"]
            table = Table(title=f"{protocol}: {counts['train']} studies read, {counts['test']} written, {where}")
            for name in ("", *report["reports"]):
                table.add_column(name, justify="right" if name else "left")
            for measure in MEASURES:
                shown = (interval(one[measure], undefined="no label") for one in report["reports"].values())
                table.add_row(measure.replace("_", " "), *shown)
            table.add_row("distinct reports", *map(str, report["distinct_reports"].values()))
        elif "figures" in report:
            table = Table(title=f"{protocol}: {report['studies']} studies, {where}")
            table.add_column("")
            table.add_column("", justify="right")
            for name, estimate in report["figures"].items():
                table.add_row(name.replace("_", " "), interval(estimate, undefined="not defined"))
        else:
            table = Table(title=f"{protocol}: AUC, {where}")
            for name, justify in (("label", "left"), ("AUC", "right"), ("present", "right"), ("absent", "right")):
                table.add_column(name, justify=justify)  # type: ignore[arg-type]
            for label, area in report["labels"].items():
                counted = "" if label in report["macro_over"] else " (not in macro)"
                unseen = " (unseen)" if label in report.get("unseen", ()) else ""
                table.add_row(label + unseen + counted, interval(area), str(area["positives"]), str(area["negatives"]))
            table.add_row("macro", interval(report["macro"]), "", "", style="bold")
            for which, macro in report.get("macro_of", {}).items():
                table.add_row(f"macro, {which} classes", interval(macro), "", "")
            if "paraphrases" in report and report["paraphrases"]["macro"]["mean"] is not None:
                wordings = report["paraphrases"]["macro"]
                spread = f"{wordings['mean']:.3f} ± {wordings['deviation']:.3f}"
                table.add_row(f"macro, {len(wordings['each'])} other wordings", spread, "", "")
        yield table


def _abstentions(report: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(confidence, coverage in percent, `r<k>`) of all directions, the best cut-off of recall only."""
    return list(
        dict.fromkeys(
            (by, percent, next(iter(of)))
            for kinds in report.values()
            for by, coverages in kinds.items()
            for percent, of in coverages.items()
            if percent != "100"
        )
    )


def interval(estimate: Mapping[str, Any], undefined: str = "one class only", *, sign: bool = False) -> str:
    """A figure with its bounds, as far as they are known; `sign`: shown in front of positive ones, too."""
    if estimate["value"] is None:
        return undefined
    form = "+.3f" if sign else ".3f"
    bounds = "" if estimate["low"] is None else f" [{estimate['low']:{form}}, {estimate['high']:{form}}]"
    return f"{estimate['value']:{form}}{bounds}"
