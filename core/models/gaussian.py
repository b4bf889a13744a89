"""Diagonal Gaussians instead of points: the encoder that makes them of tokens, and samples of them.

(MAP's probability distribution encoder, CVPR 2023, as the D-MLM paper, arXiv 2507.21794, takes it up.) `logvar` is the
natural logarithm of the variance everywhere, never of the standard deviation, and lies smoothly inside LOGVAR_RANGE.

Letters: S = sequences, L = tokens of a sequence, C = channels, R = chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.keyed import hash_keys, normal
from core.models.attention import cross_attention, dense_attention, pick_rows
from core.models.heads import soft_bound, unit_norm
from core.models.transformer import LayerNorm, Linear, activate
from shards.errors import ConfigError

LOGVAR_RANGE = (-10.0, 10.0)
# MAP's spread of first weights; the log-variance then starts near its bias, the mean near the token itself.
WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """`mean` and `logvar` (natural logarithm of the variance), fp32, both `[..., D]`."""

    mean: Tensor
    logvar: Tensor

    def detach(self) -> Gaussian:
        """The same numbers without their history."""
        return Gaussian(mean=self.mean.detach(), logvar=self.logvar.detach())

    def uncertainty(self) -> Tensor:
        """Mean log-variance over the dimensions, `[...]`."""
        return self.logvar.mean(dim=-1)

    def out_of_range(self) -> Tensor:
        """How many log-variances `[...]` the encoder had put outside of LOGVAR_RANGE, read from the bounded ones."""
        low, high = LOGVAR_RANGE
        rails = soft_bound(torch.tensor([low, high], device=self.logvar.device), low, high)
        return ((self.logvar < rails[0]) | (self.logvar > rails[1])).sum(dim=-1)


def sample(gaussian: Gaussian, samples: int, draw_key: Tensor, purpose: str) -> Tensor:
    """`[R, D]` -> `[samples + 1, R, D]` fp32: the mean, then `mean + exp(logvar / 2) * noise`, differentiable in both.

    The noise of a row depends on its `draw_key [R]` int64 and `purpose` alone.
    """
    mean = gaussian.mean
    if not samples:
        return mean[None]
    noise = normal(hash_keys(purpose, draw_key), samples * mean.shape[1])
    noise = noise.view(len(mean), samples, mean.shape[1]).transpose(0, 1)  # [samples, R, D]
    drawn = torch.addcmul(mean, torch.exp(gaussian.logvar / 2), noise)
    return torch.cat([mean[None], drawn])


class _Residual(nn.Module):
    """`x + MLP(LayerNorm(x))`, fp32 in and out; the wide layer in between computes in `dtype`."""

    def __init__(self, width: int, mlp_ratio: float, *, bias: float = 0.0) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm = LayerNorm(width, eps=1e-6)
        self.mlp_in = Linear(width, hidden, std=WEIGHT_STD)
        self.mlp_out = Linear(hidden, width, std=WEIGHT_STD, first_bias=bias)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        wide = activate(self.mlp_in(self.norm(x.to(dtype))), "gelu")
        out: Tensor = x + self.mlp_out(wide.float())
        return out


class GaussianEncoder(nn.Module):
    """Tokens `[S, L, C]` to the Gaussians of chosen tokens; all of them are attended to, only the chosen finished.

    `kind="attention"` is MAP's: one self-attention, whose first half of heads makes the mean and second half the
    log-variance. `kind="linear"` is its ablation: the token is the mean, a linear layer of it the log-variance.
    There is no dropout, as nowhere in our towers: the unmasked pass is the target of others, and sampling is noise.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`logvar_init`: where log-variances start, before the bounds. -4 where unit-norm means are compared by W2,
        -10 (bounded: -9.3) by CSD, 0 where means are not normalised.

        `detach_variance`: the log-variance's gradient moves its own last layers only, nothing that the mean reads.
        """

        kind: Literal["attention", "linear"] = "attention"
        heads: int = 12
        mlp_ratio: float = 4.0
        logvar_init: float = -4.0
        detach_variance: bool = False

        def __post_init__(self) -> None:
            low, high = LOGVAR_RANGE
            if not low <= self.logvar_init < high:
                raise ConfigError(f"logvar_init={self.logvar_init} must lie in [{low:g}, {high:g}); -4 suits W2")
            if self.heads % 2:
                raise ConfigError(f"heads={self.heads} must be even: half make the mean, half the log-variance")

    def __init__(self, config: GaussianEncoder.Config, width: int) -> None:
        super().__init__()
        self.config = config
        if width % (2 * config.heads):
            raise ConfigError(
                f"width {width} of a Gaussian encoder is not divisible by 2 * heads = {2 * config.heads}; change one"
            )
        first = config.logvar_init
        if config.kind == "linear":
            self.variance_out = Linear(width, width, std=WEIGHT_STD, first_bias=first)
            return
        half = width // 2
        self.dense = Linear(width, width, std=WEIGHT_STD)
        self.norm = LayerNorm(width, eps=1e-6)
        self.query = Linear(width, width, std=WEIGHT_STD, bias=False)
        self.key_value = Linear(width, 2 * width, std=WEIGHT_STD, bias=False)
        self.mean_out = Linear(half, width, std=WEIGHT_STD)
        self.variance_out = Linear(half, width, std=WEIGHT_STD)
        self.mean_residual = _Residual(width, config.mlp_ratio)
        self.variance_residual = _Residual(width, config.mlp_ratio, bias=first)

    def forward(self, x: Tensor, rows: Tensor | None = None, *, key_mask: Tensor | None = None) -> Gaussian:
        """Gaussians of chosen tokens of `x [S, L, C]`: those at `rows [R]`, places in the flattened `[S * L, C]`, none
        of them twice, or the first of each sequence, R = S, for which less is computed.

        `key_mask [S, L]` bool, False for tokens that nobody attends to.
        """
        sequences, length, _ = x.shape
        chosen = x[:, 0] if rows is None else pick_rows(x.flatten(0, 1), rows)  # [R, C]
        if self.config.kind == "linear":
            return Gaussian(mean=chosen.float(), logvar=soft_bound(self._of_variance(chosen), *LOGVAR_RANGE))
        y = self.norm(activate(self.dense(x.flatten(0, 1)), "gelu"))
        heads = self.config.heads
        key_value = self.key_value(y).view(sequences, length, 2, heads, -1)
        if rows is None:
            query = self.query(y.view_as(x)[:, 0]).view(sequences, 1, heads, -1)
            mixed = cross_attention(query, key_value, key_mask)[:, 0]
        else:
            query = self.query(y).view(sequences, length, 1, heads, -1)
            attended = dense_attention(torch.cat([query, key_value], dim=2), key_mask=key_mask)
            mixed = pick_rows(attended.flatten(0, 1), rows)
        of_mean, of_variance = mixed.chunk(2, dim=1)  # heads in order: first half, second half
        with torch.autocast(x.device.type, enabled=False):
            mean = self.mean_residual(chosen.float() + self.mean_out(of_mean.float()), x.dtype)
            logvar = self.variance_residual(self._of_variance(of_variance), x.dtype)
        return Gaussian(mean=mean, logvar=soft_bound(logvar, *LOGVAR_RANGE))

    def _of_variance(self, x: Tensor) -> Tensor:
        """The variance's first own layer, fp32."""
        if self.config.detach_variance:
            x = x.detach()
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.variance_out(x.float())
            return out


def unit_mean(gaussian: Gaussian) -> Gaussian:
    """Means of length 1; the log-variance is that of the normalised space already."""
    return Gaussian(mean=unit_norm(gaussian.mean), logvar=gaussian.logvar)
