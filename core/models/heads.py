"""Last layers: the projection to the shared space, and the learned scale and bias of the logits with smooth bounds.

All of them compute in fp32 whatever autocast says: embeddings and logits are where bf16 would be seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEAR_BOUND = 0.01


def soft_bound(x: Tensor, low: float, high: float) -> Tensor:
    """x kept inside (low, high) by two softplus shoulders: about x between them, with a gradient everywhere."""
    return low + F.softplus(x - low) - F.softplus(x - high)


def soft_bound_inverse(y: float, low: float, high: float) -> float:
    """The x with `soft_bound(x, low, high) == y`, for low < y < high."""
    above, below = y - low, high - y
    return low + math.log(math.expm1(above)) - math.log(-math.expm1(-below))


class LogitScale(nn.Module):
    """Factor on similarities, learned as its logarithm and bounded smoothly to (minimum, maximum).

    A task reports one that it calls `a.x` as the metric `optim/a_x`, which the trainer watches for its bounds.
    """

    def __init__(self, initial: float, maximum: float, minimum: float = 1.0) -> None:
        super().__init__()
        self.low, self.high = math.log(minimum), math.log(maximum)
        self.initial = soft_bound_inverse(math.log(initial), self.low, self.high)
        self.log_scale = nn.Parameter(torch.tensor([self.initial]))  # DeepSpeed takes no scalars

    def forward(self) -> Tensor:
        """[] fp32."""
        return soft_bound(self.log_scale.float(), self.low, self.high).exp().squeeze(0)

    def bound_near(self, value: float) -> float | None:
        """The bound that a `value` of this scale is within 1 % of: it is never reached, yet learning ends there."""
        bounds = (math.exp(self.low), math.exp(self.high))
        return next((bound for bound in bounds if abs(value / bound - 1) <= NEAR_BOUND), None)


class LogitBias(nn.Module):
    """Learned offset of pairwise-sigmoid logits, bounded smoothly to (-bound, bound)."""

    def __init__(self, initial: float, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.initial = soft_bound_inverse(initial, -bound, bound)
        self.bias = nn.Parameter(torch.tensor([self.initial]))

    def forward(self) -> Tensor:
        """[] fp32."""
        return soft_bound(self.bias.float(), -self.bound, self.bound).squeeze(0)


class Projection(nn.Module):
    """`[n, D]` -> `[n, E]` fp32, no bias."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(embed_dim, width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def unit_norm(x: Tensor) -> Tensor:
    """Rows of length 1 in fp32; a zero row stays zero with a finite gradient."""
    return F.normalize(x.float(), dim=-1, eps=1e-6)
