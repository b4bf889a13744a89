"""Raw radiology reports -> de-identified, structured ones: one file that packs, an audit of counts, a list of failures.

Parses, calls `shards.reports`, prints a table, exits: 0 done, 2 bad arguments or configuration, 3 too many failures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from launchers import command
from shards.errors import ConfigError
from shards.reports import llm, prepare
from shards.reports.identity.plugin import Models
from shards.reports.intake import Columns
from shards.reports.pipeline import WHOLE, Config
from shards.reports.prepare import Job, Summary
from shards.reports.sections import SECTION_NAMES
from shards.workers import in_order

EXIT_FAILURES = 3
QUIET_REPORT_S = 10.0  # without a terminal, a line of progress this often
CAUSES_SHOWN = 20

DESCRIPTION = """\
Prepare radiology reports, English and French: clean, find the language, replace what identifies a person, read the
findings (rules, or a language model), and write what training needs. Nothing of the raw text is kept.

  a table with one report a row; the key names studies and patients, and draws the surrogates (keep it secret):
    (umask 077; openssl rand -hex 32 > site.key)
    python launchers/prepare_reports.py --input reports.csv --study accession --patient mrn --text report_text \\
        --last-names surname --first-names given_name --birth-date born --key-file site.key --output prepared.jsonl
  sections in columns of their own:
    python launchers/prepare_reports.py --input reports.parquet --text findings=FINDINGS impression=IMPRESSION \\
        --key-file site.key --output prepared.jsonl
  a folder of text files, PATIENT/STUDY.txt:
    python launchers/prepare_reports.py --input notes/ --key-file site.key --output prepared.parquet
  read by a model behind vLLM, Ollama or the like on this machine; rules where its answers do not hold:
    python launchers/prepare_reports.py --input reports.csv --key-file site.key --output prepared.jsonl \\
        --llm http://127.0.0.1:8000/v1 --model NAME
  then, with the images:
    python launchers/pack.py --source dicom --input DIR --key-file site.key --reports structured prepared.jsonl \\
        --output shards/site

Beside OUTPUT lie OUTPUT.audit.json (counts only) and OUTPUT.failed.jsonl (key and cause of each report that failed).
A run that was interrupted is continued by the same command; the result is the same, byte for byte."""

EPILOG = (
    "exit codes: 0 done, 2 bad arguments or configuration, 3 more failures than --failed-max or unusable data, "
    "130/143 interrupted"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "prepare_reports.py", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument("--input", metavar="PATH", help="CSV, TSV, JSON lines, Parquet, or a folder of text files")
    result.add_argument("--output", metavar="FILE", help="made anew; .jsonl or .parquet")
    result.add_argument("--overwrite", action="store_true", help="replace FILE and what an interrupted run left")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    result.add_argument(
        "--failed-max", type=float, default=0.05, metavar="SHARE", help="more failures exit with 3 (%(default)s)"
    )
    result.add_argument("--key-file", metavar="FILE", help="secret, mode 0600: keys and surrogates follow from it")
    result.add_argument("--public", action="store_true", help="the input is a public set: no secret is needed")

    columns = result.add_argument_group("columns of a table")
    columns.add_argument("--study", default="study", metavar="COLUMN", help="name of the study (%(default)s)")
    columns.add_argument("--patient", default="patient", metavar="COLUMN", help="name of the patient (%(default)s)")
    columns.add_argument(
        "--text",
        nargs="+",
        default=["report"],
        metavar="[SECTION=]COLUMN",
        help=f"report text (%(default)s); SECTION is one of {', '.join(SECTION_NAMES)}",
    )

    known = result.add_argument_group("columns with what is known of the patient, looked for in the text")
    known.add_argument("--first-names", nargs="+", default=[], metavar="COLUMN")
    known.add_argument("--last-names", nargs="+", default=[], metavar="COLUMN")
    known.add_argument(
        "--names", nargs="+", default=[], metavar="COLUMN", help="First Last, or Last, First, or LAST^FIRST"
    )
    known.add_argument("--birth-date", metavar="COLUMN")
    known.add_argument("--ids", nargs="+", default=[], metavar="COLUMN", help="besides study and patient")

    ner = result.add_argument_group("models beside the rules of de-identification, which must be installed")
    ner.add_argument(
        "--ner-presidio", nargs="+", default=[], metavar="LANGUAGE=PIPELINE",
        help="spaCy pipelines run by Presidio: en=en_core_web_sm fr=fr_core_news_sm",
    )  # fmt: skip
    ner.add_argument("--ner-edsnlp", metavar="FOLDER", help="a trained EDS-NLP pipeline, for French reports")

    extraction = result.add_argument_group("extraction")
    extraction.add_argument(
        "--labels", default="chexpert14", metavar="SET", help="chexpert14, nih14 or ct_rate18 (%(default)s)"
    )
    extraction.add_argument("--llm", metavar="URL", help="API in the OpenAI protocol, e.g. http://127.0.0.1:8000/v1")
    extraction.add_argument("--model", default="", metavar="NAME", help="as the server calls it")
    extraction.add_argument(
        "--allow-remote", action="store_true", help="the de-identified text may leave this machine for --llm"
    )
    extraction.add_argument(
        "--llm-plain-json", action="store_true", help="the server does not know JSON schemas: ask in words"
    )
    extraction.add_argument(
        "--llm-cache", metavar="FOLDER", help="answers are kept here (OUTPUT.answers; quotes de-identified text)"
    )
    extraction.add_argument("--llm-concurrency", type=int, default=8, metavar="N", help="calls at once (%(default)s)")
    extraction.add_argument("--llm-timeout", type=float, default=120.0, metavar="S", help="of a call (%(default)s)")
    extraction.add_argument(
        "--llm-gone", choices=("stop", "rules"), default="stop", help="when the server does not answer (%(default)s)"
    )
    extraction.add_argument(
        "--llm-price", nargs=2, type=float, metavar=("IN", "OUT"), help="of a million tokens, to print what it cost"
    )

    result.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS", help="spread the work by Ray Data, --workers actors"
    )
    return result


def _texts(words: Sequence[str]) -> dict[str, str]:
    """Section -> column of --text."""
    result: dict[str, str] = {}
    for word in words:
        section, equals, column = word.partition("=")
        if not equals:
            section, column = WHOLE, word
        if section not in (WHOLE, *SECTION_NAMES):
            raise ConfigError(f"--text {word}: no section is called {section!r}; there is {', '.join(SECTION_NAMES)}")
        if section in result:
            raise ConfigError(f"--text {word}: section {section} stands twice")
        result[section] = column
    return result


def _ner(arguments: argparse.Namespace) -> Models | None:
    pairs = [tuple(word.split("=", 1)) for word in arguments.ner_presidio]
    if any(len(pair) != 2 or pair[0] not in ("en", "fr") for pair in pairs):
        raise ConfigError(f"--ner-presidio {' '.join(arguments.ner_presidio)}: write e.g. fr=fr_core_news_sm")
    if not pairs and not arguments.ner_edsnlp:
        return None
    folder = Path(arguments.ner_edsnlp) if arguments.ner_edsnlp else None
    return Models(spacy=tuple((language, name) for language, name in pairs), edsnlp=folder)


def job(arguments: argparse.Namespace) -> Job:
    """What the arguments ask for. Raises ConfigError."""
    for option in ("input", "output"):
        if getattr(arguments, option) is None:
            raise ConfigError(f"--{option} is missing; see --help for examples")
    output = Path(arguments.output)
    model = None
    if arguments.llm:
        model = llm.Config(
            url=arguments.llm,
            model=arguments.model,
            allow_remote=arguments.allow_remote,
            json_schema=not arguments.llm_plain_json,
            when_gone=arguments.llm_gone,
            concurrency=arguments.llm_concurrency,
            timeout_s=arguments.llm_timeout,
            cache=Path(arguments.llm_cache or f"{output}.answers"),
        )
    elif arguments.model:
        raise ConfigError(f"--model {arguments.model}: needs --llm, the URL of the server that has it")
    columns = Columns(
        study=arguments.study,
        patient=arguments.patient,
        texts=_texts(arguments.text),
        first_names=tuple(arguments.first_names),
        last_names=tuple(arguments.last_names),
        names=tuple(arguments.names),
        birth_date=arguments.birth_date,
        ids=tuple(arguments.ids),
    )
    return Job(
        input=Path(arguments.input),
        output=output,
        columns=columns,
        secret=command.secret(arguments, "prepare_reports.py needs"),
        pipeline=Config(ontology=arguments.labels, model=model, ner=_ner(arguments)),
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        failed_max=arguments.failed_max,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[prepare.Progress], None]]:
    """A spinner with counts on a terminal, else a line every 10 seconds."""
    started = last = time.monotonic()

    def words(state: prepare.Progress) -> str:
        rate = (state.read - state.reused) / max(time.monotonic() - started, 1e-9)
        kept = f", {state.reused} of them by an earlier run" if state.reused else ""
        return f"{state.read} reports{kept}, {state.failed} failed, {rate:.0f} reports/s"

    if not console.is_terminal:

        def line(state: prepare.Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= QUIET_REPORT_S:
                last = time.monotonic()
                console.print(words(state), highlight=False)

        yield line
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda state: bar.update(task, description=words(state))


def _print_summary(summary: Summary, wanted: Job, arguments: argparse.Namespace, console: Console) -> None:
    for title, group in (("identifiers replaced", "identifiers"), ("failed", "failed"), ("language model", "llm")):
        counts: Mapping[str, int] = summary.counts.get(group, {})
        if counts:
            table = Table(title=title, title_justify="left")
            table.add_column("count", justify="right")
            table.add_column("what")
            for name, count in sorted(counts.items(), key=lambda pair: -pair[1])[:CAUSES_SHOWN]:
                table.add_row(str(count), escape(name))
            console.print(table)
    tokens = summary.counts.get("llm", {})
    if arguments.llm_price and tokens:
        totals = llm.Totals(prompt_tokens=tokens.get("prompt tokens", 0), answer_tokens=tokens.get("answer tokens", 0))
        console.print(f"cost at these prices: {totals.cost(*arguments.llm_price):.2f}", highlight=False)
    console.print(f"{summary.prepared} of {summary.read} reports prepared, {summary.failed} failed", highlight=False)
    console.print(escape(str(wanted.output)), highlight=False, soft_wrap=True)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    wanted = job(arguments)
    run: prepare.Run = in_order
    if arguments.ray:
        from launchers import ray_data

        run = partial(ray_data.in_order, address=arguments.ray)
    with _progress(console) as show:
        summary = prepare.prepare(wanted, run=run, on_progress=show)
    _print_summary(summary, wanted, arguments, console)
    if summary.failed > wanted.failed_max * summary.read:
        print(
            f"error: {summary.failed} of {summary.read} reports failed, more than --failed-max {wanted.failed_max:g}; "
            f"causes are in {wanted.beside('.failed.jsonl')}, the others are in {wanted.output}",
            file=sys.stderr,
        )
        return EXIT_FAILURES
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return command.run(lambda console: _run(arguments, console), "parts")


if __name__ == "__main__":
    sys.exit(main())
