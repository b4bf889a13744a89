"""Multi-similarity loss over names of concepts (Wang et al. 2019, arXiv 1904.06627), as SapBERT teaches synonyms.

Letters: b = own studies, B = of all ranks, m = names a study brings, n = b m own names, N = B m of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.tasks import Gathered
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MultiSimilarity:
    """SapBERT's numbers. A pair is learned from if it is within `margin` of being wrong; None: every pair.

    bone_xray_french.md 4.3 gives them as alpha = 1 of negatives and beta = 60 of positives; in the paper and in SapBERT
    it is the negatives whose exponent is steep, and so it is here.
    """

    positive_sharpness: float = 1.0
    negative_sharpness: float = 60.0
    threshold: float = 0.5
    margin: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("positive_sharpness", "negative_sharpness"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")


def multi_similarity(gathered: Gathered, config: MultiSimilarity) -> Tensor:
    """This rank's share [] of the mean over all names that have another name in the batch; 0 without any.

    `gathered` holds unit-norm `name_embeds [b, m, E]` fp32, `name_id` and `concept_key [b, m]` int64 and `valid [b]`.
    Names of one concept are positives of each other, of others negatives; a name is nothing to itself. The cosines of
    own names with all, [n, N], are held: names are few and this is an option.
    """
    own_valid, valid = (
        rows["valid"][:, None].expand_as(rows["name_id"]).flatten() for rows in (gathered.own, gathered.all)
    )
    own_id, name_id = gathered.own["name_id"].flatten(), gathered.all["name_id"].flatten()
    own_key, key = gathered.own["concept_key"].flatten(), gathered.all["concept_key"].flatten()
    with torch.autocast(own_valid.device.type, enabled=False):
        cosine = gathered.own["name_embeds"].flatten(0, 1) @ gathered.all["name_embeds"].flatten(0, 1).T  # [n, N]
    both = own_valid[:, None] & valid[None, :]
    same = own_key[:, None] == key[None, :]
    positive = both & same & (own_id[:, None] != name_id[None, :])
    negative = both & ~same
    counted = positive.any(dim=1)
    if config.margin is not None:
        with torch.no_grad():
            farthest = cosine.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
            nearest = cosine.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
            positive = positive & (cosine - config.margin < nearest)
            negative = negative & (cosine + config.margin > farthest)
    losses = _soft_sum(-config.positive_sharpness * (cosine - config.threshold), positive) / config.positive_sharpness
    losses = losses + (
        _soft_sum(config.negative_sharpness * (cosine - config.threshold), negative) / config.negative_sharpness
    )
    return (losses * counted).sum() / _with_another_name(key, name_id, valid).clamp(min=1)


def _soft_sum(exponent: Tensor, chosen: Tensor) -> Tensor:
    """log(1 + sum over the chosen of e^exponent), [n]; `exponent`, `chosen` [n, N]."""
    exponent = exponent.masked_fill(~chosen, -torch.inf)
    return torch.logsumexp(torch.cat([torch.zeros_like(exponent[:, :1]), exponent], dim=1), dim=1)


def _with_another_name(key: Tensor, name_id: Tensor, valid: Tensor) -> Tensor:
    """How many of all names [N] have a positive: equal on all ranks."""
    pairs = (key[:, None] == key[None, :]) & (name_id[:, None] != name_id[None, :]) & valid[:, None] & valid[None, :]
    return pairs.any(dim=1).sum()
