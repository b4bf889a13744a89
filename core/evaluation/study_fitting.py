"""An encoder and small heads taught several targets of studies together: fine-tuning, or training from scratch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluation.augmentation import moved
from core.evaluation.embed import precision
from core.evaluation.fitting import FitConfig, drawn, fit
from core.evaluation.studies import Pool, StudySplit, pool_of
from core.evaluation.targets import Outputs, Target, ascending, ordinal_loss
from core.models.vision import VisionEncoder


class Heads(nn.Module):
    """One linear output a target; bounds of grades; numbers in deviations from the taught mean."""

    def __init__(self, width: int, targets: Sequence[Target], taught: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.linear = nn.Linear(width, len(targets))
        self.bounds = nn.ParameterList(
            nn.Parameter(torch.cat([torch.tensor([-1.0]), torch.zeros(max(0, one.grades - 2))])) for one in targets
        )
        known = [values[np.isfinite(values)] for values in taught]
        self.mean = [float(values.mean()) if len(values) else 0.0 for values in known]
        self.deviation = [float(values.std()) or 1.0 if len(values) else 1.0 for values in known]

    def loss(self, x: Tensor, truth: Tensor) -> Tensor:
        """`x [n, D]`, `truth [n, targets]` with NaN where it is not known -> mean over targets that someone knows."""
        scores, losses = self.linear(x), []
        for place, target in enumerate(self.targets):
            known = torch.isfinite(truth[:, place])
            if not known.any():
                continue
            score, wanted = scores[known, place], truth[known, place]
            if target.kind == "label":
                losses.append(F.binary_cross_entropy_with_logits(score, wanted))
            elif target.kind == "grade":
                bounds = ascending(self.bounds[place])
                grade = wanted.long().clamp(max=len(bounds))  # a validation study may have one that nobody taught
                losses.append(ordinal_loss(score, bounds, grade).mean())
            else:
                losses.append(F.smooth_l1_loss(score, (wanted - self.mean[place]) / self.deviation[place]))
        return torch.stack(losses).mean() if losses else scores.sum() * 0.0

    def outputs(self, x: Tensor) -> dict[str, Outputs]:
        """Target -> what `core.evaluation.targets.scored_by` reads."""
        scores = self.linear(x).double().cpu()
        found: dict[str, Outputs] = {}
        for place, target in enumerate(self.targets):
            score = scores[:, place].numpy()
            if target.kind == "label":
                found[target.name] = {"score": score}
            elif target.kind == "grade":
                bounds = ascending(self.bounds[place]).detach().double().cpu().numpy()
                grade = (score[:, None] > bounds).sum(axis=1)
                found[target.name] = {"score": score, "value": grade.astype(np.float64)}
            else:
                found[target.name] = {"value": score * self.deviation[place] + self.mean[place]}
        return found


def fine_tune_targets(
    targets: Sequence[Target],
    encoder: VisionEncoder,
    pool: Pool | None,
    splits: Mapping[str, StudySplit],
    rows: Mapping[str, np.ndarray],
    config: FitConfig,
    *,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Outputs]:
    """Target -> what is said of all test studies, after a copy of the encoder learned from `rows["train"]`.

    A pool is used as it is. The weights with the least loss on `rows["validation"]` count.
    """
    device = encoder.patch.weight.device
    truth = {name: np.stack([one.truth(split) for one in targets], axis=1) for name, split in splits.items()}
    learner = copy.deepcopy(encoder).requires_grad_(True)
    width, taught = encoder.config.width, truth["train"][rows["train"]]
    heads = cast(Heads, drawn(lambda: Heads(width, targets, list(taught.T)), config.seed)).to(device)
    steps = itertools.count()

    def features(split: StudySplit, chosen: np.ndarray, step: int | None = None) -> Tensor:
        pixels, of = split.views_of(chosen)
        if step is not None:
            pixels = moved(pixels, config.seed, step, chosen[of.numpy()].tolist())
        with precision(device, autocast):
            pooled = learner(pixels.to(device)).pooled
        return pool_of(pool)(pooled.float(), of.to(device), len(chosen))

    def loss_of(at: Tensor) -> Tensor:
        chosen = rows["train"][at.numpy()]
        wanted = torch.from_numpy(truth["train"][chosen]).float().to(device)
        return heads.loss(features(splits["train"], chosen, next(steps)), wanted)

    def everything(split: str, chosen: np.ndarray) -> Tensor:
        return torch.cat([features(splits[split], part) for part in np.array_split(chosen, len(chosen) // 64 + 1)])

    def judge() -> float:
        wanted = torch.from_numpy(truth["validation"][rows["validation"]]).float().to(device)
        return -float(heads.loss(everything("validation", rows["validation"]), wanted))

    fit(heads, learner, len(rows["train"]), loss_of, config, on_step, judge if len(rows["validation"]) else None)
    with torch.no_grad():
        return heads.outputs(everything("test", np.arange(len(splits["test"]))))
