"""Sentences of reports in another order, some left out: keyed, never empty, and equal reports stay equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from configs.chest import umcl_b16, umcl_tiny
from shards.batch import StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.transforms import report_sentences
from shards.transforms.report_sentences import varied
from tests.shards.test_label_text import loader_of, mixture, packed

FINDINGS = ["The heart is large.", "Small left effusion.", "No pneumothorax.", "Lungs are clear.", "Dr. Who agrees."]
IMPRESSION = ["Cardiomegaly.", "Effusion."]
BOTH = ("findings", "impression")


def study(**report: str) -> StudyRecord:
    view = ViewRecord(id="0", height=8, width=8, bits=8)
    return StudyRecord(study="a", patient="b", report=report, views=[view])


def test_order_and_choice_are_keyed_and_every_sentence_whole() -> None:
    record = study(findings=" ".join(FINDINGS), impression=" ".join(IMPRESSION), history="Cough.")
    config = report_sentences.Config(shuffle=True, drop=0.3)
    left_out, orders = Counter[int](), set()
    for epoch in range(300):
        found = varied(config, record, BOTH, (0, epoch, 7)).report
        assert found == varied(config, record, BOTH, (0, epoch, 7)).report
        findings = [sentence for sentence in FINDINGS if sentence in found["findings"]]
        impression = [sentence for sentence in IMPRESSION if sentence in found["impression"]]
        assert sum(map(len, findings)) + max(0, len(findings) - 1) == len(found["findings"])
        assert found["impression"] == " ".join(impression), "the impression keeps its order"
        left_out[7 - len(findings) - len(impression)] += 1
        orders.add(found["findings"])
    assert set(left_out) == {0, 1, 2} and min(left_out.values()) > 60  # of 7, up to 2.1
    assert len(orders) > 100
    assert varied(report_sentences.Config(), record, BOTH, (0, 0, 7)).report["findings"] == " ".join(FINDINGS)


@pytest.mark.parametrize("text", ["One sentence", "One. Two.", "- \n1. Clear lungs.\n...", "(a) (b)"])
def test_something_is_always_left(text: str) -> None:
    config = report_sentences.Config(shuffle=True, drop=0.99)
    for epoch in range(50):
        assert any(map(str.isalnum, varied(config, study(findings=text), BOTH, (1, epoch, 0)).report["findings"]))


def test_training_reads_so_and_validation_does_not(tmp_path: Path) -> None:
    manifest = packed(tmp_path / "a")
    sets = mixture(manifest)[:1] * 3
    config = report_sentences.Config(shuffle=True, drop=0.5)
    with loader_of(sets).start(0) as plain, loader_of(sets, sentences=config).start(0) as other:
        for _ in range(3):
            ours, theirs = next(other), next(plain)
            assert ours["report_key"].equal(theirs["report_key"])
            assert not ours["attention_mask"].equal(theirs["attention_mask"])
    with pytest.raises(ConfigError, match=r"data\.sentences changes whole reports"):
        loader_of(sets, (*("pixel_values", "input_ids"), "token_weight"), sentences=config, label_text=None)
    with pytest.raises(ConfigError, match=r"drop=1\.0 is outside"):
        report_sentences.Config(drop=1.0)
    assert umcl_b16().data.sentences == report_sentences.Config(shuffle=True, drop=0.2)
    assert not umcl_tiny().data.sentences.changes
