"""Tasks of whole studies for transfer.py: labels, ordinal grades and numbers, on frozen pooled views or fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from core.evaluation.comparison import Scored, by_subgroup, compare
from core.evaluation.fitting import FitConfig
from core.evaluation.studies import StudySplit, share_of_known, study_features
from core.evaluation.study_fitting import fine_tune_targets
from core.evaluation.targets import (
    FOLDS,
    STRENGTHS,
    Outputs,
    Target,
    constant,
    probe_target,
    scored_by,
    target_named,
)
from launchers.transfer_data import TransferEncoder
from launchers.transfer_study_data import read_studies
from shards import keyed
from shards.dataset import read_manifest
from shards.errors import ConfigError

Progress = Callable[[str, int, int], None]
Kept = Callable[[Mapping[str, Any], Callable[[], Outputs]], Outputs]  # settings, make -> what was kept, or made
PROBE, FINE_TUNE = "study_probe", "study_fine_tune"
STUDY_TASKS = (PROBE, FINE_TUNE)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """`targets`: labels and measurements of the manifest; `with_sex`: as an input of frozen features' heads."""

    data: str
    tasks: tuple[str, ...] = (PROBE,)
    targets: tuple[str, ...] = ()
    with_sex: bool = False
    percents: tuple[float, ...] = (1.0, 10.0, 100.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    limit: int | None = None
    replicates: int = 1000
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True, kw_only=True)
class Studies:
    """The splits as one encoder wants them: train, validation and test."""

    splits: Mapping[str, StudySplit]
    features: Mapping[str, np.ndarray]
    patients: Mapping[str, np.ndarray]

    def rows(self, target: Target, share: float, seed: int) -> dict[str, np.ndarray]:
        """Which studies teach and choose at a share of the patients of whom the target is known."""
        return {
            name: share_of_known(self.patients[name], np.isfinite(target.truth(split)), share, seed)
            for name, split in self.splits.items()
            if name != "test"
        }


def study_reports(
    encoders: Sequence[TransferEncoder],
    digests: Sequence[str],
    options: StudyOptions,
    kept: Kept,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """(task/target/figure -> percent -> comparison and subgroups, split -> cause -> how many were left out).

    Raises ConfigError for a target that the data do not know, or that no test study has.
    """
    if not options.targets:
        raise ConfigError("study tasks need --targets, names of the manifest's labels or of studies' measurements")
    learned: dict[tuple[str, Target, float], dict[str, list[Outputs]]] = {}
    whole = read_manifest(options.data)
    whole.of_split(options.split)  # refused here where there is none
    manifest = whole.sha256
    for encoder, weights in zip(encoders, digests, strict=True):
        studies = open_studies(encoder, options, progress)
        targets = [target_named(name, studies.splits["train"]) for name in options.targets]
        if not learned:  # the test studies' truth is the same for every encoder
            for target in targets:
                _refuse_unscored(target, studies, options)
        for task in options.tasks:
            for target in targets:
                for percent in options.percents:
                    of_seeds = []
                    for seed in seeds_of(task, percent, options):
                        settings = {
                            "task": task, "target": asdict(target), "percent": percent, "seed": seed,
                            "weights": weights, "manifest": manifest, "split": options.split, "limit": options.limit,
                            "with_sex": options.with_sex, "fit": asdict(options.fit),
                            "image_size": encoder.decode.image_size,
                            "head": [FOLDS, *STRENGTHS] if task == PROBE else None,
                        }  # fmt: skip
                        make = _learning(task, target, encoder, studies, percent / 100, seed, options)
                        of_seeds.append(kept(settings, make))
                        progress(f"{encoder.name}: {task} of {target.name} at {percent:g} %", 1, 1)
                    learned.setdefault((task, target, percent), {})[encoder.name] = of_seeds
    return _reports(learned, studies, options), {name: dict(of.skipped) for name, of in studies.splits.items()}


def _refuse_unscored(target: Target, studies: Studies, options: StudyOptions) -> None:
    """Raises ConfigError where a figure of the target is not defined on the test studies: before anything is learned.

    None is known of the target, or all are alike.
    """
    truth = target.truth(studies.splits["test"])
    known = np.flatnonzero(np.isfinite(truth))
    blind, patients = constant(target, truth[known], len(known)), studies.patients["test"][known]
    for figure in target.figures:
        if scored_by(figure, target, [blind], truth[known], patients)(np.arange(len(known))) is None:
            what = f"{len(known)} studies that know it are all alike" if len(known) else "no study knows it"
            raise ConfigError(
                f"target {target.name!r}: no {figure} in {options.split} of {options.data}: {what}; leave it out of "
                "--targets, or use a larger split"
            )


def seeds_of(task: str, percent: float, options: StudyOptions) -> tuple[int, ...]:
    """One where seeds change nothing: a small head on all labels has one answer."""
    return options.seeds[:1] if task == PROBE and percent == 100 else options.seeds


def open_studies(encoder: TransferEncoder, options: StudyOptions, progress: Progress) -> Studies:
    """Splits and frozen features; a fifth of the training patients validates where there is no such split."""

    def read(split: str) -> StudySplit:
        return read_studies(options.data, split, encoder.decode, limit=options.limit, progress=progress)

    there = read_manifest(options.data).splits
    splits = {"train": read("train"), "test": read(options.split)}
    if "validation" in there and options.split != "validation":
        splits["validation"] = read("validation")
    else:
        splits |= _halves(splits["train"])
    features = {}
    if PROBE in options.tasks:
        features = {
            name: study_features(encoder.vision, encoder.pool, splits[name], autocast=encoder.autocast)
            for name in ("train", "test")
        }
    return Studies(
        splits=splits, features=features, patients={name: of.patient_key.numpy() for name, of in splits.items()}
    )


def _halves(train: StudySplit) -> dict[str, StudySplit]:
    held = keyed.uniform(0, "transfer: validation patients", train.patient_key.numpy())[:, 0] < 0.2
    return {"train": train.rows(np.flatnonzero(~held)), "validation": train.rows(np.flatnonzero(held))}


def _learning(
    task: str, target: Target, encoder: TransferEncoder, studies: Studies, share: float, seed: int,
    options: StudyOptions,
) -> Callable[[], Outputs]:  # fmt: skip
    def make() -> Outputs:
        rows = studies.rows(target, share, seed)
        if not len(rows["train"]):
            raise ConfigError(f"target {target.name!r} is not known of any training study of {options.data}")
        if task == PROBE:
            return probe_target(target, studies.features, studies.splits, rows["train"], with_sex=options.with_sex)
        config = replace(options.fit, seed=seed)
        found = fine_tune_targets(
            [target], encoder.vision, encoder.pool, studies.splits, rows, config, autocast=encoder.autocast
        )
        return found[target.name]

    return make


def _reports(
    learned: Mapping[tuple[str, Target, float], Mapping[str, list[Outputs]]], studies: Studies, options: StudyOptions
) -> dict[str, Any]:
    test = studies.splits["test"]
    found: dict[str, Any] = {}
    for (task, target, percent), of_encoders in learned.items():
        truth = target.truth(test)
        known = np.flatnonzero(np.isfinite(truth))
        patients = studies.patients["test"][known]
        groups = {name: [values[row] for row in known] for name, values in test.groups.items()}
        for figure in target.figures:
            scores: dict[str, Scored] = {
                name: scored_by(figure, target, [_rows(one, known) for one in outputs], truth[known], patients)
                for name, outputs in of_encoders.items()
            }
            of = compare(scores, patients, replicates=options.replicates)
            assert of is not None  # refused before anything was learned
            name = f"{task}/{target.name}/{figure.replace(' ', '_')}"
            found.setdefault(name, {})[f"{percent:g}"] = {
                "figure": f"{figure}, lower is better" if figure == "MAE" else figure,
                "seeds": len(next(iter(of_encoders.values()))),
                "asked": f"{len(known)} studies of {len(np.unique(patients))} patients",
                "not_asked": {"not known": len(test) - len(known)} if len(test) > len(known) else {},
                **of.to_json(),
                "subgroups": by_subgroup(scores, patients, groups, replicates=options.replicates),
            }
    return found


def _rows(outputs: Outputs, rows: np.ndarray) -> Outputs:
    return {name: values[rows] for name, values in outputs.items()}
