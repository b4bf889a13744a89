"""Contrast of each anatomy of a CT with its own sentences (fVLM, ICLR 2025, arXiv 2501.14548; fvlm.md).

Every anatomy is a contrast of its own over the global batch, and their losses add up. Most anatomies are normal in most
patients, so normal ones are positives of each other; abnormal ones that say alike are pulled together by soft targets:
from the similarity of their texts under a running mean of the text encoder (`teacher`, after RADAR), or from what a
second model, trained beside this one, makes of the batch (`peer`, the paper's co-teaching).

What the released code does otherwise, and why ours does not, stands in fvlm.md 8. The two models of a pair start from
different weights and take turns: each learns from every other batch, so that no draw of a crop is seen by both, and is
asked without gradient at the steps between. The first, `towers`, is the one that is evaluated and exported.

Letters: b = studies, V = volumes, A = anatomies, T = patches, L = tokens, E = embedding, n = distinct texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import collectives
from core.losses import contrast
from core.losses.contrast import SoftTargets
from core.models.anatomy_pool import AnatomyPool, mean_of_patches
from core.models.average import RunningMean
from core.models.gaussian import Gaussian, GaussianEncoder, unit_mean
from core.models.heads import LogitScale, Projection, unit_norm
from core.models.initialise import draw_weights
from core.models.text import TextEncoder
from core.models.towers import first_views, mean_over_present_views, mean_over_views
from core.models.volume import VolumeEncoder, VolumeOutput
from core.tasks import Encoded, Gathered, LossOutput, Task, share_of_constant
from kernels.gaussian_similarity.expansion import Precision
from shards.batch import NOT_ANNOTATED, Batch
from shards.errors import ConfigError

# Temperatures are kept in the paper's [0.001, 0.5], smoothly.
SCALE_MIN = 2.0


class TextTower(nn.Module):
    """Text encoder and its projection, `[n, L]` -> `[n, E]` fp32; shared by all anatomies."""

    def __init__(self, config: TextEncoder.Config, embed_dim: int) -> None:
        super().__init__()
        self.encoder = TextEncoder(config)
        self.projection = Projection(config.width, embed_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.encoder(input_ids, attention_mask).pooled)
        return projected


class AnatomyTowers(nn.Module):
    """One model: volumes and texts to embeddings of anatomies, or to Gaussians of them, and the scale of its logits."""

    def __init__(self, config: FVLM.Config) -> None:
        super().__init__()
        self.vision = VolumeEncoder(config.vision)
        self.pool = AnatomyPool(
            config.pool,
            anatomies=len(config.anatomies),
            levels=len(config.vision.levels),
            width=config.vision.width,
            embed_dim=config.embed_dim,
            stem=config.vision.stem[-1] if config.vision.stem else 0,
        )
        self.text = TextTower(config.text, config.embed_dim)
        self.image_gaussian = self.text_gaussian = None
        if config.similarity != "cosine":
            self.image_gaussian = GaussianEncoder(config.gaussian, config.embed_dim)
            self.text_gaussian = GaussianEncoder(config.gaussian, config.embed_dim)
        self.logit_scale = LogitScale(config.scale_init, config.scale_max, SCALE_MIN)

    def of_pooled(self, pooled: Tensor) -> Tensor:
        """What the pool gives `[..., E]` -> the embedding that is compared, of unit norm."""
        return unit_norm(pooled if self.image_gaussian is None else _gaussian(self.image_gaussian, pooled).mean)

    def images(self, batch: Batch) -> dict[str, Tensor]:
        """`image_embeds [b, A, E]` of unit norm, or `image_mean` and `image_logvar`; 0 for an anatomy not intact."""
        return self.images_of(self.vision(batch["pixel_values"]), batch)

    def images_of(self, volumes: VolumeOutput, batch: Batch) -> dict[str, Tensor]:
        """`images` where the batch's volumes are encoded."""
        pooled = self.pool(volumes, batch["anatomy_share"])  # [V, A, E]

        def of_studies(x: Tensor) -> Tensor:
            return mean_over_present_views(x, batch["anatomy_intact"], batch["study_index"], len(batch["valid"]))

        if self.image_gaussian is None:
            return {"image_embeds": unit_norm(of_studies(pooled))}
        views = _gaussian(self.image_gaussian, pooled)
        mean = unit_norm(of_studies(views.mean))
        return {"image_mean": mean, "image_logvar": of_studies(views.logvar)}

    def texts(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Likewise of `[n, L]` tokens: `text_embeds [n, E]`, or `text_mean` and `text_logvar`."""
        projected = self.text(input_ids, attention_mask)
        if self.text_gaussian is None:
            return {"text_embeds": unit_norm(projected)}
        texts = _gaussian(self.text_gaussian, projected)
        return {"text_mean": texts.mean, "text_logvar": texts.logvar}


def _embeds_of(images: dict[str, Tensor]) -> Tensor:
    """The embeddings in what `AnatomyTowers.images` gives: Gaussian ones are their means."""
    return images["image_embeds"] if "image_embeds" in images else images["image_mean"]


def _gaussian(encoder: GaussianEncoder, x: Tensor) -> Gaussian:
    """Of each embedding `[..., E]` by itself, its mean of length 1."""
    found = unit_mean(encoder(x.flatten(0, -2)[:, None]))
    return Gaussian(mean=found.mean.view(x.shape), logvar=found.logvar.view(x.shape))


class FVLM(Task):
    """Anatomies of volumes against their sentences."""

    fields = (
        "pixel_values", "study_index", "valid", "anatomy_share", "anatomy_intact", "anatomy_input_ids",
        "anatomy_attention_mask", "anatomy_text_key", "anatomy_key", "anatomy_state",
    )  # fmt: skip

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`anatomies`: names, in the order of the data's.

        `positives` of an anatomy beside a study's own sentences: `normal`, all normal ones and equal texts; `text`,
        equal texts; `study`, none: the correction of normals taken out, for comparison.
        `soft`: where soft targets of abnormal ones come from. `soft_weight`: of them, reached linearly within
        `soft_ramp_steps`; 1 is RADAR's of a teacher, 0.5 the paper's of a peer. `teacher_decay`: of the running mean, a
        step. With a peer each model learns from half of the steps.
        `similarity`: of unit embeddings, or minus the squared Wasserstein distance of Gaussians, made by `gaussian`.
        """

        vision: VolumeEncoder.Config
        text: TextEncoder.Config
        anatomies: tuple[str, ...]
        pool: AnatomyPool.Config = field(default_factory=AnatomyPool.Config)
        embed_dim: int = 256
        positives: Literal["normal", "text", "study"] = "normal"
        soft: Literal["none", "teacher", "peer"] = "teacher"
        soft_weight: float = 1.0
        soft_ramp_steps: int = 0
        teacher_decay: float = 0.995
        similarity: Literal["cosine", "wasserstein"] = "cosine"
        gaussian: GaussianEncoder.Config = field(default_factory=lambda: GaussianEncoder.Config(kind="linear", heads=2))
        scale_init: float = 1 / 0.07
        scale_max: float = 1000.0
        precision: Precision | None = None

        def __post_init__(self) -> None:
            if not self.anatomies or len(set(self.anatomies)) != len(self.anatomies):
                raise ConfigError(f"anatomies={self.anatomies} must be names, at least one and each once")
            if not 0 <= self.soft_weight <= 1:
                raise ConfigError(f"soft_weight={self.soft_weight} must lie in [0, 1]; soft=none leaves it out")
            if self.soft_ramp_steps < 0:
                raise ConfigError(f"soft_ramp_steps={self.soft_ramp_steps} must not be negative; 0 has no ramp")
            if not SCALE_MIN < self.scale_init < self.scale_max:
                raise ConfigError(
                    f"scale_init={self.scale_init} must lie between {SCALE_MIN} and scale_max={self.scale_max}"
                )
            if self.gaussian.kind != "linear":
                raise ConfigError(
                    "gaussian.kind='attention' has no tokens to attend to in a pooled anatomy; use linear"
                )

        def to_embed(self) -> FVLM.Config:
            """Of a task that only embeds: without teacher or peer."""
            return replace(self, soft="none")

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> FVLM:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return FVLM(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: FVLM.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if vocab_size is not None:
            config = replace(config, text=replace(config.text, vocab_size=vocab_size))
        self.config = config
        self.towers = AnatomyTowers(config)
        self.peer = None
        if config.soft == "peer":
            self.peer, self.turns = AnatomyTowers(config), ("towers", "peer")
        draw_weights(self, seed)
        self.teacher = RunningMean(self.towers.text, config.teacher_decay) if config.soft == "teacher" else None
        # Optimizer steps taken: the ramp's clock, saved with the task.
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    # ---- embeddings ----

    def embed_anatomies(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit-norm `[b, A, E]`, and which are there to be judged, `[b, A]` bool; reads no text."""
        return _embeds_of(self.towers.images(batch)), anatomies_of_studies(batch)

    def embed_patches(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`embed_anatomies`, tokens `[b, T, D]` of a study's first view, and which are of an anatomy, `[b, A, T]` bool.

        The tokens are those of the last level.
        """
        volumes = self.towers.vision(batch["pixel_values"])
        embeds = _embeds_of(self.towers.images_of(volumes, batch))
        view, share = first_views(batch), batch["anatomy_share"]
        if volumes.fine is not None:
            share = mean_of_patches(share, volumes)
        member = (share[view] > 0) & batch["anatomy_intact"][view][:, :, None]
        return embeds, anatomies_of_studies(batch), volumes.levels[-1][view], member & batch["valid"][:, None, None]

    def embed_anatomy_texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit-norm `[b, A, E]` of what reports say of each anatomy, and of which they say something, `[b, A]` bool."""
        said = (batch["anatomy_state"] != NOT_ANNOTATED) & batch["valid"][:, None]
        texts = DistinctTexts.of(batch, said)
        return texts.spread({"embeds": self.embed_texts(texts.input_ids, texts.attention_mask)})["embeds"], said

    def evidence(self, batch: Batch, place: Sequence[int], directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where scores come from: `[V, K, F]` of the places that shares are counted in, and the scores `[V, K]`.

        Score k of a view: the embedding of its anatomy `place[k]` along `directions[:, k]` `[E, K]`. The evidence of a
        place is the slope of the score by the emphasis that the pool puts on it (`AnatomyPool.forward`): its weight in
        the anatomy times what it says beyond what the rest says. It adds up to 0 over an anatomy.
        """
        towers, share = self.towers, batch["anatomy_share"]
        seen = towers.vision(batch["pixel_values"])
        with torch.enable_grad():
            emphasis = torch.ones_like(share, requires_grad=True)
            pooled = towers.pool(seen, share, emphasis)[:, list(place)]  # [V, K, E]
            score = (towers.of_pooled(pooled) * directions.T).sum(dim=2)
            slopes = [
                torch.autograd.grad(score[:, k].sum(), emphasis, retain_graph=True)[0][:, anatomy]
                for k, anatomy in enumerate(place)
            ]
        return torch.stack(slopes, dim=1), score.detach()

    def embed_images(self, batch: Batch) -> Tensor:
        """Of a study, `[b, E]`: the mean over its anatomies that are there, at unit norm."""
        embeds, present = self.embed_anatomies(batch)
        return unit_norm((embeds * present[:, :, None]).sum(dim=1))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit-norm `[n, E]`."""
        found = self.towers.texts(input_ids, attention_mask)
        embeds = found.get("text_embeds", found.get("text_mean"))
        assert embeds is not None
        return embeds

    def image_features(self, batch: Batch) -> Tensor:
        """Mean token of the last level, `[b, D]`."""
        pooled = self.towers.vision(batch["pixel_values"]).pooled
        return mean_over_views(pooled, batch["study_index"], len(batch["valid"]))

    # ---- a step ----

    def encode(self, batch: Batch) -> Encoded:
        present = anatomies_of_studies(batch) & (batch["anatomy_state"] != NOT_ANNOTATED)
        texts = DistinctTexts.of(batch, present)
        gather = {
            "anatomy_present": present,
            "anatomy_key": batch["anatomy_key"],
            "anatomy_text_key": batch["anatomy_text_key"],
        }
        learner, peer = self._pair()
        gather |= learner.images(batch) | texts.spread(learner.texts(texts.input_ids, texts.attention_mask))
        if peer is not None:
            with torch.no_grad():
                found = peer.images(batch) | texts.spread(peer.texts(texts.input_ids, texts.attention_mask))
            gather |= {f"peer_{name}": values for name, values in found.items()}
        if self.teacher is not None:
            taught = unit_norm(self.teacher(texts.input_ids, texts.attention_mask))
            gather |= texts.spread({"teacher_embeds": taught})
        return Encoded(gather=gather)

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        own = gathered.own
        abnormal = own["anatomy_present"] & (own["anatomy_key"] != 0)
        # An anatomy that is normal in the whole batch has nothing to tell apart.
        taught_here = collectives.sum_over_ranks(abnormal.sum(dim=0)) > 0  # [A]
        member = own["anatomy_present"] & taught_here
        learner, peer = self._pair()
        shares = contrast.grouped_info_nce(
            replace(gathered, own={**own, "member": member, "key": self._keys(own)}),
            scale=learner.logit_scale(),
            similarity=self.config.similarity,
            row="image",
            column="text",
            key="key",
            member="member",
            soft=self._soft(own, abnormal, peer),
            precision=self.config.precision,
        )
        metrics = {
            "loss/image_to_text": shares.row_to_column,
            "loss/text_to_image": shares.column_to_row,
            "optim/towers_logit_scale": share_of_constant(self.towers.logit_scale(), gathered),
            "anatomy/pairs": member.sum().float(),
            "anatomy/abnormal": abnormal.sum().float(),
            "anatomy/contrasts": share_of_constant(taught_here.sum().float(), gathered),
        }
        if self.peer is not None:
            metrics["optim/peer_logit_scale"] = share_of_constant(self.peer.logit_scale(), gathered)
        return LossOutput(loss=shares.loss, metrics=metrics)

    def _pair(self) -> tuple[AnatomyTowers, AnatomyTowers | None]:
        """The model that learns at this step, or is evaluated, and the one that it learns from."""
        if self.peer is not None and self.training and self.turns[self.turn] == "peer":
            return self.peer, self.towers
        return self.towers, self.peer

    def after_step(self, whole: Callable[[nn.Parameter], Tensor]) -> None:
        steps = self.steps
        assert isinstance(steps, Tensor)
        if self.teacher is not None:
            self.teacher.update(self.towers.text, whole, first=steps[0] == 0)
        steps += 1

    def _keys(self, own: dict[str, Tensor]) -> Tensor:
        """Equal for positives of each other, `[b, A]`."""
        if self.config.positives == "normal":
            return own["anatomy_key"]
        if self.config.positives == "text":
            return own["anatomy_text_key"]
        studies, anatomies = own["anatomy_key"].shape  # as many studies on every rank
        first = collectives.rank() * studies
        rows = torch.arange(first, first + studies, device=own["anatomy_key"].device)
        return rows[:, None].expand(-1, anatomies)

    def _soft(self, own: dict[str, Tensor], abnormal: Tensor, peer: AnatomyTowers | None) -> SoftTargets | None:
        """Of the abnormal ones `[b, A]`; `peer`: the model that the learner learns from."""
        config, steps = self.config, self.steps
        assert isinstance(steps, Tensor)
        if config.soft == "none":
            return None
        # Nothing before the first step: a running mean has not begun.
        weight = config.soft_weight * (steps[0] / max(1, config.soft_ramp_steps)).clamp(max=1.0)
        if config.soft == "teacher":
            texts = own["teacher_embeds"]
            return SoftTargets(
                rows=texts, columns=texts, scale=self.towers.logit_scale(), taught=abnormal, weight=weight, how="added"
            )
        assert peer is not None
        part = "embeds" if config.similarity == "cosine" else "mean"
        return SoftTargets(
            rows=own[f"peer_image_{part}"],
            columns=own[f"peer_text_{part}"],
            scale=peer.logit_scale().detach(),
            taught=abnormal,
            weight=weight,
            how="mixed",
        )


def anatomies_of_studies(batch: Batch) -> Tensor:
    """Which anatomies of a valid study some view shows intact, `[b, A]` bool."""
    studies = len(batch["valid"])
    member = batch["study_index"][None, :] == torch.arange(studies, device=batch["valid"].device)[:, None]  # [b, V]
    shown = (member[:, :, None] & batch["anatomy_intact"][None]).any(dim=1)
    return shown & batch["valid"][:, None]


@dataclass(frozen=True, kw_only=True)
class DistinctTexts:
    """The texts of anatomies that count, each once: `input_ids`, `attention_mask` `[n, L]`.

    `pairs` [p]: places of those anatomies in the flattened `[b * A]`; `text` [p]: which text each has.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pairs: Tensor
    text: Tensor
    shape: Sequence[int]  # b, A

    @staticmethod
    def of(batch: Batch, present: Tensor) -> DistinctTexts:
        """Of the anatomies that are `present [b, A]`; where none is, one all the same.

        Every rank has a gradient for every weight then, 0 as the contrast leaves that text out.
        """
        pairs = present.flatten().nonzero().squeeze(1)
        if not len(pairs):
            pairs = pairs.new_zeros(1)
        keys = batch["anatomy_text_key"].flatten()
        distinct, text = torch.unique(keys[pairs], return_inverse=True)
        first = pairs.new_full((len(distinct),), len(keys)).scatter_reduce(0, text, pairs, "amin")
        mask = batch["anatomy_attention_mask"].flatten(0, 1)[first]
        longest = max(1, int(mask.sum(dim=1).max()))
        return DistinctTexts(
            input_ids=batch["anatomy_input_ids"].flatten(0, 1)[first, :longest],
            attention_mask=mask[:, :longest],
            pairs=pairs,
            text=text,
            shape=present.shape,
        )

    def spread(self, of_texts: dict[str, Tensor]) -> dict[str, Tensor]:
        """`[n, E]` each -> `[b, A, E]`, 0 where an anatomy does not count."""
        found = {}
        for name, values in of_texts.items():
            # F.embedding, not indexing: its backward adds up the rows of one text in a fixed order.
            rows = F.embedding(self.text, values)
            whole = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1]).index_copy(0, self.pairs, rows)
            found[name] = whole.view(*self.shape, -1)
        return found
