"""UMCL: prompts and what they are made of, which text is compared, gradients, drop-out, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core import collectives
from core.models.initialise import draw_weights
from core.models.prompts import PromptBank
from core.models.text import TextEncoder
from core.tasks.clip import CLIP
from core.tasks.umcl import UMCL
from shards.batch import FIELDS, NO_FINDING, NOT_ANNOTATED, Batch
from shards.errors import ConfigError
from tests.core.runs import Options, Words
from tests.core.test_checkpoint import assert_resumes_bit_identical
from tests.core.test_engine import assert_one_loss_curve
from tests.core.test_tasks import TEXT, VISION, batch_of, loss_of, rows_of
from tests.distributed import run_distributed

VOCABULARY = 40
CLASSES = (NO_FINDING, "edema", "pleural effusion", "nodule", "hernia")
BANK = PromptBank.Config(length=4, dropout=0.5)


def bank_of(config: PromptBank.Config = BANK, names: tuple[str, ...] = CLASSES) -> tuple[PromptBank, TextEncoder]:
    text = replace(TEXT, vocab_size=VOCABULARY)
    bank, encoder = PromptBank(config, text, names), TextEncoder(text)
    draw_weights(bank, 0)
    draw_weights(encoder, 0)
    bank.take_tokenizer(Words())
    return bank, encoder


@pytest.mark.parametrize("position", ["end", "front", "middle"])
def test_a_prompt_of_words_is_the_sentence_of_these_words(position: Any) -> None:
    bank, encoder = bank_of(replace(BANK, position=position))
    learned = torch.tensor([11, 12, 13, 14])
    with torch.no_grad():
        bank.context_tokens.copy_(encoder.words.weight[learned])
        found = bank(encoder)
        for row, name in enumerate(CLASSES):
            ids, _ = Words().encode([f"{name} ."], 16)
            words = ids[0, 1:-2].tolist()
            before = {"end": 4, "front": 0, "middle": 2}[position]
            sentence = [1, *learned[:before].tolist(), *words, *learned[before:].tolist(), ids[0, -2].item(), 2]
            expected = encoder(torch.tensor([sentence]), torch.ones(1, len(sentence), dtype=torch.bool)).pooled
            torch.testing.assert_close(found[row], expected[0])


def test_a_shared_context_fits_classes_that_were_never_learned() -> None:
    bank, encoder = bank_of()
    wider, _ = bank_of(names=(*CLASSES, "covid"))
    assert list(bank.state_dict()) == ["context_tokens"]
    wider.load_state_dict(bank.state_dict())
    torch.testing.assert_close(wider(encoder)[:5], bank(encoder))
    task = task_of().eval()
    torch.testing.assert_close(task.embed_classes(("covid", "edema"))[1], task.embed_classes()[1])
    own, _ = bank_of(replace(BANK, shared=False))
    with pytest.raises(ConfigError, match=r"bank\.shared=false"):
        own.of_names(("covid",))
    assert own.context_tokens.shape == (20, 16) and bank.context_tokens.shape == (4, 16)
    gradient = torch.autograd.grad(own(encoder)[1].square().sum(), own.context_tokens)[0].view(5, 4, 16)
    assert gradient[1].any() and not gradient[[0, 2, 3, 4]].any()


def test_drop_out_is_keyed() -> None:
    bank, encoder = bank_of()
    one, other = (torch.tensor([key]) for key in (1, 2))
    assert torch.equal(bank(encoder, one), bank(encoder, one))
    assert not torch.equal(bank(encoder, one), bank(encoder, other))
    assert not torch.equal(bank(encoder, one), bank(encoder))


def test_prompts_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"'no finding' has 17 tokens.*max_length=16"):
        bank_of(replace(BANK, length=12))
    with pytest.raises(ConfigError, match="'edema' is named twice"):
        bank_of(names=("edema", "Edema "))
    for changed in ({"length": 0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError):
            PromptBank.Config(**changed)


def task_of(**changed: Any) -> UMCL:
    config = UMCL.Config(vision=VISION, text=TEXT, embed_dim=8, classes=CLASSES, bank=BANK)
    task = replace(config, **changed).build(vocab_size=VOCABULARY, seed=0)
    task.take_tokenizer(Words())
    return task


def labelled_batch() -> Batch:
    """Two reports, one study with both and a text of labels, two with labels alone, one void."""
    batch = batch_of(6, [1, 2, 1, 1, 1, 1], void=(5,))
    labels = torch.full((6, 5), NOT_ANNOTATED, dtype=torch.int8)
    labels[1:5] = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]])
    labels[4, 3] = -1
    is_report = torch.tensor([True, True, False, False, False, False])
    key = torch.tensor([1, 2, 3, 4, 3, 0])
    return batch | {"labels": labels, "text_is_report": is_report, "report_key": key}


def test_a_text_of_labels_is_the_mean_of_its_prompts() -> None:
    task, batch = task_of().eval(), labelled_batch()
    assert set(task.fields) == set(batch) and set(task.fields) <= set(FIELDS)
    texts, prompts = task.encode(batch).gather["text_embeds"], task.embed_classes()
    reports = task.embed_texts(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(texts[:2], reports[:2])
    torch.testing.assert_close(texts[3], prompts[0])
    torch.testing.assert_close(texts[4], torch.nn.functional.normalize(prompts[1] + prompts[2], dim=0))
    assert not texts[5].any()
    directions = task.class_directions()
    torch.testing.assert_close(directions[:, 0], prompts[0])
    for number in range(1, 5):
        torch.testing.assert_close(directions[:, number], prompts[number] - (prompts[0] + prompts.mean(dim=0)) / 2)


@pytest.mark.parametrize("form", [{}, {"class_weight": 0.1}, {"class_weight": 0.1, "negative_bank": True}])
def test_prompts_learn_exactly_where_labels_are_read(form: dict[str, Any]) -> None:
    task, batch = task_of(**form), labelled_batch()
    out = loss_of(task, batch)
    out.loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert task.bank is not None and task.bank.context_tokens.grad is not None and task.bank.context_tokens.grad.any()
    assert 0 <= out.metrics["contrast/false_negatives_pushed_apart"] <= 1
    assert out.metrics["contrast/reports"] == pytest.approx(0.4)
    if form:
        assert out.metrics["loss/classes"] > 0
        return
    task.zero_grad()
    loss_of(task, batch | {"text_is_report": batch["valid"]}).loss.backward()
    assert not task.bank.context_tokens.grad.any()


def test_micro_batches_are_encoded_as_the_whole_batch() -> None:
    task, batch = task_of(class_weight=0.1), labelled_batch()
    whole, parts = task.encode(batch), [task.encode(rows_of(batch, start, start + 2)) for start in (0, 2, 4)]
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(torch.cat([part.gather[name] for part in parts]), whole.gather[name])
    before = task.embed_classes()
    torch.testing.assert_close(task.embed_classes(), before)
    task.after_step(lambda parameter: parameter)
    assert not torch.equal(task.embed_classes(), before), "another step drops other vectors"


def test_prompts_by_hand_and_one_hot_targets_are_clip() -> None:
    task, batch = task_of(prompts="hand", target="one_hot").eval(), labelled_batch()
    clip = CLIP.Config(vision=VISION, text=TEXT, embed_dim=8).build(vocab_size=VOCABULARY, seed=0)
    torch.testing.assert_close(loss_of(task, batch).loss, loss_of(clip, batch).loss)
    assert not any("bank" in name for name in task.state_dict())
    with pytest.raises(ConfigError, match="prompts=hand has no bank"):
        task.embed_classes()


def on_rank(rank: int, world_size: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    whole = {name: torch.from_numpy(value) for name, value in batch.items()}
    studies = len(whole["valid"]) // world_size
    task = task_of(class_weight=0.1, negative_bank=True)
    result = loss_of(task, rows_of(whole, rank * studies, (rank + 1) * studies))
    gradients = torch.autograd.grad(result.loss, list(task.parameters()))
    return {
        "loss": collectives.sum_over_ranks(result.loss).numpy(),
        "gradients": [collectives.sum_over_ranks(gradient).numpy() for gradient in gradients],
        "metrics": {key: float(collectives.sum_over_ranks(value)) for key, value in result.metrics.items()},
    }


def test_two_ranks_equal_one_process() -> None:
    batch = {name: value.numpy() for name, value in labelled_batch().items()}
    alone = on_rank(0, 1, batch)
    for rank in run_distributed(on_rank, 2, args=(batch,)):
        np.testing.assert_allclose(rank["loss"], alone["loss"], rtol=1e-6)
        assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        for ours, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "hand", "class_weight": 0.1}, "prompts=hand has no bank"),
        ({"negative_bank": True}, "class_weight=0 would learn nothing"),
        ({"precision": "bf16"}, "fp32"),
        ({"own_text": 1.5}, "own_text=1.5"),
        ({"classes": ("edema", "edema")}, "named twice"),
    ],
)
def test_a_config_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(**changed)


def test_data_of_other_classes_are_refused() -> None:
    batch = labelled_batch()
    with pytest.raises(ConfigError, match=r"3 classes.*names 5"):
        task_of().encode(batch | {"labels": batch["labels"][:, :3]})


# ---- in the engine ----

TWO_CLASSES = '["no finding", "pulmonary edema"]'  # as the batches of tests.core.runs have labels
RUN: dict[str, Any] = {
    "recipe": "umcl", "overrides": (f"task.classes={TWO_CLASSES}", f"data.label_text.classes={TWO_CLASSES}"),
}  # fmt: skip


@pytest.mark.slow
def test_ranks_stages_and_schedules_give_one_loss_curve() -> None:
    # Adam moves key biases, whose gradient is all rounding, by the whole learning rate in any direction: it is small.
    assert_one_loss_curve(Options(run_dir="", learning_rate=1e-4, **RUN))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage", "micro_batch"), [(1, 1, 4), (2, 3, None), (2, 3, 2)])
def test_a_killed_run_resumes_bit_identical(
    tmp_path: Path, ranks: int, zero_stage: int, micro_batch: int | None
) -> None:
    options = Options(run_dir="", zero_stage=zero_stage, micro_batch=micro_batch, **RUN)
    weights = assert_resumes_bit_identical(tmp_path, ranks, options)
    assert "bank.context_tokens" in weights
    assert int(weights["steps"]) == 5, "what drop-out of prompts is keyed by"
