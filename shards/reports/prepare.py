"""Many raw reports -> one file of prepared ones, an audit of counts and a list of failures, by any number of workers.

Work is done in chunks; each finished one is kept as a part beside the output, so that a run that was killed goes on
behind them and ends in the same bytes. Parts hold what the output will: nothing raw is ever written.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from shards.errors import ConfigError, DataError
from shards.ingest import Refusal, hashed_key, key_fingerprint
from shards.reports import llm
from shards.reports.intake import Columns, read_reports
from shards.reports.pipeline import WHOLE, Config, Failed, Pipeline, RawReport
from shards.reports.prepared import write_parquet
from shards.workers import WorkerDiedError, in_order

FORMAT = 1
CHUNK_REPORTS = 256
TABLES = (".parquet", ".pq")
LINES = (".jsonl", ".ndjson")
_SMALL = "Findings: the heart is normal.\n\nConclusion : le poumon est clair."


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is prepared, how, and where to. `failed_max`: share of reports that may fail before it is an error."""

    input: Path
    output: Path
    columns: Columns = field(default_factory=Columns)
    secret: bytes | None = field(default=None, repr=False)
    pipeline: Config = field(default_factory=Config)
    workers: int = 1
    overwrite: bool = False
    failed_max: float = 0.05

    def __post_init__(self) -> None:
        if self.output.suffix.lower() not in (*TABLES, *LINES):
            raise ConfigError(f"--output {self.output}: end its name in .jsonl or .parquet")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: needs at least 1")
        if not 0.0 <= self.failed_max <= 1.0:
            raise ConfigError(f"--failed-max {self.failed_max}: is no share; use 0 to 1")

    def beside(self, ending: str) -> Path:
        """A file next to the output."""
        return self.output.with_name(self.output.name + ending)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished chunk. `studies` in the order of `lines`; `failed` and `counts` name keys and causes only."""

    lines: tuple[bytes, ...]
    studies: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    counts: Counter[str]


@dataclass(frozen=True)
class Preparer:
    """A chunk of raw reports -> Done; goes to worker processes, where the pipeline is built once."""

    pipeline_config: Config
    secret: bytes | None = field(repr=False)

    @cached_property
    def pipeline(self) -> Pipeline:
        """Tables are loaded here, and the garbage collector need not look at them again."""
        pipeline = Pipeline(self.pipeline_config, self.secret)
        if self.pipeline_config.model is None:
            pipeline.prepare([RawReport(study="", patient="", texts={WHOLE: _SMALL})])
        gc.collect()
        gc.freeze()
        return pipeline

    def __call__(self, chunk: Iterable[RawReport | Refusal]) -> Done:
        """Never raises for data."""
        counts: Counter[str] = Counter()
        failed: list[tuple[str, str]] = []
        for one in chunk:
            if isinstance(one, Refusal):
                failed.append((one.name, one.reason))
                counts[f"failed/{one.reason}"] += 1
                counts["reports/read"] += 1
        lines, studies = [], []
        for result in self.pipeline.each([one for one in chunk if isinstance(one, RawReport)], counts):
            if isinstance(result, Failed):
                failed.append((result.study, result.cause))
            else:  # at once, so that no more than one report is held as objects
                lines.append(result.to_line(self.secret))
                studies.append(result.study)
        return Done(lines=tuple(lines), studies=tuple(studies), failed=tuple(failed), counts=counts)


class Run(Protocol):
    """How chunks are spread over processes: `shards.workers.in_order`, or the same on a cluster."""

    def __call__(
        self, function: Callable[[Any], Any], inputs: Iterable[Any], workers: int
    ) -> Generator[Any, None, None]: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Told after each chunk: for a progress bar."""

    read: int
    failed: int
    reused: int  # of those read, done by an earlier run


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of all reports; `counts` as in the audit."""

    read: int
    prepared: int
    failed: int
    counts: Mapping[str, Mapping[str, int]]


def prepare(
    job: Job, *, run: Run = in_order, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Summary:
    """Prepare every report of the input; see `Job`. Writes the output, `.audit.json` and `.failed.jsonl` beside it.

    The same input, options and secret give the same bytes, whatever the number of workers and interruptions; with a
    model, as far as its answers are in the cache. Raises ConfigError for bad options or an output that is there,
    DataError when a worker dies or no report could be prepared.
    """
    if job.pipeline.ner is not None:
        job.pipeline.ner.check()
    parts = _open_parts(job)
    model = job.pipeline.model
    if model is not None:  # each process has its share of the calls at once
        model = replace(model, concurrency=max(1, model.concurrency // job.workers))
    preparer = Preparer(replace(job.pipeline, model=model), job.secret)
    sent: deque[tuple[int, str]] = deque()
    state = Progress(read=0, failed=0, reused=0)
    chunks = 0

    def pending() -> Iterator[list[RawReport | Refusal]]:
        nonlocal state, chunks
        for number, chunk in enumerate(_chunks(job)):
            chunks = number + 1
            digest = _digest(job, chunk)
            if (part := _read_part(parts, number, digest)) is None:
                sent.append((number, digest))
                yield chunk
            else:
                failed = len(part.failed)
                state = Progress(
                    read=state.read + len(chunk), failed=state.failed + failed, reused=state.reused + len(chunk)
                )
                on_progress(state)

    try:
        if job.pipeline.model is not None:
            llm.Reader(job.pipeline.model, job.pipeline.vocabulary, key_fingerprint(job.secret)).probe()
        with closing(run(preparer, pending(), job.workers)) as results:
            for done in results:
                _write_part(parts, *sent.popleft(), done)
                read = done.counts["reports/read"]
                state = replace(state, read=state.read + read, failed=state.failed + len(done.failed))
                on_progress(state)
    except WorkerDiedError:
        raise DataError(
            "a worker died while preparing reports (out of memory?); run again with fewer --workers, finished parts "
            "are kept"
        ) from None
    finally:
        if not _started(parts):  # wrong columns, no server: there is nothing to go on behind
            shutil.rmtree(parts, ignore_errors=True)
    return _finish(job, parts, chunks)


def _chunks(job: Job) -> Iterator[list[RawReport | Refusal]]:
    reports = read_reports(job.input, job.columns, job.secret)
    while chunk := list(islice(reports, _chunk_reports(job))):
        yield chunk


def _chunk_reports(job: Job) -> int:
    return CHUNK_REPORTS if job.pipeline.model is None else CHUNK_REPORTS // 8


def _digest(job: Job, chunk: Iterable[RawReport | Refusal]) -> str:
    """Keyed hash of the reports of a chunk: a folder may have changed since an interrupted run, which no date tells."""
    body = [
        ascii(one)
        if isinstance(one, Refusal)
        else ascii((one.study, one.patient, sorted(one.texts.items()), one.known and astuple(one.known)))
        for one in chunk
    ]
    return hashed_key(job.secret, "chunk of reports", "\n".join(body))


def _plan(job: Job) -> str:
    """sha256 of all that the output follows from, except the content of the input files."""
    try:
        status = job.input.stat()
    except OSError:
        raise ConfigError(f"--input {job.input}: no such file or folder") from None
    body = {
        "format": FORMAT, "input": str(job.input.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns,
        "columns": asdict(job.columns), "key": key_fingerprint(job.secret), "chunk": _chunk_reports(job),
        "pipeline": job.pipeline.settings,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _open_parts(job: Job) -> Path:
    """The folder of parts, empty or left by an interrupted run of the same command."""
    parts, plan = job.beside(".parts"), _plan(job)
    try:
        name = parts / "plan"
        other = _started(parts) and name.read_text("utf-8") != plan
        if job.overwrite and other:
            shutil.rmtree(parts)
        elif other:
            raise ConfigError(
                f"{parts} holds an interrupted run with other input or options; repeat that command, choose another "
                "--output, or give --overwrite"
            )
        elif job.output.exists() and not job.overwrite and not _started(parts):
            raise ConfigError(f"--output {job.output}: is there already; choose another or give --overwrite")
        parts.mkdir(parents=True, exist_ok=True, mode=0o700)
        _put(name, plan.encode())
    except OSError as error:
        raise ConfigError(f"--output {job.output}: {error.strerror}; name a file in a folder you may write") from None
    return parts


def _started(parts: Path) -> bool:
    """Whether a run left a finished chunk there."""
    return next(parts.glob("[0-9]*.jsonl"), None) is not None


def _put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _part_name(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.jsonl"


def _write_part(parts: Path, number: int, digest: str, done: Done) -> None:
    """A line that describes the chunk, then the lines of its reports. `digest`: of the raw ones, keyed."""
    lines = b"".join(done.lines)
    head = {
        "input": digest, "sha256": hashlib.sha256(lines).hexdigest(), "studies": done.studies, "failed": done.failed,
        "counts": dict(sorted(done.counts.items())),
    }  # fmt: skip
    try:
        _put(_part_name(parts, number), json.dumps(head).encode() + b"\n" + lines)
    except OSError as error:
        raise DataError(f"{parts}: {error.strerror}; make room, then run again: finished parts are kept") from None


def _read_part(parts: Path, number: int, digest: str | None = None) -> Done | None:
    """A finished chunk; None where there is none that is whole, or where `digest` says that its reports were others."""
    try:
        first, _, lines = _part_name(parts, number).read_bytes().partition(b"\n")
        head = json.loads(first)
        if hashlib.sha256(lines).hexdigest() != head["sha256"] or digest not in (None, head["input"]):
            return None
        return Done(
            lines=tuple(lines.splitlines(keepends=True)),
            studies=tuple(head["studies"]),
            failed=tuple((name, cause) for name, cause in head["failed"]),
            counts=Counter(head["counts"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _finish(job: Job, parts: Path, chunks: int) -> Summary:
    """Join the parts. A study that stands twice keeps its first report."""
    counts: Counter[str] = Counter()
    failed: list[tuple[str, str]] = []
    seen: set[int] = set()

    def lines() -> Iterator[bytes]:
        for number in range(chunks):
            done = _read_part(parts, number)
            if done is None:
                raise DataError(f"{_part_name(parts, number)} is gone or damaged; run the same command again")
            counts.update(done.counts)
            failed.extend(done.failed)
            for study, line in zip(done.studies, done.lines, strict=True):
                place = int(study[:16], 16)
                if place in seen:
                    counts["reports/prepared"] -= 1
                    counts["failed/study stands twice"] += 1
                    failed.append((study, "study stands twice"))
                    continue
                seen.add(place)
                yield line

    part = job.output.with_name(f".{job.output.name}.part")
    try:
        if job.output.suffix.lower() in TABLES:
            write_parquet(lines(), part)
        else:
            with open(part, "wb") as file:
                file.writelines(lines())
        groups: dict[str, dict[str, int]] = {}
        for name, count in sorted(counts.items()):
            group, _, member = name.partition("/")
            groups.setdefault(group, {})[member] = count
        audit = {
            "format": FORMAT, "key_fingerprint": key_fingerprint(job.secret), "pipeline": job.pipeline.settings,
            "counts": groups,
        }  # fmt: skip
        prepared = counts["reports/prepared"]
        rows = (json.dumps({"study": name, "cause": cause}) + "\n" for name, cause in failed)
        _put(job.beside(".failed.jsonl"), "".join(rows).encode())
        _put(job.beside(".audit.json"), json.dumps(audit, indent=2, sort_keys=True).encode() + b"\n")
        if not prepared:
            causes = Counter(cause for _, cause in failed).most_common(3)
            shutil.rmtree(parts)  # mended columns are other options, which nothing here should stand against
            shown = ", ".join(f"{cause} ({count})" for cause, count in causes) or "no input"
            raise DataError(f"no report of {job.input} could be prepared: {shown}; see {job.beside('.failed.jsonl')}")
        os.replace(part, job.output)
        shutil.rmtree(parts)
    except OSError as error:
        raise DataError(f"--output {job.output}: {error.strerror}; make room, then run again: parts are kept") from None
    finally:
        part.unlink(missing_ok=True)
    return Summary(read=counts["reports/read"], prepared=prepared, failed=len(failed), counts=groups)
