"""The bone experiment: how answers become gains and figures, and that its contestants can be built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ci.bench import bone
from ci.bench.figure import bars
from ci.bench.learning import Experiment
from ci.demo import Size
from configs.schema import apply_overrides, load_recipe
from core.evaluation.studies import StudySplit
from core.evaluation.targets import Outputs
from shards.batch import NOT_ANNOTATED

SMALL = Size(samples=(60, 20, 60))
TRUTH = bone.Truth(
    of={
        "kl_grade": np.where(np.arange(120) % 3 == 0, np.nan, np.arange(120) % 5).astype(float),
        "bone_age_months": 10.0 + np.arange(120), "fracture": (np.arange(120) % 2).astype(float),
        "anomaly": (np.arange(120) % 4 == 0).astype(float),
    },
    patients=np.arange(120) // 2,
)  # fmt: skip


def answers(noise: float, seed: int) -> bone.Answers:
    """The truth with this much noise on it, in deviations."""
    draws = np.random.default_rng(seed)
    found: bone.Answers = {}
    for target in bone.TARGETS:
        truth = np.nan_to_num(TRUTH.of[target.name])
        said = truth + noise * truth.std() * draws.normal(size=120)
        outputs: Outputs = {"score": said}
        if target.kind != "label":
            outputs["value"] = np.clip(np.round(said), 0, 4) if target.kind == "grade" else said
        for share in bone.SHARES:
            found[bone.key_of(target, share)] = [outputs, outputs]
    return found


def rows_and_answers(ours: float, theirs: float) -> tuple[list[bone.Row], dict[tuple[str, int], bone.Answers]]:
    said = {
        (name, seed): answers(ours if name in (bone.OURS, bone.TUNED) else theirs, 10 * seed + place)
        for place, name in enumerate(bone.RECIPES)
        for seed in bone.SEEDS
    }
    rows = [
        bone.Row(contestant=name, seed=seed, figures=dict.fromkeys(of, 0.5), train_s=9.0, commit="abc",
                 zero_shot_fracture=0.8 + 0.05 * bone.SEEDS.index(seed) if name in (bone.OURS, bone.ONE_VIEW) else None,
                 zero_shot_within_limb=0.6 if name in (bone.OURS, bone.ONE_VIEW) else None)
        for (name, seed), of in said.items()
    ]  # fmt: skip
    return rows, said


def test_tasks_count_where_every_interval_lies_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    rows, said = rows_and_answers(0.2, 1.5)
    found = {one.id: one for one in bone.summary(rows, said, dict.fromkeys(bone.SEEDS, TRUTH), 1.0, SMALL)}
    assert set(found) == {name for name in bars() if name.startswith("bone.")}
    assert found["bone.tasks_above_init"].value == 4 and found["bone.tasks_above_init"].holds
    assert found["bone.zero_shot_fracture_auc"].value == pytest.approx(0.85)
    assert found["bone.pooling_minus_one_view"].value > 0
    bone.print_rows(rows)
    assert "one view" in capsys.readouterr().out


@pytest.mark.parametrize("pair", bone.PAIRS)
def test_one_equal_is_enough_for_a_task_not_to_count(pair: tuple[str, str]) -> None:
    rows, said = rows_and_answers(0.2, 1.5)
    said |= {(pair[1], seed): said[pair[0], seed] for seed in bone.SEEDS}
    found = {one.id: one for one in bone.summary(rows, said, dict.fromkeys(bone.SEEDS, TRUTH), 1.0, SMALL)}
    assert found["bone.tasks_above_init"].value == 0 and found["bone.tasks_above_init"].holds is False


def test_less_error_is_a_gain() -> None:
    age = next(target for target in bone.TARGETS if target.name == "bone_age_months")
    better, worse = answers(0.1, 1), answers(1.0, 2)
    of = bone.gain(age, 0.1, "a", "b", {("a", 0): better, ("b", 0): worse}, {0: TRUTH})
    assert 0 < of.low < of.mean < of.high and len(of.each) == 1


def test_answers_are_kept_as_they_were(tmp_path: Path) -> None:
    said = answers(0.3, 5)
    bone.keep_answers(tmp_path / "answers.npz", said)
    found = bone.kept_answers(tmp_path / "answers.npz")
    assert set(found) == set(said)
    for key, draws in said.items():
        for one, other in zip(draws, found[key], strict=True):
            assert set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_scratch_sees_the_labels_of_its_share_only_and_one_view_is_the_studys_own() -> None:
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    split = StudySplit(
        pixel_values=index[:, None, None, None].float(), study_index=index, labels=torch.ones(3, 2, dtype=torch.int8),
        label_names=("fracture", "anomaly"), measurements={"kl_grade": np.arange(3.0)}, sex=("F", "M", None),
        patient_key=torch.arange(3),
    )  # fmt: skip
    grade, _, fracture, _ = bone.TARGETS
    known = bone.labelled_only(split, {grade: np.array([2]), fracture: np.array([0, 1])})
    assert known.labels.tolist() == [[1, NOT_ANNOTATED], [1, NOT_ANNOTATED], [NOT_ANNOTATED, NOT_ANNOTATED]]
    assert np.isnan(known.measurements["kl_grade"][:2]).all() and known.measurements["kl_grade"][2] == 2
    alone = bone.one_random_view(split, 3)
    assert alone.pixel_values.flatten().tolist() == [0, 1, 2] and alone.study_index.tolist() == [0, 1, 2]


def test_contestants_start_alike_and_fit_the_budget() -> None:
    experiment = Experiment(folder=Path("x"), seed=11, size=SMALL)
    configs = {
        name: apply_overrides(load_recipe(recipe), experiment.overrides(*bone.BUDGET))
        for name, recipe in bone.RECIPES.items()
    }
    assert {config.global_batch_size for config in configs.values()} == {bone.BATCH}
    assert {config.trainer.steps for config in configs.values()} == {SMALL.steps}
    assert configs[bone.MAE].identity() != configs[bone.OURS].identity() != configs[bone.ONE_VIEW].identity()
    # With the vocabulary of a run's tokenizer, as runs of all views and of one are started.
    runs = (configs[name].task.build(vocab_size=300, seed=11).towers.vision for name in (bone.OURS, bone.ONE_VIEW))
    first = bone.untrained(configs[bone.INIT]).vision.state_dict()
    for begun in (run.state_dict() for run in runs):
        assert all(torch.equal(first[name], begun[name]) for name in first)
    other = bone.untrained(replace(configs[bone.INIT], seed=12)).vision.state_dict()
    assert not torch.equal(first["patch.weight"], other["patch.weight"])


def test_all_who_are_taught_whole_have_as_many_steps_in_all() -> None:
    experiment = Experiment(folder=Path("x"), seed=11, size=Size(samples=(60, 20, 60), steps=40))
    of = {name: bone.whole_fit(name, experiment) for name in bone.RECIPES}
    tuned, scratch = of[bone.TUNED], of[bone.SCRATCH]
    assert tuned is not None and scratch is not None and of[bone.OURS] is of[bone.INIT] is of[bone.MAE] is None
    assert of[bone.MAE_TUNED] == tuned and scratch.steps == 40 + tuned.steps and scratch.seed == tuned.seed == 11
    assert scratch.batch_size == tuned.batch_size == bone.BATCH


def test_area_within_strata_counts_no_pair_across_them() -> None:
    scores, present = np.array([0.9, 0.8, 0.2, 0.1, 0.5]), np.array([True, False, False, True, True])
    assert bone.area_within(scores, present, np.array([0, 0, 1, 1, 2])) == 0.5
    assert bone.area_within(scores, present, np.zeros(5)) == pytest.approx(3 / 6)
    assert np.isnan(bone.area_within(scores, present, np.arange(5)))


def test_limb_and_cast_tell_most_fractures_of_the_phantom() -> None:
    assert 0.8 < bone.told_by_limb(12, 300) < 0.95
