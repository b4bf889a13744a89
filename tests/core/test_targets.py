"""What is asked of studies: heads on frozen features, fine-tuning, and their figures against scikit-learn's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, cohen_kappa_score

from core.evaluation.fitting import FitConfig
from core.evaluation.statistics import area_under_curve
from core.evaluation.studies import StudySplit, share_of_known, study_features
from core.evaluation.study_fitting import fine_tune_targets
from core.evaluation.targets import (
    ProportionalOdds,
    Target,
    ascending,
    ordinal_loss,
    probe_target,
    scored_by,
    target_named,
)
from core.models.initialise import draw_weights
from core.models.view_pool import GatedViewPool
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

ENCODER = VisionEncoder.Config(image_size=16, patch_size=8, width=16, depth=1, heads=2, pool="mean")
GRADE = Target(name="grade", kind="grade", grades=4)


def studies(count: int, seed: int) -> StudySplit:
    """One or two views of a study, lit from a side that its grade turns; its length has grade and sex in it."""
    draws = np.random.default_rng(seed)
    grade = draws.integers(0, 4, count).astype(np.float64)
    views = 1 + draws.integers(0, 2, count)
    index = np.repeat(np.arange(count), views)
    angle = grade[index][:, None, None, None] * np.pi / 6  # a direction, since the encoder norms lengths away
    across = np.tile(np.linspace(-2, 2, 8), 2)  # in each patch, since their mean is taken
    pixels = np.cos(angle) * across[None, None, None, :] + np.sin(angle) * across[None, None, :, None]
    pixels = pixels + draws.normal(0, 0.3, (len(index), 1, 16, 16))
    sex = draws.integers(0, 2, count)
    length = np.where(np.arange(count) % 6 == 5, np.nan, 10 * grade + 20 * sex)
    return StudySplit(
        pixel_values=torch.from_numpy(pixels).float(), study_index=torch.from_numpy(index),
        labels=torch.from_numpy((grade >= 2).astype(np.int8))[:, None], label_names=("high",),
        measurements={"grade": grade, "length": length}, sex=tuple("FM"[one] for one in sex),
        patient_key=torch.arange(count) // 2,
    )  # fmt: skip


SPLITS = {"train": studies(120, 1), "validation": studies(40, 2), "test": studies(60, 3)}
ROWS = {name: np.arange(len(split)) for name, split in SPLITS.items()}


def known_rows(target: Target) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(np.isfinite(target.truth(split))) for name, split in SPLITS.items()}


def encoder() -> VisionEncoder:
    made = VisionEncoder(ENCODER)
    draw_weights(made, 0)
    return made.eval()


def test_kinds_of_targets_are_told_by_the_data() -> None:
    train = SPLITS["train"]
    assert target_named("high", train).kind == "label"
    assert target_named("grade", train) == GRADE
    assert target_named("length", replace(train, measurements={"length": train.measurements["length"] + 0.5})) == (
        Target(name="length", kind="number")
    )
    with pytest.raises(ConfigError, match="no such label or measurement; there is high, grade, length"):
        target_named("age", train)


def test_probabilities_of_grades_add_up_and_bounds_ascend() -> None:
    bounds = ascending(torch.tensor([-1.0, -30.0, 2.0], dtype=torch.float64))
    assert (bounds.diff() > 0).all()
    score = torch.tensor([-40.0, -1.0, 0.3, 50.0], dtype=torch.float64)
    each = torch.stack([ordinal_loss(score, bounds, torch.full((4,), grade)) for grade in range(4)])
    assert torch.allclose((-each).exp().sum(dim=0), torch.ones(4, dtype=torch.float64), atol=1e-6)
    assert torch.isfinite(each).all()


def test_proportional_odds_finds_the_direction_of_a_grade() -> None:
    draws = np.random.default_rng(0)
    x = draws.normal(size=(400, 3))
    grade = np.digitize(x[:, 1] + 0.1 * draws.normal(size=400), [-0.7, 0.0, 0.7])
    fitted = ProportionalOdds.fit(x, grade, 4, 1.0)
    assert abs(fitted.weight[1]) > 10 * max(abs(fitted.weight[0]), abs(fitted.weight[2]))
    assert (fitted.outputs(x)["value"] == grade).mean() > 0.85


@pytest.mark.parametrize("figure", ["quadratic kappa", "AUPRC"])
def test_figures_are_scikit_learns_under_any_weights(figure: str) -> None:
    draws = np.random.default_rng(4)
    truth, value = draws.integers(0, 4, 50).astype(float), draws.integers(0, 4, 50).astype(float)
    weights = draws.integers(0, 3, (50, 5)).astype(np.float32)
    if figure == "AUPRC":
        truth = (truth > 2).astype(float)
        wanted = [average_precision_score(truth, value, sample_weight=weights[:, r]) for r in range(5)]
    else:
        wanted = [cohen_kappa_score(truth, value, weights="quadratic", sample_weight=weights[:, r]) for r in range(5)]
    target = replace(GRADE, kind="grade" if figure == "quadratic kappa" else "label")
    statistic = scored_by(figure, target, [{"value": value, "score": value}], truth, np.arange(50))(np.arange(50))
    assert statistic is not None
    np.testing.assert_allclose(statistic(weights), wanted, atol=1e-9)


def test_frozen_features_tell_label_grade_and_number_and_sex_helps() -> None:
    noise = np.random.default_rng(5)
    features = {
        name: np.stack(
            [split.measurements["grade"] + noise.normal(0, 0.1, len(split)), noise.normal(size=len(split))], 1
        )
        for name, split in SPLITS.items()
    }
    high = probe_target(target_named("high", SPLITS["train"]), features, SPLITS, ROWS["train"])
    truth = SPLITS["test"].labels[:, 0].numpy()
    assert area_under_curve(high["score"], truth == 1) > 0.95
    grade = probe_target(GRADE, features, SPLITS, ROWS["train"])
    assert cohen_kappa_score(grade["value"], SPLITS["test"].measurements["grade"], weights="quadratic") > 0.8
    length = Target(name="length", kind="number")
    rows = known_rows(length)["train"]
    errors = []
    for with_sex in (False, True):
        value = probe_target(length, features, SPLITS, rows, with_sex=with_sex)["value"]
        errors.append(np.nanmean(np.abs(value - length.truth(SPLITS["test"]))))
    assert errors[1] < 0.5 * errors[0]


def test_what_cannot_be_taught_is_constant() -> None:
    features = {name: np.zeros((len(split), 2)) for name, split in SPLITS.items()}
    rows = np.flatnonzero(GRADE.truth(SPLITS["train"]) == 2)[:3]
    found = probe_target(GRADE, features, SPLITS, rows)
    assert set(found["value"]) == {2.0} and set(found["score"]) == {0.0}


@pytest.mark.parametrize("told", [0.0, 3.0])
def test_a_heads_strength_is_what_serves_patients_left_out(told: float) -> None:
    """Both studies of a patient have the same features, so that one would give the other away."""
    train, draws = SPLITS["train"], np.random.default_rng(3)
    labels = torch.from_numpy((np.arange(len(train)) // 2 % 2).astype(np.int8))[:, None]
    noise = draws.normal(size=(len(train) // 2, 16)).repeat(2, axis=0)
    noise[:, 0] += told * (2 * labels[:, 0].numpy() - 1)
    features = {"train": noise, "test": noise}
    splits = {"train": replace(train, labels=labels), "test": train}
    score = probe_target(target_named("high", train), features, splits, np.arange(len(train)))["score"]
    assert np.ptp(score) > 1 if told else np.ptp(score) < 0.2


def test_a_lone_patient_teaches_what_she_can() -> None:
    features = {name: np.arange(len(split), dtype=np.float64)[:, None] for name, split in SPLITS.items()}
    pairs = SPLITS["train"].labels[:, 0].view(-1, 2)
    place = int(torch.nonzero(pairs[:, 0] != pairs[:, 1])[0])
    found = probe_target(target_named("high", SPLITS["train"]), features, SPLITS, np.array([2 * place, 2 * place + 1]))
    assert np.ptp(found["score"]) > 0


def test_shares_nest_by_patient_and_are_of_those_known() -> None:
    patients, known = np.arange(100) // 2, np.arange(100) < 40
    small, large = (share_of_known(patients, known, share, seed=3) for share in (0.1, 0.5))
    assert len(small) == 4 and len(large) == 20 and set(small) <= set(large) and max(large) < 40
    assert len(share_of_known(patients, known, 0.001, seed=3)) == 2  # one patient at least


def test_learned_pooling_is_of_a_studys_own_views() -> None:
    pool = GatedViewPool(16)
    draw_weights(pool, 1)
    split = SPLITS["test"]
    whole = study_features(encoder(), pool, split)
    assert whole.shape == (60, 16)
    alone = study_features(encoder(), pool, split.rows(np.array([7, 3])))
    np.testing.assert_allclose(alone, whole[[7, 3]], atol=1e-5)


def test_a_grade_that_nobody_taught_may_be_among_those_that_choose() -> None:
    grade = SPLITS["train"].measurements["grade"]
    train = replace(SPLITS["train"], measurements={"grade": np.minimum(grade, 2)})
    target = target_named("grade", train)
    assert target.grades == 3 and SPLITS["validation"].measurements["grade"].max() == 3
    config = FitConfig(steps=2, batch_size=8)
    found = fine_tune_targets([target], encoder(), None, {**SPLITS, "train": train}, ROWS, config)
    assert found["grade"]["value"].max() <= 2


def test_targets_are_learned_together_from_scratch() -> None:
    targets = [target_named("high", SPLITS["train"]), GRADE, Target(name="length", kind="number")]
    config = FitConfig(steps=60, batch_size=24, lr=1e-2, encoder_lr=2e-3)
    before = encoder()
    found = fine_tune_targets(targets, before, None, SPLITS, ROWS, config)
    grade = SPLITS["test"].measurements["grade"]
    assert cohen_kappa_score(found["grade"]["value"], grade, weights="quadratic") > 0.6
    assert set(found["high"]) == {"score"} and 0 < found["length"]["value"].mean() < 60
    for name, value in encoder().state_dict().items():
        assert torch.equal(before.state_dict()[name], value)  # a copy was taught
    again = fine_tune_targets(targets, before, None, SPLITS, ROWS, config)
    np.testing.assert_array_equal(again["grade"]["score"], found["grade"]["score"])
