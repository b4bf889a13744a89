"""A probe that tells sets apart exactly as far as their embeddings differ."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.embed import EmbeddedSplit
from core.evaluation.probe import LinearProbe
from core.evaluation.set_identity import SetIdentity
from tests.core.test_evaluation import split_of


def embedded(seed: int, mean: float) -> EmbeddedSplit:
    """200 studies of 100 patients, whose keys other sets have, too."""
    images = torch.randn(200, 4, generator=torch.Generator().manual_seed(seed))
    images[:, 2] += mean
    return split_of(images=images, patient_key=torch.arange(200) // 2)


def test_sets_are_told_apart_as_far_as_they_differ() -> None:
    identity = SetIdentity(LinearProbe.Config(replicates=50))
    found = dict(identity.run({"near": embedded(0, 0), "same": embedded(1, 0), "far": embedded(2, 6)}))
    assert found["far"] > 0.99 and found["macro"] == pytest.approx((found["near"] + found["same"] + found["far"]) / 3)
    report = identity.report()
    assert report["protocol"] == "set_identity"
    assert sum(report["studies"].values()) == 600 and 240 < report["studies"]["test"] < 360
    assert report["labels"]["far"]["positives"] % 2 == 0, "a patient is on one side"
    alike = dict(identity.run({"a": embedded(3, 0), "b": embedded(4, 0)}))
    assert alike["a"] == alike["b"] and 0.35 < alike["macro"] < 0.65
