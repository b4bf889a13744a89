"""Reports from frozen anatomies: scores against their definitions, and proof that what is written comes from the image.

The studies are made up: embeddings tell which organ is ill, and only the tokens of its patches tell on which side.
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn.functional import normalize
from torchmetrics.functional.text import bleu_score

from core.evaluation.embed import EmbeddedSplit
from core.evaluation.generation import (
    DECODER,
    FREQUENT,
    MEASURES,
    NEAREST,
    SHUFFLED,
    AbnormalHeads,
    Generation,
    Labeller,
    ReportedSplit,
    nearest_studies,
)
from core.evaluation.text_scores import Bleu, LabelF1, RougeL, longest_common_subsequence, words_of
from core.models.report_decoder import ReportDecoder
from core.optim import OptimConfig
from shards.errors import ConfigError
from shards.tokenizer import Tokenizer, train_wordpiece

CPU = torch.device("cpu")
ORGANS = ("lung", "liver", "kidney")
SAID = {"lung": "there is a {side} nodule", "liver": "a {side} mass is seen", "kidney": "a stone, {side}-sided"}
NAMES = tuple(f"{side} {organ}" for organ in ORGANS for side in ("left", "right"))
SMALL = ReportDecoder.Config(width=32, depth=2, heads=2, max_length=40)


def config(steps: int, **changed: object) -> Generation.Config:
    optim = OptimConfig(learning_rate=3e-3, weight_decay=0.01, warmup_steps=10)
    return Generation.Config(decoder=SMALL, steps=steps, batch_size=16, optim=optim, replicates=50, **changed)  # type: ignore[arg-type]


def studies(count: int, seed: int) -> ReportedSplit:
    """A third of the organs is ill; 8 patches, of which organ a has numbers 2 a and 2 a + 1. Two studies a patient."""
    generator = torch.Generator().manual_seed(seed)
    ill = torch.rand(count, 3, generator=generator) < 0.35
    right = torch.rand(count, 3, generator=generator) < 0.5
    organs = torch.eye(8)[:3].expand(count, 3, 8) + torch.eye(8)[3] * ill[:, :, None]
    sides = torch.eye(8)[4:6][right.long()].repeat_interleave(2, dim=1)  # [n, 6, 8]
    tokens = torch.cat([sides, torch.zeros(count, 2, 8)], dim=1)
    member = torch.zeros(count, 3, 8, dtype=torch.bool)
    for organ in range(3):
        member[:, organ, 2 * organ : 2 * organ + 2] = True
    reports = []
    for row in range(count):
        said = [
            SAID[name].format(side="right" if right[row, a] else "left") if ill[row, a] else f"{name} normal"
            for a, name in enumerate(ORGANS)
        ]
        reports.append(". ".join(said) + ".")
    number = torch.arange(count)
    split = EmbeddedSplit(
        image_embeds=None, text_embeds=None, features=None, labels=torch.zeros(count, 0, dtype=torch.int8),
        report_key=number, patient_key=number // 2, sample_id=number,
        anatomy_embeds=normalize(organs + 0.05 * torch.randn(count, 3, 8, generator=generator), dim=2),
        anatomy_present=torch.ones(count, 3), patch_member=member,
        patch_tokens=(tokens + 0.05 * torch.randn(count, 8, 8, generator=generator)).bfloat16(),
    )  # fmt: skip
    return ReportedSplit(split=split, reports=reports, state=ill.numpy().astype(np.int8))


def read(text: str) -> set[str]:
    """The labels of a report in the words of SAID."""
    words = " ".join(words_of(text))
    return {
        f"{side} {organ}"
        for organ, side in product(ORGANS, ("left", "right"))
        if " ".join(words_of(SAID[organ].format(side=side))) in words
    }


LABELLER = Labeller(names=NAMES, states=read, source="the words of this test")


@lru_cache
def tokenizer() -> Tokenizer:
    return train_wordpiece(studies(80, 1).reports, 200)


# ---- the decoder reads the image ----


def test_eight_studies_are_learned_word_for_word(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    few = studies(8, 3)
    told = []
    evaluator = Generation(config(250))
    found = dict(evaluator.run(few, few, tokenizer(), LABELLER, CPU, lambda *step: told.append(step)))
    assert [words_of(text) for text in evaluator.written] == [words_of(text) for text in few.reports]
    assert found["decoder_bleu_4"] == found["nearest_study_rouge_l"] == pytest.approx(1)
    assert found["decoder_label_f1_macro"] == 1
    assert told[0] == ("decoder: steps", 1, 250) and ("decoder: reports", 8, 8) in told
    # No text of a report in the result or a log.
    seen = json.dumps(evaluator.report()) + caplog.text + repr(told)
    assert not any(sentence in seen.lower() for text in few.reports for sentence in text.split(". "))


def test_what_is_written_comes_from_the_image() -> None:
    train, test = studies(96, 5), studies(40, 6)
    evaluator = Generation(config(400))
    found = dict(evaluator.run(train, test, tokenizer(), LABELLER, CPU))
    # Sides stand in the tokens of abnormal organs alone.
    assert found["decoder_label_f1_micro"] > 0.9 and found["decoder_label_f1_macro"] > 0.85
    # Given another study's anatomies it knows no more than a control that sees none: the labels' frequency.
    assert found["decoder_other_study_label_f1_micro"] < 0.5 < found["decoder_label_f1_micro"] - 0.35
    # Neighbours are found by what is ill; sides are not in the embeddings.
    assert 0.3 < found["nearest_study_label_f1_micro"] < 0.8
    report = evaluator.report()
    assert list(report["reports"]) == [DECODER, SHUFFLED, NEAREST, FREQUENT]
    assert report["abnormal"] == {"abnormal_taken_for_abnormal": 1.0, "normal_taken_for_abnormal": 0.0}
    assert report["distinct_reports"][FREQUENT] == 1 and report["labels"] == {
        name: sum(name in read(text) for text in test.reports) for name in NAMES
    }
    for control, lead in report["less"].items():
        for measure in MEASURES:
            estimate = lead[measure]
            both = [report["reports"][name][measure]["value"] for name in (DECODER, control)]
            assert estimate["value"] == pytest.approx(both[0] - both[1])
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["patients"] == 20
    assert report["less"][SHUFFLED]["label_f1_micro"]["low"] > 0.3


def test_the_same_run_twice_writes_the_same_and_a_search_is_no_worse() -> None:
    train, test = studies(24, 7), studies(6, 8)
    first, again, wide = (Generation(config(20, beams=beams)) for beams in (1, 1, 3))
    for evaluator in (first, again, wide):
        list(evaluator.run(train, test, tokenizer(), LABELLER, CPU))
    assert first.written == again.written and first.report() == again.report()
    assert len(wide.written) == 6 and wide.report()["loss"] == first.report()["loss"]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class Endless:
        vocab_size, prefix, suffix = 10, (1,), ()

    with pytest.raises(ConfigError, match="puts a token before and after every text"):
        next(Generation().run(studies(2, 1), studies(2, 1), Endless(), LABELLER, CPU))  # type: ignore[arg-type]


def test_anatomies_of_one_class_are_never_abnormal_and_without_states_all_are_shown() -> None:
    train = studies(30, 9)
    assert train.state is not None
    train.state[:, 1] = 0
    flags = AbnormalHeads(train).flags(train.split)
    assert flags[:, 0].any() and not flags[:, 1].any()
    train.split.need("anatomy_present")[4, 0] = 0
    untold = AbnormalHeads(ReportedSplit(split=train.split, reports=train.reports))
    assert np.array_equal(untold.flags(train.split), train.split.need("anatomy_present").numpy() > 0)
    assert untold.judged(train) is None


def test_the_nearest_study_is_nearest_in_what_both_show() -> None:
    split = AbnormalHeads(studies(30, 9)).apply(studies(30, 9).split)
    assert nearest_studies(split, split).tolist() == list(range(30))
    split.present[:, 1:] = torch.rand(30, 2, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = []
    for query in range(30):
        scores = []
        for other in range(30):
            both = split.present[query] & split.present[other]
            scores.append(float((split.embeds[query] * split.embeds[other]).sum(dim=1)[both].mean()))
        expected.append(int(np.argmax(scores)))
    assert nearest_studies(split, split).tolist() == expected


# ---- scores ----

WORDS = st.lists(st.sampled_from("abcd"), max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), st.data())
def test_bleu_is_torchmetrics_of_the_drawn_studies(
    pairs: list[tuple[list[str], list[str]]], data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(pairs), max_size=len(pairs)))
    scores = Bleu(*zip(*pairs, strict=True))(np.array(counts, np.float32)[:, None])
    drawn = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    ours, theirs = [" ".join(a) for a, _ in drawn], [[" ".join(b)] for _, b in drawn]
    for order in range(1, 5):
        assert scores[order - 1, 0] == pytest.approx(float(bleu_score(ours, theirs, n_gram=order)), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_longest_common_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else max(table[i, j + 1], table[i + 1, j])
    assert longest_common_subsequence(a, b) == table[-1, -1]


def test_rouge_l_by_hand() -> None:
    generated = ["the gunman kill police", "", "no effusion"]
    references = ["police killed the gunman", "clear lungs", "no effusion"]
    rouge = RougeL([words_of(text) for text in generated], [words_of(text) for text in references])
    # "the gunman": 2 words of 4 and 4; nothing; all.
    assert rouge(np.eye(3, dtype=np.float32))[0].tolist() == [0.5, 0.0, 1.0]
    assert rouge(np.array([[1.0], [1.0], [2.0]]))[0, 0] == pytest.approx(0.625)


def test_words_are_compared_without_case_accents_and_white_space() -> None:
    assert words_of("Épanchement  PLEURAL (5.2 mm).") == words_of("epanchement pleural ( 5 . 2 mm ) .")


def test_label_f1_is_that_of_sklearn() -> None:
    generator = np.random.default_rng(1)
    generated, references = generator.random((2, 30, 5)) < 0.3
    references[:, 4] = False  # in no reference: no part of the macro mean
    weights = generator.integers(1, 4, 30)
    drawn = np.repeat(np.arange(30), weights)
    micro, macro = LabelF1(generated, references)(weights[:, None].astype(np.float32))[:, 0]
    assert micro == pytest.approx(f1_score(references[drawn], generated[drawn], average="micro"))
    assert macro == pytest.approx(f1_score(references[drawn][:, :4], generated[drawn][:, :4], average="macro"))
