"""Scores of a run's checkpoint on held-out patients: zero-shot AUC, retrieval, linear probe, uncertainty, intervals.

Parses, runs the protocols (evaluation_protocols.py), prints tables, writes `eval/<protocol>.json`, TensorBoard scalars
and pictures into the run directory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from core.evaluation.generation import Generation
from core.evaluation.pictures import as_png
from core.evaluation.text_query import TextQuery
from core.evaluation.zero_shot import Prompts, check_prompts
from core.metrics import Metrics
from core.world import World
from launchers.command import errors_in_one_line
from launchers.evaluation_progress import shown_progress
from launchers.evaluation_protocols import PROTOCOLS, Evaluation, evaluate
from launchers.evaluation_splits import Options
from launchers.evaluation_tables import tables
from launchers.past_run import open_run
from shards.errors import ConfigError
from shards.store import open_store

EPILOG = """\
protocols:
  zero_shot     AUC of each label: is the image nearer to sentences that state it than to those that deny it?
                A model of structured reports is asked with parts of such reports for the diseases they know.
  retrieval     recall of the right report among all, and the other way; also over the queries it is surest of.
                A model of anatomies is asked for the mean similarity of those that volume and report both have
  linear_probe  AUC of a logistic regression on frozen image features
  uncertainty   does the model know when it is wrong? Calibration error and Brier score of zero-shot probabilities;
                risk over coverage when it leaves the least sure studies to a person, by log-variance, by maximum
                probability and by norm (area_*: lower is better; gain: what log-variance saves over maximum
                probability, good above 0); AUC of log-variance, degraded above clean images, where the data say
                which; rank correlation of log-variance with blur, noise, crop and masked words made on the fly.
                A task without log-variance gets the baselines. A constant log-variance is reported as FAILED.
                Definitions: core/evaluation/uncertainty.py. Curves: TensorBoard, eval/uncertainty/risk_coverage.
  anatomy       zero_shot of a model of anatomies: each label is looked for in its own anatomy
                (evaluation.anatomy_of); coverage is the share of studies that show it uncut. Volumes are cropped
                around anatomies, unless evaluation.around_anatomies is off. Also: macro AUC under other wordings of
                the prompts, decisions at thresholds of the validation split, and for each label a picture of where
                in the anatomy the score comes from (eval/anatomy/heat_map/*.png)
  anatomy_probe AUC of a logistic regression on the frozen embedding of each label's anatomy, taught with the labels
                of 1, 10 and 100 % of the patients
  supervised    AUC of the predictions of a task that was taught the labels
  generation    a small decoder is trained to write reports from the frozen anatomies of volumes; BLEU, ROUGE-L and F1
                of clinical labels of what it writes for held-out studies, beside the report of the nearest training
                study, the most frequent one, and what it writes from another study's anatomies. Only when named.
                Definitions: core/evaluation/generation.py
  wording       macro AUC of the prompts, of 20 other wordings of them (mean and deviation) and of prompts that the task
                has learned; share of pairs of studies of like labels that the loss pushes apart. Only when named
  set_identity  AUC of a logistic regression on frozen image embeddings for each set of a training mixture against the
                others: how much of a hospital they hold. Only when named
  map           t-SNE of frozen image features, views of a study pooled, coloured by body part, labels, grades and other
                things known (eval/map/*.png); share of the ten nearest studies of other patients that are alike. Only
                when named
  query         the views nearest to the words of --query, with keys of studies and nothing else (eval/query/*.png)
By default: those that the run's task can be asked.

exit codes: 0 done, 2 bad arguments or configuration, 3 bad data or damaged checkpoint, 4 embeddings not finite
"""


def read_prompts(path: str) -> Prompts:
    """A TOML file with a table for each label: `positive = [...]` and, if wanted, `negative = [...]`."""
    try:
        with open(path, "rb") as file:
            return check_prompts(tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: not TOML ({error})") from None


def write(run_dir: str, evaluation: Evaluation, step: int) -> list[str]:
    """`eval/<protocol>.json`, pictures as PNG and TensorBoard's files under `eval/tb`; returns the names written.

    A folder of its own: TensorBoard follows only the newest file of a folder, and training may still be writing its.
    """
    names = []
    with open_store(run_dir) as store, tempfile.TemporaryDirectory(prefix="roentgen-eval-") as scratch:
        for protocol, report in evaluation.reports.items():
            names.append(f"eval/{protocol}.json")
            store.put(names[-1], json.dumps(report, indent=1).encode() + b"\n")
        metrics = Metrics(Path(scratch), World(), first_step=0)
        metrics.scalars(step, evaluation.figures)
        for name, image in evaluation.pictures.items():
            metrics.picture(step, name, image)
            names.append(f"{name}.png")
            store.put(names[-1], as_png(image))
        metrics.close()
        for file in sorted((Path(scratch) / "tb").iterdir()):
            store.put(f"eval/tb/{file.name}", file)
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluate a run's checkpoint on held-out patients, with bootstrap intervals by patient.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--run-dir", required=True, metavar="DIR", help="run directory, folder or s3://")
    add("--protocol", nargs="+", choices=PROTOCOLS, help="default: all that fit the run's task")
    add("--checkpoint", default="latest", metavar="WHICH", help="latest, best or step-N")
    add("--data", metavar="MANIFEST", help="manifest to evaluate on; default: the run's own")
    add("--split", default="test")
    add(
        "--prompts",
        metavar="FILE",
        help="TOML: a table for each label with lists `positive` and `negative`, plain text",
    )
    add("--query", nargs="+", default=[], metavar="WORDS", help='query: what to look for, "fracture du radius"')
    add("--limit", type=_positive, metavar="N", help="first N studies of each split only")
    add(
        "--corruption-studies",
        type=_positive,
        default=256,
        metavar="N",
        help="uncertainty: first N studies, encoded anew for every level of every corruption; default: 256",
    )
    add("--decoder-steps", type=_positive, default=Options.decoder_steps, metavar="N", help="generation: of training")
    add(
        "--decoder-studies",
        type=_positive,
        default=Options.decoder_studies,
        metavar="N",
        help=f"generation: first N of training, patches in memory; default: {Options.decoder_studies}",
    )
    add("--report-length", type=_positive, default=Options.report_length, metavar="N", help="generation: in tokens")
    add(
        "--beams", type=_positive, default=Options.beams, metavar="N", help="generation: width of the search; 1: greedy"
    )
    add(
        "--generated-reports",
        metavar="FILE",
        help="generation: write each study's key and the text generated for it, JSON lines. The text may repeat what "
        "training reports say: treat the file like reports. Without it no text is kept",
    )
    add("--batch-size", type=_positive, default=96, metavar="N")
    add("--replicates", type=_positive, default=1000, metavar="N", help="of the bootstrap")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--json", metavar="FILE", help="write all reports into one file as well")
    return command


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False)
    if arguments.generated_reports and Generation.protocol not in (arguments.protocol or ()):
        raise ConfigError("--generated-reports: nothing is generated without --protocol generation; name it")
    asked = list(arguments.protocol or ())
    if arguments.query and TextQuery.protocol not in asked:
        asked.append(TextQuery.protocol)
    options = Options(
        protocols=tuple(asked) or None,
        queries=tuple(arguments.query),
        data=arguments.data,
        split=arguments.split,
        prompts=read_prompts(arguments.prompts) if arguments.prompts else None,
        limit=arguments.limit,
        corruption_studies=arguments.corruption_studies,
        decoder_studies=arguments.decoder_studies,
        decoder_steps=arguments.decoder_steps,
        report_length=arguments.report_length,
        beams=arguments.beams,
        keep_reports=arguments.generated_reports is not None,
        batch_size=arguments.batch_size,
        replicates=arguments.replicates,
        seed=arguments.seed,
    )
    device = torch.device(arguments.device) if arguments.device else None
    with open_run(arguments.run_dir, arguments.checkpoint, device) as run:
        with shown_progress() as progress:
            evaluation = evaluate(run, options, progress)
        names = write(arguments.run_dir, evaluation, run.step)
    for table in tables(evaluation.reports):
        console.print(table)
    for protocol, report in evaluation.reports.items():
        for note in report.get("notes", ()):
            console.print(f"{protocol}: {note}", soft_wrap=True)
        if report["skipped"]:
            causes = ", ".join(f"{count} {cause}" for cause, count in sorted(report["skipped"].items()))
            console.print(f"{protocol}: studies left out: {causes}", soft_wrap=True)
    if arguments.generated_reports:
        lines = (json.dumps({"study": study, "report": text}) for study, text in evaluation.written)
        Path(arguments.generated_reports).write_text("".join(f"{line}\n" for line in lines))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(evaluation.reports, indent=1) + "\n")
    console.print(f"written to {arguments.run_dir}: {', '.join(names)}, eval/tb", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
