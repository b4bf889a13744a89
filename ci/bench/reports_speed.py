"""Reports/s of the whole chain by rules on one core, and whether memory stays flat over many of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import cycle, islice

import psutil

from ci.bench.figure import Figure, figure
from ci.bench.reports_data import ct_rate, open_i
from shards.ingest import hashed_key
from shards.reports.pipeline import WHOLE, Config, RawReport
from shards.reports.prepare import CHUNK_REPORTS, Preparer

REPORTS = 20_480
QUICK_REPORTS = 1_024
SECRET = b"the secret of a benchmark"


def _distinct() -> list[list[str]]:
    """Texts of CT-RATE and of Open-i, each once."""
    return [list(dict.fromkeys(report.text for report in read())) for read in (ct_rate, open_i)]


def _reports() -> Iterator[RawReport]:
    """CT-RATE and Open-i in turn, without end; every report is of another study and patient."""
    pairs = zip(*map(cycle, _distinct()), strict=False)
    for number, text in enumerate(one for pair in pairs for one in pair):
        study, patient = (hashed_key(SECRET, kind, str(number)) for kind in ("study", "patient"))
        yield RawReport(study=study, patient=patient, texts={WHOLE: text})


def figures_speed(quick: bool) -> list[Figure]:
    """Cleaned, de-identified, extracted by rules and serialised, by chunks as prepare_reports.py does it.

    Sentences are remembered, so that the rate is that of reports never seen before; memory is that of all.
    """
    started = time.perf_counter()
    count = QUICK_REPORTS if quick else REPORTS
    preparer, reports, process = Preparer(Config(), SECRET), _reports(), psutil.Process()
    preparer(list(islice(reports, CHUNK_REPORTS)))  # tables are loaded
    rates, resident_mb, failed, size = [], [], 0, 0
    fresh = 2 * min(map(len, _distinct())) // CHUNK_REPORTS - 1  # chunks before the shorter set begins again
    for number in range(count // CHUNK_REPORTS):
        chunk = list(islice(reports, CHUNK_REPORTS))
        begun = time.process_time()
        done = preparer(chunk)
        if number < fresh:
            rates.append(len(chunk) / (time.process_time() - begun))
        failed += len(done.failed)
        size += sum(map(len, done.lines))
        resident_mb.append(process.memory_info().rss / 1e6)
    wall_s = time.perf_counter() - started
    early = resident_mb[max(1, len(resident_mb) // 10) - 1]
    return [
        figure(
            "reports.per_second", statistics.median(rates), repeats=len(rates), threads=1, wall_s=wall_s,
            note=f"processor seconds; unseen reports, chunks of {CHUNK_REPORTS}, slowest {min(rates):.0f}; of "
            f"{count} reports {failed} failed, {size / count:.0f} bytes each",
        ),
        figure(
            "reports.memory_growth_mb", resident_mb[-1] - early, threads=1, wall_s=wall_s,
            note=f"{resident_mb[-1]:.0f} MB after {count} reports",
        ),
    ]  # fmt: skip
