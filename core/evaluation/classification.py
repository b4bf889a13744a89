"""Classification from a transferred encoder as labels get fewer: a linear probe, or encoder and head fine-tuned.

Both give logits of the test images; `core.evaluation.comparison` makes figures of them.

Letters: n = images, K = labels, D = width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluation.augmentation import moved
from core.evaluation.comparison import Areas, labels_told
from core.evaluation.embed import precision
from core.evaluation.fitting import FitConfig, drawn, fit
from core.evaluation.images import ImageSplit, halves_by_patient, pooled_features, share_of_patients
from core.evaluation.probe import Column, Fits, LinearProbe, fit_probes
from core.evaluation.statistics import LEAST_PATIENTS
from core.models.vision import VisionEncoder


@dataclass(frozen=True, kw_only=True)
class Features:
    """Pooled features `[n, D]` of the three splits of a frozen encoder: what every share and seed of a probe shares."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def of(
        cls, encoder: VisionEncoder, train: ImageSplit, validation: ImageSplit, test: ImageSplit,
        *, autocast: torch.dtype | None = None,
    ) -> Features:  # fmt: skip
        """Each split through the encoder once."""
        found = (pooled_features(encoder, split, autocast=autocast) for split in (train, validation, test))
        return cls(**dict(zip(("train", "validation", "test"), found, strict=True)))


def probe_at_share(
    features: Features,
    train: ImageSplit,
    validation: ImageSplit,
    share: float,
    seed: int,
    config: LinearProbe.Config | None = None,
) -> Fits:
    """Logistic regressions taught with the labels of a share of the patients; the strength is chosen on as few.

    `scores [n, K]` of the test split; a label that the share leaves with one class has score 0 everywhere, AUC 0.5.
    """
    rows, choice = share_of_patients(train, share, seed), share_of_patients(validation, share, seed)
    column = Column(
        train=features.train[rows].numpy(), validation=features.validation[choice].numpy(), test=features.test.numpy()
    ).standardised(np.ones(len(rows), dtype=bool))
    return fit_probes(
        [column] * len(train.label_names), train.labels[rows].numpy(), validation.labels[choice].numpy(),
        config or LinearProbe.Config(),
    )  # fmt: skip


def fine_tune_at_share(
    encoder: VisionEncoder,
    train: ImageSplit,
    validation: ImageSplit,
    test: ImageSplit,
    share: float,
    config: FitConfig,
    *,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Logits `[n, K]` of the test images after a copy of the encoder and a linear head learned from a share.

    Images are moved a little at every step. Labels that are uncertain or not annotated are not asked. The weights that
    tell best the labels of as few validation patients count. Where these have no label that five of them have and five
    lack, the choice would be chance, and the last count.
    """
    rows = share_of_patients(train, share, config.seed)
    held = validation.rows(share_of_patients(validation, share, config.seed))
    device = encoder.patch.weight.device
    learner = copy.deepcopy(encoder).requires_grad_(True)
    head = drawn(lambda: nn.Linear(encoder.config.width, len(train.label_names)), config.seed).to(device)
    steps = itertools.count()

    def logits_of(pixels: Tensor) -> Tensor:
        with precision(device, autocast):
            pooled = learner(pixels.to(device)).pooled
        found: Tensor = head(pooled.float())
        return found

    def loss_of(at: Tensor) -> Tensor:
        labels = train.labels[rows[at]].to(device)
        asked = ((labels == 0) | (labels == 1)).float()
        pixels = moved(train.pixel_values[rows[at]], config.seed, next(steps), rows[at].tolist())
        each = F.binary_cross_entropy_with_logits(logits_of(pixels), labels.clamp(min=0).float(), reduction="none")
        return (each * asked).sum() / asked.sum().clamp(min=1)

    def scores_of(split: ImageSplit) -> np.ndarray:
        found = [logits_of(pixels).cpu() for pixels in split.pixel_values.split(64)]
        return torch.cat(found).double().numpy()

    truth, patients = held.labels.numpy(), held.patient_key.numpy()
    told = labels_told(truth, patients, LEAST_PATIENTS)

    everyone = np.arange(len(held))

    def judge() -> float:
        macro = Areas(scores=[scores_of(held)[:, told]], truth=truth[:, told], patient_key=patients)(everyone)
        assert macro is not None, "it is not asked without labels to tell"
        return float(macro(np.ones((len(held), 1)))[0])

    fit(head, learner, len(rows), loss_of, config, on_step, judge if told else None)
    with torch.no_grad():
        return scores_of(test)


def with_validation(train: ImageSplit, validation: ImageSplit | None, seed: int) -> tuple[ImageSplit, ImageSplit]:
    """The splits that teach and that choose; a fifth of the training patients chooses where there is no other."""
    if validation is not None:
        return train, validation
    taught, held = halves_by_patient(train, 0.2, seed)
    return train.rows(taught), train.rows(held)
