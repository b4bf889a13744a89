"""Targets by labels against their definition, and the loss on them against CLIP's, alone and on two ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import collectives
from core.losses import contrast
from core.losses.agreement import Studies, Target, agreement, itl_loss, label_targets
from shards.batch import NOT_ANNOTATED, UNCERTAIN
from shards.errors import ConfigError
from tests.distributed import run_distributed

STUDIES, CLASSES = 24, 5


def random_studies(*, known: float = 0.7, present: float = 0.4) -> tuple[Studies, Tensor]:
    """Studies with repeated texts and one void, and whose text is a report."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(STUDIES, CLASSES, generator=generator) < present).to(torch.int8)
    labels[torch.rand(STUDIES, CLASSES, generator=generator) > known] = UNCERTAIN
    labels[:3] = NOT_ANNOTATED
    text_key = torch.arange(STUDIES)
    text_key[5] = text_key[4]
    valid = torch.arange(STUDIES) != 7
    labels[7] = NOT_ANNOTATED
    is_report = torch.rand(STUDIES, generator=generator) < 0.6
    return Studies(labels=labels, text_key=text_key, valid=valid), is_report


def targets(studies: Studies, is_report: Tensor, target: Target = "soft", **changed: float) -> Tensor:
    return label_targets(
        studies, studies, is_report, target=target, **{"own_text": 0.5, "threshold": 0.5, **changed}
    )  # fmt: skip


def by_definition(studies: Studies, i: int, j: int) -> float:
    """a_ij of umcl.md 4.1, class by class."""
    y_i, y_j = studies.labels[i].tolist(), studies.labels[j].tolist()
    both = [(float(a), float(b)) for a, b in zip(y_i, y_j, strict=True) if a in (0, 1) and b in (0, 1)]
    norms = [sum(pair[side] for pair in both) ** 0.5 for side in (0, 1)]
    if not min(norms) > 0 or not studies.valid[j]:
        return 0.0
    found = sum(a * b for a, b in both) / (norms[0] * norms[1])
    return found if found >= 0.5 - 1e-9 else 0.0


def test_agreement_is_its_definition_and_symmetric() -> None:
    studies, _ = random_studies()
    a = agreement(studies, studies, 0.5)
    expected = [[by_definition(studies, i, j) for j in range(STUDIES)] for i in range(STUDIES)]
    np.testing.assert_allclose(a.numpy(), expected, rtol=1e-6)
    valid = studies.valid
    assert torch.equal(a[valid][:, valid], a[valid][:, valid].T)
    has_label = valid & (studies.labels == 1).any(dim=1)
    assert (a.diagonal()[has_label] == 1).all() and 0 < (a > 0).float().mean() < 1


@pytest.mark.parametrize("target", ["one_hot", "hard", "soft"])
def test_rows_add_up_to_one_and_void_studies_get_nothing(target: Target) -> None:
    studies, is_report = random_studies()
    q = targets(studies, is_report, target)[studies.valid]
    torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)))
    assert not q[:, ~studies.valid].any() and (q >= 0).all()


@pytest.mark.parametrize("target", ["one_hot", "hard", "soft"])
def test_without_labels_a_text_is_its_own_studys(target: Target) -> None:
    studies, is_report = random_studies()
    unlabelled = replace(studies, labels=torch.full_like(studies.labels, NOT_ANNOTATED), text_key=torch.arange(STUDIES))
    valid = studies.valid
    assert torch.equal(targets(unlabelled, is_report, target)[valid], torch.eye(STUDIES)[valid])


def test_a_report_keeps_half_and_a_text_of_labels_nothing() -> None:
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.int8)
    studies = Studies(labels=labels, text_key=torch.arange(3), valid=torch.ones(3, dtype=torch.bool))
    q = targets(studies, torch.tensor([True, False, True]))
    assert q.tolist() == [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_what_is_not_known_never_moves_a_target() -> None:
    studies, is_report = random_studies()
    labels = studies.labels.clone()
    labels[labels == UNCERTAIN] = NOT_ANNOTATED
    more = torch.cat([labels, torch.full((STUDIES, 3), NOT_ANNOTATED, dtype=torch.int8)], dim=1)
    for target in ("hard", "soft"):
        expected = targets(studies, is_report, target)  # type: ignore[arg-type]
        assert torch.equal(targets(replace(studies, labels=more), is_report, target), expected)  # type: ignore[arg-type]
    # Of a class that j does not know, what i says of it plays no part in their agreement.
    i, j = torch.tensor([[1, 1, 0]], dtype=torch.int8), torch.tensor([[1, UNCERTAIN, 0]], dtype=torch.int8)
    key, valid = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    one, other = (Studies(labels=x, text_key=key, valid=valid) for x in (i, j))
    assert agreement(one, other, 0.0).item() == 1.0


def test_soft_targets_of_single_labels_are_the_hard_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = F.one_hot(torch.randint(0, CLASSES, (STUDIES,), generator=generator), CLASSES).to(torch.int8)
    studies = Studies(labels=labels, text_key=torch.arange(STUDIES), valid=torch.ones(STUDIES, dtype=torch.bool))
    nobody = torch.zeros(STUDIES, dtype=torch.bool)
    same = (labels[:, None] == labels).all(dim=2).float()
    hard = targets(studies, nobody, "hard")
    torch.testing.assert_close(hard, same / same.sum(dim=1, keepdim=True))
    torch.testing.assert_close(targets(studies, nobody, "soft"), hard)


def embeddings(seed: int) -> Tensor:
    return F.normalize(torch.randn(STUDIES, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def shares(rank: int, world_size: int, target: Target) -> dict[str, Any]:
    """Loss and gradients of this rank's rows."""
    studies, is_report = random_studies()
    rows = slice(rank * STUDIES // world_size, (rank + 1) * STUDIES // world_size)
    image, text = (embeddings(seed)[rows].requires_grad_() for seed in (3, 4))
    scale = torch.tensor(5.0, requires_grad=True)
    own = replace(studies, labels=studies.labels[rows], text_key=studies.text_key[rows], valid=studies.valid[rows])
    gathered = collectives.gather(
        {"image_embeds": image, "text_embeds": text, "report_key": own.text_key, "valid": own.valid}
    )  # fmt: skip
    q = label_targets(own, studies, is_report[rows], target=target, own_text=0.5, threshold=0.5)
    found = itl_loss(gathered, scale, q, (agreement(own, studies, 0.5) > 0) & own.valid[:, None])
    gradients = torch.autograd.grad(found.loss, [image, text, scale])
    expected = contrast.info_nce(gathered, scale=scale)
    return {
        "loss": collectives.sum_over_ranks(found.loss).numpy(),
        "pushed_apart": collectives.sum_over_ranks(found.pushed_apart).numpy(),
        "rows": [gradient.numpy() for gradient in gradients[:2]],
        "scale": collectives.sum_over_ranks(gradients[2]).numpy(),
        "clip": collectives.sum_over_ranks(expected.loss).numpy(),
        "clip_rows": [gradient.numpy() for gradient in torch.autograd.grad(expected.loss, [image, text])],
    }


def test_one_hot_targets_are_the_loss_of_clip() -> None:
    found = shares(0, 1, "one_hot")
    np.testing.assert_allclose(found["loss"], found["clip"], rtol=1e-6)
    for ours, theirs in zip(found["rows"], found["clip_rows"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert shares(0, 1, "soft")["pushed_apart"] < found["pushed_apart"] <= 1


def test_two_ranks_give_the_loss_and_gradients_of_one() -> None:
    alone = shares(0, 1, "soft")
    found = run_distributed(shares, 2, args=("soft",))
    for rank in found:
        for name in ("loss", "scale", "pushed_apart"):
            np.testing.assert_allclose(rank[name], alone[name], rtol=1e-5)
    for side in range(2):
        joined = np.concatenate([rank["rows"][side] for rank in found])
        np.testing.assert_allclose(joined, alone["rows"][side], rtol=1e-5, atol=1e-7)


def test_a_ring_is_refused() -> None:
    gathered = replace(collectives.gather({"valid": torch.ones(1, dtype=torch.bool)}), exchange="ring")
    with pytest.raises(ConfigError, match=r"engine\.exchange=gather"):
        itl_loss(gathered, torch.ones(()), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
