"""Reports/s of the whole chain by rules on one core, and whether memory stays flat over many of them.

`python -m ci.bench.reports_speed --reports 200000` takes an hour or more: memory over as many, no two of them alike.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import string
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import psutil

from ci.bench.figure import Figure, figure, print_table
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


def _reports(varied: bool = False) -> Iterator[RawReport]:
    """CT-RATE and Open-i in turn, without end; every report is of another study and patient."""
    pairs = zip(*map(cycle, _distinct()), strict=False)
    for number, text in enumerate(one for pair in pairs for one in pair):
        study, patient = (hashed_key(SECRET, kind, str(number)) for kind in ("study", "patient"))
        yield RawReport(study=study, patient=patient, texts={WHOLE: _varied(text, number) if varied else text})


def _varied(text: str, number: int) -> str:
    """The report with other figures and a made-up word in each sentence: nothing remembered knows it."""
    drawn = random.Random(number)
    text = re.sub(r"\d", lambda match: drawn.choice("123456789"), text)
    return re.sub(r"(?<=[a-z])(?=\.)", lambda match: " " + "".join(drawn.choices(string.ascii_lowercase, k=9)), text)


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
    return [
        figure(
            "reports.per_second", statistics.median(rates), repeats=len(rates), threads=1, wall_s=wall_s,
            note=f"processor seconds; unseen reports, chunks of {CHUNK_REPORTS}, slowest {min(rates):.0f}; of "
            f"{count} reports {failed} failed, {size / count:.0f} bytes each",
        ),
        _growth(resident_mb, count, wall_s),
    ]  # fmt: skip


def _growth(resident_mb: Sequence[float], count: int, wall_s: float) -> Figure:
    """`resident_mb`: after each chunk. The last less that after a tenth."""
    early = resident_mb[max(1, len(resident_mb) // 10) - 1]
    return figure(
        "reports.memory_growth_mb", resident_mb[-1] - early, threads=1, wall_s=wall_s,
        note=f"{resident_mb[-1]:.0f} MB after {count} reports, {max(resident_mb):.0f} at most",
    )  # fmt: skip


def memory(count: int) -> Figure:
    """Growth over `count` reports, each with words of its own; told every 10,240 on the error stream."""
    started = time.perf_counter()
    preparer, reports, process = Preparer(Config(), SECRET), _reports(varied=True), psutil.Process()
    resident_mb = []
    for done in range(CHUNK_REPORTS, count + 1, CHUNK_REPORTS):
        preparer(list(islice(reports, CHUNK_REPORTS)))
        resident_mb.append(process.memory_info().rss / 1e6)
        if done % 10_240 == 0:
            print(f"{done} reports, {resident_mb[-1]:.0f} MB, {time.process_time():.0f} s", file=sys.stderr, flush=True)
    return _growth(resident_mb, len(resident_mb) * CHUNK_REPORTS, time.perf_counter() - started)


def main() -> int:
    """Exit code 1 where memory grows by more than the bar."""
    parser = argparse.ArgumentParser(prog="python -m ci.bench.reports_speed")
    parser.add_argument("--reports", type=int, default=200_000)
    found = memory(max(parser.parse_args().reports, CHUNK_REPORTS))
    print_table([found], "memory over reports that differ")
    return int(found.holds is False)


if __name__ == "__main__":
    sys.exit(main())
