"""An invented hospital's export through `pack.py --source archive`: identities left, pairs, bytes, views/s, stages.

The export is that of `ci/data/hospital_export.py`. Views per second are of the whole command's work, worker processes
started and all: headers, pairs, pixels, text cleaned, de-identified and read, tars written. Temporary files: 4 GB.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gdcm
import psutil
from pydicom import dcmread

from ci.bench.figure import REPOSITORY, Figure, figure, seconds_of
from ci.data import archive_check, identity_search
from ci.data.hospital_export import Export, make_export
from shards.errors import RoentgenError
from shards.ingest.dicom_file import pixels_of, quiet, read_file
from shards.ingest.dicom_pixels import load_view
from shards.ingest.image_file import ImageLimits
from shards.manifest import Manifest
from shards.reports.intake import known_patient
from shards.reports.pipeline import WHOLE
from shards.writer import ShardBuilder

DESCRIPTION = "archive: a hospital's export to shards, identities left, pairs, bytes again, views/s, stages (minutes)"

SECRET, OTHER_SECRET = b"the secret of a benchmark", b"another secret of a benchmark"
SEED = 10
STUDIES, QUICK_STUDIES = 2_080, 60  # give 5,000 views
WORKERS = 2
ROUNDS = 3
STAGED_STUDIES = 40


def run(quick: bool) -> list[Figure]:
    """All figures of the archive."""
    with tempfile.TemporaryDirectory(prefix="archive-") as scratch:
        figures = _identities(Path(scratch), QUICK_STUDIES if quick else STUDIES)
    with tempfile.TemporaryDirectory(prefix="archive-") as scratch:
        figures += _speed(Path(scratch), quick)
    return figures


# --- identities ---


def _identities(scratch: Path, studies: int) -> list[Figure]:
    started = time.perf_counter()
    faulty = 0.1 if studies == STUDIES else 0.5  # few studies hold few of the faults
    export = make_export(
        scratch / "export", studies=studies, layout="table of files", seed=SEED, size=128, faulty=faulty
    )
    logs = _packed(export, scratch / "set", SECRET)
    _packed(export, scratch / "again", SECRET)
    found = identity_search.everywhere(scratch / "set", logs, export.studies)
    found += identity_search.beside_samples(scratch / "set", logs, export.studies)
    suspects = archive_check.suspects(export, identity_search.records(scratch / "set"), SECRET)
    if suspects:
        again = archive_check.again(export, suspects, OTHER_SECRET)
        found += archive_check.lasting(suspects, archive_check.suspects(export, again, OTHER_SECRET))
    manifest = Manifest.from_bytes((scratch / "set" / "manifest.json").read_bytes())
    wrong = archive_check.wrong_studies(export, scratch / "set", SECRET)
    names = sorted(path.name for path in (scratch / "set").iterdir())
    _, differ, missing = filecmp.cmpfiles(scratch / "set", scratch / "again", names, shallow=False)
    injected = sum(len(study.injected) for study in export.studies)
    views = sum(shard.images for shard in manifest.shards)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.items())) or "none of any kind"
    wall_s = time.perf_counter() - started
    return [
        figure(
            "archive.identities_found", found.total(), seeds=(SEED,), wall_s=wall_s,
            note=f"of {injected} put into {len(export.studies)} studies, {export.files} files; {kinds}; "
            f"{sum(map(len, suspects.values()))} surrogates equal to one by chance",
        ),
        figure(
            "archive.pairs_wrong", len(wrong), seeds=(SEED,),
            note=f"{manifest.samples} studies of {views} views packed; {', '.join(sorted(set(wrong))) or 'none wrong'}",
        ),
        figure(
            "archive.files_unaccounted", archive_check.unaccounted(export, manifest), seeds=(SEED,),
            note=f"{sum(manifest.refused.values())} refused for {len(manifest.refused)} reasons",
        ),
        figure(
            "archive.second_run_differs", len(differ) + len(missing), seeds=(SEED,), note=f"of {len(names)} files",
        ),
    ]  # fmt: skip


def _packed(export: Export, output: Path, secret: bytes) -> str:
    """Run the command as a user does; what it printed. Raises RoentgenError where it fails."""
    key = output.with_suffix(".key")
    key.write_bytes(secret)
    key.chmod(0o600)
    command = [sys.executable, "-m", "launchers.pack", "--source", "archive", "--input", export.folder,
               "--key-file", key, "--output", output, "--workers", WORKERS, "--shard-samples", 256]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode != 0:
        raise RoentgenError(f"pack.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout + done.stderr


# --- speed ---


def _speed(scratch: Path, quick: bool) -> list[Figure]:
    plain = make_export(
        scratch / "plain", studies=8 if quick else 500, seed=SEED, size=96 if quick else 1024, faulty=0.0
    )
    figures = [_rate("archive.views_per_second", plain, scratch, 1 if quick else ROUNDS, _views_per_second)]
    figures += _stages(plain)
    shutil.rmtree(plain.folder)
    lossless = make_export(
        scratch / "lossless", studies=4 if quick else 30, seed=SEED, size=(96, 80) if quick else (2500, 2000),
        faulty=0.0,
    )  # fmt: skip
    raw_bytes = _to_jpeg_lossless(lossless)
    return [
        *figures,
        _rate(
            "archive.jpeg_lossless_mb_per_second", lossless, scratch, 1 if quick else ROUNDS,
            lambda views, seconds: raw_bytes / 1e6 / seconds,
        ),
    ]  # fmt: skip


def _views_per_second(views: int, seconds: float) -> float:
    return views / seconds


def _rate(figure_id: str, export: Export, scratch: Path, rounds: int, rate: Callable[[int, float], float]) -> Figure:
    """Wall clock of the whole command; processor time beside it, which other programs on the machine change less."""
    walls, processors = [], []
    for number in range(rounds):
        before = psutil.Process().cpu_times()
        walls.append(seconds_of(partial(_packed, export, scratch / f"set{number}", SECRET)))
        after = psutil.Process().cpu_times()
        processors.append(after.children_user - before.children_user + after.children_system - before.children_system)
        shutil.rmtree(scratch / f"set{number}")
    seconds = statistics.median(walls)
    return figure(
        figure_id, rate(export.files, seconds), repeats=rounds, threads=WORKERS, wall_s=sum(walls), seeds=(SEED,),
        note=f"{export.files} views of {len(export.studies)} studies in {', '.join(f'{one:.1f}' for one in walls)} s; "
        f"{1000 * statistics.median(processors) / export.files:.0f} ms of a processor a view; "
        f"load of the machine {os.getloadavg()[0]:.1f}",
    )  # fmt: skip


def _to_jpeg_lossless(export: Export) -> int:
    """Rewrite every image with JPEG lossless (process 14, selection 1); bytes of all pixels as they were."""
    total = 0
    for path in sorted((export.folder / "images").rglob("IM*")):
        total += len(dcmread(path).PixelData)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        if not reader.Read() or change.SetInput(reader.GetImage()) is False or not change.Change():
            raise RoentgenError(f"{path.name}: GDCM does not write JPEG lossless")
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        if not writer.Write():
            raise RoentgenError(f"{path.name}: GDCM does not write the file")
    return total


def _stages(export: Export) -> list[Figure]:
    """Milliseconds of one process a view, or a study, in the order of the work."""
    source = archive_check.archive(export, SECRET)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.process_time()
        yield
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - started

    plan = source.plan()
    with timed("headers and pairs"):
        source.plan()
    seconds["headers and pairs"] *= min(STAGED_STUDIES, len(plan.items)) / len(plan.items)
    source.load(plan.items[0])  # tables are loaded
    views = 0
    for item in plan.items[:STAGED_STUDIES]:
        for path in (path for group, _ in item.payload.groups for path in group):
            views += 1
            with quiet:
                with timed("file read"):
                    dataset = read_file(export.folder / path)
                with timed("pixels decoded"):
                    pixels_of(dataset)
                dataset = read_file(export.folder / path)  # pydicom remembers what it decoded
                with timed("pixels checked, turned, encoded"):
                    load_view(dataset, "0", ImageLimits(), None)
        report = item.payload.report
        opened = source.images.open_study(item.key, item.patient, item.payload.groups, searched=True)
        assert opened.sample is not None
        known = known_patient(item.patient, **report.known)
        with timed("text cleaned, de-identified, read"):
            source.structured.complete(opened.sample.record, {WHOLE: report.text()}, known, None)
        with timed("tar built"):
            ShardBuilder().add(opened.sample)
    seconds["pixels checked, turned, encoded"] -= seconds["pixels decoded"]
    return [
        figure(
            f"archive.stage: {stage}", 1000 * spent / views, unit="ms a view", better="lower", threads=1, seeds=(SEED,),
            note=f"{views} views of {min(STAGED_STUDIES, len(plan.items))} studies, one process",
        )
        for stage, spent in seconds.items()
    ]  # fmt: skip
