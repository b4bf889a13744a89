"""ECAMP's text: spans become tokens, masks have their rates, weights add up, budgets hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.batch import FIELDS, Distilled, StudyRecord, ViewRecord
from shards.decode import Decoder
from shards.errors import BadSampleError, ConfigError
from shards.ingest.phantom_chest import ChestPhantom
from shards.loader import Loader
from shards.tokenizer import train_wordpiece
from shards.transforms.entity_masking import (
    BOILERPLATE,
    DESCRIPTOR,
    ENTITY,
    Config,
    build_mlm,
    mark_report,
    tokenise,
    weights,
)
from shards.transforms.masking import Config as Masking
from shards.writer import WriterConfig, write_shards

FINDINGS = "There is no evidence of effusion.  Small left\n pneumothorax is seen. The heart is normal."
TOKENIZER = train_wordpiece([FINDINGS, "There is a pneumothorax. There is no effusion."] * 2, 120)


def record_of(findings: str = FINDINGS, **changed: Any) -> StudyRecord:
    """Impression is joined behind the findings in the spans' text, as it is sorted."""

    def span(words: str) -> tuple[int, int]:
        return findings.index(words), findings.index(words) + len(words)

    told = (("effusion", "absent", "There is no effusion."), ("pneumothorax", "present", "There is a pneumothorax."),
            ("heart", "absent", "There is no cardiomegaly."))  # fmt: skip
    body: dict[str, Any] = {
        "study": "s", "patient": "p", "report": {"impression": "Pneumothorax.", "findings": findings},
        "distilled": [
            Distilled(entity=name, status=status, sentence=sentence, spans=(span(name),))  # type: ignore[arg-type]
            for name, status, sentence in told
        ],
        "boilerplate": [span("There is no evidence of")],
        "descriptors": [span("evidence of"), span("Small left")],
        "views": [ViewRecord(id="0", height=8, width=8)],
    }  # fmt: skip
    return StudyRecord(**(body | changed))


def test_spans_are_found_again_in_the_text_that_is_read() -> None:
    marked = mark_report(record_of(), ("impression", "findings"))
    text, kinds = marked.report.text, marked.report.kinds

    def words(bit: int) -> list[str]:
        shown = "".join(c if kind & bit else " " for c, kind in zip(text, kinds, strict=True))
        return shown.split()

    assert text.startswith("Pneumothorax. There is no")
    assert words(ENTITY) == ["effusion", "pneumothorax", "heart"]
    assert words(DESCRIPTOR) == ["evidence", "of", "Small", "left"]
    assert words(BOILERPLATE) == ["There", "is", "no", "evidence", "of"]
    assert [text[start:].split()[0] for start in marked.report.breaks[:-1]] == [
        "Pneumothorax.",
        "There",
        "Small",
        "The",
    ]
    denied = marked.distilled[0]
    assert [denied.text[i] for i in np.flatnonzero(denied.kinds & ENTITY)] == list("effusion")
    assert "".join(c for c, kind in zip(denied.text, denied.kinds, strict=True) if kind & BOILERPLATE) == "There is no"


def test_a_span_outside_of_the_report_makes_the_sample_bad() -> None:
    with pytest.raises(ValueError, match="outside of the report"):
        record_of(descriptors=[(0, 1000)])
    with pytest.raises(BadSampleError, match="an entity lies outside of the report"):
        mark_report(record_of(entities=[{"concept": "x", "span": [5, 1000]}]), ("findings",))


def rows_of(config: Config, rows: int, length: int = 64, epoch: int = 0, train: bool = True) -> Any:
    marked = mark_report(record_of(), ("findings", "impression"))
    ids = np.arange(rows)
    epochs = np.full(rows, epoch)
    return tokenise(config, TOKENIZER, [marked] * rows, 7, epochs, ids, length=length, train=train)


def test_distilled_sentences_stand_between_sentences_within_their_budget() -> None:
    config = Config(distilled=0.8, distilled_tokens=60)
    tokens = rows_of(config, 400, length=128)
    texts = TOKENIZER.decode([row[seen].tolist() for row, seen in zip(tokens.ids, tokens.seen, strict=True)])
    with_them = ["there is a pneu" in text or "there is no eff" in text for text in texts]
    assert abs(np.mean(with_them) - 0.8) < 0.06
    assert len(set(texts)) == 5 + 1  # four sentences and the end to stand at, or none at all
    assert not tokens.cut.any()
    assert not any("there is a pneu" in text for text in TOKENIZER.decode(rows_of(config, 50, 128, train=False).ids))

    short = rows_of(config, 50, length=48)
    assert (short.seen.sum(axis=1) <= 48).all()
    whole = (tokens.words >= 0).sum(axis=1)
    np.testing.assert_array_equal((short.words >= 0).sum(axis=1) + short.cut, whole[:50])
    dropped = rows_of(replace(config, distilled_tokens=12), 50, length=128).dropped
    assert set(dropped.tolist()) <= {0, 1, 2} and dropped.max() > 0


def test_budgets_without_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="no room for one distilled sentence"):
        Config(distilled_tokens=4)
    with pytest.raises(ConfigError, match=r"more than half of data\.text_length=64"):
        Config(distilled_tokens=40).check_room(64)
    with pytest.raises(ConfigError, match=r"outside \[0, 1\]"):
        Config(descriptor=1.5)


def random_rows(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Words of one to four tokens of random classes between two special tokens; every tenth row has no entity."""
    generator = np.random.default_rng(seed)
    words, kinds = np.full((rows, 130), -1), np.zeros((rows, 130), dtype=np.uint8)
    for row in range(rows):
        numbers = np.repeat(np.arange(60), generator.integers(1, 5, 60))[: generator.integers(40, 120)]
        of_word = generator.choice([0, 0, 0, ENTITY, DESCRIPTOR, BOILERPLATE, DESCRIPTOR | BOILERPLATE], 60)
        of_word = of_word & ~ENTITY if row % 10 == 0 else np.r_[ENTITY, of_word[1:]]
        words[row, 1 : 1 + len(numbers)] = numbers
        kinds[row, 1 : 1 + len(numbers)] = of_word[numbers]
    return words, kinds


def masks_of(config: Config, words: np.ndarray, kinds: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(len(words))
    return build_mlm(config, 3, np.full(len(words), epoch), ids, words, kinds)


@pytest.mark.parametrize("compat", ["none", "original"])
def test_masking_rates_on_many_tokens(compat: Any) -> None:
    words, kinds = random_rows(6000)
    mask, _ = masks_of(Config(compat=compat), words, kinds)
    has_entity = ((kinds & ENTITY) != 0).any(axis=1, keepdims=True)
    entity = (kinds & ENTITY) != 0
    descriptor = ((kinds & DESCRIPTOR) != 0) & ~entity & has_entity
    other = (words >= 0) & ~entity & ~descriptor & has_entity
    plain = (words >= 0) & ~has_entity
    expected = ((descriptor, 1.0 if compat == "none" else 0.70), (entity, 0.75), (other, 0.70), (plain, 0.75))
    assert not mask[words < 0].any()
    for which, rate in expected:
        assert abs(mask[which].mean() - rate) < 0.01
    assert ((words >= 0) & has_entity).sum() > 1e5
    uniform, _ = masks_of(Config(masking="uniform", uniform=0.5), words, kinds)
    assert abs(uniform[words >= 0].mean() - 0.5) < 0.01


def test_continuations_share_the_fate_of_their_word_and_draws_are_keyed() -> None:
    words, kinds = random_rows(200)
    mask, weight = masks_of(Config(), words, kinds)
    same_word = (words[:, 1:] == words[:, :-1]) & (words[:, 1:] >= 0)
    assert same_word.sum() > 1000
    assert (mask[:, 1:] == mask[:, :-1])[same_word].all()
    assert ((weight > 0) == mask).all(), "only what is masked is predicted"
    again, _ = masks_of(Config(), words[50:60], kinds[50:60])
    alone = build_mlm(Config(), 3, np.zeros(10), np.arange(50, 60), words[50:60], kinds[50:60])[0]
    np.testing.assert_array_equal(alone, mask[50:60])
    assert (again != mask[50:60]).any() and (masks_of(Config(), words, kinds, epoch=1)[0] != mask).any()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 1.0]))
def test_weights_add_up_to_the_positions(seed: int, kept: float) -> None:
    generator = np.random.default_rng(seed)
    kinds = generator.choice(np.arange(8), (20, 30), p=[0.5, *[0.5 / 7] * 7]).astype(np.uint8)
    kinds[:5] &= ~DESCRIPTOR & 7
    kinds[5:8] &= ~BOILERPLATE & 7
    counted = np.arange(30) < generator.integers(1, 31, (20, 1))
    found = weights(Config(boilerplate_weight=kept), kinds, counted)
    np.testing.assert_allclose(found.sum(axis=1), counted.sum(axis=1), rtol=1e-12)
    assert (found[counted] > 0).all() and not found[~counted].any()


def test_the_released_loss_counts_every_position() -> None:
    config = Config(compat="original", distilled=0.0)
    tokens = rows_of(config, 4, length=80)
    assert tokens.ids.shape == (4, 80) and not tokens.seen.all()
    _, weight = masks_of(config, tokens.words, tokens.kinds)
    assert (weight > 0).all()
    np.testing.assert_allclose(weight.sum(axis=1), 80, rtol=1e-6)
    plain = masks_of(replace(config, rebalance=False), tokens.words, tokens.kinds)[1]
    assert (plain == 1).all()


FIELDS_READ = (
    "pixel_values", "study_index", "valid", "input_ids", "attention_mask", "text_mask", "token_weight", "cut_tokens",
    "dropped_sentences", "patch_mask", "attention_grid",
)  # fmt: skip


def batches(folder: Path, *, entities: bool = True) -> Loader:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        source = ChestPhantom(
            ChestPhantom.Config(train=24, validation=0, test=0, size=32, masks=False, entities=entities)
        )
        write_shards(source, str(folder), WriterConfig())
    config = Loader.Config(
        train=str(manifest), lanes=6, text_length=64, buffer_bytes=1 << 26, decode=Decoder.Config(image_size=32),
        masking=Masking(patch_size=8, patch_mask_ratio=0.75), entity_masking=Config(distilled_tokens=24),
    )  # fmt: skip
    return Loader(config, global_batch_size=6, seed=5, fields=FIELDS_READ, tokenizer=TOKENIZER)


def test_batches_hold_the_fields_and_replay(tmp_path: Path) -> None:
    loader = batches(tmp_path)
    with loader.start(0) as run:
        first = next(run)
        second = next(run)
    with loader.start(1) as run:
        again = next(run)
    assert set(FIELDS_READ) <= first.keys() <= FIELDS.keys()
    assert (first["token_weight"] > 0).equal(first["text_mask"]) and first["text_mask"].any(dim=1).all()
    assert first["attention_grid"].eq(1).all(), "1 where nobody stored a grid"
    assert all(torch.equal(again[name], second[name]) for name in second)


def test_a_set_without_any_entity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study has an entity"):
        batches(tmp_path, entities=False)
