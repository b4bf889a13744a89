"""Zero-shot by anatomy: the right anatomy, the softmax over two prompts, missing anatomies; AUC of taught labels."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from configs import ct, prompts
from core.evaluation.anatomy import AnatomyZeroShot, LabelAreas
from core.evaluation.embed import EmbeddedSplit, embed_split
from core.evaluation.zero_shot import ZeroShot
from shards.batch import NOT_ANNOTATED, Batch
from shards.errors import ConfigError

CPU = torch.device("cpu")
ANATOMIES, LABELS = ("lung", "liver"), ("cyst", "effusion", "unasked")
PROMPTS = {name: {"positive": [f"{name}."], "negative": [f"Not {name}."]} for name in ("effusion", "cyst")}
ANATOMY_OF = {"effusion": "lung", "cyst": "liver"}
CONFIG = ZeroShot.Config(replicates=20)


class Task:
    """Texts have fixed places; anatomies are what the batch says."""

    texts = normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), dim=1)

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        known = ["effusion.", "Not effusion.", "cyst.", "Not cyst."]
        ids = torch.tensor([[known.index(text)] for text in texts])
        return ids, torch.ones_like(ids).bool()

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.texts[input_ids[:, 0]]

    def embed_anatomies(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["there"]

    def label_logits(self, batch: Batch) -> Tensor:
        return batch["x"][:, 0, :3]


def studies(count: int = 40) -> EmbeddedSplit:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (count, 3), generator=generator).to(torch.int8)
    labels[3, 0], labels[4, 1] = NOT_ANNOTATED, -1
    batch = {
        "x": normalize(torch.randn(count, 2, 5, generator=generator), dim=2),
        "there": torch.rand(count, 2, generator=generator) < 0.7,
        "valid": torch.arange(count) != 7,
        "labels": labels,
        **dict.fromkeys(("report_key", "patient_key", "sample_id"), torch.arange(count)),
    }
    return embed_split(Task(), [batch], CPU, parts=("anatomy_embeds", "anatomy_present", "label_logits"))  # type: ignore[arg-type]


def test_each_disease_is_looked_for_in_its_own_anatomy_where_that_is_there() -> None:
    split, task = studies(), Task()
    assert len(split) == 39
    evaluator = AnatomyZeroShot(PROMPTS, ANATOMY_OF, CONFIG)
    found = dict(evaluator.run(task, task, split, LABELS, ANATOMIES, CPU))  # type: ignore[arg-type]
    expected, coverage = {}, []
    for label, anatomy, first in (("effusion", 0, 0), ("cyst", 1, 2)):
        truth = split.labels[:, LABELS.index(label)]
        there, annotated = split.need("anatomy_present")[:, anatomy] > 0, (truth == 0) | (truth == 1)
        kept = there & annotated
        logits = split.need("anatomy_embeds")[kept, anatomy] @ task.texts[first : first + 2].T / 0.07
        expected[label] = roc_auc_score(truth[kept], logits.softmax(1)[:, 0])
        coverage.append(float(kept.sum() / annotated.sum()))
    for label, value in expected.items():
        assert found[label] == pytest.approx(value, abs=1e-6)
    assert found["macro"] == pytest.approx(sum(expected.values()) / 2)
    assert found["coverage"] == pytest.approx(sum(coverage) / 2) and found["coverage"] < 0.9
    assert evaluator.report()["labels_left_out"] == ["unasked"]
    with pytest.raises(ConfigError, match=r"no label of this data .* set evaluation\.anatomy_of"):
        next(evaluator.run(task, task, split, LABELS, ("brain",), CPU))  # type: ignore[arg-type]


def test_taught_labels() -> None:
    split = studies()
    found = dict(LabelAreas(CONFIG).run(split, LABELS))
    truth = split.labels[:, 2]
    assert found["unasked"] == pytest.approx(roc_auc_score(truth, split.need("label_logits")[:, 2]))


def test_recipes_know_the_anatomy_and_the_prompts_of_their_labels() -> None:
    for config in (ct.fvlm_tiny(), ct.fvlm_b()):
        asked = config.evaluation
        assert set(asked.anatomy_of) == set(asked.prompts) and set(asked.anatomy_of.values()) <= set(
            config.task.anatomies
        )
    by_anatomy = list(prompts.CT_RATE_ANATOMY.values())
    assert {name: by_anatomy.count(name) for name in set(by_anatomy)} == {
        "lung": 11, "heart": 3, "esophagus": 1, "aorta": 1,
    }  # fmt: skip
