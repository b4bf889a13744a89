"""Does this image belong to this report? Hard negatives out of the micro-batch, and the loss over samples (ALBEF, MAP).

Letters: b = studies of the micro-batch, K = samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.keyed import hash_keys, uniform


def draw_negatives(
    logits: Tensor, *, keys: Tensor, valid: Tensor, draw_key: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """For each report a study whose image does not belong to it: `(study [b] int64, whether there is one [b] bool)`.

    Where there is none it is the report's own study: any other would depend on what is encoded together.

    Study j is drawn for report i with probability proportional to exp(`logits[i, j]`), among the valid studies of
    another key within the same `group` neighbouring rows. The draw depends on the `draw_key`s of i and j alone, so a
    micro-batch or a rank that holds whole groups draws what the whole batch would.

    Args:
        logits: `[b, b]`, reports down, images across.
        keys, draw_key: `[b]` int64; `valid`: `[b]` bool.
    """
    rows = torch.arange(len(keys), device=keys.device) // group
    allowed = (rows[:, None] == rows[None, :]) & (keys[:, None] != keys[None, :]) & valid[:, None] & valid[None, :]
    # The largest of logit + Gumbel noise is a draw from the softmax (Gumbel, 1954), with no sums that could round.
    noise = -(-uniform(hash_keys("match", draw_key[:, None], draw_key[None, :])).log()).log()
    scores = (logits.detach().float() + noise).masked_fill(~allowed, -torch.inf)
    exists = allowed.any(dim=1)
    return torch.where(exists, scores.argmax(dim=1), torch.arange(len(keys), device=keys.device)), exists


def match_loss(logits: Tensor, matched: bool) -> Tensor:
    """`logits [K, n]` that image and report belong together -> cross-entropy `[n]`, mean over samples."""
    return F.softplus(-logits if matched else logits).mean(dim=0)
