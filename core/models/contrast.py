"""All-pairs contrast of image and report Gaussians behind one switch: the similarity, the loss, their learned scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from core.losses import contrast
from core.models.gaussian import Gaussian
from core.models.heads import LogitBias, LogitScale, unit_norm
from core.tasks import Gathered
from kernels.gaussian_similarity import expansion
from kernels.gaussian_similarity.expansion import Precision
from shards.errors import ConfigError

SCALE_MIN = 1e-3


class GaussianContrast(nn.Module):
    """The logit of a pair is `scale * similarity`, with the sigmoid loss `+ bias`; equal keys are positives.

    `wasserstein` is minus the squared 2-Wasserstein distance, `sampled` minus the closed-form sampled distance (CSD),
    `cosine` that of the means. Under `info_nce` the variances of `sampled` learn hubness, not ambiguity: pair it with
    `sigmoid`, and `wasserstein` with `info_nce`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The scale starts at `scale_init` and stays smoothly below `scale_max`. Of unit-norm means a distance is
        2 - 2 cos, so a scale of 7 is CLIP's 1 / 0.07 on cosines; of means that are not normalised, 1 / 14 is MAP's.
        `precision`: of the product's inputs; None: fp32 for cosines, centred bf16 for distances.
        """

        similarity: contrast.Similarity = "wasserstein"
        loss: Literal["info_nce", "sigmoid"] = "info_nce"
        scale_init: float = 7.0
        scale_max: float = 200.0
        bias_init: float = 0.0
        bias_bound: float = 40.0
        precision: Precision | None = None

        def __post_init__(self) -> None:
            if not SCALE_MIN < self.scale_init < self.scale_max:
                raise ConfigError(
                    f"scale_init={self.scale_init} must lie between {SCALE_MIN} and scale_max={self.scale_max}"
                )
            if not abs(self.bias_init) < self.bias_bound:
                raise ConfigError(f"bias_init={self.bias_init} must lie within bias_bound={self.bias_bound} of 0")

    def __init__(self, config: GaussianContrast.Config) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = LogitScale(config.scale_init, config.scale_max, SCALE_MIN)
        self.logit_bias = LogitBias(config.bias_init, config.bias_bound) if config.loss == "sigmoid" else None

    def forward(self, gathered: Gathered, key: str, *, detach_means: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss, []; reads `<side>_mean` and `<side>_logvar` of image and text, and `key`.

        With InfoNCE also what each own valid study adds beyond the least its keys allow, `[n]`, by side.

        `key`: which of the gathered keys makes positives. `detach_means`: only variances, scale and bias learn.
        """
        config, own, sides = self.config, dict(gathered.own), ("image", "text")
        if detach_means:
            own.update({f"{side}_mean": own[f"{side}_mean"].detach() for side in sides})
        if config.similarity == "cosine":
            own.update({f"{side}_embeds": unit_norm(own[f"{side}_mean"]) for side in sides})
        gathered = replace(gathered, own=own)  # the losses exchange what they need of it
        shared: dict[str, Any] = {"similarity": config.similarity, "key": key, "precision": config.precision}
        if self.logit_bias is not None:
            return contrast.pairwise_sigmoid(gathered, scale=self.logit_scale(), bias=self.logit_bias(), **shared), {}
        found = contrast.info_nce(gathered, scale=self.logit_scale(), **shared)
        return found.loss, {"image": found.row_excess, "text": found.column_excess}

    def logits(self, rows: Gaussian, columns: Gaussian) -> Tensor:
        """`[n, m]`, stored: for the studies of a micro-batch. Without the bias."""
        similarity = self.config.similarity
        if similarity == "cosine":
            pairs = expansion.inner_product(unit_norm(rows.mean), unit_norm(columns.mean), precision="fp32")
        else:
            distance = expansion.squared_wasserstein if similarity == "wasserstein" else expansion.sampled_distance
            pairs = distance(rows.mean, rows.logvar, columns.mean, columns.logvar, precision="fp32")
        return self.logit_scale() * pairs.similarity()
