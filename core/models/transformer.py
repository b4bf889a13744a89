"""Transformer blocks on a `[T, D]` token matrix, pre- or post-norm; how tokens form sequences is the layout's business.

Everything but attention runs on the token matrix, so packed tokens cost what they are and padding costs nothing. There
is no dropout: pre-training at these sizes is bound by data, and a pass without random state can be replayed.

Letters: T = tokens of all sequences, D = width, H = heads, K = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core.models.attention import Layout
from shards.errors import ConfigError

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
Norm = Literal["pre", "post"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype the blocks compute in: autocast's where it is on for the tensor's device, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _CpuLinear(torch.autograd.Function):
    """x W + b whose weight gradient is a product of row-major matrices, in half precision on a CPU.

    oneDNN runs `g.T @ x` at 240-340 GFLOP/s a core where row-major operands give 600-900 (bf16, AMX, torch 2.13), so
    the narrower operand is transposed first, which costs a tenth of what it saves.

    Kept for the backward is the fp32 weight, which is there anyway: half-precision copies of all layers' would be half
    as much again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, wide: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = wide
        weight = weight.to(x.dtype)
        return torch.addmm(bias, x, weight) if wide else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = weight.to(grad.dtype)
            grad_x = grad @ weight.T if ctx.wide else grad @ weight
        if ctx.wide:
            # A row of ones below x^T: the same product then adds up the bias gradient too.
            inputs = x.shape[1]
            rows = x.new_empty((inputs + 1, x.shape[0]))
            rows[:inputs].copy_(x.T)
            rows[inputs] = 1
            both = rows @ grad  # [in + 1, out]
            return grad_x, both[:inputs], both[inputs], None
        columns = grad.T.contiguous()  # [out, T]
        return grad_x, columns @ x, columns.sum(dim=1), None


class Linear(nn.Module):
    """`[T, in]` -> `[T, out]`. The weight is `[in, out]` where out > in (`wide`), else `[out, in]`.

    That order, the smaller side first, is the one in which its gradient is cheap to form: see `_CpuLinear`.
    `std` and `first_bias` are first values that differ from the usual 1 / sqrt(in) and 0.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, std: float | None = None, first_bias: float = 0.0
    ) -> None:
        super().__init__()
        self.wide = outputs > inputs
        self.fan_in, self.outputs = inputs, outputs
        self.std, self.first_bias = std, first_bias
        self.weight = nn.Parameter(torch.zeros((inputs, outputs) if self.wide else (outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(self.outputs) if self.bias is None else self.bias.to(x.dtype)
        if x.device.type == "cpu" and x.dtype is torch.bfloat16:
            product: Tensor = _CpuLinear.apply(x, self.weight, bias, self.wide)
            return product
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight.T if self.wide else weight, bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that takes and returns the stream's dtype; statistics are fp32 inside, whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.device.type != "cpu" and x.dtype != weight.dtype:
            # The CPU kernel takes a bf16 stream with fp32 weights; the CUDA one wants both alike.
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerScale(nn.Module):
    """Learned factor a channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """GELU by the error function (BERT, ViT), by tanh, or OpenAI CLIP's `x * sigmoid(1.702 x)`."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a stack of blocks. `layer_scale` None leaves the factors out."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    norm: Norm = "pre"
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-6
    layer_scale: float | None = None
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} is not divisible by heads={self.heads}; change one of them")


class Block(nn.Module):
    """Attention and MLP, each with a residual; norms before them (`pre`) or after the sums (`post`, BERT)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads, self.norm, self.activation = config.heads, config.norm, config.activation
        self.norm1 = LayerNorm(width, eps=config.norm_epsilon)
        self.qkv = Linear(width, 3 * width)
        self.attention_out = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=config.norm_epsilon)
        self.mlp_in = Linear(width, hidden)
        self.mlp_out = Linear(hidden, width)
        scaled = config.layer_scale
        self.scale1: nn.Module = nn.Identity() if scaled is None else LayerScale(width, scaled)
        self.scale2: nn.Module = nn.Identity() if scaled is None else LayerScale(width, scaled)

    def branch_ends(self) -> tuple[Linear, ...]:
        """The layer that ends each residual branch."""
        return self.attention_out, self.mlp_out

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, -1)  # [T, 3, H, K]
        mixed: Tensor = self.attention_out(layout.attend(qkv))
        return mixed

    def mlp(self, x: Tensor) -> Tensor:
        """`[T, D]` -> `[T, D]`."""
        out: Tensor = self.mlp_out(activate(self.mlp_in(x), self.activation))
        return out

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.norm == "pre":
            x = x + self.scale1(self.attend(self.norm1(x), layout))
            x = x + self.scale2(self.mlp(self.norm2(x)))
        else:
            x = self.norm1(x + self.scale1(self.attend(x, layout)))
            x = self.norm2(x + self.scale2(self.mlp(x)))
        return x


class Transformer(nn.Module):
    """A stack of blocks; with `checkpoint_activations` only the input of each is kept for backward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.checkpoint_activations = config.checkpoint_activations
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        for state in self.states(x, layout):
            x = state
        return x

    def states(self, x: Tensor, layout: Layout) -> Iterator[Tensor]:
        """The stream `[T, D]` after each block."""
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # No random state to restore: blocks draw nothing.
                x = checkpoint(block, x, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layout)
            yield x
