"""Zero-shot by anatomy: the right anatomy, the softmax over two prompts, missing anatomies; AUC of taught labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import normalize

from configs import ct, prompts
from core.evaluation.anatomy import AnatomyZeroShot, LabelAreas
from core.evaluation.embed import EmbeddedSplit, embed_split
from core.evaluation.probe import AnatomyProbe, LinearProbe
from core.evaluation.retrieval import Retrieval
from core.evaluation.zero_shot import ZeroShot
from shards.batch import NOT_ANNOTATED, Batch
from shards.errors import ConfigError, DataError

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


def test_figures_under_other_wordings_and_decisions_at_thresholds_of_other_patients() -> None:
    split, task = studies(200), Task()
    validation, test = split.rows(torch.arange(0, 199, 2)), split.rows(torch.arange(1, 199, 2))
    swapped = {name: {"positive": sides["negative"], "negative": sides["positive"]} for name, sides in PROMPTS.items()}
    evaluator = AnatomyZeroShot(PROMPTS, ANATOMY_OF, CONFIG, [PROMPTS, swapped, PROMPTS])
    found = dict(evaluator.run(task, task, test, LABELS, ANATOMIES, CPU, validation=validation))  # type: ignore[arg-type]
    wordings = evaluator.report()["paraphrases"]
    area = found["macro"]
    assert wordings["macro"]["each"] == pytest.approx([area, 1 - area, area])
    assert found["macro_paraphrased"] == pytest.approx(np.mean([area, 1 - area, area]))
    assert wordings["macro"]["deviation"] == pytest.approx(np.std([area, 1 - area, area], ddof=1))
    assert wordings["labels"]["cyst"]["each"][0] == pytest.approx(found["cyst"])

    decisions = evaluator.report()["decisions"]
    truth, scores = (test.labels[:, 1].numpy(), [])
    for one in (validation, test):
        logits = one.need("anatomy_embeds")[:, 0] @ (task.texts[0] - task.texts[1])
        scores.append(logits.numpy())
    known = [
        np.isin(one.labels[:, 1], (0, 1)) & (one.need("anatomy_present")[:, 0] > 0).numpy()
        for one in (validation, test)
    ]
    wrong, right, cuts = roc_curve(
        validation.labels[:, 1].numpy()[known[0]], scores[0][known[0]], drop_intermediate=False
    )
    cut = cuts[np.argmin(np.hypot(wrong, 1 - right))]
    of_label = decisions["labels"]["effusion"]
    assert of_label["threshold"] == pytest.approx(float(cut), abs=1e-6) and decisions["validation_studies"] == 100
    called, truth = scores[1][known[1]] >= cut - 1e-7, truth[known[1]]
    for name, value in {
        "accuracy": accuracy_score(truth, called),
        "weighted_f1": f1_score(truth, called, average="weighted"),
        "precision": precision_score(truth, called),
        "sensitivity": recall_score(truth, called),
        "specificity": recall_score(truth, called, pos_label=0),
    }.items():
        assert of_label[name]["value"] == pytest.approx(value), name
        assert of_label[name]["low"] < value < of_label[name]["high"]
        assert decisions["macro"][name]["value"] == pytest.approx(
            np.mean([one[name]["value"] for one in decisions["labels"].values()])
        )


def test_reports_are_retrieved_by_the_anatomies_that_both_sides_have() -> None:
    generator = torch.Generator().manual_seed(4)
    count, anatomies, width = 30, 3, 4
    sides = [normalize(torch.randn(count, anatomies, width, generator=generator), dim=2) for _ in range(2)]
    shown, said = (torch.rand(count, anatomies, generator=generator) < share for share in (0.7, 0.8))
    shown[:2], said[:2] = False, True  # no anatomy, no part in it
    text_key = torch.randint(1, 4, (count, anatomies), generator=generator)
    zeros = torch.zeros(count, dtype=torch.int64)
    split = EmbeddedSplit(
        image_embeds=None, text_embeds=None, features=None, labels=torch.zeros(count, 1), report_key=zeros,
        patient_key=torch.arange(count) // 2, sample_id=zeros, anatomy_embeds=sides[0], anatomy_present=shown.float(),
        anatomy_text_embeds=sides[1], anatomy_said=said.float(), anatomy_text_key=text_key,
    )  # fmt: skip
    retrieval = Retrieval(Retrieval.Config(replicates=10, block=7))
    found = dict(retrieval.run(split))
    kept = [i for i in range(count) if (shown[i] & said[i]).any()]
    texts = [(text_key[i] * said[i]).tolist() for i in range(count)]
    same_text = {(i, j): texts[i] == texts[j] for i in kept for j in kept}
    near = {}
    for i in kept:
        for j in kept:
            both = [a for a in range(anatomies) if shown[i, a] and said[j, a]]
            near[i, j] = np.mean([float(sides[0][i, a] @ sides[1][j, a]) for a in both]) if both else -1.0
    for direction, pair in (("image_to_text", lambda i, j: (i, j)), ("text_to_image", lambda i, j: (j, i))):
        ranks = []
        for i in kept:
            best = max(near[pair(i, j)] for j in kept if same_text[i, j])
            ranks.append(1 + sum(near[pair(i, j)] >= best - 1e-7 for j in kept if not same_text[i, j]))
        assert found[f"{direction}_median_rank"] == np.median(ranks)
        for k in (1, 5, 10):
            assert found[f"{direction}_r{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
    report = retrieval.report()
    assert report["studies"] == len(kept) and report["without_shared_anatomy"] == count - len(kept) >= 2
    assert report["compared_by"] == "anatomies"
    with pytest.raises(DataError, match="nothing to retrieve"):
        next(retrieval.run(replace(split, anatomy_present=torch.zeros(count, anatomies))))


def test_a_probe_reads_each_label_from_its_own_anatomy_with_fewer_and_fewer_labels() -> None:
    count = 600
    generator = torch.Generator().manual_seed(6)
    embeds = torch.randn(count, 2, 6, generator=generator)
    labels = torch.stack([embeds[:, 1, 0] > 0, embeds[:, 0, 3] > 0.3, embeds[:, 0, 0] > 0], dim=1).to(torch.int8)
    zeros = torch.zeros(count, dtype=torch.int64)
    split = EmbeddedSplit(
        image_embeds=None, text_embeds=None, features=None, labels=labels, report_key=zeros,
        patient_key=torch.arange(count) // 2, sample_id=zeros, anatomy_embeds=embeds,
        anatomy_present=(torch.rand(count, 2, generator=generator) < 0.9).float(),
    )  # fmt: skip
    train, test = split.rows(torch.arange(400)), split.rows(torch.arange(400, count))
    probe = AnatomyProbe(ANATOMY_OF, LinearProbe.Config(replicates=20), label_shares=(0.003, 0.1, 1.0))
    steps: list[tuple[int, int]] = []
    found = dict(probe.run(train, None, test, LABELS, ANATOMIES, lambda *step: steps.append(step)))
    shares = probe.report()["shares"]
    assert found["cyst_at_100"] > 0.97 and found["effusion_at_100"] > 0.97
    assert found["macro_at_100"] > found["macro_at_10"] > 0.6 and "unasked_at_100" not in found
    # Too few for both classes: a score that cannot tell, over the same labels.
    assert shares["0.3"]["labels_not_fitted"] == ["cyst", "effusion"] and found["macro_at_0.3"] == 0.5
    assert shares["10"]["studies"]["train"] < 60 and shares["100"]["macro_over"] == shares["0.3"]["macro_over"]
    absent = int((test.need("anatomy_present")[:, 1] == 0).sum())
    of_cyst = shares["100"]["labels"]["cyst"]
    assert of_cyst["positives"] + of_cyst["negatives"] == len(test) - absent
    assert steps == [(1, 3), (2, 3), (3, 3)]
    unlabelled = replace(train, labels=torch.full_like(train.labels, NOT_ANNOTATED))
    with pytest.raises(ConfigError, match="no label has both"):
        list(probe.run(unlabelled, None, test, LABELS, ANATOMIES))
