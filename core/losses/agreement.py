"""Contrast of images and texts whose targets follow from labels: two normal studies are no negatives (UMCL, umcl.md 4).

Targets have no form that a kernel could work out tile by tile, since labels are compared where both studies know them
and weak agreement is cut off. Each rank therefore holds its own rows of the matrix of all pairs, b x G, and no rank the
whole. Targets are of fp32 and carry no gradient.

Letters: b = own studies, G = studies of all ranks, C = classes, E = embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from core import collectives
from core.tasks import Gathered
from shards.errors import ConfigError

# Which texts of the batch an image belongs to: equal ones; those of equal labels, too; those that agree, by how far.
Target = Literal["one_hot", "hard", "soft"]

_OUT = -1e4  # logit of a void study: its exponential is 0 beside any other


@dataclass(frozen=True, kw_only=True)
class Studies:
    """What targets follow from. `labels` [n, C] int8: 1 present, 0 absent, anything else: not known.

    `text_key` [n] int64: equal for equal texts. `valid` [n] bool.
    """

    labels: Tensor
    text_key: Tensor
    valid: Tensor

    @property
    def present(self) -> Tensor:
        """[n, C] fp32, 1 where a class is present."""
        return (self.labels == 1).float()

    @property
    def known(self) -> Tensor:
        """[n, C] fp32, 1 where a class is present or absent."""
        return ((self.labels == 1) | (self.labels == 0)).float()


def agreement(own: Studies, all_studies: Studies, threshold: float) -> Tensor:
    """`a [b, G]` in [0, 1]: cosine of the labels over the classes that both studies know; 0 below `threshold`.

    0, too, where one of the two has nothing present among those classes. Symmetric.
    """
    common = own.present @ all_studies.present.T
    # |y_i|^2 over the classes that j knows, and the other way round; both count classes, so they are exact.
    squares = (own.present @ all_studies.known.T) * (own.known @ all_studies.present.T)
    cosine = torch.where(squares > 0, common / squares.clamp(min=1.0).sqrt(), 0.0)
    return torch.where((cosine >= threshold) & all_studies.valid, cosine, 0.0)


def label_targets(
    own: Studies,
    all_studies: Studies,
    text_is_report: Tensor,
    *,
    target: Target,
    own_text: float,
    threshold: float,
) -> Tensor:
    """`q [b, G]`, rows that add up to 1: which texts an image belongs to, and which images its text does (4.2, 4.4).

    Agreement is symmetric and a study is image and text at once, so both directions have the same targets. Equal texts
    share what is a study's own: they cannot be told apart. Rows of void studies mean nothing.

    Args:
        text_is_report: [b] bool. The text of the others is made of their labels, so it is theirs no more than anyone's
            who agrees with them: none of their target is kept for it.
        own_text: share of a report's target that stays with the study's own text; the rest goes to those that agree.
    """
    same_text = (own.text_key[:, None] == all_studies.text_key) & all_studies.valid
    identity = _rows_to_one(same_text.float())
    if target == "one_hot":
        return identity
    if target == "hard":
        annotated = own.present.any(dim=1, keepdim=True) & all_studies.valid
        same_labels = _equal_rows(_states(own), _states(all_studies)) & annotated
        return _rows_to_one((same_text | same_labels).float())
    agrees = agreement(own, all_studies, threshold)
    kept = torch.where(text_is_report, own_text, 0.0)[:, None]
    mixed = kept * identity + (1 - kept) * _rows_to_one(agrees)
    return torch.where(agrees.any(dim=1, keepdim=True), mixed, identity)


def moved_apart(log_probability: Tensor, targets: Tensor, pairs: Tensor) -> Tensor:
    """Which of `pairs [b, G]` a step moves apart: the slope of a pair's loss is its probability less its target."""
    return pairs & (log_probability.exp() > targets)


def _rows_to_one(x: Tensor) -> Tensor:
    """Rows divided by their sums; rows of zeros stay."""
    total = x.sum(dim=1, keepdim=True)
    return x / torch.where(total > 0, total, 1.0)


def _states(studies: Studies) -> Tensor:
    """Labels with one value for everything that is not known."""
    return torch.where(studies.known > 0, studies.labels, -1)


def _equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """[n, C], [m, C] -> [n, m] bool."""
    return (a[:, None] == b).all(dim=2)


class SoftTargetLoss(NamedTuple):
    """This rank's shares. `loss`: half of each direction; the directions themselves, detached, are for metrics.

    `pushed_apart`, detached: of the pairs of different texts whose labels agree, the share that a step moves apart.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    pushed_apart: Tensor


def itl_loss(gathered: Gathered, scale: Tensor, targets: Tensor, false_negatives: Tensor) -> SoftTargetLoss:
    """Cross-entropy of `targets [b, G]` in both directions, each the mean over valid studies (4.3).

    Args:
        gathered: unit-norm fp32 `image_embeds`, `text_embeds [b, E]`, and `valid [b]` bool.
        false_negatives: [b, G] bool, pairs that a loss should not push apart; they are only counted.

    Raises ConfigError where the batch is exchanged by ring, which holds one rank's columns at a time.
    """
    if gathered.exchange != "gather":
        raise ConfigError("targets by labels hold the columns of all ranks; set engine.exchange=gather")
    own, everyone = gathered.own, gathered.all
    studies = everyone["valid"].sum().clamp(min=1)
    shares, pushed = [], []
    for rows, columns in (("image_embeds", "text_embeds"), ("text_embeds", "image_embeds")):
        similarity = scale * own[rows] @ everyone[columns].T
        logits = similarity.masked_fill(~everyone["valid"], _OUT)
        log_probability = logits.log_softmax(dim=1)
        cross_entropy = -(targets * log_probability).sum(dim=1)
        shares.append(torch.where(own["valid"], cross_entropy, 0.0).sum() / studies)
        pushed.append(moved_apart(log_probability.detach(), targets, false_negatives))
    counts = torch.stack([torch.stack(pushed).sum(), 2 * false_negatives.sum()]).float()
    pairs = collectives.sum_over_ranks(counts)[1].clamp(min=1)
    image_to_text, text_to_image = shares
    return SoftTargetLoss(
        loss=(image_to_text + text_to_image) / 2,
        image_to_text=image_to_text.detach(),
        text_to_image=text_to_image.detach(),
        pushed_apart=counts[0] / pairs,
    )
