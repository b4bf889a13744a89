from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from core.engine import split
from core.evaluation.embed import EmbeddedSplit, embed_split
from core.evaluation.probe import LinearProbe
from core.evaluation.retrieval import Retrieval, ranks_of_best_match
from core.evaluation.statistics import area_under_curve, areas_under_curve, means, paired_difference
from core.evaluation.zero_shot import ZeroShot, check_prompts, encode_prompts
from shards.batch import NOT_ANNOTATED, UNCERTAIN, Batch
from shards.errors import ConfigError, DataError
from tests.distributed import run_distributed

CPU = torch.device("cpu")


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def split_of(
    images: Tensor | None = None,
    texts: Tensor | None = None,
    features: Tensor | None = None,
    labels: Tensor | None = None,
    report_key: Tensor | None = None,
    patient_key: Tensor | None = None,
) -> EmbeddedSplit:
    count = len(next(part for part in (images, texts, features) if part is not None))
    return EmbeddedSplit(
        image_embeds=images,
        text_embeds=texts,
        features=features,
        labels=torch.zeros(count, 0, dtype=torch.int8) if labels is None else labels,
        report_key=torch.arange(count) if report_key is None else report_key,
        patient_key=torch.arange(count) if patient_key is None else patient_key,
        sample_id=torch.arange(count),
    )


class ToyTask(torch.nn.Module):
    """Embeds an image by its mean brightness per corner, a text by its token counts: cheap, exact, row-local."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def embed_images(self, batch: Batch) -> Tensor:
        return unit(self.image_features(batch) + 1.0)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counts = torch.nn.functional.one_hot(input_ids, 4).float() * attention_mask[..., None]
        return unit(counts.sum(dim=1) + 1e-3)

    def image_features(self, batch: Batch) -> Tensor:
        pooled = self.dropout(batch["pixel_values"][:, 0].flatten(1)[:, :4])
        studies = torch.zeros(len(batch["valid"]), 4)
        return studies.index_add(0, batch["study_index"], pooled)


def toy_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(3):
        views = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
        batches.append(
            {
                "pixel_values": torch.randn(8, 1, 2, 2, generator=generator),
                "study_index": views,
                "valid": torch.tensor([True, True, index != 1, True, index != 2, True]),
                "input_ids": torch.randint(0, 4, (6, 6), generator=generator),
                "attention_mask": torch.ones(6, 6, dtype=torch.bool),
                "report_key": torch.arange(6) + 6 * index,
                "patient_key": torch.arange(6) + 6 * index,
                "sample_id": torch.arange(6) + 6 * index,
                "labels": torch.zeros(6, 2, dtype=torch.int8),
            }
        )
    return batches


# --- statistics ---


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_area_equals_scikit_learn_with_and_without_ties(decimals: int) -> None:
    random = np.random.default_rng(decimals)
    truth = random.integers(0, 2, 203)
    scores = np.round(truth + random.normal(size=203), decimals)
    assert area_under_curve(scores, truth) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert np.isnan(area_under_curve(scores, np.ones(203)))


def test_bootstrap_replicate_equals_auc_of_the_resampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    truth, patient = random.integers(0, 2, 60), random.integers(0, 25, 60)
    scores = np.round(truth + random.normal(size=60), 1)
    found = areas_under_curve(scores[:, None], truth[:, None], patient, ["x"], seed=5, replicates=40)
    from core.evaluation import statistics

    patients, place = np.unique(patient, return_inverse=True)
    ((_, counts),) = statistics._multiplicities(len(patients), 40, 60, 5)
    assert (counts.sum(axis=0) == len(patients)).all()
    for replicate in range(40):
        rows = np.repeat(np.arange(60), counts[place, replicate].astype(int))
        assert found.samples[replicate, 0] == pytest.approx(roc_auc_score(truth[rows], scores[rows]), abs=1e-9)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 130)  # small blocks change nothing
    again = areas_under_curve(scores[:, None], truth[:, None], patient, ["x"], seed=5, replicates=40)
    np.testing.assert_array_equal(again.samples, found.samples)


def test_uncertain_and_missing_labels_are_left_out_and_counted() -> None:
    truth = np.array([[1, 1], [0, 1], [UNCERTAIN, 1], [NOT_ANNOTATED, 1], [1, 1], [0, 1]])
    scores = np.array([[0.9, 0.0], [0.1, 0.0], [-9.0, 0.0], [9.0, 0.0], [0.05, 0.0], [0.0, 0.0]])
    found = areas_under_curve(scores, truth, np.array([1, 1, 2, 3, 4, 5]), ["a", "b"], seed=0, replicates=50)
    first, second = found.labels
    assert (first.positives, first.negatives, first.patients) == (2, 2, 3)
    assert first.value == 0.75 and found.macro.value == 0.75  # b has one class and no part in the macro average
    assert np.isnan(second.value) and second.positives == 6
    assert found.to_json()["labels"]["b"]["value"] is None
    with pytest.raises(FloatingPointError, match="not finite"):
        areas_under_curve(scores * np.nan, truth, np.arange(6), ["a", "b"], seed=0)


def test_labels_of_too_few_patients_have_no_interval_and_no_part_in_the_macro_average() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, (40, 2))
    truth[:, 1] = 0
    truth[:6, 1] = 1  # six studies of four patients
    patients = np.concatenate([[0, 0, 0, 1, 2, 3], np.arange(10, 44)])
    scores = random.normal(size=(40, 2))
    found = areas_under_curve(scores, truth, patients, ["common", "rare"], seed=0, replicates=100)
    assert found.macro_over == ("common",) and found.macro.value == found.labels[0].value
    assert np.isfinite(found.labels[1].value) and np.isnan(found.labels[1].low)
    only_rare = areas_under_curve(scores[:, 1:], truth[:, 1:], patients, ["rare"], seed=0, replicates=100)
    assert only_rare.macro_over == ("rare",) and np.isfinite(only_rare.macro.value)


def test_intervals_cover_and_widen_when_studies_repeat_within_patients() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 200)
    scores = truth + random.normal(size=200)
    alone = areas_under_curve(scores[:, None], truth[:, None], np.arange(200), ["x"], seed=1, replicates=400)
    # Every patient four times: four times the rows, no more information.
    repeated = areas_under_curve(
        np.repeat(scores, 4)[:, None], np.repeat(truth, 4)[:, None], np.repeat(np.arange(200), 4), ["x"],
        seed=1, replicates=400,
    )  # fmt: skip
    assert repeated.labels[0].low == pytest.approx(alone.labels[0].low, abs=1e-9)
    assert alone.labels[0].low < 0.76 < alone.labels[0].high  # the true AUC of two unit normals 1 apart
    naive = areas_under_curve(
        np.repeat(scores, 4)[:, None], np.repeat(truth, 4)[:, None], np.arange(800), ["x"], seed=1, replicates=400
    )
    assert naive.labels[0].high - naive.labels[0].low < 0.7 * (alone.labels[0].high - alone.labels[0].low)


def test_paired_difference_is_tighter_than_the_intervals_it_joins() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2, (150, 2))
    first = truth + random.normal(size=(150, 2))
    second = first + 0.2 * random.normal(size=(150, 2))
    difference = paired_difference(first, second, truth, np.arange(150), ["a", "b"], seed=0, replicates=200)
    alone = areas_under_curve(first, truth, np.arange(150), ["a", "b"], seed=0, replicates=200)
    other = areas_under_curve(second, truth, np.arange(150), ["a", "b"], seed=0, replicates=200)
    assert difference.macro.value == pytest.approx(alone.macro.value - other.macro.value)
    assert difference.macro.high - difference.macro.low < 0.5 * (alone.macro.high - alone.macro.low)
    nothing = paired_difference(first, first, truth, np.arange(150), ["a", "b"], seed=0, replicates=50)
    assert nothing.macro.low == nothing.macro.high == 0.0


def test_means_weigh_studies_and_resample_patients() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    (found,) = means(values, np.array([7, 7, 7, 9]), seed=0, replicates=500)
    assert found.value == 0.75 and found.patients == 2
    assert found.low == 0.0 and found.high == 1.0  # two patients: a draw may hold either alone


# --- embedding a split ---


def test_embed_split_keeps_valid_studies_in_order_and_turns_dropout_off() -> None:
    task = ToyTask()
    progress: list[int] = []
    split = embed_split(task, toy_batches(), CPU, on_batch=progress.append)
    assert progress == [6, 5, 5] and len(split) == 16 and task.training
    assert split.sample_id.tolist() == [*range(8), *range(9, 16), 17]
    again = embed_split(task, toy_batches(), CPU)
    assert torch.equal(split.need("features"), again.need("features"))
    first = toy_batches()[0]["pixel_values"]
    torch.testing.assert_close(split.need("features")[0], (first[0] + first[1]).flatten())
    only = embed_split(task, toy_batches(), CPU, parts=("features",))
    assert only.image_embeds is None and only.rows(torch.tensor([0, 2])).sample_id.tolist() == [0, 2]


def test_embed_split_without_a_valid_study_is_an_error() -> None:
    batch = toy_batches()[0] | {"valid": torch.zeros(6, dtype=torch.bool)}
    for batches in ([], [batch]):
        with pytest.raises(DataError, match="no usable study"):
            embed_split(ToyTask(), batches, CPU)


def _embed_on_rank(rank: int, world_size: int) -> np.ndarray:
    batches = [split(batch, 6 // world_size)[rank] for batch in toy_batches()]
    found = embed_split(ToyTask(), batches, CPU)
    parts = [found.need("image_embeds"), found.need("text_embeds"), found.need("features"), found.sample_id[:, None]]
    return torch.cat(parts, dim=1).numpy()


def test_two_ranks_embed_what_one_embeds() -> None:
    one = _embed_on_rank(0, 1)
    for found in run_distributed(_embed_on_rank, 2):
        np.testing.assert_allclose(found, one, rtol=1e-6)


# --- zero-shot ---


class WordTokenizer:
    """Words to ids by first letter."""

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        rows = [["abcd".index(word[0]) for word in text.split()][:max_length] for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def encode_parts(self, rows: list[tuple[tuple[int, str], ...]], max_length: int) -> SimpleNamespace:
        """ "d" separates parts."""
        ids, mask = self.encode([" d ".join(text for _, text in parts) for parts in rows], max_length)
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


PROMPTS = {
    "aorta": {"positive": ["a", "a a"], "negative": ["b"]},
    "bone": {"positive": ["b"]},
    "unused": {"positive": ["c"], "negative": ["d"]},
}


def test_zero_shot_score_is_mean_positive_less_mean_negative_similarity() -> None:
    generator = torch.Generator().manual_seed(1)
    images = unit(torch.randn(80, 4, generator=generator))
    task, tokenizer = ToyTask(), WordTokenizer()
    text = {word: task.embed_texts(*tokenizer.encode([word], 8))[0] for word in ("a", "a a", "b")}
    score = images @ ((text["a"] + text["a a"]) / 2 - text["b"])
    labels = torch.stack([(images[:, 1] > 0), (score + torch.randn(80, generator=generator) > 0)], dim=1).to(torch.int8)
    labels[:5, 1] = UNCERTAIN
    split = split_of(images=images, labels=labels)
    evaluator = ZeroShot(PROMPTS, ZeroShot.Config(replicates=50, batch_size=2))
    found = dict(evaluator.run(task, tokenizer, split, ["bone", "aorta"], CPU))
    assert set(found) == {"bone", "aorta", "macro"}
    expected = roc_auc_score(labels[5:, 1].numpy(), score[5:].numpy())
    assert found["aorta"] == pytest.approx(expected, abs=1e-6)
    assert found["bone"] > 0.9
    assert found["macro"] == pytest.approx(np.mean([expected, found["bone"]]), abs=1e-6)
    report = evaluator.report()
    assert report["labels"]["aorta"]["positives"] + report["labels"]["aorta"]["negatives"] == 75
    assert report["prompts"]["aorta"] == {"positive": 2, "negative": 1}
    assert report["unseen"] == [] and report["macro_of"] == {}
    assert task.training
    taught = ZeroShot(PROMPTS, ZeroShot.Config(replicates=50, seen=("bone", "heart")))
    apart = dict(taught.run(task, tokenizer, split, ["bone", "aorta"], CPU))
    assert apart == found | {"macro_seen": found["bone"], "macro_unseen": found["aorta"]}
    assert taught.report()["unseen"] == ["aorta"] and set(taught.report()["macro_of"]) == {"seen", "unseen"}
    every = ZeroShot(PROMPTS, ZeroShot.Config(replicates=50, seen=("bone", "aorta")))
    assert dict(every.run(task, tokenizer, split, ["bone", "aorta"], CPU)) == found


def test_prompts_pooled_at_a_temperature_count_the_nearest_and_at_a_high_one_are_the_mean() -> None:
    images = unit(torch.randn(30, 4, generator=torch.Generator().manual_seed(2)))
    task, tokenizer = ToyTask(), WordTokenizer()
    prompts = {"aorta": {"positive": ["a", "c"], "negative": ["b", "d"]}, "bone": {"positive": ["b"]}}

    def scores(temperature: float | None) -> np.ndarray:
        asked = ZeroShot(prompts, ZeroShot.Config(temperature=temperature))
        return asked.scores(task, tokenizer, images, ["aorta", "bone"], CPU, None)

    near = {word: (images @ task.embed_texts(*tokenizer.encode([word], 8))[0]).numpy() for word in "abcd"}
    nearest = np.maximum(near["a"], near["c"]) - np.maximum(near["b"], near["d"])
    np.testing.assert_allclose(scores(1e-4), np.stack([nearest, near["b"]], axis=1), atol=1e-3)
    np.testing.assert_allclose(scores(1e4), scores(None), atol=1e-3)
    assert np.abs(scores(0.05) - scores(None)).max() > 0.1
    with pytest.raises(ConfigError, match=r"temperature=-1.0 of prompts must be positive"):
        ZeroShot(prompts, ZeroShot.Config(temperature=-1.0))


def test_prompts_in_parts_are_encoded_in_parts_and_plain_ones_beside_them_as_ever() -> None:
    ids, mask = encode_prompts(WordTokenizer(), [((1, "a b"), (4, "c")), "b a"], 8)
    assert ids.tolist() == [[0, 1, 3, 2], [1, 0, 0, 0]] and mask.sum(dim=1).tolist() == [4, 2]
    parts = {"bone": {"positive": [((1, "a"), (4, "b"))], "negative": ["c", "a"]}}
    direction = ZeroShot(parts).directions(ToyTask(), WordTokenizer(), ["bone"], CPU, None)[:, 0]
    text = ToyTask().embed_texts(*WordTokenizer().encode(["a d b", "c", "a"], 8))
    assert torch.allclose(direction, text[0] - (text[1] + text[2]) / 2)


def test_zero_shot_names_labels_and_prompts_that_do_not_meet() -> None:
    split = split_of(images=unit(torch.randn(4, 4)), labels=torch.zeros(4, 1, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"no prompts for the labels of this data \(heart\)"):
        list(ZeroShot(PROMPTS).run(ToyTask(), WordTokenizer(), split, ["heart"], CPU))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"x": {"positive": "a sentence"}}, "must be a list"),
        ({"x": {"negative": ["no x"]}}, "no positive sentence"),
        ({"x": {"positive": ["a"], "neutral": ["b"]}}, "found positive, neutral"),
        ({"x": ["a"]}, "found list"),
        ({"x": {"positive": ["  "]}}, "none of them empty"),
        ({"x": {"positive": [()]}}, "none of them empty"),
    ],
)
def test_bad_prompts_are_named(prompts: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_prompts(prompts)


# --- retrieval ---


@pytest.mark.parametrize("block", [1, 7, 64])
def test_ranks_equal_a_plain_sort_for_any_block(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = unit(torch.randn(41, 8, generator=generator)), unit(torch.randn(41, 8, generator=generator))
    key = torch.randint(0, 20, (41,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as inside a run: must not round the similarities
        ranks = ranks_of_best_match(queries, candidates, key, block=block)
    for row in range(41):
        order = torch.argsort(queries[row] @ candidates.T, descending=True)
        first = (key[order] == key[row]).nonzero()[0].item() + 1
        assert ranks[row] == first


def test_retrieval_of_perfect_random_and_collapsed_embeddings() -> None:
    images = unit(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    perfect = dict(Retrieval(Retrieval.Config(replicates=20)).run(split_of(images=images, texts=images)))
    assert perfect["image_to_text_r1"] == 1.0
    assert perfect["text_to_image_median_rank"] == 1.0
    point = torch.ones(50, 8)
    evaluator = Retrieval(Retrieval.Config(replicates=20))
    collapsed = dict(evaluator.run(split_of(images=point, texts=point)))
    assert collapsed["image_to_text_r10"] == 0.0
    assert collapsed["text_to_image_median_rank"] == 50.0
    same = split_of(images=point, texts=point, report_key=torch.zeros(50, dtype=torch.int64))
    assert dict(evaluator.run(same))["image_to_text_r1"] == 1.0
    assert evaluator.report()["distinct_reports"] == 1


# --- probe ---


def _probe_splits(count: int, seed: int) -> EmbeddedSplit:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator)
    labels = torch.full((count, 3), NOT_ANNOTATED, dtype=torch.int8)
    labels[:, 0] = (features[:, 0] > 0).to(torch.int8)
    labels[: count // 2, 1] = (features[: count // 2, 1] + torch.randn(count // 2, generator=generator) > 0).to(
        torch.int8
    )
    labels[::3, 0] = UNCERTAIN
    scale = torch.tensor([1e-4, 1e3, 1.0, 1.0, 1.0, 0.0])  # standardisation undoes all but the dead feature
    return split_of(features=features * scale + 5.0, labels=labels, patient_key=torch.arange(count) // 2)


@pytest.mark.parametrize("with_validation", [True, False])
def test_probe_learns_what_is_linear_and_says_what_it_left_out(with_validation: bool) -> None:
    evaluator = LinearProbe(LinearProbe.Config(replicates=50))
    validation = _probe_splits(80, 2) if with_validation else None
    found = dict(evaluator.run(_probe_splits(240, 1), validation, _probe_splits(160, 3), ["sign", "noisy", "absent"]))
    assert found["sign"] > 0.97
    assert 0.65 < found["noisy"] < found["sign"]
    report = evaluator.report()
    assert report["labels_not_fitted"] == ["absent"] and report["strength"] in LinearProbe.Config().strengths
    assert report["studies"]["test"] == 160
    assert report["macro"]["low"] < found["macro"] < report["macro"]["high"]


def test_probe_without_labels_is_refused() -> None:
    split = split_of(features=torch.randn(4, 2), labels=torch.zeros(4, 1, dtype=torch.int8))
    with pytest.raises(ConfigError, match="no label has both"):
        list(LinearProbe().run(split, split, split, ["x"]))
