"""Pairwise sigmoid loss with keyed positives (SigLIP, arXiv 2303.15343), row-local and blockwise.

Every pair of the global batch is counted once, by the rank that owns its image. A block of pairs is gone before the
next begins and leaves only its gradient, so memory is linear in the batch. fp32 (fp64 for fp64 input) throughout.

Letters: b = own rows, B = rows of the global batch, E = embedding size, R = rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.losses.clip import rows_per_block, without_void


class _PairwiseSigmoid(torch.autograd.Function):
    """-sum over valid pairs of log sigmoid(y * (scale * cosine + bias)), y = +1 for equal keys, -1 otherwise."""

    @staticmethod
    def forward(
        ctx: Any,
        own_image: Tensor,
        all_text: Tensor,
        scale: Tensor,
        bias: Tensor,
        own_key: Tensor,
        all_key: Tensor,
        own_valid: Tensor,
        all_valid: Tensor,
        block_rows: int,
        with_gradient: bool,
    ) -> Tensor:
        total = own_image.new_zeros(())
        grad_image = torch.zeros_like(own_image) if with_gradient else None
        grad_text = torch.zeros_like(all_text) if with_gradient else None
        grad_scale = torch.zeros_like(total) if with_gradient else None
        grad_bias = torch.zeros_like(total) if with_gradient else None
        columns = all_text.T  # [E, B]
        for start in range(0, own_image.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            cosine = own_image[rows] @ columns  # [R, B]
            pair = own_valid[rows, None] & all_valid[None, :]
            sign = torch.where(own_key[rows, None] == all_key[None, :], 1.0, -1.0).to(cosine.dtype)
            signed = (cosine * scale + bias) * sign
            total -= F.logsigmoid(signed).masked_fill_(~pair, 0.0).sum()
            if grad_image is not None and grad_text is not None and grad_scale is not None and grad_bias is not None:
                seed = torch.sigmoid(-signed).mul_(-sign).masked_fill_(~pair, 0.0)  # d loss / d logit, [R, B]
                grad_bias += seed.sum()
                grad_scale += (seed * cosine).sum()
                seed *= scale
                grad_image[rows] = seed @ all_text
                grad_text.addmm_(seed.T, own_image[rows])
        if with_gradient:
            ctx.save_for_backward(grad_image, grad_text, grad_scale, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (*(grad * saved for saved in ctx.saved_tensors), None, None, None, None, None, None)


def siglip(
    own_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    own_key: Tensor,
    all_key: Tensor,
    own_valid: Tensor,
    all_valid: Tensor,
    block_rows: int | None = None,
) -> Tensor:
    """This rank's share of the loss: its images `[b, E]` against all texts `[B, E]`, over the global valid count. [].

    `scale []`, `bias []`; keys int64 and valid bool of `[b]` and `[B]`. Pairs of equal key are positives. Without any
    valid row the share is 0 with zero gradient.
    """
    needs_gradient = any(x.requires_grad for x in (own_image, all_text, scale, bias))
    with torch.autocast(own_image.device.type, enabled=False):
        own_image, all_text = without_void(own_image, own_valid), without_void(all_text, all_valid)
        total: Tensor = _PairwiseSigmoid.apply(
            own_image,
            all_text,
            scale.to(own_image.dtype),
            bias.to(own_image.dtype),
            own_key,
            all_key,
            own_valid,
            all_valid,
            block_rows or rows_per_block(all_text.shape[0]),
            torch.is_grad_enabled() and needs_gradient,
        )
    return total / all_valid.sum().clamp(min=1)
