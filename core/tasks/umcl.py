"""Contrast of images with reports, labels or both: learned prompts, targets by labels (after UMCL, arXiv 2307.05920).

The paper has no code and its details are not public: this is the idea as umcl.md specifies it, not a reproduction. A
study whose text is made of its labels is compared with the prompts of the classes it has, which are learned; the same
prompts are the zero-shot classifier. Studies whose labels agree are positives of each other as far as they agree.

Letters: b = studies, C = classes, E = embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.keyed import hash_keys
from core.losses.agreement import Studies, Target, agreement, itl_loss, label_targets
from core.models.heads import LogitScale, unit_norm
from core.models.initialise import draw_weights
from core.models.prompts import PromptBank, Words, check_names
from core.tasks import Encoded, Gathered, LossOutput, share_of_constant
from core.tasks.two_towers import TwoTowerTask
from shards.batch import NO_FINDING, Batch
from shards.errors import ConfigError


class UMCL(TwoTowerTask):
    """Images, reports and labels in one contrast."""

    steps: Tensor
    fields = (*TwoTowerTask.fields, "labels", "text_is_report")
    optional_parameters = ("bank.context_tokens",)

    @dataclass(frozen=True, kw_only=True)
    class Config(TwoTowerTask.Config):
        """`classes`: names, in the order of the data's (`data.label_text.classes`).

        `prompts` of labels: `continuous`, learned; `hand`, sentences that the data write (`data.label_text.sentences`).
        `target`: of the contrast (core.losses.agreement). `own_text`: of a report's target, the share of its own text.
        `threshold`: agreement below it counts for nothing. `negative_bank`: a second context learns what images without
        a class are like; `class_weight`: of the yes-or-no question that teaches it, asked of each known label. Without
        a negative bank it is asked of the prompts alone, with a bias for each class.
        """

        classes: tuple[str, ...]
        prompts: Literal["continuous", "hand"] = "continuous"
        bank: PromptBank.Config = field(default_factory=PromptBank.Config)
        target: Target = "soft"
        own_text: float = 0.5
        threshold: float = 0.5
        negative_bank: bool = False
        class_weight: float = 0.0
        scale_init: float = 1 / 0.07
        scale_max: float = 100.0

        def __post_init__(self) -> None:
            check_names(self.classes)
            for name in ("own_text", "threshold"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ConfigError(f"{name}={getattr(self, name)} must lie in [0, 1]")
            if not 0 <= self.class_weight < float("inf"):
                raise ConfigError(f"class_weight={self.class_weight} must not be negative; 0 asks nothing")
            if self.prompts == "hand" and (self.negative_bank or self.class_weight):
                raise ConfigError("prompts=hand has no bank; set negative_bank=false and class_weight=0")
            if self.negative_bank and not self.class_weight:
                raise ConfigError("negative_bank=true with class_weight=0 would learn nothing; set class_weight=0.1")
            if self.precision not in (None, "fp32"):
                raise ConfigError(f"precision={self.precision}: targets by labels compare pairs in fp32; leave it out")

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> UMCL:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return UMCL(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: UMCL.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.config, self._seed = config, seed
        text = self.towers.text.config
        has_bank = config.prompts == "continuous"
        self.bank = PromptBank(config.bank, text, config.classes) if has_bank else None
        self.negative_bank = PromptBank(config.bank, text, config.classes) if config.negative_bank else None
        self.class_bias = None
        if config.class_weight and not config.negative_bank:
            self.class_bias = nn.Parameter(torch.zeros(len(config.classes)))
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)
        draw_weights(self, seed)
        # Optimizer steps taken: what drop-out of prompts is keyed by, saved with the task.
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def take_tokenizer(self, tokenizer: Words) -> None:
        for bank in (self.bank, self.negative_bank):
            if bank is not None:
                bank.take_tokenizer(tokenizer)

    # ---- embeddings ----

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the learned prompts; none where they are written by hand."""
        return self.config.classes if self.bank is not None else ()

    def embed_classes(self, names: Sequence[str] = ()) -> Tensor:
        """Unit-norm `[C, E]` of the prompts of `names`, those of the classes if there are none.

        Raises ConfigError where prompts are written by hand, or no context fits other names.
        """
        if self.bank is None:
            raise ConfigError("task.prompts=hand has no bank of prompts; embed sentences instead")
        return self._prompts(self.bank.of_names(names) if names else self.bank)

    def class_directions(self) -> Tensor:
        """`[E, C]`: along its column an image scores for a class.

        What a prompt says beyond its negative. Without a negative bank: beyond `no finding`, if that is a class, which
        alone would find any abnormal image, and beyond the mean prompt, which alone would find no rare class; half of
        each.
        """
        prompts, classes = self.embed_classes(), self.config.classes
        if self.negative_bank is not None:
            prompts = prompts - self._prompts(self.negative_bank)
        elif NO_FINDING in classes:
            others = torch.tensor([name != NO_FINDING for name in classes], device=prompts.device)
            beside = (prompts[classes.index(NO_FINDING)] + prompts.mean(dim=0)) / 2
            prompts = prompts - others[:, None] * beside
        return prompts.T

    def _prompts(self, bank: PromptBank) -> Tensor:
        draw_key = None
        if self.training:
            draw_key = hash_keys("umcl step", torch.full_like(self.steps, self._seed), self.steps)
        return unit_norm(self.towers.text_projection(bank(self.towers.text, draw_key)))

    # ---- a step ----

    def encode(self, batch: Batch) -> Encoded:
        labels, is_report = batch["labels"], batch["text_is_report"]
        if labels.shape[1] != len(self.config.classes):
            raise ConfigError(
                f"the data have {labels.shape[1]} classes, task.classes names {len(self.config.classes)}; "
                "set data.label_text.classes to the same"
            )
        encoded = super().encode(batch)
        gather, local = encoded.gather, dict(encoded.local)
        if self.bank is not None:
            prompts = self._prompts(self.bank)
            with torch.autocast(prompts.device.type, enabled=False):
                of_labels = unit_norm((labels == 1).float() @ prompts)
                gather["text_embeds"] = torch.where(is_report[:, None], gather["text_embeds"], of_labels)
                if self.config.class_weight:
                    local["classes"] = self._class_losses(gather["image_embeds"], prompts, batch)
        gather |= {"labels": labels, "text_is_report": is_report}
        return Encoded(gather=gather, local=local)

    def _class_losses(self, images: Tensor, prompts: Tensor, batch: Batch) -> Tensor:
        """[b]: cross-entropy of each study's known labels, their mean; 0 without any (umcl.md 4.5)."""
        against = 0.0 if self.negative_bank is None else self._prompts(self.negative_bank)
        logits = self.logit_scale() * images @ (prompts - against).T
        if self.class_bias is not None:
            logits = logits + self.class_bias
        labels = batch["labels"]
        known = ((labels == 0) | (labels == 1)) & batch["valid"][:, None]
        losses = F.binary_cross_entropy_with_logits(logits, (labels == 1).float(), reduction="none")
        return (losses * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)

    def targets(self, own: Studies, all_studies: Studies, text_is_report: Tensor) -> Tensor:
        """`[b, G]`, of both directions."""
        config = self.config
        return label_targets(
            own, all_studies, text_is_report,
            target=config.target, own_text=config.own_text, threshold=config.threshold,
        )  # fmt: skip

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        config, scale, everyone = self.config, self.logit_scale(), gathered.all
        own, all_studies = (
            Studies(labels=rows["labels"], text_key=rows["report_key"], valid=rows["valid"])
            for rows in (gathered.own, everyone)
        )
        targets = self.targets(own, all_studies, gathered.own["text_is_report"])
        other_text = own.text_key[:, None] != all_studies.text_key
        false_negatives = (agreement(own, all_studies, config.threshold) > 0) & other_text & own.valid[:, None]
        found = itl_loss(gathered, scale, targets, false_negatives)
        studies = everyone["valid"].sum().clamp(min=1)
        loss = found.loss
        metrics = {
            "loss/image_to_text": found.image_to_text,
            "loss/text_to_image": found.text_to_image,
            "contrast/false_negatives_pushed_apart": found.pushed_apart,
            "contrast/reports": (gathered.own["text_is_report"] & own.valid).sum().float() / studies,
            "optim/logit_scale": share_of_constant(scale, gathered),
        }
        if "classes" in local:
            classes = local["classes"].sum() / studies
            loss = loss + config.class_weight * classes
            metrics["loss/classes"] = classes.detach()
        return LossOutput(loss=loss, metrics=metrics)

    def after_step(self, whole: Callable[[nn.Parameter], Tensor]) -> None:
        self.steps += 1
