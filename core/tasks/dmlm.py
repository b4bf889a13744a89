"""Distribution-based masked vision-language model (D-MLM, after arXiv 2507.21794; losses of MAP, CVPR 2023).

Images and reports are Gaussians. They are contrasted over the global batch; words and patches are masked and predicted
from samples of fused tokens; an image is matched to its report; masked views are held to the full ones. A part whose
weight is 0 has no weights and costs no pass. Matching takes its negatives from the micro-batch, all else from the study
itself, so nothing but matching depends on how a batch is cut (see `core.losses.matching.draw_negatives`).

There is no dropout (see `core.models.transformer`), and no ramp of the divergence's weight: its target is a detached
Gaussian of the same weights, the learning rate has a warm-up, and a task knows no step.

Letters: b = studies, V = images, N = patches, L = words, D = width of an encoder, C = of the fusion, E = embedding.
An image and its study's report are a pair, so there are V pairs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from core.losses.matching import draw_negatives
from core.losses.per_study import PerStudy
from core.losses.variance import Divergence, divergence, forecast_error, kl_divergence, prior_kl, variance_floor
from core.models.contrast import GaussianContrast
from core.models.fused import FusedGaussians, PatchSplit, Tokens
from core.models.fusion import Fusion
from core.models.gaussian import Gaussian, GaussianEncoder, unit_mean
from core.models.heads import unit_norm
from core.models.initialise import draw_weights
from core.models.text import TextEncoder, never_empty
from core.models.towers import Encoders, mean_over_views
from core.models.transformer import Linear
from core.models.vision import VisionEncoder
from core.tasks import Encoded, Gathered, LossOutput, Task, share_of_constant
from shards.batch import Batch
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Factors on the parts of the loss. 0 leaves a part out.

    `contrast`: of the embeddings. `variance`: a second contrast, on detached means, that only variances learn from.
    `excess`: the mean log-variance forecasts how badly a study is told apart (`core.losses.variance.forecast_error`).
    `mlm`, `mim`: masked words and patches. `itm`: matching. `kl`: divergence of masked views from full ones. `floor`:
    of the mean log-variance. `vib`: KL of the embeddings to the unit Gaussian.
    """

    contrast: float = 1.0
    variance: float = 0.0
    excess: float = 0.1
    mlm: float = 1.0
    mim: float = 1.0
    itm: float = 1.0
    kl: float = 0.1
    floor: float = 0.01
    vib: float = 1e-4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"weights.{name}={value} must not be negative; 0 switches the part off")
        if not self.contrast and not self.variance and not self.mlm and not self.mim and not self.itm:
            raise ConfigError("every weight that teaches the encoders is 0; set weights.contrast=1")


class DMLM(Task):
    """Gaussian embeddings, fused Gaussian tokens, and the losses on both."""

    fields = (
        "pixel_values", "study_index", "valid", "input_ids", "attention_mask", "report_key", "finding_key",
        "text_mask", "patch_mask", "draw_key",
    )  # fmt: skip

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`samples`: drawn a fused token, beside its mean. `positives`: equal reports, or equal sets of findings.

        `unit_norm`: means of the embeddings have length 1; fused ones never do. `embedding_floor`, `fused_floor`: mean
        log-variance below which `weights.floor` pushes. `kl_at`: the embeddings (no fusion needed), the fused tokens
        (masked ones and the first), or both. `share_gaussian_encoders`: one a modality, for embeddings and fused
        tokens. `match_group`: neighbouring studies among which matching draws its negatives; where it divides the
        micro-batch, neither micro-batches nor ranks change them.
        """

        vision: VisionEncoder.Config
        text: TextEncoder.Config
        embed_dim: int = 768
        unit_norm: bool = True
        contrast: GaussianContrast.Config = field(default_factory=GaussianContrast.Config)
        variance: GaussianContrast.Config = field(
            default_factory=lambda: GaussianContrast.Config(similarity="sampled", loss="sigmoid", scale_init=5.0)
        )
        positives: Literal["report", "finding"] = "finding"
        embedding: GaussianEncoder.Config = field(default_factory=GaussianEncoder.Config)
        fusion: Fusion.Config = field(default_factory=Fusion.Config)
        fused: GaussianEncoder.Config = field(default_factory=lambda: GaussianEncoder.Config(logvar_init=0.0))
        share_gaussian_encoders: bool = False
        samples: int = 2
        kl: Divergence = "consistency"
        kl_at: Literal["embedding", "fused", "both"] = "both"
        embedding_floor: float = -6.0
        fused_floor: float = -2.06
        match_group: int = 16
        weights: Weights = field(default_factory=Weights)

        def __post_init__(self) -> None:
            if not 0 <= self.samples <= 64:
                raise ConfigError(f"samples={self.samples} must lie between 0 (the mean alone) and 64")
            if self.match_group < 2:
                raise ConfigError(f"match_group={self.match_group} leaves no other study to draw; use 16")
            if self.share_gaussian_encoders and self.embed_dim != self.fusion.width:
                raise ConfigError(
                    f"share_gaussian_encoders=True needs embed_dim={self.embed_dim} and "
                    f"fusion.width={self.fusion.width} to be equal"
                )
            if self.weights.excess and (not self.weights.contrast or self.contrast.loss != "info_nce"):
                raise ConfigError(
                    f"weights.excess={self.weights.excess} forecasts an InfoNCE: set weights.contrast=1 and "
                    "contrast.loss=info_nce, or weights.excess=0"
                )
            if self.variance.similarity == "cosine":
                raise ConfigError("variance.similarity='cosine' has no variance in it; use sampled or wasserstein")

        def to_embed(self) -> DMLM.Config:
            """Of a task that only embeds: without the fusion, where a contrast taught the embeddings."""
            if not self.weights.contrast and not self.weights.variance:
                return self
            return replace(self, weights=replace(self.weights, mlm=0.0, mim=0.0, itm=0.0, kl=0.0))

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> DMLM:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return DMLM(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: DMLM.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        weights = config.weights
        # Which passes the weights ask for.
        self._kl_embedding = weights.kl > 0 and config.kl_at != "fused"
        kl_fused = weights.kl > 0 and config.kl_at != "embedding"
        self._fuses_words, self._fuses_patches = weights.mlm > 0 or kl_fused, weights.mim > 0 or kl_fused

        self.towers = Encoders(config.vision, config.text, vocab_size=vocab_size)
        vision, text = config.vision, self.towers.text.config
        self.image_in, self.text_in = Linear(vision.width, config.embed_dim), Linear(text.width, config.embed_dim)
        self.image_gaussian = GaussianEncoder(config.embedding, config.embed_dim)
        self.text_gaussian = GaussianEncoder(config.embedding, config.embed_dim)
        self.contrast = GaussianContrast(config.contrast) if weights.contrast else None
        self.variance = GaussianContrast(config.variance) if weights.variance else None
        self.word_mask_token = None
        if self._fuses_words or self._kl_embedding:
            self.word_mask_token = nn.Parameter(torch.zeros(1, text.width))
        self.fused = None
        if self._fuses_words or self._fuses_patches or weights.itm:
            encoders = (self.image_gaussian, self.text_gaussian)
            if not config.share_gaussian_encoders:
                width = config.fusion.width
                encoders = (GaussianEncoder(config.fused, width), GaussianEncoder(config.fused, width))
            self.fused = FusedGaussians(
                config.fusion,
                encoders,
                vision=vision,
                text=text,
                samples=config.samples,
                floor=config.fused_floor if weights.floor else None,
                words=weights.mlm > 0,
                patches=weights.mim > 0,
                match=weights.itm > 0,
                masked_divergence=config.kl if kl_fused else None,
            )
        draw_weights(self, seed)

    # ---- embeddings ----

    def distribution_of_images(self, batch: Batch) -> Gaussian:
        """Of studies `[b, E]`: means and log-variances averaged over views; reads pixels, `study_index`, `valid`."""
        return self._of_images(self.towers.image_tokens(batch["pixel_values"]), batch)

    def distribution_of_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Gaussian:
        """`[n, E]`."""
        return self._of_texts(self.towers.text_tokens(input_ids, attention_mask), attention_mask)

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit-norm means `[b, E]`: what is compared by cosine."""
        return unit_norm(self.distribution_of_images(batch).mean)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit-norm means `[n, E]`."""
        return unit_norm(self.distribution_of_texts(input_ids, attention_mask).mean)

    def logit_scale(self) -> Tensor | None:
        """Factor from a difference of cosines to log-odds, []; None where there is none.

        Of unit-norm means a squared distance is 2 - 2 cos; of others it says nothing of cosines.
        """
        if self.contrast is None:
            return None
        if self.contrast.config.similarity == "cosine":
            return self.contrast.logit_scale()
        return 2.0 * self.contrast.logit_scale() if self.config.unit_norm else None

    def image_features(self, batch: Batch) -> Tensor:
        """Pooled, before any Gaussian, `[b, D]`."""
        return self.towers.image_features(batch)

    def _of_images(self, tokens: Tensor, batch: Batch) -> Gaussian:
        """Tokens `[V, 1 + M, D]` -> `[b, E]`."""
        x = self.image_in(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        views = self.image_gaussian(x)
        studies = len(batch["valid"])
        mean, logvar = (mean_over_views(part, batch["study_index"], studies) for part in (views.mean, views.logvar))
        return self._normalised(Gaussian(mean=mean, logvar=logvar))

    def _of_texts(self, tokens: Tensor, attention_mask: Tensor) -> Gaussian:
        """Tokens `[b, L, D]` -> `[b, E]`."""
        x = self.text_in(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        return self._normalised(self.text_gaussian(x, key_mask=never_empty(attention_mask)))

    def _normalised(self, gaussian: Gaussian) -> Gaussian:
        return unit_mean(gaussian) if self.config.unit_norm else gaussian

    # ---- a step ----

    def encode(self, batch: Batch) -> Encoded:
        ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
        images, texts = self.towers.image_tokens(pixels), self.towers.text_tokens(ids, mask)
        image, text = self._of_images(images, batch), self._of_texts(texts, mask)
        split = PatchSplit.of(batch["patch_mask"])
        masked_image = masked_text = None
        if self.word_mask_token is not None:
            masked_text = self.towers.text_tokens(ids, mask, hidden=(batch["text_mask"], self.word_mask_token))
        if self._fuses_patches or self._kl_embedding:
            masked_image = self.towers.image_tokens(pixels, split.keep)

        local = PerStudy(batch["valid"])
        self._add_levels(local, image, text)
        if self._kl_embedding:
            assert masked_text is not None and masked_image is not None
            views = ((self._of_images(masked_image, batch), image), (self._of_texts(masked_text, mask), text))
            for masked, full in views:
                local.add("kl", divergence(self.config.kl, masked, full, unit_norm=self.config.unit_norm))
        if self.fused is not None:
            tokens = Tokens(
                image=images,
                text=texts,
                patches=split,
                masked_image=masked_image if self._fuses_patches else None,
                masked_text=masked_text if self._fuses_words else None,
            )
            negatives = self._negatives(image, text, batch) if self.config.weights.itm else None
            self.fused.add_losses(local, tokens, batch, self.towers.vision.patches(pixels), negatives)
        return Encoded(
            gather={
                "image_mean": image.mean,
                "image_logvar": image.logvar,
                "text_mean": text.mean,
                "text_logvar": text.logvar,
                **{name: batch[name] for name in ("report_key", "finding_key", "valid")},
            },
            local=local.means(),
        )

    def _add_levels(self, local: PerStudy, image: Gaussian, text: Gaussian) -> None:
        """Variance regularisers of the embeddings, and what is logged of the pair."""
        weights = self.config.weights
        for gaussian in (image, text):
            if weights.floor:
                local.add("floor", variance_floor(gaussian, self.config.embedding_floor))
            if weights.vib:
                local.add("vib", prior_kl(gaussian, with_mean=not self.config.unit_norm))
        with torch.no_grad():
            spread = (image.logvar / 2).exp() - (text.logvar / 2).exp()
            local.add("pair_w2", ((image.mean - text.mean).square() + spread.square()).sum(dim=1))
            local.add("pair_kl", kl_divergence(image, text))

    @torch.no_grad()
    def _negatives(self, image: Gaussian, text: Gaussian, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each report of the micro-batch a study whose image does not belong to it, the likelier the closer."""
        with torch.autocast(image.mean.device.type, enabled=False):
            if self.contrast is not None:
                logits = self.contrast.logits(text, image)
            else:
                logits = image.mean.new_zeros(len(text.mean), len(image.mean))
        keys = batch[f"{self.config.positives}_key"]
        group = self.config.match_group
        if len(keys) % group:
            common = math.gcd(len(keys), group)
            raise ConfigError(
                f"{len(keys)} studies are encoded at a time, which task.match_group={group} does not divide; set "
                + (f"it to {common}, or " if common > 1 else "")
                + "engine.micro_batch, or without one the share of global_batch_size that a rank gets, to a multiple "
                f"of {group}"
            )
        return draw_negatives(logits, keys=keys, valid=batch["valid"], draw_key=batch["draw_key"], group=group)

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        own, count = gathered.own, gathered.all["valid"].sum().clamp(min=1)
        weights, key = asdict(self.config.weights), f"{self.config.positives}_key"
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        excess: dict[str, Tensor] = {}
        for name, contrast in (("contrast", self.contrast), ("variance", self.variance)):
            if contrast is not None:
                losses[name], found = contrast(gathered, key, detach_means=name == "variance")
                excess = excess or found
                metrics[f"optim/{name}_logit_scale"] = share_of_constant(contrast.logit_scale(), gathered)
        for name, values in local.items():
            share = values.sum() / count
            if name in weights:
                losses[name] = share
            else:
                metrics[f"uncertainty/{name}"] = share.detach()
        valid = own["valid"]
        forecasts = []
        for name in ("image", "text"):
            gaussian = Gaussian(mean=own[f"{name}_mean"][valid], logvar=own[f"{name}_logvar"][valid])
            if weights["excess"]:
                forecasts.append(
                    forecast_error(gaussian, excess[name], self.config.embedding.logvar_init).sum() / count
                )
            gaussian = gaussian.detach()
            metrics[f"uncertainty/{name}_logvar"] = gaussian.uncertainty().sum() / count
            metrics[f"uncertainty/{name}_out_of_range"] = gaussian.out_of_range().sum().float()
        if forecasts:
            losses["excess"] = torch.stack(forecasts).mean()
        metrics.update({f"loss/{name}": loss.detach() for name, loss in losses.items()})
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return LossOutput(loss=total, metrics=metrics)
