"""Scores of a run's checkpoint on held-out patients: zero-shot AUC, retrieval, linear probe, uncertainty, intervals.

Parses, embeds each split once, calls the evaluators, prints tables, writes `eval/<protocol>.json`, TensorBoard scalars
and pictures into the run directory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from configs import prompts as built_in
from core.evaluation.anatomy import AnatomyZeroShot, LabelAreas
from core.evaluation.corruption import Words
from core.evaluation.embed import (
    ANATOMY_PARTS,
    ANATOMY_TEXT_PARTS,
    LABEL_PART,
    PATCH_PARTS,
    EmbeddedSplit,
    Encoders,
    GaussianTask,
    embed_split,
    parts_of_retrieval,
    parts_of_uncertainty,
)
from core.evaluation.generation import MEASURES, Generation
from core.evaluation.heat_map import Explained, HeatMaps
from core.evaluation.pictures import as_png
from core.evaluation.probe import AnatomyProbe, LinearProbe
from core.evaluation.retrieval import Retrieval
from core.evaluation.uncertainty import Uncertainty
from core.evaluation.zero_shot import Prompts, ZeroShot, check_prompts
from core.metrics import Metrics
from core.models.report_decoder import ReportDecoder
from core.world import World
from launchers.past_run import PastRun, open_run
from launchers.report_generation import keys_of, labeller_for, with_reports
from shards.batch import Batch
from shards.collate import ANATOMY_TEXT_FIELDS, Collator
from shards.dataset import DataSet
from shards.errors import ConfigError, NonFiniteError, RoentgenError
from shards.loader import as_mixture, evaluation_batches
from shards.store import open_store
from shards.tokenizer import Tokenizer

PROTOCOLS = (
    ZeroShot.protocol,
    Retrieval.protocol,
    LinearProbe.protocol,
    Uncertainty.protocol,
    AnatomyZeroShot.protocol,
    LabelAreas.protocol,
    AnatomyProbe.protocol,
    Generation.protocol,
)
TRAINED = {LinearProbe.protocol, AnatomyProbe.protocol, Generation.protocol}  # on the training split
PROMPTED = {ZeroShot.protocol, Uncertainty.protocol, AnatomyZeroShot.protocol}
Evaluated = ZeroShot | Retrieval | LinearProbe | Uncertainty | AnatomyZeroShot | LabelAreas | AnatomyProbe | Generation
COVERAGES = (1.0, 0.9, 0.7, 0.5)  # of retrieval with abstention
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
By default: those that the run's task can be asked.

exit codes: 0 done, 2 bad arguments or configuration, 3 bad data or damaged checkpoint, 4 embeddings not finite
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is evaluated. `data`: manifest, None for the run's own; `limit`: studies of each split, None for all."""

    protocols: tuple[str, ...] | None = None  # None: all that fit the task
    data: str | None = None
    split: str = "test"
    prompts: Prompts | None = None
    limit: int | None = None
    probe_studies: int = 20_000  # of the training split; the probe gains little from more
    corruption_studies: int = 256  # first ones, encoded anew for every level of every corruption
    decoder_studies: int = 4000  # of the training split, for generation; the tokens of their patches are held in memory
    decoder_steps: int = Generation.Config.steps
    report_length: int = ReportDecoder.Config.max_length  # tokens
    beams: int = Generation.Config.beams
    keep_reports: bool = False  # generated ones, in Evaluation.written
    batch_size: int = 96
    threads: int = 0  # of the decoder; 0: all cores
    replicates: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`reports`: protocol -> what its evaluator says, ready for JSON; `figures`: TensorBoard name -> value.

    `pictures`: TensorBoard name -> image [3, H, W] in [0, 1]. `written`: (study, generated report), if asked for.
    """

    reports: dict[str, dict[str, Any]]
    figures: dict[str, float]
    pictures: dict[str, Tensor]
    written: list[tuple[str, str]] = field(default_factory=list)


class Splits:
    """Splits through the run's encoders, each at most once for a set of parts.

    All are of the manifest given as data; else held-out ones are of the run's validation manifest, if it has one, and
    the training split is of its (first) training manifest.
    """

    def __init__(self, run: PastRun, options: Options, progress: Callable[[str, int, int], None]) -> None:
        self._run, self._options, self._progress = run, options, progress
        config = run.config.data
        trained_on = as_mixture(config, run.config.global_batch_size)[0]
        self.url = options.data or config.validation or trained_on.manifest
        self.train_url = options.data or trained_on.manifest
        self.train_split = trained_on.split
        here: dict[str, Any] = {"threads": options.threads or os.cpu_count() or 1}
        if not torch.cuda.is_available():
            here["device"] = "cpu"
        volume = None if config.volume is None else replace(config.volume, **here)
        self._config = replace(config, decode=replace(config.decode, **here), volume=volume)
        # Those that the task tells apart, in its order.
        self.anatomies = volume.anatomies if volume is not None and "anatomy_share" in run.task.fields else ()
        self._sets: dict[str, DataSet] = {}
        self.skipped: Counter[str] = Counter()
        whole = self.open(options.split).whole
        # Patients held out of training who are not those that are tested: thresholds and strengths are chosen on them.
        self.held_out: str | None = config.validation_split
        if config.validation_split not in whole.splits or config.validation_split == options.split:
            self.held_out = None
        self.manifest, self.labels = whole, whole.labels

    def open(self, split: str) -> DataSet:
        """Raises ConfigError or DataError naming the manifest or the splits there are."""
        if split not in self._sets:
            url = self.train_url if split == self.train_split else self.url
            self._sets[split] = DataSet(url, split, store=self._config.store)
        return self._sets[split]

    def embed(
        self,
        split: str,
        parts: set[str],
        limit: int | None = None,
        *,
        change: Callable[[Batch], Batch] | None = None,
        quiet: bool = False,
    ) -> EmbeddedSplit:
        """Studies without a usable report are left out only if `parts` has something of the text.

        `change` is made to every batch before it is encoded. `quiet`: no progress is shown.
        """
        run, data = self._run, self.open(split)
        limits = [value for value in (limit, self._options.limit) if value is not None]
        total = min([data.table.total, *limits])
        batches = self._batches(data, parts, total)
        done = 0

        def advance(studies: int) -> None:
            nonlocal done
            done += studies
            if not quiet:
                self._progress(f"{split}: {' '.join(sorted(parts))}", done, total)

        return embed_split(
            cast(Encoders, run.task),
            batches if change is None else map(change, batches),
            run.device,
            parts=sorted(parts),
            autocast=run.autocast,
            on_batch=advance,
        )

    def with_anatomies(self, split: str) -> Iterator[Batch]:
        """The studies of a split as pictures need them: volumes, and which voxels are whose."""
        data = self.open(split)
        total = min(data.table.total, self._options.limit or data.table.total)
        return self._batches(data, {*ANATOMY_PARTS, "anatomy_labels"}, total)

    def _batches(self, data: DataSet, parts: set[str], total: int) -> Iterator[Batch]:
        reads_masks = bool(self.anatomies) and bool(parts & {"image_embeds", *ANATOMY_PARTS})
        fields = ["anatomy_share", "anatomy_intact"] if reads_masks else []
        fields += ["anatomy_labels"] if "anatomy_labels" in parts else []
        fields += ANATOMY_TEXT_FIELDS if set(ANATOMY_TEXT_PARTS) & parts else []
        reads_text = bool(parts & {"text_embeds", "text_logvar", *ANATOMY_TEXT_PARTS})
        run, config, of_patches = self._run, self._config, bool(parts & set(PATCH_PARTS))
        if config.volume is not None and of_patches:
            # What is to be written must not say which anatomies there are to write it from.
            config = replace(config, volume=replace(config.volume, keep_cut_if_mentioned=False))
        # Tokens of patches are of one crop a volume.
        around = run.config.evaluation.around_anatomies and bool(parts & set(ANATOMY_PARTS)) and not of_patches
        collate = Collator(
            config, run.tokenizer if reads_text else None, self.labels, run.config.seed, fields,
            around_anatomies=run.config.task.vision.patch_size if around else None,
        )  # fmt: skip
        return evaluation_batches(data, collate, config, self._note, min(self._options.batch_size, total), total)

    def _note(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "skip":
            self.skipped[str(event.get("cause"))] += 1


def evaluate(
    run: PastRun, options: Options, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Evaluation:
    """Run the protocols on one split. `progress(what, done, total)` is called on the way.

    Raises:
        ConfigError: unknown protocol, no prompts or no labels for the data. DataError: no such split, nothing usable.
    """
    wanted = protocols_of(run, options.protocols)
    splits = Splits(run, options, progress)
    if wanted & TRAINED:  # a split that is not there is said before minutes of embedding
        splits.open(splits.train_split)
    common: dict[str, Any] = {"seed": options.seed, "replicates": options.replicates}
    measures_uncertainty = Uncertainty.protocol in wanted
    gaussian = isinstance(run.task, GaussianTask)
    parts = {"image_embeds"} if wanted & {ZeroShot.protocol, Uncertainty.protocol} else set()
    parts |= {"features"} if LinearProbe.protocol in wanted else set()
    parts |= parts_of_uncertainty(run.task) if measures_uncertainty else set()
    parts |= {LABEL_PART} if LabelAreas.protocol in wanted else set()
    text_parts = {"image_embeds", "text_embeds"} | ({"image_logvar", "text_logvar"} if gaussian else set())
    compares_whole_reports = Retrieval.protocol in wanted and "text_embeds" in parts_of_retrieval(run.task)
    prompts, source = None, ""
    if wanted & PROMPTED:  # wrong prompts are said before minutes of embedding
        prompts, source = choose_prompts(run, options.prompts, splits.labels)
        check_prompts(prompts)
    test: EmbeddedSplit | None = None
    with_text: EmbeddedSplit | None = None
    if compares_whole_reports or (measures_uncertainty and gaussian):
        with_text = splits.embed(options.split, text_parts | parts)
        test = with_text if not splits.skipped["empty report"] else None
    skipped_with_text = dict(splits.skipped)
    if test is None and parts:
        splits.skipped.clear()
        test = splits.embed(options.split, parts)
    skipped = dict(splits.skipped)
    held_out = splits.held_out

    reports: dict[str, dict[str, Any]] = {}
    figures: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}

    def take(evaluator: Evaluated, found: Iterator[tuple[str, float]]) -> dict[str, Any]:
        figures.update({f"eval/{evaluator.protocol}/{name}": value for name, value in found})
        reports[evaluator.protocol] = evaluator.report()
        return reports[evaluator.protocol]

    if ZeroShot.protocol in wanted and prompts is not None and test is not None:
        zero_shot = ZeroShot(prompts, ZeroShot.Config(text_length=run.text_length, **common))
        scores = zero_shot.run(run.encoders, run.tokenizer, test, splits.labels, run.device, run.autocast)
        take(zero_shot, scores)["prompts_from"] = source
    if LabelAreas.protocol in wanted and test is not None:
        taught = LabelAreas(ZeroShot.Config(**common))
        take(taught, taught.run(test, splits.labels))
    if compares_whole_reports and with_text is not None:
        retrieval = Retrieval(Retrieval.Config(coverages=COVERAGES, **common))
        take(retrieval, retrieval.run(with_text))
    if LinearProbe.protocol in wanted and test is not None:
        probe = LinearProbe(LinearProbe.Config(**common))
        train = splits.embed(splits.train_split, {"features"}, limit=options.probe_studies)
        fits = probe.run(
            train, splits.embed(held_out, {"features"}) if held_out else None, test, splits.labels,
            lambda done, total: progress("probe: fits", done, total),
        )  # fmt: skip
        take(probe, fits)
    if measures_uncertainty and prompts is not None and test is not None:
        uncertainty = Uncertainty(prompts, Uncertainty.Config(text_length=run.text_length, **common))
        passes = 0

        def again(change: Callable[[Batch], Batch], changed_parts: set[str]) -> EmbeddedSplit:
            nonlocal passes
            found = splits.embed(options.split, changed_parts, options.corruption_studies, change=change, quiet=True)
            passes += 1
            progress(f"{options.split}: corrupted and masked", passes, uncertainty.passes)
            return found

        found = uncertainty.run(
            run.encoders, run.tokenizer, test, splits.labels, run.device, run.autocast,
            validation=splits.embed(held_out, {"image_embeds"}) if held_out else None,
            with_text=with_text, embed=again, words=words_of(run.tokenizer),
        )  # fmt: skip
        take(uncertainty, found)["prompts_from"] = source
        pictures = {f"eval/{Uncertainty.protocol}/{name}": image for name, image in uncertainty.pictures().items()}
    written: list[tuple[str, str]] = []
    if Generation.protocol in wanted:
        splits.skipped.clear()
        generation, studies, scores = generate_reports(run, splits, options, progress)
        take(generation, scores)["skipped"] = dict(splits.skipped)
        written = list(zip(studies, generation.written, strict=True)) if options.keep_reports else []
    for protocol, report in reports.items():
        report.setdefault("skipped", skipped_with_text if protocol == Retrieval.protocol else skipped)
    by_anatomy = wanted & {AnatomyZeroShot.protocol, AnatomyProbe.protocol}
    if Retrieval.protocol in wanted and not compares_whole_reports:
        by_anatomy.add(Retrieval.protocol)
    if by_anatomy:
        pictures |= evaluate_anatomies(run, splits, by_anatomy, options, (prompts, source), progress, take)
    for report in reports.values():
        report |= {
            "step": run.step,
            "recipe": run.recipe,
            "data": splits.url,
            "manifest_sha256": splits.manifest.sha256,
            "split": options.split,
            "seed": options.seed,
        }
    return Evaluation(reports=reports, figures=figures, pictures=pictures, written=written)


def generate_reports(
    run: PastRun, splits: Splits, options: Options, progress: Callable[[str, int, int], None]
) -> tuple[Generation, list[str], Iterator[tuple[str, float]]]:
    """(the evaluator, keys of the held-out studies, its figures, which train the decoder when they are asked for)."""
    config = Generation.Config(
        decoder=ReportDecoder.Config(max_length=options.report_length), steps=options.decoder_steps,
        beams=options.beams, replicates=options.replicates, seed=options.seed,
    )  # fmt: skip
    reported = []
    for split, limit in ((splits.train_split, options.decoder_studies), (options.split, None)):
        embedded = splits.embed(split, {*ANATOMY_PARTS, *PATCH_PARTS}, limit)
        data, sections = splits.open(split), run.config.data.sections
        reported.append(with_reports(embedded, data, sections, splits.anatomies, splits.skipped))
    train, test = reported
    generation = Generation(config)
    found = generation.run(train, test, run.tokenizer, labeller_for(splits.labels), run.device, progress)
    return generation, keys_of(test.split, splits.open(options.split)), found


def evaluate_anatomies(
    run: PastRun,
    splits: Splits,
    wanted: set[str],
    options: Options,
    prompts: tuple[Prompts | None, str],
    progress: Callable[[str, int, int], None],
    take: Callable[[Evaluated, Iterator[tuple[str, float]]], dict[str, Any]],
) -> dict[str, Tensor]:
    """The protocols of a model of anatomies, each split embedded once; returns pictures by TensorBoard name.

    `prompts`: and where they are from. `take` is given each evaluator with what it yields, and returns its report.
    """
    common: dict[str, Any] = {"seed": options.seed, "replicates": options.replicates}
    anatomies, anatomy_of = run.config.task.anatomies, run.config.evaluation.anatomy_of
    parts = parts_of_retrieval(run.task) if Retrieval.protocol in wanted else set(ANATOMY_PARTS)
    splits.skipped.clear()
    test = splits.embed(options.split, parts)
    skipped = dict(splits.skipped)
    validation = None
    if splits.held_out and wanted & {AnatomyZeroShot.protocol, AnatomyProbe.protocol}:
        validation = splits.embed(splits.held_out, set(ANATOMY_PARTS))
    reports: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    if Retrieval.protocol in wanted:
        retrieval = Retrieval(Retrieval.Config(coverages=COVERAGES, **common))
        reports.append(take(retrieval, retrieval.run(test)))
    if AnatomyZeroShot.protocol in wanted:
        chosen, source = prompts
        assert chosen is not None
        # Other wordings are the recipe's of its own prompts: they say nothing of those that were given instead.
        paraphrases = () if options.prompts is not None else run.config.evaluation.paraphrases
        zero_shot = AnatomyZeroShot(
            chosen, anatomy_of, ZeroShot.Config(text_length=run.text_length, **common), paraphrases
        )
        reports.append(
            take(
                zero_shot,
                zero_shot.run(
                    run.encoders, run.tokenizer, test, splits.labels, anatomies, run.device, run.autocast,
                    validation=validation,
                ),
            )
        )  # fmt: skip
        reports[-1]["prompts_from"] = source
        asked = zero_shot.asked(splits.labels, anatomies)
        names = [name for name, known in zip(asked.names, asked.truth(test).T, strict=True) if (known == 1).any()]
        drawn = HeatMaps(names, anatomy_of, anatomies).run(
            cast(Explained, run.task),
            zero_shot.directions(run.encoders, run.tokenizer, names, run.device, run.autocast),
            splits.with_anatomies(options.split), splits.labels, run.config.task.vision.fine_size, run.device,
            run.autocast,
        )  # fmt: skip
        for number, (name, image) in enumerate(drawn, start=1):
            pictures[f"eval/{HeatMaps.name_of(name)}"] = image
            progress("heat maps", number, len(names))
    if AnatomyProbe.protocol in wanted:
        probe = AnatomyProbe(anatomy_of, LinearProbe.Config(**common))
        train = splits.embed(splits.train_split, set(ANATOMY_PARTS), limit=options.probe_studies)
        fits = probe.run(
            train, validation, test, splits.labels, anatomies,
            lambda done, total: progress("anatomy probe: fits", done, total),
        )  # fmt: skip
        reports.append(take(probe, fits))
    for report in reports:
        report["skipped"] = skipped
    return pictures


def protocols_of(run: PastRun, asked: Sequence[str] | None) -> set[str]:
    """Those `asked` for, or all that the run's task can be asked. Raises ConfigError naming one that it cannot."""
    task = run.task

    def has(*methods: str) -> bool:
        return all(callable(getattr(task, name, None)) for name in methods)

    fit = set(PROTOCOLS[:4]) if has("embed_images", "embed_texts") else set()
    fit |= {AnatomyZeroShot.protocol, AnatomyProbe.protocol} if has("embed_anatomies", "embed_texts") else set()
    fit |= {LabelAreas.protocol} if has("label_logits") else set()
    fit |= {Generation.protocol} if has("embed_patches") else set()
    for name in asked or ():
        if name not in PROTOCOLS:
            raise ConfigError(f"--protocol {name}: unknown; use {', '.join(PROTOCOLS)}")
        if name not in fit:
            raise ConfigError(
                f"--protocol {name}: {type(task).__name__} cannot be asked; use {', '.join(sorted(fit)) or 'none'}"
            )
    return set(asked or fit - {Generation.protocol})  # which trains for minutes


def words_of(tokenizer: Tokenizer) -> Words | None:
    """How a vocabulary marks words: a sign before what begins one (`Ġ`, `▁`), else before what goes on (`##`).

    None where it has no mask token.
    """
    if tokenizer.mask_id is None:
        return None
    spelled = tokenizer.tokens(range(tokenizer.vocab_size))
    openings = tuple(sign for sign in ("Ġ", "▁") if sum(token.startswith(sign) for token in spelled) > 1)
    continues = [
        not token.startswith(openings) if openings else token.startswith("##") and len(token) > 2 for token in spelled
    ]
    return Words(mask_id=tokenizer.mask_id, special_ids=tokenizer.special_ids, continues=torch.tensor(continues))


def choose_prompts(run: PastRun, given: Prompts | None, labels: Sequence[str]) -> tuple[Prompts, str]:
    """(prompts, where they are from): those given, else for each label the recipe's, else the built-in ones.

    Raises ConfigError when no label has any.
    """
    if given is not None:
        return given, "--prompts"
    chosen, source = built_in.choose(labels, run.config.evaluation.prompts, run.config.data.report)
    if not chosen:
        raise ConfigError(
            f"no prompts for the labels of this data ({', '.join(labels) or 'none'}); "
            "give some with --prompts FILE.toml or evaluation.prompts in the recipe"
        )
    return chosen, source


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


# ---- what is shown ----


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
                    table.add_row(f"R@{name.removeprefix('r')}", *(_interval(one[name]) for one in found))
            for by, percent, name in _abstentions(report["abstention"]):
                found = [report["abstention"][direction].get(by) for direction in report["directions"]]
                shown = ("" if one is None else _interval(one[percent][name]) for one in found)
                table.add_row(f"R@{name.removeprefix('r')}, surest {percent} % by {by}", *shown)
        elif "shares" in report:
            table = Table(title=f"{protocol}: AUC by share of labels, {where}")
            table.add_column("label")
            for percent in report["shares"]:
                table.add_column(f"{percent} %", justify="right")
            for label in report["anatomy_of"]:
                table.add_row(label, *(_interval(one["labels"][label]) for one in report["shares"].values()))
            table.add_row("macro", *(_interval(one["macro"]) for one in report["shares"].values()), style="bold")
        elif "less" in report:
            counts = report["studies"]
            table = Table(title=f"{protocol}: {counts['train']} studies read, {counts['test']} written, {where}")
            for name in ("", *report["reports"]):
                table.add_column(name, justify="right" if name else "left")
            for measure in MEASURES:
                shown = (_interval(one[measure], undefined="no label") for one in report["reports"].values())
                table.add_row(measure.replace("_", " "), *shown)
            table.add_row("distinct reports", *map(str, report["distinct_reports"].values()))
        elif "figures" in report:
            table = Table(title=f"{protocol}: {report['studies']} studies, {where}")
            table.add_column("")
            table.add_column("", justify="right")
            for name, estimate in report["figures"].items():
                table.add_row(name.replace("_", " "), _interval(estimate, undefined="not defined"))
        else:
            table = Table(title=f"{protocol}: AUC, {where}")
            for name, justify in (("label", "left"), ("AUC", "right"), ("present", "right"), ("absent", "right")):
                table.add_column(name, justify=justify)  # type: ignore[arg-type]
            for label, area in report["labels"].items():
                counted = "" if label in report["macro_over"] else " (not in macro)"
                table.add_row(label + counted, _interval(area), str(area["positives"]), str(area["negatives"]))
            table.add_row("macro", _interval(report["macro"]), "", "", style="bold")
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


def _interval(estimate: Mapping[str, Any], undefined: str = "one class only") -> str:
    if estimate["value"] is None:
        return undefined
    bounds = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{bounds}"


@contextmanager
def _shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal; on anything else a line when a part is done."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        started: dict[str, float] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what], started[what] = bars.add_task(what, total=total), time.monotonic()
            bars.update(tasks[what], completed=done)
            if done == total and not console.is_terminal:
                console.print(f"{what}: {total} in {time.monotonic() - started[what]:.1f} s")

        yield show


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False)
    try:
        if arguments.generated_reports and Generation.protocol not in (arguments.protocol or ()):
            raise ConfigError("--generated-reports: nothing is generated without --protocol generation; name it")
        options = Options(
            protocols=tuple(arguments.protocol) if arguments.protocol else None,
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
            with _shown_progress() as progress:
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
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return NonFiniteError.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; free space or choose another place", file=sys.stderr)
        return ConfigError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
