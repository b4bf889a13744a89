"""fVLM and its baselines on volumes: targets, soft targets, one text encoded once, any number of ranks, the teacher."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import schema
from configs.schema import TrainConfig
from core import collectives
from core.engine import Engine, EngineConfig
from core.models.average import RunningMean
from core.models.text import TextEncoder
from core.models.volume import VolumeEncoder
from core.optim import OptimConfig
from core.tasks import Task
from core.tasks.fvlm import FVLM, DistinctTexts, TextTower
from core.tasks.supervised import Supervised
from core.tasks.volume_clip import VolumeCLIP
from core.world import World
from shards.batch import NOT_ANNOTATED, Batch
from shards.errors import ConfigError
from tests.core.runs import in_ranks
from tests.distributed import run_distributed

VISION = VolumeEncoder.Config(volume_size=(4, 8, 8), patch_size=(2, 4, 4), width=16, depth=2, heads=2, levels=(1, 2))
TEXT = TextEncoder.Config(max_length=16, width=16, depth=1, heads=2, norm="pre", pool="mean", token_types=0)
ANATOMIES = ("lung", "liver", "spleen")
CONFIG = FVLM.Config(vision=VISION, text=TEXT, anatomies=ANATOMIES, embed_dim=8)
STUDIES, WORDS = 6, 40


def volume_batch(studies: int = STUDIES, *, seed: int = 3) -> Batch:
    """Studies of one volume each, the second of two; the last is void. Of the spleen nobody has an abnormal one."""
    generator = torch.Generator().manual_seed(seed)
    study_index = torch.tensor([0, 1, 1, *range(2, studies)])
    valid = torch.ones(studies, dtype=torch.bool)
    valid[-1] = False
    normal = torch.rand(studies, 3, generator=generator) < 0.5
    normal[:, 2] = True
    normal[0, :2] = False
    text_key = torch.where(normal & (torch.rand(studies, 3, generator=generator) < 0.7), 5, 0)  # the template: 5
    own = 10 + torch.randint(0, 4, (studies, 3), generator=generator)
    text_key = torch.where(text_key == 0, own, text_key)
    words = torch.randint(1, WORDS, (20, 9), generator=generator)
    lengths = torch.randint(2, 10, (20,), generator=generator)
    mask = torch.arange(9)[None] < lengths[text_key.flatten()][:, None]
    share = torch.rand(len(study_index), 3, 8, generator=generator)
    share = share * (torch.rand(len(study_index), 3, 8, generator=generator) < 0.4)
    intact = share.any(dim=2) & (torch.rand(len(study_index), 3, generator=generator) < 0.8)
    seen = valid[study_index]
    return {
        "pixel_values": torch.randn(len(study_index), 1, 4, 8, 8, generator=generator)
        * seen[:, None, None, None, None],
        "study_index": study_index,
        "valid": valid,
        "anatomy_share": share * seen[:, None, None],
        "anatomy_intact": intact & seen[:, None],
        "anatomy_input_ids": (words[text_key.flatten()] * mask).view(studies, 3, 9),
        "anatomy_attention_mask": mask.view(studies, 3, 9),
        "anatomy_text_key": text_key,
        "anatomy_key": torch.where(normal, 0, text_key),
        "anatomy_state": (~normal).to(torch.int8),
    }


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Studies [start, stop)."""
    images = (batch["study_index"] >= start) & (batch["study_index"] < stop)
    per_image = ("pixel_values", "study_index", "anatomy_share", "anatomy_intact")
    part = {name: value[images] if name in per_image else value[start:stop] for name, value in batch.items()}
    return part | {"study_index": part["study_index"] - start}


def build(**changed: Any) -> FVLM:
    return replace(CONFIG, **changed).build(vocab_size=WORDS)


def loss_of(task: Task, batch: Batch) -> Any:
    encoded = task.encode(batch)
    return task.objective(collectives.gather(encoded.gather), encoded.local)


def take_steps(task: FVLM, count: int) -> None:
    for _ in range(count):
        task.after_step(lambda parameter: parameter.detach())


OPTIONS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "peer": {"soft": "peer", "soft_weight": 0.5},
    "gaussian": {"similarity": "wasserstein", "scale_init": 7.0, "soft": "none"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_reaches_every_weight(option: str) -> None:
    task = build(**OPTIONS[option])
    take_steps(task, 1)
    out = loss_of(task, volume_batch())
    out.loss.backward()
    for name, parameter in task.named_parameters():
        if name.startswith("peer."):
            assert parameter.grad is None, name  # its turn is the next step
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert out.loss > 0 and all(not value.requires_grad for value in out.metrics.values())
    assert out.metrics["anatomy/contrasts"] == 2  # no spleen is abnormal


def straight_loss(task: FVLM, batch: Batch, peer: FVLM | None = None, weight: float = 0.0) -> Tensor:
    """Anatomy after anatomy with the whole target matrix, as fvlm.md 3.1 and 3.2 state it.

    A `peer` replaces `weight` of the targets of abnormal rows by its own softmax, after 3.3.
    """
    images, present = task.embed_anatomies(batch)
    total, scale = torch.zeros(()), task.towers.logit_scale()
    for anatomy in range(len(ANATOMIES)):
        own = present[:, anatomy]
        key, text_key = batch["anatomy_key"][own, anatomy], batch["anatomy_text_key"][own, anatomy]
        if not (key != 0).any():
            continue
        texts = task.embed_texts(
            batch["anatomy_input_ids"][own, anatomy], batch["anatomy_attention_mask"][own, anatomy]
        )
        normal = key == 0
        alike = torch.eye(len(key)).bool()
        if task.config.positives != "study":
            alike = alike | (text_key[:, None] == text_key)
        if task.config.positives == "normal":
            # A sentence that one calls normal and another abnormal is no positive.
            alike = torch.where(normal[:, None] | normal, normal[:, None] & normal, alike)
        target = alike.float() / alike.float().sum(1, keepdim=True)
        logits = scale * images[own, anatomy] @ texts.T
        theirs = torch.zeros_like(logits)
        if peer is not None:
            said = peer.embed_texts(
                batch["anatomy_input_ids"][own, anatomy], batch["anatomy_attention_mask"][own, anatomy]
            )
            theirs = peer.towers.logit_scale() * peer.embed_anatomies(batch)[0][own, anatomy] @ said.T
        for each, other in ((logits, theirs), (logits.T, theirs.T)):
            share = torch.where(normal, 0.0, weight)[:, None]
            wanted = (1 - share) * target + share * other.softmax(1).detach()
            total = total - 0.5 * (wanted * each.log_softmax(1)).sum(1).mean()
    return total


def alone(pair: FVLM, member: str) -> FVLM:
    """One model of a pair, as a task of its own."""
    task = build(soft="none")
    task.towers.load_state_dict(getattr(pair, member).state_dict())
    return task


@pytest.mark.parametrize(("turn", "learner", "other"), [(0, "towers", "peer"), (1, "peer", "towers")])
def test_of_a_pair_one_learns_from_its_labels_and_the_other(turn: int, learner: str, other: str) -> None:
    pair, batch = build(soft="peer", soft_weight=0.5, soft_ramp_steps=4), volume_batch()
    take_steps(pair, 2)  # half of the ramp
    assert not torch.equal(pair.towers.vision.patch.weight, pair.get_parameter("peer.vision.patch.weight"))
    pair.turn = turn
    loss = loss_of(pair, batch).loss
    wanted = straight_loss(alone(pair, learner), batch, alone(pair, other), weight=0.25)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert abs(loss - straight_loss(alone(pair, learner), batch)) > 1e-3  # normal rows alone are as they were
    loss.backward()
    assert {name.split(".")[0] for name, weight in pair.named_parameters() if weight.grad is not None} == {learner}
    pair.eval()  # a judgement is of the first, at any step
    torch.testing.assert_close(
        loss_of(pair, batch).loss, straight_loss(alone(pair, "towers"), batch, alone(pair, "peer"), weight=0.25)
    )


@pytest.mark.parametrize("positives", ["normal", "text", "study"])
def test_the_loss_is_the_papers(positives: str) -> None:
    task, batch = build(positives=positives, soft="none"), volume_batch()
    torch.testing.assert_close(loss_of(task, batch).loss, straight_loss(task, batch), rtol=1e-5, atol=1e-5)


def test_each_text_is_encoded_once_and_only_if_it_counts() -> None:
    batch = volume_batch()
    present = batch["anatomy_intact"][[0, 1, 3, 4, 5, 6]] & batch["valid"][:, None]
    texts = DistinctTexts.of(batch, present)
    keys = batch["anatomy_text_key"][present]
    assert len(texts.input_ids) == len(keys.unique()) < len(keys)
    assert texts.input_ids.shape[1] == int(texts.attention_mask.sum(1).max())
    numbered = texts.spread({"x": texts.input_ids[:, :2].float()})["x"]
    assert torch.equal(numbered[present], batch["anatomy_input_ids"][present][:, :2].float())
    assert not numbered[~present].any()
    alone = DistinctTexts.of(batch, torch.zeros_like(present))
    assert len(alone.input_ids) == 1


def test_a_batch_without_any_intact_anatomy_has_no_loss_and_gradients_of_zero() -> None:
    task, batch = build(), volume_batch()
    batch["anatomy_intact"] = torch.zeros_like(batch["anatomy_intact"])
    out = loss_of(task, batch)
    out.loss.backward()
    assert out.loss == 0
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_patches_are_those_of_a_studys_first_view() -> None:
    task, batch = build(), volume_batch()
    embeds, present, tokens, member = task.embed_patches(batch)
    for found, expected in zip((embeds, present), task.embed_anatomies(batch), strict=True):
        torch.testing.assert_close(found, expected)
    first = torch.tensor([0, 1, 3, 4, 5, 6])  # study 1 has views 1 and 2
    torch.testing.assert_close(tokens, task.towers.vision(batch["pixel_values"]).levels[-1][first])
    assert torch.equal(member, (batch["anatomy_share"][first] > 0) & batch["anatomy_intact"][first][:, :, None])
    assert member.any() and not member[-1].any()
    config = VolumeCLIP.Config(vision=VISION, text=TEXT, embed_dim=8)
    whole = config.build(vocab_size=WORDS)
    pooled, present, tokens, member = whole.embed_patches(batch)
    mean = F.normalize(whole.image_features(batch), dim=1)
    torch.testing.assert_close(pooled[:-1, 0], mean[:-1])
    assert torch.equal(present[:, 0], batch["valid"]) and tokens.shape == (STUDIES, 8, 16)
    assert torch.equal(member, batch["valid"][:, None, None].expand(-1, 1, 8))


def test_anatomies_of_which_nothing_is_known_are_not_contrasted() -> None:
    task, batch = build(soft="none"), volume_batch()
    silent = {name: value.clone() for name, value in batch.items()}
    silent["anatomy_state"][1] = NOT_ANNOTATED
    gone = {name: value.clone() for name, value in batch.items()}
    gone["anatomy_intact"][1:3] = False
    torch.testing.assert_close(loss_of(task, silent).loss, loss_of(task, gone).loss)
    assert not torch.equal(loss_of(task, silent).loss, loss_of(task, batch).loss)
    assert torch.equal(task.embed_anatomies(silent)[1], task.embed_anatomies(batch)[1])  # there all the same


def test_void_studies_and_cut_anatomies_count_for_nothing() -> None:
    task, batch = build(), volume_batch()
    take_steps(task, 2)
    spoilt = {name: value.clone() for name, value in batch.items()}
    cut = ~batch["anatomy_intact"]
    spoilt["anatomy_share"][cut] = 0.7
    spoilt["anatomy_key"][-1] = 99
    spoilt["anatomy_input_ids"][-1] = 7
    a, b = loss_of(task, batch), loss_of(task, spoilt)
    torch.testing.assert_close(a.loss, b.loss)
    assert a.metrics["anatomy/pairs"] == b.metrics["anatomy/pairs"]


def test_soft_targets_come_with_the_ramp() -> None:
    task, plain = build(soft_ramp_steps=4), build(soft="none")
    batch = volume_batch()
    losses = []
    for _ in range(6):
        losses.append(loss_of(task, batch).loss.item())
        take_steps(task, 1)
    hard = loss_of(plain, batch).loss.item()
    assert losses[0] == pytest.approx(hard, rel=1e-6)
    assert len({round(loss, 6) for loss in losses[:5]}) == 5 and losses[4] == pytest.approx(losses[5], rel=1e-6)


def test_the_teacher_is_a_running_mean_in_fp32_that_no_cast_touches() -> None:
    tower = TextTower(replace(TEXT, vocab_size=WORDS), 8)
    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(p.shape, generator=generator) for p in tower.parameters()] for _ in range(3)]
    teacher = RunningMean(tower, decay=0.9)
    assert not list(teacher.parameters()) and not list(teacher.children())
    wanted = None
    for step, each in enumerate(values):
        with torch.no_grad():
            for parameter, value in zip(tower.parameters(), each, strict=True):
                parameter.copy_(value)
        teacher.update(tower, lambda parameter: parameter.detach(), first=torch.tensor(step == 0))
        wanted = each if wanted is None else [0.9 * a + 0.1 * b for a, b in zip(wanted, each, strict=True)]
        teacher.bfloat16()
    assert wanted is not None
    for found, value in zip(teacher.weights().values(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for parameter, value in zip(tower.parameters(), wanted, strict=True):
            parameter.copy_(value)
    ids = torch.randint(1, WORDS, (3, 5), generator=generator)
    said, original = teacher(ids, torch.ones(3, 5).bool()), tower(ids, torch.ones(3, 5).bool())
    torch.testing.assert_close(said, original, rtol=1e-4, atol=1e-4)
    assert not said.requires_grad
    again = RunningMean(tower, decay=0.9)
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(ids, torch.ones(3, 5).bool()), said)


def test_what_cannot_be_is_refused() -> None:
    for changed, said in (
        ({"anatomies": ("lung", "lung")}, "each once"),
        ({"anatomies": ()}, "at least one"),
        ({"soft_weight": 1.5}, "soft_weight=1.5"),
        ({"scale_init": 1.0}, "scale_init=1.0 must lie between"),
        ({"soft_ramp_steps": -1}, "soft_ramp_steps=-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(CONFIG, **changed)
    with pytest.raises(ConfigError, match="teacher_decay=1"):
        build(teacher_decay=1.0)


# ---- over ranks ----


def on_rank(rank: int, world_size: int, option: str) -> dict[str, np.ndarray]:
    """Loss, and this rank's share of the gradients: of four ranks the last has nothing but a void study."""
    batch = volume_batch(8)
    batch["valid"][6:] = False
    batch["anatomy_intact"] &= batch["valid"][batch["study_index"], None]
    task = build(**OPTIONS[option])
    take_steps(task, 2)
    each = 8 // world_size
    out = loss_of(task, rows_of(batch, rank * each, (rank + 1) * each))
    out.loss.backward()
    found = {name: parameter.grad.numpy() for name, parameter in task.named_parameters() if parameter.grad is not None}
    return found | {"loss": out.loss.detach().numpy()} | {name: value.numpy() for name, value in out.metrics.items()}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", ["teacher", pytest.param("peer", marks=pytest.mark.slow)])
def test_ranks_add_up_to_one_process(option: str, world_size: int) -> None:
    alone = on_rank(0, 1, option)
    ranks = run_distributed(on_rank, world_size, args=(option,))
    for name, value in alone.items():
        total = np.sum([rank[name] for rank in ranks], axis=0)
        np.testing.assert_allclose(total, value, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(value).max()), err_msg=name)


STAGES: dict[str, dict[str, Any]] = {
    "zero 0": {"zero_stage": 0},
    "zero 1, cached": {"zero_stage": 1, "micro_batch": 2},
    "zero 2, ring": {"zero_stage": 2, "exchange": "ring"},
    "zero 3": {"zero_stage": 3},
}


def trained(folder: str, world: World) -> dict[str, list[float]]:
    """Losses of three steps and of one more after a restart, then the teacher's weights, for every way to compute."""
    found = {}
    each = 8 // world.world_size

    def start(options: dict[str, Any]) -> tuple[FVLM, Engine]:
        task = build(soft_ramp_steps=2)
        config = EngineConfig(precision="fp32", **options)
        return task, Engine(config, task, world, optim=OptimConfig(learning_rate=1e-3), total_steps=4, seed=0)

    def moved(engine: Engine, step: int) -> float:
        batch = rows_of(volume_batch(8, seed=step), world.rank * each, (world.rank + 1) * each)
        return engine.train_step(batch, step=step).metrics["loss/total"]

    for name, options in STAGES.items():
        _, engine = start(options)
        losses = [moved(engine, step) for step in range(3)]
        assert not engine.save(Path(folder) / name.replace(" ", "-"))
        task, engine = start(options)
        engine.load(Path(folder) / name.replace(" ", "-"))
        losses.append(moved(engine, 3))
        assert task.teacher is not None and int(task.steps) == 4
        weights = torch.cat([value.flatten() for value in task.teacher.weights().values()])
        found[name] = [*losses, *weights[::50].tolist()]
    return found


@pytest.mark.slow
def test_stages_schedules_and_a_restart_give_one_curve_and_one_teacher(tmp_path: Path) -> None:
    ranks = in_ranks(2, partial(trained, str(tmp_path)))
    reference = np.array(ranks[0]["zero 0"])
    assert len(set(reference[:4])) == 4
    for rank in ranks:
        for name, values in rank.items():
            np.testing.assert_allclose(values, reference, rtol=1e-5, atol=1e-6, err_msg=name)


def pair_trained(folder: str, world: World) -> dict[str, list[float]]:
    """Losses of four steps of a pair, and sums over its weights, unbroken and restarted after each of two steps.

    Asserts at every step that one model moved, and the other by no bit: neither by decay nor by its moments.
    """
    found = {}
    each = 8 // world.world_size
    stages = STAGES if world.world_size > 1 else {"zero 2": {"zero_stage": 2}}

    def start(options: dict[str, Any]) -> Engine:
        task = build(soft="peer", soft_weight=0.5, soft_ramp_steps=2)
        config = EngineConfig(precision="fp32", **options)
        optim = OptimConfig(learning_rate=1e-3, weight_decay=0.5)
        return Engine(config, task, world, optim=optim, total_steps=4, seed=0)

    def moved(engine: Engine, step: int) -> float:
        batch = rows_of(volume_batch(8, seed=step), world.rank * each, (world.rank + 1) * each)
        before = weights_of(engine)
        loss = engine.train_step(batch, step=step).metrics["loss/total"]
        after = weights_of(engine)
        learner = ("towers", "peer")[step % 2]
        for name, weight in before.items():
            if name.split(".")[0] in ("towers", "peer"):
                assert torch.equal(weight, after[name]) != name.startswith(learner), (step, name)
        return loss

    def weights_of(engine: Engine) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in engine.full_weights().items()}

    def sums(engine: Engine) -> list[float]:
        return [float(weight.double().abs().sum()) for weight in weights_of(engine).values()]

    for name, options in stages.items():
        engine = start(options)
        losses = [moved(engine, step) for step in range(4)]
        found[name] = [*losses, *sums(engine)]
        for broken in (1, 2):
            at = Path(folder) / f"{name} {broken}".replace(" ", "-")
            engine = start(options)
            early = [moved(engine, step) for step in range(broken)]
            assert not engine.save(at)
            engine = start(options)
            engine.load(at)
            late = [moved(engine, step) for step in range(broken, 4)]
            assert [*early, *late, *sums(engine)] == found[name], (name, broken)
    return found


def test_a_pair_takes_turns_and_a_restart_is_exact(tmp_path: Path) -> None:
    (alone,) = in_ranks(1, partial(pair_trained, str(tmp_path)))
    assert len(set(alone["zero 2"][:4])) == 4


@pytest.mark.slow
def test_a_pair_learns_the_same_at_every_stage_on_one_rank_and_two(tmp_path: Path) -> None:
    (alone,) = in_ranks(1, partial(pair_trained, str(tmp_path)))
    ranks = in_ranks(2, partial(pair_trained, str(tmp_path)))
    for name, values in ranks[0].items():
        # Losses: a bias of attention keys has no gradient but rounding, and Adam steps by its sign.
        np.testing.assert_allclose(values[:4], alone["zero 2"][:4], rtol=1e-5, err_msg=name)


# ---- baselines and recipes ----


def test_uncertain_and_missing_labels_are_not_asked() -> None:
    task = Supervised.Config(vision=VISION, labels=3).build()
    batch = volume_batch() | {
        "labels": torch.tensor([[1, 0, -1], [-2, -2, -2], [0, -2, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]])
    }
    encoded = task.encode(batch)
    logits = task.label_logits(batch)
    expected = torch.stack([F.softplus(-logits[0, 0]), F.softplus(logits[0, 1])]).mean()
    torch.testing.assert_close(encoded.local["labels"][0], expected)
    assert encoded.local["labels"][1] == 0 and encoded.local["labels"][5] == 0  # nothing annotated; void
    out = loss_of(task, batch)
    torch.testing.assert_close(out.loss, encoded.local["labels"].sum() / 5)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in task.parameters())
    with pytest.raises(ConfigError, match=r"set task\.labels=2"):
        task.encode(batch | {"labels": batch["labels"][:, :2]})


def synthetic(config: TrainConfig, studies: int) -> Batch:
    """Noise in the shapes of a recipe; half of the anatomies abnormal."""
    task = config.task
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(studies, task.vision.channels, *task.vision.volume_size, generator=generator)
    batch = {"pixel_values": pixels, "study_index": torch.arange(studies), "valid": torch.ones(studies).bool()}
    length = 12
    if isinstance(task, FVLM.Config):
        anatomies, patches = len(task.anatomies), config.data.volume.patches
        key = torch.randint(0, 2, (studies, anatomies), generator=generator)
        key = key * (1 + torch.arange(studies * anatomies).view(studies, anatomies))
        batch |= {
            "anatomy_share": torch.rand(studies, anatomies, patches, generator=generator),
            "anatomy_intact": torch.ones(studies, anatomies).bool(),
            "anatomy_input_ids": torch.randint(5, WORDS, (studies, anatomies, length), generator=generator),
            "anatomy_attention_mask": torch.ones(studies, anatomies, length).bool(),
            "anatomy_text_key": torch.where(key == 0, -1 - torch.arange(anatomies), key),
            "anatomy_key": key,
            "anatomy_state": (key != 0).to(torch.int8),
        }
    batch["input_ids"] = torch.randint(5, WORDS, (studies, length), generator=generator)
    batch["attention_mask"] = torch.ones(studies, length).bool()
    batch["report_key"] = torch.arange(studies)
    batch["labels"] = torch.randint(0, 2, (studies, getattr(task, "labels", 1)), generator=generator)
    return {name: batch[name] for name in schema.task_class(task).fields}


@pytest.mark.parametrize("recipe", ["ct:fvlm_tiny", "ct:clip_tiny", "ct:supervised_tiny"])
def test_every_tiny_recipe_makes_three_steps_downhill(recipe: str) -> None:
    config = schema.load_recipe(recipe)
    task = config.task.build(vocab_size=WORDS, seed=0)
    batch = synthetic(config, 3)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        out = loss_of(task, batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        with torch.no_grad():
            task.after_step(lambda parameter: parameter.detach())
        losses.append(out.loss.item())
    assert losses[-1] < losses[0], losses


def test_the_large_recipes_are_the_papers_shapes() -> None:
    config = schema.load_recipe("ct:fvlm_b")
    assert config.task.vision.grid == (7, 16, 11) and len(config.task.anatomies) == 36
    assert schema.load_recipe("ct:clip_b").task.vision == schema.load_recipe("ct:supervised_b").task.vision
