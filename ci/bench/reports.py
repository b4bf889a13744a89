"""What is made of reports without a model: identifiers found, labels, spans, speed, on real sets beside the project.

Each part of `shards.reports` has its module here, `reports_<part>.py`, with `figures_<part>(quick) -> list[Figure]`.
"""

from __future__ import annotations

import importlib
import importlib.util

from ci.bench.figure import Figure

DESCRIPTION = "reports: de-identification, labels and anatomy against real sets, reports/s on one core (minutes)"

PARTS = ("deid", "labels", "anatomy", "speed")


def run(quick: bool) -> list[Figure]:
    """The figures of every part, in the order of PARTS."""
    figures: list[Figure] = []
    for part in PARTS:
        name = f"ci.bench.reports_{part}"
        if importlib.util.find_spec(name) is not None:
            figures += getattr(importlib.import_module(name), f"figures_{part}")(quick)
    return figures
