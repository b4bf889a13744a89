"""Studies of several views aligned with their reports (bone radiographs and French reports, arXiv 2405.08932).

The views of a study are pooled by gated attention before they are projected; InfoNCE or the pairwise sigmoid compares
studies and reports of the global batch, equal reports being no negatives. Two flaws of the released code are left out
(bone_xray_french.md, 4.1): there is one learned temperature, and a bias only where it can learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from core.keyed import hash_keys
from core.losses import contrast
from core.losses.multi_similarity import MultiSimilarity, multi_similarity
from core.models.heads import LogitBias, LogitScale, unit_norm
from core.models.initialise import draw_weights
from core.models.prompts import Words
from core.models.towers import mean_over_views
from core.models.view_pool import GatedViewPool
from core.tasks import Encoded, Gathered, LossOutput, share_of_constant
from core.tasks.two_towers import TwoTowerTask
from shards.batch import Batch
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Synonyms:
    """Names of one concept, `groups` of two or more, drawn with each study and drawn together by the text encoder.

    Without groups nothing is drawn. `weight`: of their loss beside the contrast's.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    weight: float = 0.1
    loss: MultiSimilarity = field(default_factory=MultiSimilarity)

    def __post_init__(self) -> None:
        if any(len(set(names)) < 2 for names in self.groups):
            short = next(names for names in self.groups if len(set(names)) < 2)
            raise ConfigError(f"synonyms.groups: {list(short)} has no two names; leave it out or add another")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"synonyms.weight={self.weight} must not be negative; 0 or no groups switches it off")

    @property
    def names(self) -> tuple[str, ...]:
        """All, group after group."""
        return tuple(name for names in self.groups for name in names)


class StudyAlign(TwoTowerTask):
    """Each study picks its report out of the batch, each report its study, whatever the number of views."""

    fields = (*TwoTowerTask.fields, "draw_key")
    optional_parameters = ("view_pool.score.weight", "logit_bias.bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(TwoTowerTask.Config):
        """`pooling`: gated attention over views, or their mean. `scale_init`: CLIP's 1 / 0.07; 10 suits the sigmoid.

        `bias_init` and `bias_bound` are the sigmoid's.
        """

        loss: Literal["info_nce", "sigmoid"] = "info_nce"
        pooling: Literal["gated", "mean"] = "gated"
        scale_init: float = 1 / 0.07
        scale_max: float = 100.0
        bias_init: float = -10.0
        bias_bound: float = 40.0
        synonyms: Synonyms = field(default_factory=Synonyms)

        def __post_init__(self) -> None:
            for name, known in (("loss", ("info_nce", "sigmoid")), ("pooling", ("gated", "mean"))):
                if getattr(self, name) not in known:
                    raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; use {' or '.join(known)}")

        def build(self, *, vocab_size: int | None = None, seed: int = 0) -> StudyAlign:
            """The task with weights drawn from `seed`; `vocab_size` is the tokenizer's."""
            return StudyAlign(self, vocab_size=vocab_size, seed=seed)

    def __init__(self, config: StudyAlign.Config, *, vocab_size: int | None = None, seed: int = 0) -> None:
        super().__init__(config, vocab_size=vocab_size)
        self.config = config
        self.view_pool = GatedViewPool(config.vision.width) if config.pooling == "gated" else None
        self.logit_scale = LogitScale(config.scale_init, config.scale_max)
        self.logit_bias = LogitBias(config.bias_init, config.bias_bound) if config.loss == "sigmoid" else None
        draw_weights(self, seed)
        self._names: tuple[Tensor, Tensor] | None = None  # tokens of all synonyms, [names, L] each

    def take_tokenizer(self, tokenizer: Words) -> None:
        if self.config.synonyms.groups:
            self._names = tokenizer.encode(self.config.synonyms.names, self.towers.text.config.max_length)

    # ---- embeddings ----

    def image_features(self, batch: Batch) -> Tensor:
        """One vector a study, before the projection, `[b, D]` fp32: what probes and heads are taught on."""
        return self.pool(self.towers.vision(batch["pixel_values"]).pooled, batch)

    def pool(self, pooled: Tensor, batch: Batch) -> Tensor:
        """`pooled [V, D]` of the batch's views -> `[b, D]` fp32; reads `study_index` and `valid`."""
        studies = len(batch["valid"])
        if self.view_pool is None:
            return mean_over_views(pooled.float(), batch["study_index"], studies)
        found: Tensor = self.view_pool(pooled, batch["study_index"], studies)
        return found

    def embed_images(self, batch: Batch) -> Tensor:
        return unit_norm(self._project(batch))

    def image_norms(self, batch: Batch) -> Tensor:
        return self._project(batch).norm(dim=-1)

    def _project(self, batch: Batch) -> Tensor:
        projected: Tensor = self.towers.vision_projection(self.image_features(batch))
        return projected

    # ---- a step ----

    def encode(self, batch: Batch) -> Encoded:
        encoded = super().encode(batch)
        if not self.config.synonyms.groups:
            return encoded
        return Encoded(gather={**encoded.gather, **self._synonyms(batch["draw_key"])}, local=encoded.local)

    def _synonyms(self, draw_key: Tensor) -> dict[str, Tensor]:
        """Two names of one concept a study, by its `draw_key [b]` alone."""
        if self._names is None:
            raise ConfigError("synonyms need the tokenizer's words; call take_tokenizer first")
        groups = self.config.synonyms.groups
        sizes = torch.tensor([len(names) for names in groups], device=draw_key.device)
        first = sizes.cumsum(0) - sizes
        concept = hash_keys("synonym concept", draw_key) % len(groups)  # [b]
        one = hash_keys("first synonym", draw_key) % sizes[concept]
        other = (one + 1 + hash_keys("second synonym", draw_key) % (sizes[concept] - 1)) % sizes[concept]
        name_id = first[concept][:, None] + torch.stack([one, other], dim=1)  # [b, 2]
        input_ids, attention_mask = (tokens.to(draw_key.device)[name_id.flatten()] for tokens in self._names)
        return {
            "name_embeds": self.embed_texts(input_ids, attention_mask).unflatten(0, (-1, 2)),
            "name_id": name_id,
            "concept_key": concept[:, None].expand(-1, 2).contiguous(),
        }

    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        config, scale = self.config, self.logit_scale()
        shared: dict[str, Any] = {"scale": scale, "precision": config.precision}
        metrics = {"optim/logit_scale": share_of_constant(scale, gathered)}
        if self.logit_bias is not None:
            bias = self.logit_bias()
            loss = contrast.pairwise_sigmoid(gathered, bias=bias, **shared)
            metrics |= {
                "loss/pairwise_sigmoid": loss.detach(), "optim/logit_bias": share_of_constant(bias, gathered),
            }  # fmt: skip
        else:
            found = contrast.info_nce(gathered, **shared)
            loss = found.loss
            metrics |= {"loss/image_to_text": found.row_to_column, "loss/text_to_image": found.column_to_row}
        if config.synonyms.groups:
            synonyms = multi_similarity(gathered, config.synonyms.loss)
            loss = loss + config.synonyms.weight * synonyms
            metrics["loss/synonyms"] = synonyms.detach()
        return LossOutput(loss=loss, metrics=metrics)
