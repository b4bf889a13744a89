"""Symmetric InfoNCE with keyed positives (CLIP, arXiv 2103.00020), row-local and blockwise.

A rank holds the logits of a few of its own rows against all columns at a time, never [B, B] nor [b, B]. A row's softmax
is complete inside its block, so the gradient is formed there and then: nothing is recomputed, and what is kept for
backward is as large as the embeddings. All arithmetic is fp32 (fp64 for fp64 input), autocast or not.

Letters: b = own rows, B = rows of the global batch, E = embedding size, R = rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block of logits; 16 MB in fp32, and a few of these are alive at once.
BLOCK_ELEMENTS = 1 << 22


def rows_per_block(columns: int, block_elements: int = BLOCK_ELEMENTS) -> int:
    """Rows R with R * columns <= block_elements, and at least 1."""
    return max(1, block_elements // max(1, columns))


class _RowCrossEntropy(torch.autograd.Function):
    """sum over valid own rows of (logsumexp of the row - mean logit of its positives), with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        everyone: Tensor,
        scale: Tensor,
        own_key: Tensor,
        all_key: Tensor,
        own_valid: Tensor,
        all_valid: Tensor,
        block_rows: int,
        with_gradient: bool,
    ) -> Tensor:
        dtype = own.dtype
        total = own.new_zeros(())
        grad_own = torch.zeros_like(own) if with_gradient else None
        grad_all = torch.zeros_like(everyone) if with_gradient else None
        grad_scale = own.new_zeros(()) if with_gradient else None
        columns = everyone.T  # [E, B]
        for start in range(0, own.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            cosine = own[rows] @ columns  # [R, B]
            # A void column is nobody's positive and takes no softmax mass; a void row weighs nothing.
            positive = (own_key[rows, None] == all_key[None, :]) & all_valid[None, :]
            weight = own_valid[rows].to(dtype)  # [R]
            logits = (cosine * scale).masked_fill_(~all_valid[None, :], -torch.inf)
            # No valid column at all: then no valid row either, and the row's -inf must not become NaN.
            log_sum = torch.where(own_valid[rows], torch.logsumexp(logits, dim=1), 0.0)  # [R]
            target = positive.to(dtype)
            target /= target.sum(dim=1, keepdim=True).clamp_(min=1.0)
            positive_cosine = (target * cosine).sum(dim=1)
            total += (weight * (log_sum - scale * positive_cosine)).sum()
            if grad_own is not None and grad_all is not None and grad_scale is not None:
                seed = logits.sub_(log_sum[:, None]).exp_().sub_(target)  # softmax - target, [R, B]
                seed *= weight[:, None]
                grad_scale += (seed * cosine).sum()
                seed *= scale
                grad_own[rows] = seed @ everyone
                grad_all.addmm_(seed.T, own[rows])
        if with_gradient:
            ctx.save_for_backward(grad_own, grad_all, grad_scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad_own, grad_all, grad_scale = ctx.saved_tensors
        return (grad * grad_own, grad * grad_all, grad * grad_scale, None, None, None, None, None, None)


def without_void(x: Tensor, valid: Tensor) -> Tensor:
    """`x [n, E]` with void rows zeroed, so that nothing they hold, NaN included, enters a product; fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(valid[:, None], wide, torch.zeros((), dtype=wide.dtype, device=wide.device))


def row_cross_entropy(
    own: Tensor,
    everyone: Tensor,
    scale: Tensor,
    *,
    own_key: Tensor,
    all_key: Tensor,
    own_valid: Tensor,
    all_valid: Tensor,
    block_rows: int | None = None,
) -> Tensor:
    """Sum over valid own rows of the cross-entropy of softmax(scale * own @ everyone.T), uniform positives. [] fp32.

    `own [b, E]`, `everyone [B, E]`, `scale []`, keys int64 and valid bool of `[b]` and `[B]`. Each row's target is
    uniform over the valid columns of equal key and adds up to 1.
    """
    with torch.autocast(own.device.type, enabled=False):
        own, everyone = without_void(own, own_valid), without_void(everyone, all_valid)
        loss: Tensor = _RowCrossEntropy.apply(
            own,
            everyone,
            scale.to(own.dtype),
            own_key,
            all_key,
            own_valid,
            all_valid,
            block_rows or rows_per_block(everyone.shape[0]),
            torch.is_grad_enabled() and (own.requires_grad or everyone.requires_grad or scale.requires_grad),
        )
    return loss


def clip(
    own_image: Tensor,
    own_text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    scale: Tensor,
    *,
    own_key: Tensor,
    all_key: Tensor,
    own_valid: Tensor,
    all_valid: Tensor,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """This rank's shares (image to text, text to image) of the symmetric loss; the loss is half their sum over ranks.

    Unit-norm embeddings `[b, E]` and `[B, E]`; denominators are the global count of valid rows, so the shares of all
    ranks add up. Without any valid row both are 0 with zero gradient.
    """
    count = all_valid.sum().clamp(min=1)
    shared = {
        "own_key": own_key,
        "all_key": all_key,
        "own_valid": own_valid,
        "all_valid": all_valid,
        "block_rows": block_rows,
    }
    image_to_text = row_cross_entropy(own_image, all_text, scale, **shared) / count  # type: ignore[arg-type]
    text_to_image = row_cross_entropy(own_text, all_image, scale, **shared) / count  # type: ignore[arg-type]
    return image_to_text, text_to_image
