"""What is made of reports without a model: identifiers found, labels, spans, speed, on real sets beside the project.

Each part of `shards.reports` has its module here, `reports_<part>.py`, with `figures_<part>(quick) -> list[Figure]`.
"""

from __future__ import annotations

from ci.bench.figure import Figure
from ci.bench.reports_anatomy import figures_anatomy
from ci.bench.reports_deid import figures_deid
from ci.bench.reports_labels import figures_labels
from ci.bench.reports_speed import figures_speed

DESCRIPTION = "reports: de-identification, labels and anatomy against real sets, reports/s on one core (minutes)"


def run(quick: bool) -> list[Figure]:
    """The figures of every part."""
    return [one for part in (figures_deid, figures_labels, figures_anatomy, figures_speed) for one in part(quick)]
