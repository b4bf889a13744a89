"""Does aligning bone radiographs with French reports teach an encoder? Three seeds of bone phantoms, equal budgets.

Phantoms of `standard` difficulty; every run sees as many studies for as many steps. Judged with the labels of 1 and
10 % of the patients: quadratic kappa of the knee's grade, months of error of bone age, AUROC of fracture and anomaly.
Once with encoders frozen and small heads taught (mean of DRAWS draws): `bone:align_tiny`, its own initialisation,
`bone:mae_tiny`, judged by the mean of its patches, and, as ablation of pooling, `bone:align_one_view_tiny`, taught and
judged on one random view. And once with the whole encoder taught the four targets together (one draw): that of
`bone:align_tiny`, that of `bone:mae_tiny`, and `scratch`, the initialisation in as many steps as the others had before
and now. A gain is the mean of three seeds, its interval from a bootstrap of each seed's test patients, the same for
both sides; a task counts where the aligned encoder is above each other one that is judged as it is.

Limb and cast alone tell most fractures apart in these phantoms: what they tell is printed beside the zero-shot figure,
and so is that figure among studies of one limb, with or without cast.

Finished runs of the same settings are kept, so an experiment that was cut off goes on: delete runs/bench_bone after a
change of code.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ci.bench.figure import LOG_COLUMNS, REPOSITORY, Figure, commit, figure
from ci.bench.learning import Experiment, keep_row, kept_row, processor_seconds, settings_of
from ci.demo import RANKS, Size
from configs import schema
from core.evaluation.fitting import FitConfig
from core.evaluation.statistics import area_under_curve, replicates_of
from core.evaluation.studies import StudySplit, share_of_known, study_features
from core.evaluation.study_fitting import fine_tune_targets
from core.evaluation.targets import Outputs, Target, probe_target, scored_by
from core.evaluation.zero_shot import ZeroShot
from launchers.evaluation_maps import study_vectors
from launchers.past_run import open_run
from launchers.transfer_data import TransferEncoder, open_encoder, pool_of, vision_of
from launchers.transfer_study_data import read_studies
from shards import keyed
from shards.batch import NOT_ANNOTATED
from shards.ingest.phantom_bone import generator_hash, split_seed
from shards.ingest.phantom_bone_scene import STANDARD, draw_scene

DESCRIPTION = "bone alignment against its initialisation, scratch and masked images on four tasks (an hour and a half)"

SEEDS = (3, 4, 5)  # 0 to 2 were looked at before heads and augmentation were as they are
DIFFICULTY = "standard"
FULL = Size(samples=(6000, 600, 1200), steps=800, warmup_steps=30)
QUICK = Size(samples=(160, 48, 64), steps=3, warmup_steps=1, log_every=1)
BATCH = 64  # studies; with 800 steps a run takes four to six minutes of two idle cores
LEARNING_RATE = 2e-3  # found for `align` on seed 10, among 1e-3, 2e-3 and 4e-3; all who are taught have it
BUDGET = (
    f"global_batch_size={BATCH}", "data.lanes=32", f"optim.learning_rate={LEARNING_RATE}", "engine.precision=fp32",
    "trainer.evaluate_every=None",
)  # fmt: skip
FOLDER = REPOSITORY / "runs" / "bench_bone"
SHARES, DRAWS, REPLICATES = (0.01, 0.1), 3, 1000
FINE_TUNE = FitConfig(batch_size=BATCH, lr=1e-2, encoder_lr=1e-3)  # found for `align` on seed 10
FINE_TUNE_SHARE = 0.25  # of the steps before
OURS, INIT, SCRATCH, MAE, ONE_VIEW = "align", "initialisation", "scratch", "mae", "one view"
TUNED, MAE_TUNED = "align, fine-tuned", "mae, fine-tuned"
RECIPES = {
    OURS: "bone:align_tiny", TUNED: "bone:align_tiny", INIT: "bone:align_tiny", SCRATCH: "bone:align_tiny",
    MAE: "bone:mae_tiny", MAE_TUNED: "bone:mae_tiny", ONE_VIEW: "bone:align_one_view_tiny",
}  # fmt: skip
TUNED_FROM = {TUNED: OURS, MAE_TUNED: MAE}
PAIRS = ((OURS, INIT), (OURS, MAE), (TUNED, SCRATCH), (TUNED, MAE_TUNED))  # each judged as the other is
TARGETS = {  # and the figure that each is judged by
    Target(name="kl_grade", kind="grade", grades=5): "quadratic kappa",
    Target(name="bone_age_months", kind="number"): "MAE",
    Target(name="fracture", kind="label"): "AUROC",
    Target(name="anomaly", kind="label"): "AUROC",
}
FRACTURE = next(target for target in TARGETS if target.name == "fracture")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one run showed on held-out patients. `figures`: "target at share" -> value, mean over draws."""

    contestant: str
    seed: int
    figures: dict[str, float]
    zero_shot_fracture: float | None  # AUROC, of contestants that read text
    zero_shot_within_limb: float | None  # the same among studies of one limb that all have, or all lack, a cast
    train_s: float  # processor time of each rank
    commit: str  # that it was run at


Answers = dict[str, list[Outputs]]  # "target at share" -> what was said of all test studies, of each draw


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Of a seed's test studies: target -> truth `[n]`, NaN where unknown; `patients [n]`."""

    of: Mapping[str, np.ndarray]
    patients: np.ndarray


def run(quick: bool) -> list[Figure]:
    """All seeds and contestants. Leaves shards and run directories under runs/bench_bone."""
    started = time.perf_counter()
    torch.set_num_threads(RANKS)
    console = Console(stderr=True, highlight=False)
    size, seeds = (QUICK, SEEDS[:1]) if quick else (FULL, SEEDS)
    rows: list[Row] = []
    answers: dict[tuple[str, int], Answers] = {}
    truths: dict[int, Truth] = {}
    for seed in seeds:
        experiment = Experiment(folder=FOLDER / f"{size.steps}-steps" / str(seed), seed=seed, size=size)
        if not experiment.manifest.exists():
            experiment.pack(DIFFICULTY, "--size", "64", source="phantom_bone")
        for name in RECIPES:
            row, answers[name, seed] = run_one(name, experiment, quick=quick)
            rows.append(row)
            shown = ", ".join(f"{of} {value:.3f}" for of, value in row.figures.items())
            zero_shot = "" if row.zero_shot_fracture is None else f"zero-shot fracture {row.zero_shot_fracture:.3f}, "
            console.print(f"seed {seed}, {name}: {zero_shot}{shown}, trained in {row.train_s:.0f} s of a rank")
        truths[seed] = truth_of(experiment)
    print_rows(rows)
    return summary(rows, answers, truths, time.perf_counter() - started, size)


def run_one(name: str, experiment: Experiment, *, quick: bool) -> tuple[Row, Answers]:
    """Train and judge one contestant, or read what it showed when these settings were run before."""
    overrides = experiment.overrides(*BUDGET)
    config = schema.apply_overrides(schema.load_recipe(RECIPES[name]), overrides)
    run_name = name.replace(",", "").replace(" ", "_")
    folder = experiment.folder / run_name
    fit = whole_fit(name, experiment)
    settings = settings_of(config, f"{generator_hash()} {name} {experiment.size.samples} {SHARES} {DRAWS} {fit}")
    found = kept_row(folder / "row.json", settings)
    if found is not None:
        return Row(**found), kept_answers(folder / "answers.npz")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    zero_shot: tuple[float | None, float | None] = (None, None)
    train_s = 0.0
    if name in (INIT, SCRATCH):
        encoder = untrained(config)
        if name == SCRATCH:
            encoder = replace(encoder, pool=None)  # the mean of views, since a pool is not taught here
    elif name in TUNED_FROM:
        encoder = open_encoder(str(experiment.folder / TUNED_FROM[name]))
    else:
        train_s = processor_seconds(lambda: experiment.pretrain(RECIPES[name], overrides, run_name))
        encoder = open_encoder(str(folder))
    splits = {
        split: read_studies(str(experiment.manifest), split, encoder.decode)
        for split in ("train", "validation", "test")
    }
    if name == ONE_VIEW:
        splits = {part: one_random_view(split, experiment.seed) for part, split in splits.items()}
    if name in (OURS, ONE_VIEW):
        zero_shot = zero_shot_fracture(folder, splits["test"])
    started = time.process_time()
    if fit is None:
        answers = probed(encoder, splits, experiment.seed)
    else:
        answers = taught_whole(encoder, splits, fit)
        train_s = (time.process_time() - started) / RANKS
    truth = {target.name: target.truth(splits["test"]) for target in TARGETS}
    patients = splits["test"].patient_key.numpy()
    figures = {
        key_of(target, share): float(statistic(np.ones((len(rows), 1), dtype=np.float32))[0])
        for target in TARGETS
        for share in SHARES
        for rows, statistic in [statistic_of(target, share, answers, Truth(of=truth, patients=patients))]
    }
    row = Row(
        contestant=name, seed=experiment.seed, figures=figures, zero_shot_fracture=zero_shot[0],
        zero_shot_within_limb=zero_shot[1], train_s=train_s, commit=commit(),
    )  # fmt: skip
    keep_answers(folder / "answers.npz", answers)
    keep_row(folder / "row.json", asdict(row), settings)
    return row, answers


def zero_shot_fracture(run_dir: Path, test: StudySplit) -> tuple[float, float]:
    """AUROC of fracture by the recipe's prompts, of all studies and within strata of limb and cast."""
    with open_run(str(run_dir)) as run:
        asking = run.config.evaluation
        asked = ZeroShot(
            asking.prompts, ZeroShot.Config(text_length=run.text_length, temperature=asking.prompt_temperature)
        )
        images = study_vectors(run, test, run.encoders.embed_images)
        found = asked.scores(run.encoders, run.tokenizer, images, [FRACTURE.name], run.device, run.autocast)
    scores = found[:, 0]
    present = FRACTURE.truth(test) == 1
    casts = test.labels[:, test.label_names.index("cast")].tolist()
    strata = np.unique([f"{part} {cast}" for part, cast in zip(test.groups["body part"], casts, strict=True)],
                       return_inverse=True)[1]  # fmt: skip
    return area_under_curve(scores, present), area_within(scores, present, strata)


def area_within(scores: np.ndarray, present: np.ndarray, strata: np.ndarray) -> float:
    """Chance that a positive outscores a negative of its own stratum; NaN without such a pair. All `[n]`."""
    right = pairs = 0.0
    for stratum in np.unique(strata):
        rows = strata == stratum
        count = float(present[rows].sum()) * float((~present[rows]).sum())
        if count:
            right, pairs = right + count * area_under_curve(scores[rows], present[rows]), pairs + count
    return right / pairs if pairs else float("nan")


def untrained(config: schema.TrainConfig) -> TransferEncoder:
    """The encoder that a run starts from."""
    task = config.task.build(vocab_size=64, seed=config.seed).eval().requires_grad_(False)
    decode = replace(config.data.decode, threads=RANKS)
    return TransferEncoder(
        name=INIT, vision=vision_of(task), decode=decode, autocast=None, source={}, pool=pool_of(task)
    )


def one_random_view(split: StudySplit, seed: int) -> StudySplit:
    """Each study with one of its views, drawn from its place."""
    ends = torch.searchsorted(split.study_index, torch.arange(len(split) + 1)).numpy()
    drawn = keyed.uniform(seed, "bone bench: one view", np.arange(len(split)))[:, 0]
    chosen = torch.from_numpy(ends[:-1] + (drawn * np.diff(ends)).astype(np.int64))
    return replace(split, pixel_values=split.pixel_values[chosen], study_index=torch.arange(len(split)))


def key_of(target: Target, share: float) -> str:
    """Under which answers and figures are kept."""
    return f"{target.name} at {100 * share:g} %"


def taught_rows(target: Target, split: StudySplit, share: float, seed: int) -> np.ndarray:
    """Which studies' labels teach or choose: the same patients for all contestants."""
    return share_of_known(split.patient_key.numpy(), np.isfinite(target.truth(split)), share, seed)


def probed(encoder: TransferEncoder, splits: Mapping[str, StudySplit], seed: int) -> Answers:
    """Small heads on frozen features, several draws of each share."""
    features = {
        name: study_features(encoder.vision, encoder.pool, splits[name], autocast=encoder.autocast)
        for name in ("train", "test")
    }
    return {
        key_of(target, share): [
            probe_target(target, features, splits, taught_rows(target, splits["train"], share, DRAWS * seed + draw))
            for draw in range(DRAWS)
        ]
        for target in TARGETS
        for share in SHARES
    }


def whole_fit(name: str, experiment: Experiment) -> FitConfig | None:
    """How a contestant's whole encoder is taught; None of those that stay frozen."""
    if name not in (SCRATCH, *TUNED_FROM):
        return None
    steps = max(1, round(FINE_TUNE_SHARE * experiment.size.steps))
    if name in TUNED_FROM:
        return replace(FINE_TUNE, steps=steps, seed=experiment.seed)
    return FitConfig(
        steps=experiment.size.steps + steps, batch_size=BATCH, lr=LEARNING_RATE, encoder_lr=LEARNING_RATE,
        seed=experiment.seed,
    )  # fmt: skip


def taught_whole(encoder: TransferEncoder, splits: Mapping[str, StudySplit], fit: FitConfig) -> Answers:
    """The whole encoder taught all targets of a share together."""
    found: Answers = {}
    for share in SHARES:
        of = {
            part: {target: taught_rows(target, splits[part], share, DRAWS * fit.seed) for target in TARGETS}
            for part in ("train", "validation")
        }
        known = {**splits, **{part: labelled_only(splits[part], of[part]) for part in of}}
        places = {part: np.unique(np.concatenate(list(of[part].values()))) for part in of}
        said = fine_tune_targets(tuple(TARGETS), encoder.vision, encoder.pool, known, places, fit)
        found |= {key_of(target, share): [said[target.name]] for target in TARGETS}
    return found


def labelled_only(split: StudySplit, rows: Mapping[Target, np.ndarray]) -> StudySplit:
    """The split as if each target were known of these studies only."""
    labels = torch.full_like(split.labels, NOT_ANNOTATED)
    measurements = {name: np.full(len(split), np.nan) for name in split.measurements}
    for target, places in rows.items():
        if target.kind == "label":
            column = split.label_names.index(target.name)
            labels[places, column] = split.labels[places, column]
        else:
            measurements[target.name][places] = split.measurements[target.name][places]
    return replace(split, labels=labels, measurements=measurements)


def keep_answers(path: Path, answers: Answers) -> None:
    """For `kept_answers`."""
    flat = {
        f"{key}|{draw}|{name}": values
        for key, draws in answers.items()
        for draw, outputs in enumerate(draws)
        for name, values in outputs.items()
    }
    np.savez_compressed(path, **flat)  # type: ignore[arg-type]


def kept_answers(path: Path) -> Answers:
    """What `keep_answers` wrote."""
    found: dict[str, dict[str, Outputs]] = {}
    with np.load(path, allow_pickle=False) as file:
        for flat, values in file.items():
            key, draw, name = flat.split("|")
            found.setdefault(key, {}).setdefault(draw, {})[name] = values
    return {key: [draws[draw] for draw in sorted(draws)] for key, draws in found.items()}


def truth_of(experiment: Experiment) -> Truth:
    """Of the test studies, as every contestant's were read."""
    config = schema.load_recipe(RECIPES[OURS])
    test = read_studies(str(experiment.manifest), "test", replace(config.data.decode, threads=RANKS), most_views=1)
    return Truth(of={target.name: target.truth(test) for target in TARGETS}, patients=test.patient_key.numpy())


def statistic_of(
    target: Target, share: float, answers: Answers, truth: Truth
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Places of the test studies whose truth is known, and the target's figure of weights of these `[known, r]`."""
    known = np.flatnonzero(np.isfinite(truth.of[target.name]))
    draws = [{name: values[known] for name, values in one.items()} for one in answers[key_of(target, share)]]
    scored = scored_by(TARGETS[target], target, draws, truth.of[target.name][known], truth.patients[known])
    statistic = scored(np.arange(len(known)))
    return known, statistic or (lambda weights: np.full(weights.shape[1], np.nan))


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Mean over seeds, good above 0, its 95 % interval, and each seed's."""

    low: float
    mean: float
    high: float
    each: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def gain(
    target: Target, share: float, one: str, other: str, answers: Mapping[tuple[str, int], Answers],
    truths: Mapping[int, Truth],
) -> Gain:  # fmt: skip
    """Of contestant `one` over `other`; less error counts as gain."""
    sign, values, samples = -1.0 if TARGETS[target] == "MAE" else 1.0, [], []
    for seed, truth in truths.items():
        known, ours = statistic_of(target, share, answers[one, seed], truth)
        _, theirs = statistic_of(target, share, answers[other, seed], truth)

        def difference(
            weights: np.ndarray,
            ours: Callable[[np.ndarray], np.ndarray] = ours,
            theirs: Callable[[np.ndarray], np.ndarray] = theirs,
        ) -> np.ndarray:
            return (sign * (ours(weights) - theirs(weights)))[None]

        estimates, drawn = replicates_of(difference, truth.patients[known], seed=seed, replicates=REPLICATES)
        values.append(estimates[0].value)
        samples.append(drawn[:, 0])
    low, high = np.nanpercentile(np.mean(samples, axis=0), [2.5, 97.5])
    return Gain(low=float(low), mean=statistics.fmean(values), high=float(high), each=tuple(values))


def summary(
    rows: Sequence[Row], answers: Mapping[tuple[str, int], Answers], truths: Mapping[int, Truth], wall_s: float,
    size: Size = FULL,
) -> list[Figure]:  # fmt: skip
    """The figures that are judged. A task counts where its interval lies above 0 against all peers at both shares."""
    make = partial(figure, repeats=len(truths), seeds=tuple(truths), threads=RANKS, wall_s=wall_s)
    above, said = [], []
    for target in TARGETS:
        gains = {
            (share, peer): gain(target, share, ours, peer, answers, truths) for share in SHARES for ours, peer in PAIRS
        }
        if all(one.low > 0 for one in gains.values()):
            above.append(target.name)
        said += [f"{key_of(target, share)} over {peer} {one}" for (share, peer), one in gains.items()]
    readers = {name: [row for row in rows if row.contestant == name] for name in (OURS, ONE_VIEW)}
    zero_shot = {name: [row.zero_shot_fracture or 0.0 for row in of] for name, of in readers.items()}
    within = statistics.fmean(row.zero_shot_within_limb or 0.0 for row in readers[OURS])
    told = statistics.fmean(told_by_limb(seed, size.samples[2]) for seed in truths)
    pooling = gain(FRACTURE, SHARES[-1], OURS, ONE_VIEW, answers, truths)
    each = ", ".join(f"{value:.3f}" for value in zero_shot[OURS])
    return [
        make("bone.tasks_above_init", len(above), note=f"{', '.join(above) or 'none'}; " + "; ".join(said)),
        make(
            "bone.zero_shot_fracture_auc", statistics.fmean(zero_shot[OURS]),
            note=f"seeds {each}; one who knows limb and cast alone: {told:.3f}; within a limb: "
            f"{within:.3f}; one view: {statistics.fmean(zero_shot[ONE_VIEW]):.3f}",
        ),
        make(
            "bone.pooling_minus_one_view", pooling.low,
            note=f"fracture at {100 * SHARES[-1]:g} % of labels: {pooling}, of which the lower end counts; seeds "
            + ", ".join(f"{value:+.3f}" for value in pooling.each),
        ),
    ]  # fmt: skip


def told_by_limb(seed: int, count: int) -> float:
    """AUROC of fracture on the test phantoms for one who knows how frequent it is in each limb, with and without cast.

    The frequencies are those of as many training phantoms.
    """
    train, test = ([draw_scene(split_seed(seed, split), index, STANDARD) for index in range(count)]
                   for split in ("train", "test"))  # fmt: skip
    seen: dict[tuple[str, bool], list[int]] = {}
    for scene in train:
        seen.setdefault((scene.part, scene.cast), []).append(scene.labels["fracture"])
    scores = [statistics.fmean(seen.get((scene.part, scene.cast), [0.5])) for scene in test]
    return area_under_curve(np.array(scores), np.array([scene.labels["fracture"] == 1 for scene in test]))


def print_rows(rows: Sequence[Row]) -> None:
    """Every run, contestant by contestant."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    table = Table(title="every run: kappa, months, AUROC, AUROC", title_justify="left", show_edge=False, pad_edge=False)
    keys = [key_of(target, share) for target in TARGETS for share in SHARES]
    for heading in ("contestant", "seed", *keys, "zero-shot fracture", "within a limb", "seconds", "commit"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for row in sorted(rows, key=lambda row: (list(RECIPES).index(row.contestant), row.seed)):
        figures = (f"{row.figures[key]:.3f}" for key in keys)
        asked = (row.zero_shot_fracture, row.zero_shot_within_limb)
        zero_shot = ("-" if value is None else f"{value:.3f}" for value in asked)
        table.add_row(row.contestant, str(row.seed), *figures, *zero_shot, f"{row.train_s:.0f}", row.commit)
    console.print(table)
