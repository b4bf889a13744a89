"""Evaluation of uncertainty on answers known beforehand: perfect, random and constant confidence, ties, no answer."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, brier_score_loss
from torch import Tensor

from core.engine import split as share_of_ranks
from core.evaluation.abstention import Selective, oracle, picture
from core.evaluation.calibration import Calibration, Decisions
from core.evaluation.corruption import KINDS, Words, corrupt_images, mask_words
from core.evaluation.embed import EmbeddedSplit, embed_split
from core.evaluation.retrieval import Retrieval, margins
from core.evaluation.statistics import RankCorrelation, resampled
from core.evaluation.uncertainty import Uncertainty
from core.models.gaussian import Gaussian
from shards.batch import NOT_ANNOTATED, UNCERTAIN, Batch
from tests.core.test_evaluation import CPU, ToyTask, WordTokenizer, split_of, unit
from tests.distributed import run_distributed


def once(count: int) -> np.ndarray:
    return np.ones((count, 1), dtype=np.float32)


def brute_area(confidence: np.ndarray, risk: np.ndarray) -> float:
    """Area under the risk-coverage curve by its definition, equal confidences in every order, with exact numbers."""
    groups = [np.flatnonzero(confidence == value) for value in sorted(set(confidence.tolist()), reverse=True)]
    total, kept, found = Fraction(0), 0, Fraction(0)
    for group in groups:
        mean = sum(Fraction(float(risk[i])) for i in group) / len(group)
        for _ in group:
            total, kept = total + mean, kept + 1
            found += total / kept
    return float(found / kept)


# --- risk and coverage ---


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_area_equals_the_definition_with_and_without_ties(decimals: int) -> None:
    random = np.random.default_rng(decimals)
    confidence, risk = np.round(random.normal(size=61), decimals), random.integers(0, 4, 61) / 3
    assert Selective(confidence, risk).area(once(61))[0] == pytest.approx(brute_area(confidence, risk), abs=1e-13)
    # A weight is so many equal cases; a case of weight 0 does not exist.
    weights = random.integers(0, 4, (61, 1)).astype(np.float32)
    rows = np.repeat(np.arange(61), weights[:, 0].astype(int))
    got = Selective(confidence, risk).area(weights)[0]
    assert got == pytest.approx(brute_area(confidence[rows], risk[rows]), abs=1e-13)


def test_perfect_random_and_constant_confidence() -> None:
    random = np.random.default_rng(0)
    risk = (random.uniform(size=4000) < 0.3).astype(float)
    mean = risk.mean()
    best = oracle(risk).area(once(4000))[0]
    # The oracle answers 1 - r without a fault: area r + (1 - r) log(1 - r) for large n (Geifman et al. 2019).
    assert best == pytest.approx(mean + (1 - mean) * np.log(1 - mean), abs=1e-3)
    assert Selective(-risk, risk).area(once(4000))[0] == best
    assert Selective(random.normal(size=4000), risk).area(once(4000))[0] == pytest.approx(mean, abs=0.03)
    constant = Selective(np.full(4000, -4.0), risk)
    assert constant.area(once(4000))[0] == pytest.approx(mean, abs=1e-12)
    # ... at every coverage, however the data are ordered.
    for coverage in (0.01, 0.33, 1.0):
        assert constant.at(coverage, once(4000))[0] == pytest.approx(mean, abs=1e-12)
    assert Selective(risk, risk).area(once(4000))[0] > mean + 0.2


def test_value_at_a_coverage_takes_the_surest_cases_and_parts_of_them() -> None:
    confidence, values = np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 8.0, 1.0, 3.0])
    one = Selective(confidence, values)
    assert one.at(0.25, once(4))[0] == 0.0
    assert one.at(0.75, once(4))[0] == pytest.approx(4 / 3)
    assert one.at(0.5, once(4))[0] == 1.0  # the first, and one of the two equal ones: 0 and 2 on average
    assert one.at(0.125, once(4))[0] == 0.0 and one.at(1.0, once(4))[0] == 3.0
    weights = np.array([[1, 0], [1, 1], [1, 2], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(one.at(1.0, weights), [3.0, 10 / 3])
    np.testing.assert_allclose(one.at(0.5, weights), [1.0, 1.0])
    coverage, risk = Selective(np.arange(7), np.arange(7)).curve()
    assert coverage[-1] == 1.0 and risk[-1] == 3.0 and len(coverage) == 86  # the first holds one case at least


@pytest.mark.parametrize(
    ("what", "match"), [("confidence", "confidence of case 2 is nan"), ("values", "values of case 2")]
)
def test_a_value_that_is_not_finite_is_named(what: str, match: str) -> None:
    given = {"confidence": np.zeros(4), "values": np.zeros(4)}
    given[what][2] = np.nan
    with pytest.raises(FloatingPointError, match=match):
        Selective(**given)


def test_picture_shows_every_curve() -> None:
    coverage = np.linspace(0.1, 1, 10)
    drawn = picture({"a": (coverage, coverage / 2), "oracle": (coverage, coverage / 4)}, title="t", risk="wrong")
    assert drawn.shape[0] == 3 and drawn.dtype == torch.float32 and 0 <= drawn.min() and drawn.max() == 1
    colours = (drawn.max(dim=0).values - drawn.min(dim=0).values) > 0.3
    assert colours.sum() > 300  # two coloured lines
    fewer = picture({"a": (coverage, coverage / 2)}, title="t", risk="wrong")
    assert ((fewer.max(dim=0).values - fewer.min(dim=0).values) > 0.3).sum() < colours.sum()


# --- statistics ---


def test_rank_correlation_equals_scipy_on_resampled_rows() -> None:
    random = np.random.default_rng(4)
    x = np.round(random.normal(size=50), 1)
    y = np.round(x + random.normal(size=50), 0)
    weights = random.integers(0, 4, (50, 3)).astype(np.float32)
    got = RankCorrelation(x, y)(weights)
    for replicate in range(3):
        rows = np.repeat(np.arange(50), weights[:, replicate].astype(int))
        assert got[replicate] == pytest.approx(spearmanr(x[rows], y[rows]).statistic, abs=1e-12)
    assert np.isnan(RankCorrelation(np.zeros(5), np.arange(5))(once(5))[0])


def test_resampled_figures_are_paired_by_patient() -> None:
    random = np.random.default_rng(0)
    value = random.normal(size=300)

    def statistics(weights: np.ndarray) -> np.ndarray:
        mean = value @ weights / weights.sum(axis=0)
        return np.stack([mean, mean + 1, (mean + 1) - mean])

    first, second, difference = resampled(statistics, np.arange(300) // 2, seed=0, replicates=200)
    assert first.patients == 150 and first.low < first.value < first.high
    assert second.high - first.high == pytest.approx(1) and difference.low == pytest.approx(difference.high)


# --- calibration ---


def test_calibration_error_and_brier_score_equal_scikit_learn() -> None:
    random = np.random.default_rng(1)
    probability = np.round(random.beta(0.4, 2.0, 500), 2)  # many ties
    truth = random.uniform(size=500) < probability**2
    one = Calibration(probability, truth, bins=10)
    share, mean = calibration_curve(truth, probability, n_bins=10, strategy="quantile")
    borders = np.unique(np.quantile(probability, np.linspace(0, 1, 11)[1:-1]))
    counts = np.bincount(np.searchsorted(borders, probability))
    expected = (np.abs(share - mean) * counts[counts > 0]).sum() / 500
    assert one.error(once(500))[0] == pytest.approx(expected, abs=1e-12)
    assert one.brier(once(500))[0] == pytest.approx(brier_score_loss(truth, probability), abs=1e-12)
    perfect = Calibration(truth.astype(float), truth, bins=10)
    assert perfect.error(once(500))[0] == 0 == perfect.brier(once(500))[0]
    half = np.arange(500) % 2 == 0
    assert Calibration(1.0 - half, half, bins=10).error(once(500))[0] == pytest.approx(1.0)
    constant = Calibration(np.full(500, 0.25), truth, bins=10)  # one bin
    assert constant.error(once(500))[0] == pytest.approx(abs(0.25 - truth.mean()))


def test_noise_is_the_calibration_error_of_a_perfect_model() -> None:
    random = np.random.default_rng(5)
    probability = random.beta(0.7, 1.5, 300)
    errors = [Calibration(probability, random.uniform(size=300) < probability, 15) for _ in range(200)]
    assert np.mean([one.error(once(300))[0] for one in errors]) == pytest.approx(errors[0].noise(), rel=0.05)


def test_decisions_are_chosen_where_both_classes_are() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2, (400, 3))
    scores = 0.01 * (truth + random.normal(size=(400, 3)))
    truth[:, 1] = 0
    truth[:50, 0] = UNCERTAIN
    scores[:50, 0] = 9.0  # what is not asked does not count
    found = Decisions.fit(scores, truth)
    assert found.known.tolist() == [True, False, True]
    best = max(balanced_accuracy_score(truth[:, 2], scores[:, 2] >= cut) for cut in scores[:, 2])
    assert balanced_accuracy_score(truth[:, 2], found.margin(scores)[:, 2] >= 0) == pytest.approx(best)
    fitted = Calibration(found.probability(scores)[:, 2], truth[:, 2] == 1, bins=5)
    assert (
        fitted.error(once(400))[0] < 0.06 < Calibration(np.abs(scores[:, 2]), truth[:, 2] == 1, 5).error(once(400))[0]
    )
    assert found.threshold[0] < 0.02
    nothing = Decisions.fit(np.zeros((4, 1)), np.array([[0], [1], [0], [1]]))  # a constant score decides nothing
    assert nothing.known.all() and np.allclose(nothing.probability(np.zeros((1, 1))), 0.5)
    backwards = Decisions.fit(np.array([[3.0], [2.0], [1.0]]), np.array([[0], [0], [1]]))
    assert np.isfinite(nothing.threshold).all() and np.isfinite(backwards.threshold).all()


# --- corruption ---


def a_batch(count: int = 6, size: int = 32) -> Batch:
    random = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(count + 1, 2, size, size, generator=random).cumsum(dim=-1),
        "study_index": torch.tensor([0, *range(count)]),  # the first study has two images
        "valid": torch.tensor([*[True] * (count - 1), False]),
        "sample_id": torch.arange(10, 10 + count),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_grows_with_its_level_and_is_keyed_by_study(kind: str) -> None:
    batch = a_batch()
    batch["pixel_values"][-1] = 0.0  # a void slot
    assert corrupt_images(batch, kind=kind, level=0.0, seed=0) is batch  # type: ignore[arg-type]
    by_level = [
        corrupt_images(batch, kind=kind, level=level, seed=0)["pixel_values"]  # type: ignore[arg-type]
        for level in (0.25, 0.5, 1.0)
    ]
    moved = [float((one - batch["pixel_values"])[:-1].abs().mean()) for one in by_level]
    assert 0.001 < moved[0] < moved[1] < moved[2]
    assert all(not one[-1].any() and torch.isfinite(one).all() for one in by_level)
    # A study alone, in another place of another batch, is changed alike.
    alone = {
        "pixel_values": batch["pixel_values"][3:4], "study_index": torch.tensor([0]),
        "valid": torch.tensor([True]), "sample_id": batch["sample_id"][2:3],
    }  # fmt: skip
    again = corrupt_images(alone, kind=kind, level=1.0, seed=0)["pixel_values"]  # type: ignore[arg-type]
    torch.testing.assert_close(again[0], by_level[2][3], rtol=1e-5, atol=1e-5)
    other = corrupt_images(batch, kind=kind, level=1.0, seed=1)["pixel_values"]  # type: ignore[arg-type]
    assert torch.equal(other, by_level[2]) == (kind == "blur")
    if kind == "noise":
        first, second = (by_level[2] - batch["pixel_values"])[:2, 0]
        assert np.corrcoef(first.flatten(), second.flatten())[0, 1] < 0.2  # two images of one study


def test_blur_and_crop_do_what_they_say() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    batch = {**a_batch(1), "pixel_values": ramp, "study_index": torch.tensor([0]), "valid": torch.tensor([True])}
    blurred = corrupt_images(batch, kind="blur", level=1.0, seed=0)["pixel_values"]
    torch.testing.assert_close(blurred[..., 8:-8], ramp[..., 8:-8], rtol=1e-4, atol=1e-4)  # a ramp stays one
    cropped = corrupt_images(batch, kind="crop", level=1.0, seed=0)["pixel_values"]
    steps = cropped[0, 0, 0, 1:] - cropped[0, 0, 0, :-1]
    assert steps[4:-4].allclose(torch.tensor(0.5), atol=1e-3) and 0 <= cropped.min() and cropped.max() <= 31


def test_masking_takes_whole_words_in_nested_shares() -> None:
    # 0 [PAD], 1 [CLS], 2 [SEP], 3 [MASK], 4-9 words, 10-12 continuations
    ids = torch.tensor([[1, 4, 10, 11, 5, 6, 12, 7, 8, 2], [1, 10, 5, 6, 10, 2, 0, 0, 0, 0]])
    words = Words(mask_id=3, special_ids=frozenset({0, 1, 2, 3}), continues=torch.arange(13) >= 10)
    batch = {"input_ids": ids, "attention_mask": ids > 0, "sample_id": torch.tensor([3, 4])}
    groups = [[[1, 2, 3], [4], [5, 6], [7], [8]], [[1], [2], [3, 4]]]
    before = torch.zeros_like(ids, dtype=torch.bool)
    for share, counts in ((0.0, (0, 0)), (0.2, (1, 1)), (0.6, (3, 2)), (1.0, (5, 3))):
        changed = mask_words(batch, share=share, words=words, seed=0)["input_ids"]
        masked = changed == 3
        assert (changed[~masked] == ids[~masked]).all() and (masked | ~before).all()
        for row in range(2):
            hit = [bool(masked[row, group].all()) for group in groups[row]]
            assert sum(hit) == counts[row] and masked[row].sum() == sum(map(len, np.array(groups[row], object)[hit]))
        before = masked
    alone = {name: values[1:] for name, values in batch.items()}
    single = mask_words(alone, share=0.6, words=words, seed=0)["input_ids"]
    assert torch.equal(single[0], mask_words(batch, share=0.6, words=words, seed=0)["input_ids"][1])


# --- retrieval with abstention ---


@pytest.mark.parametrize("block", [1, 7, 64])
def test_margin_is_to_the_best_candidate_with_another_key(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = unit(torch.randn(41, 8, generator=generator)), unit(torch.randn(41, 8, generator=generator))
    key = torch.randint(0, 9, (41,), generator=generator)
    got = margins(queries, candidates, key, block=block)
    for row in range(41):
        similarity = queries[row] @ candidates.T
        best = similarity.argmax()
        rival = similarity[key != key[best]].max()
        assert got[row] == pytest.approx(float(similarity[best] - rival), abs=1e-6)
    alike = margins(queries, candidates, torch.zeros(41, dtype=torch.int64), block=block)
    torch.testing.assert_close(alike, (queries @ candidates.T).amax(dim=1) + 1)


def test_retrieval_abstains_by_log_variance_and_by_margin() -> None:
    generator = torch.Generator().manual_seed(1)
    images = unit(torch.randn(60, 8, generator=generator))
    texts = images.clone()
    texts[40:] = texts[40:].roll(1, dims=0)  # a third is paired wrongly, and the model says so
    logvar = torch.full((60, 4), -4.0)
    logvar[40:] = -1.0
    config = Retrieval.Config(replicates=20, coverages=(1.0, 0.5))
    evaluator = Retrieval(config)
    split = replace(split_of(images=images, texts=texts), image_logvar=logvar)
    found = dict(evaluator.run(split))
    assert found["image_to_text_r1"] == found["image_to_text_r1_at_100_by_logvar"] == pytest.approx(2 / 3)
    assert found["image_to_text_r1_at_50_by_logvar"] == 1.0
    assert found["image_to_text_r1_at_50_by_margin"] < 1.0
    assert "text_to_image_r1_at_50_by_logvar" not in found and "text_to_image_r1_at_50_by_margin" in found
    kept = evaluator.report()["abstention"]["image_to_text"]["logvar"]["50"]
    assert set(kept) == {"r1", "r5", "r10"} and kept["r1"]["value"] == 1.0
    assert not any("_at_" in name for name in dict(Retrieval(Retrieval.Config(replicates=1)).run(split)))


# --- the protocol ---


class ToyGaussianTask(ToyTask):
    """Sure of images with much detail and of texts with few masked words."""

    spread = 1.0

    def distribution_of_images(self, batch: Batch) -> Gaussian:
        detail = batch["pixel_values"].diff(dim=-1).flatten(1).std(dim=1)
        studies = torch.zeros(len(batch["valid"])).index_add(0, batch["study_index"], detail)
        mean = self.embed_images(batch)
        return Gaussian(mean=mean, logvar=(-4.0 - self.spread * studies)[:, None].expand_as(mean))

    def distribution_of_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Gaussian:
        mean = self.embed_texts(input_ids, attention_mask)
        masked = ((input_ids == 3) & attention_mask).float().mean(dim=1)
        return Gaussian(mean=mean, logvar=(-6.0 + self.spread * masked)[:, None].expand_as(mean))

    def logit_scale(self) -> Tensor:
        return torch.tensor(10.0)


PROMPTS = {"aorta": {"positive": ["a"], "negative": ["b"]}, "bone": {"positive": ["b"], "negative": ["c"]}}
LABELS = ["aorta", "bone", "nothing"]


def a_split(count: int = 400, seed: int = 0, embed_dim: int = 4) -> EmbeddedSplit:
    """Labels follow the scores, except in a fifth of the studies, degraded ones, of which the model is unsure."""
    random = torch.Generator().manual_seed(seed)
    images = unit(torch.randn(count, embed_dim, generator=random))
    truth = torch.stack([images[:, 0] > images[:, 1], images[:, 1] > images[:, 2]], dim=1)
    grade = torch.rand(count, generator=random) * (torch.arange(count) % 5 == 0)
    flipped = torch.rand(count, 2, generator=random) < (grade > 0)[:, None] * 0.7
    labels = torch.full((count, 3), NOT_ANNOTATED, dtype=torch.int8)
    labels[:, :2] = (truth ^ flipped).to(torch.int8)
    logvar = (-4.0 + grade)[:, None].expand(count, embed_dim) + 0.1 * torch.randn(count, embed_dim, generator=random)
    return replace(
        split_of(images=images, labels=labels, patient_key=torch.arange(count) // 2),
        image_mean=images, image_logvar=logvar, degradation_grade=grade,
    )  # fmt: skip


def measure(
    split: EmbeddedSplit, task: torch.nn.Module | None = None, **options: object
) -> tuple[dict, dict, Uncertainty]:
    evaluator = Uncertainty(PROMPTS, Uncertainty.Config(replicates=30))
    task = ToyGaussianTask() if task is None else task
    found = dict(evaluator.run(task, WordTokenizer(), split, LABELS, CPU, **options))  # type: ignore[arg-type]
    return found, evaluator.report(), evaluator


@pytest.mark.parametrize("with_validation", [True, False])
def test_a_log_variance_that_knows_is_found_to_know(with_validation: bool) -> None:
    split = a_split()
    found, report, evaluator = measure(split, validation=a_split(seed=1) if with_validation else None)
    assert found["degraded_auc"] > 0.9 and found["grade_correlation"] > 0.5
    assert found["degraded_auc_max_probability"] == pytest.approx(0.5, abs=0.1)
    assert found["area_oracle"] <= found["area_logvar"] < found["area_fitted_probability"]
    assert found["gain"] == pytest.approx(found["area_max_probability"] - found["area_logvar"])
    assert found["calibration_error"] > found["calibration_error_noise"] > 0
    assert found["gain_over_fitted"] > 0.02 and report["figures"]["gain_over_fitted"]["low"] > 0
    assert found["excess_logvar"] == pytest.approx(found["area_logvar"] - found["area_oracle"])
    assert 0.1 < found["risk"] < 0.3 and report["studies_decided"] == 400
    assert report["labels_decided"] == ["aorta", "bone"] and report["logit_scale"] == 10.0
    assert set(report["calibration_of_labels"]["bone"]) == {
        "calibration_error", "brier", "calibration_error_fitted", "brier_fitted"
    }  # fmt: skip
    assert found["calibration_error_fitted"] < found["calibration_error"]
    assert any("no validation" in note for note in report["notes"]) != with_validation
    assert any("corrupted" in note for note in report["notes"])
    assert not any("FAILED" in note for note in report["notes"])
    assert {"degraded_auc_normal", "degraded_auc_abnormal"} <= set(found)
    assert set(evaluator.pictures()) == {"risk_coverage"}
    assert set(report["curves"]) == {"max_probability", "fitted_probability", "logvar", "oracle"}
    assert abs(found["sampled_minus_mean"]) < 0.2


def test_a_constant_log_variance_is_named_as_failure() -> None:
    split = a_split()
    found, report, _ = measure(replace(split, image_logvar=torch.full((400, 4), -4.0)))
    assert found["logvar_spread"] < 1e-6 and found["degraded_auc"] == 0.5
    assert found["area_logvar"] == pytest.approx(found["risk"]) and "grade_correlation" not in found
    assert any(note.startswith("FAILED: logvar_spread") for note in report["notes"])


def test_a_task_without_distributions_has_its_baselines() -> None:
    split = replace(a_split(), image_mean=None, image_logvar=None, image_norm=torch.rand(400))
    found, report, evaluator = measure(split, ToyTask())
    assert {"area_max_probability", "area_norm", "degraded_auc_norm", "calibration_error"} <= set(found)
    assert not any("logvar" in name or name.startswith("gain") for name in found)
    assert any("ToyTask has no log-variance" in note for note in report["notes"])
    assert any("no logit scale" in note for note in report["notes"])
    assert found["calibration_error"] == found["calibration_error_fitted"]
    assert evaluator.pictures()


def test_norms_of_means_that_are_not_normalised_are_a_control() -> None:
    split = a_split()
    longer = split.need("image_mean") * (2.0 - split.degradation_grade)[:, None]  # type: ignore[operator]
    assert "degraded_auc_norm" not in measure(split)[0]
    assert measure(replace(split, image_mean=longer))[0]["degraded_auc_norm"] > 0.99


def test_labels_of_one_class_and_unknown_grades_leave_the_rest() -> None:
    split = a_split()
    absent = torch.zeros(400, 3, dtype=torch.int8)
    found, report, evaluator = measure(replace(split, labels=absent, degradation_grade=torch.full((400,), -1.0)))
    assert "risk" not in found and not evaluator.pictures() and found["logvar_spread"] > 0
    assert any("no label has annotated" in note for note in report["notes"])
    assert any("no degraded_auc" in note for note in report["notes"])
    one = split.labels.clone()
    one[:, 1] = 1
    one[:7, 0] = UNCERTAIN
    found, report, _ = measure(replace(split, labels=one))
    assert report["labels_decided"] == ["aorta"] and report["studies_decided"] == 393
    assert any("7 studies without an annotated label" in note for note in report["notes"])


@pytest.mark.parametrize("name", ["image_embeds", "image_logvar"])
def test_outputs_that_are_not_finite_are_refused_by_name(name: str) -> None:
    split = a_split()
    broken = split.need(name).clone()
    broken[17, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"{name} of sample 17 is nan at \(17, 2\)"):
        measure(replace(split, **{name: broken}))


def batches(count: int = 4, rows: int = 6) -> list[Batch]:
    random = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        label = torch.randint(0, 2, (rows, 3), generator=random, dtype=torch.int8)
        label[:, 2] = torch.where(torch.arange(rows) % 3 == 0, UNCERTAIN, 0)
        pixels = torch.randn(rows, 1, 32, 32, generator=random)
        # Texts begin with how sure they are: reports of uncertain studies have masks (3) in them.
        ids = torch.randint(0, 3, (rows, 6), generator=random)
        ids[::3, 0] = 3
        found.append({
            "pixel_values": pixels, "study_index": torch.arange(rows), "input_ids": ids,
            "valid": torch.tensor([True] * (rows - (index == count - 1)) + [False] * (index == count - 1)),
            "attention_mask": torch.ones(rows, 6, dtype=torch.bool), "labels": label,
            "report_key": torch.arange(rows) + rows * index, "patient_key": torch.arange(rows) + rows * index,
            "sample_id": torch.arange(rows) + rows * index,
            "degradation_grade": torch.where(torch.arange(rows) % 2 == 0, 0.0, 0.5),
            "uncertain_verdicts": torch.zeros(rows, dtype=torch.int64),
        })  # fmt: skip
    return found


def _everything(rank: int, world_size: int, spread: float = 1.0) -> list[tuple[str, float]]:
    own = [share_of_ranks(batch, 6 // world_size)[rank] for batch in batches()]
    task = ToyGaussianTask()
    task.spread = spread
    words = Words(mask_id=3, special_ids=frozenset({3}), continues=torch.zeros(4, dtype=torch.bool))

    def embed(change, parts: set[str]) -> EmbeddedSplit:  # type: ignore[no-untyped-def]
        return embed_split(task, (change(batch) for batch in own), CPU, parts=sorted(parts))

    parts = {"image_embeds", "image_mean", "image_logvar", "text_embeds", "text_logvar"}
    split = embed(lambda batch: batch, parts)
    evaluator = Uncertainty(PROMPTS, Uncertainty.Config(replicates=10))
    run = partial(evaluator.run, task, WordTokenizer(), split, LABELS, CPU)
    return list(run(with_text=split, embed=embed, words=words))


def test_corrupted_images_and_masked_words_are_followed() -> None:
    found = dict(_everything(0, 1))
    assert found["corruption_blur"] > 0.8 and found["corruption_blur_within"] == pytest.approx(1.0)
    assert found["corruption_noise_within"] == pytest.approx(-1.0)  # this toy takes noise for detail
    assert found["masked_words"] > 0.8 and found["masked_words_within"] > 0.9
    assert found["vague_auc"] == 1.0
    still = dict(_everything(0, 1, 0.0))
    assert (
        "corruption_blur" not in still and still["corruption_blur_within"] == 0.0 and still["masked_words_within"] == 0
    )


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures() -> None:
    one = _everything(0, 1)
    assert len(one) > 20
    for found in run_distributed(_everything, 2):
        assert [name for name, _ in found] == [name for name, _ in one]
        np.testing.assert_allclose([value for _, value in found], [value for _, value in one], rtol=1e-6, atol=1e-7)
