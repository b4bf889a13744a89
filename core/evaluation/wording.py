"""How far zero-shot classification hangs on the words of prompts; learned prompts beside written ones (umcl.md 7)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from core.evaluation.embed import EmbeddedSplit, Encoders, precision
from core.evaluation.statistics import Estimate, areas_under_curve
from core.evaluation.zero_shot import Encode, Prompts, ZeroShot, scores_of
from core.losses.agreement import Studies, agreement, label_targets, moved_apart
from shards.errors import ConfigError

PAIRS_OF = 96  # studies are compared in batches of so many, as a tiny recipe does


@runtime_checkable
class PromptedTask(Protocol):
    """A task with learned prompts."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def class_directions(self) -> Tensor:
        """[E, C]."""


@runtime_checkable
class LabelledTargets(Protocol):
    """A contrast whose targets follow from labels; others have equal texts as positives."""

    def targets(self, own: Studies, all_studies: Studies, text_is_report: Tensor) -> Tensor:
        """[b, G]."""


class Wording:
    """Macro AUC of written prompts, of each paraphrase of them, and of the task's learned prompts if it has some.

    All over the same labels, those that each of them knows. Beside them, of the pairs of studies whose labels agree
    by half or more while their reports differ, the share that a training step would push apart.
    """

    protocol = "wording"

    def __init__(self, prompts: Prompts, paraphrases: Sequence[Prompts], config: ZeroShot.Config | None = None) -> None:
        """Raises ConfigError for prompts that cannot be used, and without a second wording."""
        self._written = ZeroShot(prompts, config)
        self._paraphrases = [ZeroShot(other, config) for other in paraphrases]
        if len(self._paraphrases) < 2:
            raise ConfigError(f"{len(self._paraphrases)} other wordings have no spread; give two or more")
        self._report: dict[str, Any] = {}

    def run(
        self,
        task: Encoders,
        tokenizer: Encode,
        split: EmbeddedSplit,
        labels: Sequence[str],
        device: torch.device,
        autocast: torch.dtype | None = None,
        *,
        with_text: EmbeddedSplit | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Yields (figure, value). `labels` name the columns of `split.labels`; `with_text`: studies with a report.

        Raises ConfigError when no label has prompts of every wording.
        """
        names = [name for name in self._written.scored(labels) if all(name in one.prompts for one in self._paraphrases)]
        bank = _bank(task, device, autocast)
        if bank:
            names = [name for name in names if name in bank]
        if not names:
            raise ConfigError(f"no label of {', '.join(labels)} has prompts of every wording")
        embeds, patients = split.need("image_embeds"), split.patient_key.numpy()
        truth = split.labels[:, [list(labels).index(name) for name in names]].numpy()
        config = self._written.config

        def macro(directions: Tensor, replicates: int) -> Estimate:
            return areas_under_curve(
                scores_of(embeds, directions), truth, patients, names,
                seed=config.seed, replicates=replicates, level=config.level,
            ).macro  # fmt: skip

        def of_prompts(one: ZeroShot, replicates: int) -> Estimate:
            return macro(one.directions(task, tokenizer, names, device, autocast), replicates)

        each = [of_prompts(one, 1).value for one in self._paraphrases]
        figures = {
            "written": of_prompts(self._written, config.replicates),
            "paraphrases_mean": _plain(statistics.fmean(each)),
            "paraphrases_deviation": _plain(statistics.stdev(each)),
        }
        if bank:
            figures["learned"] = macro(torch.stack([bank[name] for name in names], dim=1), config.replicates)
        pushed = None if with_text is None else false_negatives_pushed_apart(task, with_text)
        if pushed is not None:
            figures["false_negatives_pushed_apart"] = _plain(pushed)
        self._report = {
            "protocol": self.protocol,
            "studies": len(split),
            "level": config.level,
            "labels": names,
            "figures": {name: figure.to_json() for name, figure in figures.items()},
            "paraphrases": each,
        }
        yield from ((name, figure.value) for name, figure in figures.items())

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON."""
        return self._report


def _plain(value: float) -> Estimate:
    return Estimate(value=value, low=float("nan"), high=float("nan"))


@torch.no_grad()
def _bank(task: Encoders, device: torch.device, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Class -> direction [E] fp32 on the CPU, of learned prompts; none without them."""
    if not isinstance(task, PromptedTask) or not task.class_names:
        return {}
    was_training = getattr(task, "training", False)
    if isinstance(task, torch.nn.Module):
        task.eval()
    try:
        with precision(device, autocast):
            directions = task.class_directions().float().cpu()
    finally:
        if isinstance(task, torch.nn.Module):
            task.train(was_training)
    return dict(zip(task.class_names, directions.T, strict=True))


@torch.no_grad()
def false_negatives_pushed_apart(task: object, split: EmbeddedSplit, threshold: float = 0.5) -> float | None:
    """Share of the pairs of studies that agree, and directions, whose loss falls as they move apart (umcl.md 7).

    Studies are compared with those of their batch of PAIRS_OF. None without such a pair, or without a scale of logits.
    """
    scale = task.logit_scale() if callable(getattr(task, "logit_scale", None)) else None  # type: ignore[attr-defined]
    if scale is None:
        return None
    pushed = pairs = 0
    for start in range(0, len(split), PAIRS_OF):
        rows = slice(start, start + PAIRS_OF)
        images, texts = split.need("image_embeds")[rows], split.need("text_embeds")[rows]
        everyone = torch.ones(len(images), dtype=torch.bool)
        studies = Studies(labels=split.labels[rows], text_key=split.report_key[rows], valid=everyone)
        if isinstance(task, LabelledTargets):
            targets = task.targets(studies, studies, everyone)
        else:
            targets = label_targets(studies, studies, everyone, target="one_hot", own_text=1.0, threshold=threshold)
        agree = agreement(studies, studies, threshold) > 0
        agree &= studies.text_key[:, None] != studies.text_key
        logits = scale.float().cpu() * images @ texts.T
        pushed += sum(int(moved_apart(one.log_softmax(dim=1), targets, agree).sum()) for one in (logits, logits.T))
        pairs += 2 * int(agree.sum())
    return pushed / pairs if pairs else None
