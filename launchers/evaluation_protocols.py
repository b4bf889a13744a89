"""What a run is asked: one function a protocol, on splits that are embedded once.

To add a protocol: a function of `Asking`, its line in `ASKED`, and in `protocols_of` the tasks that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from configs import prompts as built_in
from core.evaluation.anatomy import AnatomyZeroShot, LabelAreas
from core.evaluation.corruption import Words
from core.evaluation.embed import (
    ANATOMY_PARTS,
    LABEL_PART,
    EmbeddedSplit,
    GaussianTask,
    parts_of_retrieval,
    parts_of_uncertainty,
)
from core.evaluation.generation import Generation
from core.evaluation.heat_map import Explained, HeatMaps
from core.evaluation.latent_map import LatentMap
from core.evaluation.probe import AnatomyProbe, LinearProbe
from core.evaluation.retrieval import Retrieval
from core.evaluation.set_identity import SetIdentity
from core.evaluation.text_query import TextQuery
from core.evaluation.uncertainty import Uncertainty
from core.evaluation.wording import Wording
from core.evaluation.zero_shot import Prompts, ZeroShot, check_prompts
from launchers.evaluation_maps import ask_map, ask_query, read_split
from launchers.evaluation_splits import Options, Progress, Splits
from launchers.past_run import PastRun
from launchers.report_generation import generate_reports
from shards.batch import Batch
from shards.errors import ConfigError
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
    Wording.protocol,
    SetIdentity.protocol,
    LatentMap.protocol,
    TextQuery.protocol,
)
WORDINGS = 20  # of each label's prompts, where the recipe has none
TRAINED = {LinearProbe.protocol, AnatomyProbe.protocol, Generation.protocol}  # on the training split
PROMPTED = {ZeroShot.protocol, Uncertainty.protocol, AnatomyZeroShot.protocol, Wording.protocol}
# The first trains for minutes, identity needs the sets that the run was trained on, a query its words.
ONLY_WHEN_NAMED = {
    Generation.protocol, Wording.protocol, SetIdentity.protocol, LatentMap.protocol, TextQuery.protocol,
}  # fmt: skip
COVERAGES = (1.0, 0.9, 0.7, 0.5)  # of retrieval with abstention


class Evaluator(Protocol):
    """Of core.evaluation; `run` yields figures, `report` says what the last run found."""

    @property
    def protocol(self) -> str: ...

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`reports`: protocol -> what its evaluator says, ready for JSON; `figures`: TensorBoard name -> value.

    `pictures`: TensorBoard name -> image [3, H, W] in [0, 1]. `written`: (study, generated report), if asked for.
    """

    reports: dict[str, dict[str, Any]]
    figures: dict[str, float]
    pictures: dict[str, Tensor]
    written: list[tuple[str, str]] = field(default_factory=list)


class Asking:
    """An evaluation under way: the test split as embedded for all that is `wanted`, and what was said so far.

    `test` has what needs no text of all studies, `with_text` everything of those with a report; None where nothing
    wants it. Of studies that were left out there are two counts, too.
    """

    def __init__(self, run: PastRun, options: Options, splits: Splits, wanted: set[str], progress: Progress) -> None:
        """Raises ConfigError for wrong prompts, before minutes of embedding."""
        self.run, self.options, self.splits, self.wanted, self.progress = run, options, splits, wanted, progress
        self.common: dict[str, Any] = {"seed": options.seed, "replicates": options.replicates}
        self.compares_whole_reports = Retrieval.protocol in wanted and "text_embeds" in parts_of_retrieval(run.task)
        self.given: tuple[Prompts, str] | None = None
        if wanted & PROMPTED:
            self.given = choose_prompts(run, options.prompts, splits.labels)
            check_prompts(self.given[0])
        self.test: EmbeddedSplit | None = None
        self.with_text: EmbeddedSplit | None = None
        self.skipped: dict[str, int] = {}
        self.skipped_with_text: dict[str, int] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, float] = {}
        self.pictures: dict[str, Tensor] = {}
        self.written: list[tuple[str, str]] = []

    @property
    def prompts(self) -> Prompts:
        assert self.given is not None, "no protocol that is wanted reads prompts"
        return self.given[0]

    @property
    def prompts_from(self) -> str:
        return "" if self.given is None else self.given[1]

    def embed(self) -> None:
        """The test split once, or twice where studies without a report must not be missed by what needs none."""
        wanted, run, options, splits = self.wanted, self.run, self.options, self.splits
        gaussian = isinstance(run.task, GaussianTask)
        measures_uncertainty = Uncertainty.protocol in wanted
        parts = {"image_embeds"} if wanted & {ZeroShot.protocol, Uncertainty.protocol, Wording.protocol} else set()
        parts |= {"features"} if LinearProbe.protocol in wanted else set()
        parts |= parts_of_uncertainty(run.task) if measures_uncertainty else set()
        parts |= {LABEL_PART} if LabelAreas.protocol in wanted else set()
        text_parts = {"image_embeds", "text_embeds"} | ({"image_logvar", "text_logvar"} if gaussian else set())
        if self.compares_whole_reports or (measures_uncertainty and gaussian) or Wording.protocol in wanted:
            self.with_text = splits.embed(options.split, text_parts | parts)
            self.test = self.with_text if not splits.skipped["empty report"] else None
        self.skipped_with_text = dict(splits.skipped)
        if self.test is None and parts:
            splits.skipped.clear()
            self.test = splits.embed(options.split, parts)
        self.skipped = dict(splits.skipped)

    def take(self, evaluator: Evaluator, found: Iterator[tuple[str, float]]) -> dict[str, Any]:
        """Run an evaluator to its end; returns its report."""
        self.figures.update({f"eval/{evaluator.protocol}/{name}": value for name, value in found})
        self.reports[evaluator.protocol] = evaluator.report()
        return self.reports[evaluator.protocol]


def evaluate(run: PastRun, options: Options, progress: Progress = lambda what, done, total: None) -> Evaluation:
    """Run the protocols on one split. `progress(what, done, total)` is called on the way.

    Raises:
        ConfigError: unknown protocol, no prompts or no labels for the data. DataError: no such split, nothing usable.
    """
    wanted = protocols_of(run, options.protocols)
    splits = Splits(run, options, progress)
    if wanted & TRAINED:  # a split that is not there is said before minutes of embedding
        splits.open(splits.train_split)
    asking = Asking(run, options, splits, wanted, progress)
    asking.embed()
    for protocol, ask in ASKED.items():
        if protocol in wanted:
            ask(asking)
    for protocol, report in asking.reports.items():
        skipped = asking.skipped_with_text if protocol == Retrieval.protocol else asking.skipped
        report.setdefault("skipped", skipped)
    _ask_by_anatomy(asking)
    for protocol, report in asking.reports.items():
        report |= {"step": run.step, "recipe": run.recipe, "seed": options.seed}
        if protocol == SetIdentity.protocol:
            report |= {"data": "each set of the mixture", "split": "training split"}
        else:
            report |= {"data": splits.url, "manifest_sha256": splits.manifest.sha256, "split": options.split}
    return Evaluation(reports=asking.reports, figures=asking.figures, pictures=asking.pictures, written=asking.written)


def _ask_zero_shot(asking: Asking) -> None:
    assert asking.test is not None
    run = asking.run
    config = ZeroShot.Config(
        text_length=run.text_length, seen=asking.splits.seen, temperature=run.config.evaluation.prompt_temperature,
        **asking.common,
    )  # fmt: skip
    zero_shot = ZeroShot(asking.prompts, config)
    scores = zero_shot.run(run.encoders, run.tokenizer, asking.test, asking.splits.labels, run.device, run.autocast)
    asking.take(zero_shot, scores)["prompts_from"] = asking.prompts_from


def _ask_wording(asking: Asking) -> None:
    assert asking.test is not None
    run, labels = asking.run, asking.splits.labels
    # Other wordings are the recipe's of its own prompts: they say nothing of those that were given instead.
    paraphrases = () if asking.options.prompts is not None else run.config.evaluation.paraphrases
    config = ZeroShot.Config(text_length=run.text_length, **asking.common)
    wording = Wording(asking.prompts, paraphrases or built_in.paraphrased(labels, WORDINGS), config)
    found = wording.run(
        run.encoders, run.tokenizer, asking.test, labels, run.device, run.autocast, with_text=asking.with_text
    )  # fmt: skip
    asking.take(wording, found)["prompts_from"] = asking.prompts_from


def _ask_taught_labels(asking: Asking) -> None:
    assert asking.test is not None
    taught = LabelAreas(ZeroShot.Config(**asking.common))
    asking.take(taught, taught.run(asking.test, asking.splits.labels))


def _ask_retrieval(asking: Asking) -> None:
    if asking.with_text is not None and asking.compares_whole_reports:  # else it is asked by anatomy
        retrieval = Retrieval(Retrieval.Config(coverages=COVERAGES, **asking.common))
        asking.take(retrieval, retrieval.run(asking.with_text))


def _ask_linear_probe(asking: Asking) -> None:
    assert asking.test is not None
    splits, held_out = asking.splits, asking.splits.held_out
    probe = LinearProbe(LinearProbe.Config(**asking.common))
    train = splits.embed(splits.train_split, {"features"}, limit=asking.options.probe_studies)
    fits = probe.run(
        train, splits.embed(held_out, {"features"}) if held_out else None, asking.test, splits.labels,
        lambda done, total: asking.progress("probe: fits", done, total),
    )  # fmt: skip
    asking.take(probe, fits)


def _ask_uncertainty(asking: Asking) -> None:
    assert asking.test is not None
    run, options, splits, held_out = asking.run, asking.options, asking.splits, asking.splits.held_out
    uncertainty = Uncertainty(asking.prompts, Uncertainty.Config(text_length=run.text_length, **asking.common))
    passes = 0

    def again(change: Callable[[Batch], Batch], changed_parts: set[str]) -> EmbeddedSplit:
        nonlocal passes
        found = splits.embed(options.split, changed_parts, options.corruption_studies, change=change, quiet=True)
        passes += 1
        asking.progress(f"{options.split}: corrupted and masked", passes, uncertainty.passes)
        return found

    found = uncertainty.run(
        run.encoders, run.tokenizer, asking.test, splits.labels, run.device, run.autocast,
        validation=splits.embed(held_out, {"image_embeds"}) if held_out else None,
        with_text=asking.with_text, embed=again, words=words_of(run.tokenizer),
    )  # fmt: skip
    asking.take(uncertainty, found)["prompts_from"] = asking.prompts_from
    drawn = uncertainty.pictures().items()
    asking.pictures |= {f"eval/{Uncertainty.protocol}/{name}": image for name, image in drawn}


def _ask_generation(asking: Asking) -> None:
    asking.splits.skipped.clear()
    generation, studies, scores = generate_reports(asking.run, asking.splits, asking.options, asking.progress)
    asking.take(generation, scores)["skipped"] = dict(asking.splits.skipped)
    if asking.options.keep_reports:
        asking.written = list(zip(studies, generation.written, strict=True))


def _ask_set_identity(asking: Asking) -> None:
    identity = SetIdentity(LinearProbe.Config(**asking.common))
    asking.splits.skipped.clear()
    sets = asking.splits.embed_training_sets({"image_embeds"}, asking.options.probe_studies)
    fits = identity.run(sets, lambda done, total: asking.progress("sets: fits", done, total))
    asking.take(identity, fits)["skipped"] = dict(asking.splits.skipped)


def _ask_map(asking: Asking) -> None:
    split = read_split(
        asking.run, asking.splits.url, asking.options.split, _limit(asking, asking.options.map_studies),
        asking.progress,
    )  # fmt: skip
    found, figures = ask_map(asking.run, split, asking.options.seed)
    asking.take(found, iter(figures.items()))["skipped"] = dict(split.skipped)
    drawn = found.pictures().items()
    asking.pictures |= {f"eval/{LatentMap.protocol}/{name.replace(' ', '_')}": image for name, image in drawn}


def _ask_query(asking: Asking) -> None:
    if not asking.options.queries:
        raise ConfigError('--protocol query: asks for nothing; say what with --query "fracture du radius"')
    everything = asking.splits.open(asking.options.split).table.total
    split = read_split(
        asking.run, asking.splits.url, asking.options.split, _limit(asking, everything), asking.progress
    )  # fmt: skip
    found, figures = ask_query(asking.run, split, asking.options.queries)
    asking.take(found, iter(figures.items()))["skipped"] = dict(split.skipped)
    asking.pictures |= {f"eval/{TextQuery.protocol}/{name}": image for name, image in found.pictures().items()}


def _limit(asking: Asking, most: int) -> int:
    return min(most, asking.options.limit or most)


# In the order of what is printed.
ASKED: dict[str, Callable[[Asking], None]] = {
    ZeroShot.protocol: _ask_zero_shot,
    LabelAreas.protocol: _ask_taught_labels,
    Retrieval.protocol: _ask_retrieval,
    LinearProbe.protocol: _ask_linear_probe,
    Uncertainty.protocol: _ask_uncertainty,
    Generation.protocol: _ask_generation,
    Wording.protocol: _ask_wording,
    SetIdentity.protocol: _ask_set_identity,
    LatentMap.protocol: _ask_map,
    TextQuery.protocol: _ask_query,
}


def _ask_by_anatomy(asking: Asking) -> None:
    """The protocols of a model of anatomies, each split embedded once."""
    run, splits = asking.run, asking.splits
    wanted = asking.wanted & {AnatomyZeroShot.protocol, AnatomyProbe.protocol}
    retrieves = Retrieval.protocol in asking.wanted and not asking.compares_whole_reports
    if not wanted and not retrieves:
        return
    splits.skipped.clear()
    test = splits.embed(asking.options.split, parts_of_retrieval(run.task) if retrieves else set(ANATOMY_PARTS))
    skipped = dict(splits.skipped)
    validation = splits.embed(splits.held_out, set(ANATOMY_PARTS)) if splits.held_out and wanted else None
    reports = []
    if retrieves:
        retrieval = Retrieval(Retrieval.Config(coverages=COVERAGES, **asking.common))
        reports.append(asking.take(retrieval, retrieval.run(test)))
    if AnatomyZeroShot.protocol in wanted:
        reports.append(_ask_anatomy_zero_shot(asking, test, validation))
    if AnatomyProbe.protocol in wanted:
        reports.append(_ask_anatomy_probe(asking, test, validation))
    for report in reports:
        report["skipped"] = skipped


def _ask_anatomy_zero_shot(asking: Asking, test: EmbeddedSplit, validation: EmbeddedSplit | None) -> dict[str, Any]:
    """Its report; pictures of where in the anatomies the scores come from are kept, too."""
    run, splits = asking.run, asking.splits
    anatomies, anatomy_of = run.config.task.anatomies, run.config.evaluation.anatomy_of
    # Other wordings are the recipe's of its own prompts: they say nothing of those that were given instead.
    paraphrases = () if asking.options.prompts is not None else run.config.evaluation.paraphrases
    config = ZeroShot.Config(text_length=run.text_length, **asking.common)
    zero_shot = AnatomyZeroShot(asking.prompts, anatomy_of, config, paraphrases)
    scores = zero_shot.run(
        run.encoders, run.tokenizer, test, splits.labels, anatomies, run.device, run.autocast,
        validation=validation,
    )  # fmt: skip
    report = asking.take(zero_shot, scores)
    report["prompts_from"] = asking.prompts_from
    asked = zero_shot.asked(splits.labels, anatomies)
    names = [name for name, known in zip(asked.names, asked.truth(test).T, strict=True) if (known == 1).any()]
    drawn = HeatMaps(names, anatomy_of, anatomies).run(
        cast(Explained, run.task),
        zero_shot.directions(run.encoders, run.tokenizer, names, run.device, run.autocast),
        splits.with_anatomies(asking.options.split), splits.labels, run.config.task.vision.fine_size, run.device,
        run.autocast,
    )  # fmt: skip
    for number, (name, image) in enumerate(drawn, start=1):
        asking.pictures[f"eval/{HeatMaps.name_of(name)}"] = image
        asking.progress("heat maps", number, len(names))
    return report


def _ask_anatomy_probe(asking: Asking, test: EmbeddedSplit, validation: EmbeddedSplit | None) -> dict[str, Any]:
    run, splits = asking.run, asking.splits
    probe = AnatomyProbe(run.config.evaluation.anatomy_of, LinearProbe.Config(**asking.common))
    train = splits.embed(splits.train_split, set(ANATOMY_PARTS), limit=asking.options.probe_studies)
    fits = probe.run(
        train, validation, test, splits.labels, run.config.task.anatomies,
        lambda done, total: asking.progress("anatomy probe: fits", done, total),
    )  # fmt: skip
    return asking.take(probe, fits)


def protocols_of(run: PastRun, asked: Sequence[str] | None) -> set[str]:
    """Those `asked` for, or all that the run's task can be asked. Raises ConfigError naming one that it cannot."""
    task = run.task

    def has(*methods: str) -> bool:
        return all(callable(getattr(task, name, None)) for name in methods)

    fit = {*PROTOCOLS[:4], Wording.protocol, SetIdentity.protocol} if has("embed_images", "embed_texts") else set()
    fit |= {AnatomyZeroShot.protocol, AnatomyProbe.protocol} if has("embed_anatomies", "embed_texts") else set()
    fit |= {LabelAreas.protocol} if has("label_logits") else set()
    fit |= {Generation.protocol} if has("embed_patches") else set()
    if run.config.data.volume is None:
        fit |= {LatentMap.protocol} if has("image_features") else set()
        fit |= {TextQuery.protocol} if has("embed_images", "embed_texts") else set()
    for name in asked or ():
        if name not in PROTOCOLS:
            raise ConfigError(f"--protocol {name}: unknown; use {', '.join(PROTOCOLS)}")
        if name not in fit:
            raise ConfigError(
                f"--protocol {name}: {type(task).__name__} cannot be asked; use {', '.join(sorted(fit)) or 'none'}"
            )
    return set(asked or fit - ONLY_WHEN_NAMED)


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
