"""Entity-centred, context-aware masked modelling (ECAMP, arXiv 2312.13316).

Masked patches are completed from visible ones, the completed image is shown at twice its size, and masked words are
completed from the visible patches. Which words are masked, and what each counts, comes with the batch
(`shards.transforms.entity_masking`). MRM is the same task with uniform masking and `fusion=coarse`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from core.losses.per_study import PerStudy
from core.models.initialise import draw_weights
from core.models.masked_image import DecoderConfig, MaskedImageModel
from core.models.report_completion import ReportCompletion, Scales
from core.models.text import TextEncoder
from core.models.towers import first_views, mean_over_views
from core.models.vision import VisionEncoder
from core.tasks import Encoded, Gathered, LossOutput, Task
from shards.batch import Batch
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Factors on the parts of the loss: masked patches, super-resolution (0: no head), masked words."""

    mim: float = 1.0
    sr: float = 1.0
    mlm: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"weights.{name}={value} must not be negative; 0 switches the part off")
        if not self.mim and not self.mlm:
            raise ConfigError("weights.mim and weights.mlm are 0: nothing teaches the encoder; set one to 1")


class ECAMP(Task):
    """A report belongs to the first view of its study; all views are completed."""

    fields = (
        "pixel_values", "study_index", "valid", "input_ids", "attention_mask", "text_mask", "token_weight",
        "cut_tokens", "dropped_sentences", "patch_mask", "attention_grid",
    )  # fmt: skip

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`vision.image_size` is the encoder's; images come at twice that where `weights.sr` is not 0.

        `fusion`: the scales at which words see the image. `attention_floor`: share of the super-resolution's weight
        that does not follow the attention grid. `compat=original`: the released head and its window; the other half of
        the switch is `data.entity_masking.compat`.
        """

        vision: VisionEncoder.Config
        text: TextEncoder.Config
        decoder: DecoderConfig = field(default_factory=DecoderConfig)
        fusion: Scales = "both"
        attention_floor: float = 0.25
        weights: Weights = field(default_factory=Weights)
        compat: Literal["none", "original"] = "none"

        def __post_init__(self) -> None:
            if not 0.0 <= self.attention_floor <= 1.0:
                raise ConfigError(f"attention_floor={self.attention_floor} is outside [0, 1]")

        @property
        def pixels(self) -> int:
            """Side of the images that a batch holds."""
            return self.vision.image_size * (2 if self.weights.sr else 1)

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> ECAMP:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return ECAMP(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: ECAMP.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        head: Literal["residual", "original"] = "original" if config.compat == "original" else "residual"
        self.image = MaskedImageModel(
            config.vision, config.decoder, head if config.weights.sr else "none", config.attention_floor
        )
        text = config.text if vocab_size is None else replace(config.text, vocab_size=vocab_size)
        self.report = ReportCompletion(text, config.vision.width, config.fusion) if config.weights.mlm else None
        draw_weights(self, seed)

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled features of the whole image, mean over views, `[b, D]` fp32."""
        pooled = self.image.vision(self.image.small(batch["pixel_values"])).pooled.float()
        return mean_over_views(pooled, batch["study_index"], len(batch["valid"]))

    def check_attention(self) -> None:
        """Raises ConfigError where `attention_maps` has nothing to tell, naming the setting that is why."""
        if self.report is None:
            raise ConfigError("task.weights.mlm=0: this run reads no report, so no word looks anywhere")
        if self.config.fusion == "coarse":
            raise ConfigError("task.fusion=coarse looks at no patch; attention grids need a run with fine or both")

    @torch.no_grad()
    def attention_maps(self, batch: Batch, chosen: Tensor) -> Tensor:
        """Where the tokens `chosen [b, L]` of each report look in its first view, nothing masked: `[b, N]` fp32.

        The mean over those tokens; 0 for a report without any. Raises ConfigError as `check_attention` does.
        """
        self.check_attention()
        assert self.report is not None
        tokens = self.image.vision(self.image.small(batch["pixel_values"])).tokens[first_views(batch)]
        maps = self.report.attention_map(batch["input_ids"], batch["attention_mask"], tokens)
        share = chosen.float() / chosen.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bl,bln->bn", share, maps)

    def encode(self, batch: Batch) -> Encoded:
        valid, study = batch["valid"], batch["study_index"]
        local = PerStudy(valid)
        images = self.image(batch["pixel_values"], batch["patch_mask"], batch["attention_grid"])
        for name, loss in images.losses.items():
            local.add(name, loss, study)
        weight = batch["token_weight"]
        if self.report is not None:
            patches = images.tokens[first_views(batch)]
            read = (batch[name] for name in ("input_ids", "attention_mask", "text_mask"))
            local.add("mlm", self.report(*read, weight, patches))
        columns = ("valid", "cut_tokens", "dropped_sentences")
        return Encoded(
            gather={name: batch[name] for name in columns} | {"token_weight": weight.sum(dim=1) * valid},
            local=local.means(),
        )

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        own, count = gathered.own, gathered.all["valid"].sum().clamp(min=1)
        losses = {name: values.sum() / count for name, values in local.items()}
        if self.report is not None:  # over the tokens of the global batch, whatever report they stand in
            losses["mlm"] = local["mlm"].sum() / gathered.all["token_weight"].sum().clamp(min=1e-6)
        metrics = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        for metric, name in (("reports_cut", "cut_tokens"), ("sentences_dropped", "dropped_sentences")):
            metrics[f"text/{metric}"] = ((own[name] > 0) & own["valid"]).sum() / count
        weights = asdict(self.config.weights)
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return LossOutput(loss=total, metrics=metrics)
