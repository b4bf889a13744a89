"""Studies of several views aligned with reports: pooling by hand, losses, synonyms, one rank against two, a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import bone
from configs.schema import load_recipe, task_class
from core import collectives
from core.engine import split
from core.losses.multi_similarity import MultiSimilarity, multi_similarity
from core.models.heads import unit_norm
from core.models.initialise import draw_weights
from core.models.view_pool import GatedViewPool
from core.tasks.clip import CLIP
from core.tasks.study_align import StudyAlign, Synonyms
from core.tasks.supervised_images import SupervisedImages
from shards.batch import Batch
from shards.errors import ConfigError
from tests.core.test_tasks import TEXT, VISION, batch_of, loss_of, rows_of
from tests.distributed import run_distributed

GROUPS = (("ulna", "cubitus"), ("fibula", "péroné", "os péroné"), ("patella", "rotule"))
FORMS: dict[str, dict[str, Any]] = {
    "info_nce": {}, "sigmoid": {"loss": "sigmoid", "scale_init": 10.0}, "mean": {"pooling": "mean"},
    "synonyms": {"synonyms": Synonyms(groups=GROUPS, weight=0.5)},
}  # fmt: skip


class Letters:
    """A word is its letters."""

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        length = max(map(len, texts))
        mask = torch.tensor([[place < len(text) for place in range(length)] for text in texts])
        ids = torch.tensor([[ord(letter) % 39 + 1 for letter in text.ljust(length)] for text in texts])
        return (ids * mask)[:, :max_length], mask[:, :max_length]


def build(form: str, seed: int = 0) -> StudyAlign:
    task = StudyAlign.Config(vision=VISION, text=TEXT, embed_dim=8, **FORMS[form]).build(vocab_size=40, seed=seed)
    task.take_tokenizer(Letters())
    return task


def studies(count: int, views: list[int], *, void: tuple[int, ...] = ()) -> Batch:
    batch = batch_of(count, views, void=void)
    return {**batch, "draw_key": (torch.arange(count) * 7919 + 5) * batch["valid"]}


# ---- pooling ----


def test_gated_pooling_is_the_formula() -> None:
    pool = GatedViewPool(6)
    draw_weights(pool, 3)
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 0, 0, 1, 3, 3])
    found, shares = pool(x, index, 4), pool.shares(x, index, 4)
    for study, rows in enumerate(([0, 1, 2], [3], [], [4, 5])):
        own = x[rows]
        scores = (torch.tanh(pool.content(own)) * torch.sigmoid(pool.gate(own))) @ pool.score.weight[0]
        expected = (scores.softmax(0)[:, None] * own).sum(0) if rows else torch.zeros(6)
        torch.testing.assert_close(found[study], expected)
    assert torch.equal(found[1], x[3])  # one view is itself
    torch.testing.assert_close(shares.sum(1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert not torch.allclose(shares[0, :3], torch.full((3,), 1 / 3))


def test_pooling_knows_no_order_no_neighbours_and_no_padding() -> None:
    task = build("info_nce")
    batch = studies(5, [1, 3, 2, 1, 4], void=(3,))
    whole = task.encode(batch).gather["image_embeds"]
    for row in range(5):  # a study alone is what it is in company
        torch.testing.assert_close(task.encode(rows_of(batch, row, row + 1)).gather["image_embeds"][0], whole[row])
    order = torch.tensor([0, 3, 1, 2, 5, 4, 6, 10, 8, 9, 7])
    assert torch.equal(batch["study_index"][order], batch["study_index"])
    turned = {**batch, "pixel_values": batch["pixel_values"][order]}
    torch.testing.assert_close(task.encode(turned).gather["image_embeds"], whole)
    features = task.image_features(batch)
    assert features.shape == (5, 16) and features.dtype is torch.float32
    torch.testing.assert_close(task.embed_images(batch), unit_norm(task.towers.vision_projection(features)))
    torch.testing.assert_close(task.image_norms(batch), task.towers.vision_projection(features).norm(dim=1))


def test_one_view_and_infonce_is_clip() -> None:
    batch = studies(4, [1, 1, 1, 1])
    ours = build("info_nce")
    clip = CLIP.Config(vision=VISION, text=TEXT, embed_dim=8).build(vocab_size=40, seed=0)
    torch.testing.assert_close(loss_of(ours, batch).loss, loss_of(clip, batch).loss)


# ---- a step ----


@pytest.mark.parametrize("form", FORMS)
def test_a_step_reaches_every_weight_and_void_counts_for_nothing(form: str) -> None:
    task = build(form)
    assert set(task.fields) == set(studies(3, [1, 1, 1]))
    with_void = studies(5, [2, 3, 1, 2, 1], void=(4,))
    out = loss_of(task, with_void)
    out.loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name == "towers.text.transformer.blocks.0.qkv.bias", name
    without = loss_of(task, rows_of(with_void, 0, 4))
    torch.testing.assert_close(out.loss, without.loss, rtol=1e-6, atol=1e-6)
    nothing = loss_of(task, studies(3, [1, 2, 1], void=(0, 1, 2)))
    task.zero_grad()
    nothing.loss.backward()
    assert nothing.loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in task.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_encode_what_the_batch_does(form: str) -> None:
    task, batch = build(form), studies(6, [2, 1, 3, 1, 2, 1], void=(3,))
    whole = task.encode(batch).gather
    parts = [task.encode(part).gather for part in split(batch, 2)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, msg=name)


def on_rank(rank: int, world_size: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    whole = {name: torch.from_numpy(value) for name, value in batch.items()}
    count = len(whole["valid"]) // world_size
    out: dict[str, Any] = {}
    for form in FORMS:
        task = build(form)
        result = loss_of(task, rows_of(whole, rank * count, (rank + 1) * count))
        gradients = torch.autograd.grad(result.loss, list(task.parameters()))
        out[form] = {
            "loss": collectives.sum_over_ranks(result.loss).numpy(),
            "gradients": [collectives.sum_over_ranks(gradient).numpy() for gradient in gradients],
            "metrics": {key: float(collectives.sum_over_ranks(value)) for key, value in result.metrics.items()},
        }
    return out


def test_two_ranks_equal_one_process() -> None:
    batch = {name: value.numpy() for name, value in studies(6, [1, 2, 1, 3, 1, 2], void=(4,)).items()}
    alone = on_rank(0, 1, batch)
    for found in run_distributed(on_rank, 2, args=(batch,)):
        for form in FORMS:
            np.testing.assert_allclose(found[form]["loss"], alone[form]["loss"], rtol=1e-6)
            assert found[form]["metrics"] == pytest.approx(alone[form]["metrics"], rel=1e-5)
            for ours, expected in zip(found[form]["gradients"], alone[form]["gradients"], strict=True):
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


# ---- synonyms ----


def test_multi_similarity_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    names = unit_norm(torch.randn(3, 2, 5, generator=generator))
    gathered = collectives.gather({
        "name_embeds": names, "name_id": torch.tensor([[0, 1], [2, 3], [1, 0]]),
        "concept_key": torch.tensor([[0, 0], [1, 1], [0, 0]]), "valid": torch.tensor([True, True, True]),
    })  # fmt: skip
    config = MultiSimilarity(positive_sharpness=2.0, negative_sharpness=10.0, threshold=0.3, margin=None)
    flat, name, key = names.flatten(0, 1), [0, 1, 2, 3, 1, 0], [0, 0, 1, 1, 0, 0]
    expected = 0.0
    for i in range(6):
        s = [float(flat[i] @ flat[j]) for j in range(6)]
        positives = [np.exp(-2.0 * (s[j] - 0.3)) for j in range(6) if key[j] == key[i] and name[j] != name[i]]
        negatives = [np.exp(10.0 * (s[j] - 0.3)) for j in range(6) if key[j] != key[i]]
        expected += np.log1p(sum(positives)) / 2.0 + np.log1p(sum(negatives)) / 10.0
    assert multi_similarity(gathered, config).item() == pytest.approx(expected / 6, rel=1e-5)
    mined = multi_similarity(gathered, replace(config, margin=0.05)).item()
    assert 0 < mined < expected / 6  # pairs that are far from wrong are left out


def test_synonyms_are_two_names_of_one_concept_by_the_studys_key() -> None:
    task, key = build("synonyms"), torch.arange(400) * 104729
    found = task._synonyms(key)
    names = [name for group in GROUPS for name in group]
    seen = set()
    for concept, (one, other) in zip(found["concept_key"][:, 0].tolist(), found["name_id"].tolist(), strict=True):
        assert one != other and {names[one], names[other]} <= set(GROUPS[concept])
        seen.add((one, other))
    assert len(seen) == 2 + 6 + 2
    again = task._synonyms(key[7:9])
    assert torch.equal(again["name_id"], found["name_id"][7:9])


def test_learning_synonyms_draws_them_together() -> None:
    task = build("synonyms")
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    batch, first, last = studies(6, [1] * 6), 0.0, 0.0
    for step in range(12):
        out = loss_of(task, {**batch, "draw_key": batch["draw_key"] + step})
        last = float(out.metrics["loss/synonyms"])
        first = first or last
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loss": "triplet"}, "loss='triplet' is unknown"), ({"pooling": "max"}, "pooling='max' is unknown")],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudyAlign.Config(vision=VISION, text=TEXT, **changes)
    with pytest.raises(ConfigError, match="has no two names"):
        Synonyms(groups=(("ulna", "ulna"),))
    with pytest.raises(ConfigError, match="weight=-1"):
        Synonyms(groups=GROUPS, weight=-1.0)
    with pytest.raises(ConfigError, match="positive_sharpness=0"):
        MultiSimilarity(positive_sharpness=0.0)
    with pytest.raises(ConfigError, match="take_tokenizer"):
        StudyAlign.Config(vision=VISION, text=TEXT, **FORMS["synonyms"]).build(vocab_size=40).encode(
            studies(3, [1] * 3)
        )


# ---- recipes ----


def test_every_group_of_synonyms_is_of_different_names_and_no_name_is_in_two() -> None:
    names = [name for group in bone.SYNONYMS for name in group]
    assert len(names) == len(set(names)) > 60


def test_the_large_recipes_keep_the_grid() -> None:
    for recipe, pixels in (("align_b16", 224), ("align_b16_336", 336), ("align_b16_448", 448)):
        config = load_recipe(f"bone:{recipe}")
        assert config.task.vision.image_size == config.data.decode.image_size == pixels
        assert config.task.vision.grid == (14, 14)
        assert config.data.sampling == "all_views"
    assert load_recipe("bone:align_one_view_tiny").data.sampling == "one_view"


def test_labels_alone_are_learned_from_all_views() -> None:
    task = SupervisedImages.Config(vision=VISION, labels=3).build(seed=0)
    batch = studies(4, [2, 1, 3, 1], void=(2,))
    batch["labels"] = torch.tensor([[1, 0, -2], [0, -1, 1], [1, 1, 1], [0, 0, -2]], dtype=torch.int8)
    assert set(task_class(task.config).fields) == {"pixel_values", "study_index", "valid", "labels"}
    out = loss_of(task, batch)
    logits = task.label_logits(batch).detach().double()
    nats = [
        np.mean([float(torch.nn.functional.softplus(-logit if label else logit)) for logit, label in pairs])
        for pairs in (
            [(logits[0, 0], 1), (logits[0, 1], 0)], [(logits[1, 0], 0), (logits[1, 2], 1)],
            [(logits[3, 0], 0), (logits[3, 1], 0)],
        )
    ]  # fmt: skip
    assert out.loss.item() == pytest.approx(np.sum(nats) / 3, rel=1e-5)
    with pytest.raises(ConfigError, match=r"set task\.labels=2"):
        task.encode({**batch, "labels": batch["labels"][:, :2]})
