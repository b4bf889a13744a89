"""Masked words of a report from its other words and from what is seen of the image (ECAMP, arXiv 2312.13316, 3).

The image enters once, between the embeddings and the blocks of a bidirectional text stack: every token looks at the
visible patches (fine scale) and is given their mean (coarse scale). There is no dropout, as in no block of ours.

Letters: S = reports, L = padded length, T = tokens of all reports, M = visible patches, R = chosen tokens, D = width of
the text, H = heads, K = D / H.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout, PackedLayout, cross_attention, pick_rows
from core.models.text import TextEncoder, never_empty
from core.models.transformer import LayerNorm, Linear, activate
from shards.errors import ConfigError

Scales = Literal["fine", "coarse", "both"]


class ContextFusion(nn.Module):
    """Multi-scale context fusion: self-attention, the image at one or both scales, an MLP; norms after the sums."""

    def __init__(self, text: TextEncoder.Config, image_width: int, scales: Scales) -> None:
        super().__init__()
        width, hidden = text.width, round(text.width * text.mlp_ratio)
        self.heads, self.scales, self.activation = text.heads, scales, text.activation
        self.image_in = Linear(image_width, width)
        self.qkv, self.attention_out = Linear(width, 3 * width), Linear(width, width)
        self.query = Linear(width, width) if scales != "coarse" else None
        self.key_value = Linear(width, 2 * width) if scales != "coarse" else None
        self.coarse = Linear(width, width) if scales != "fine" else None
        self.cross_out = Linear(width, width)
        self.mlp_in, self.mlp_out = Linear(width, hidden), Linear(hidden, width)
        self.norm_self, self.norm_cross, self.norm_mlp = (LayerNorm(width, eps=text.norm_epsilon) for _ in range(3))

    def forward(self, x: Tensor, layout: Tokens, patches: Tensor) -> Tensor:
        """`x [T, D]`, `patches [S, M, image width]` -> `[T, D]`."""
        x = self.attend(x, layout)
        image = self.image_in(patches.flatten(0, 1))  # [S * M, D]
        context = x.new_zeros(())
        if self.query is not None and self.key_value is not None:
            reports, seen = patches.shape[:2]
            query = layout.padded(self.query(x)).unflatten(2, (self.heads, -1))
            key_value = self.key_value(image).view(reports, seen, 2, self.heads, -1)
            context = layout.rows(cross_attention(query, key_value, None))
        if self.coarse is not None:
            mean = self.coarse(image.view(*patches.shape[:2], -1).mean(dim=1))  # [S, D]
            context = context + layout.rows(mean[:, None].expand(-1, layout.length, -1).contiguous())
        x = self.norm_cross(x + self.cross_out(context))
        fused: Tensor = self.norm_mlp(x + self.mlp_out(activate(self.mlp_in(x), self.activation)))
        return fused

    def attend(self, x: Tensor, layout: Tokens) -> Tensor:
        """The first third: the report with itself, `[T, D]`."""
        mixed = layout.layout.attend(self.qkv(x).view(len(x), 3, self.heads, -1))
        normed: Tensor = self.norm_self(x + self.attention_out(mixed))
        return normed

    def attention_map(self, x: Tensor, layout: Tokens, patches: Tensor) -> Tensor:
        """Where each token looks, `[S, L, M]` fp32: the largest share that any head gives a patch. Not of `coarse`."""
        assert self.query is not None and self.key_value is not None
        reports, seen = patches.shape[:2]
        query = layout.padded(self.query(self.attend(x, layout))).unflatten(2, (self.heads, -1)).float()
        keys = self.key_value(self.image_in(patches.flatten(0, 1))).view(reports, seen, 2, self.heads, -1)[:, :, 0]
        scores = torch.einsum("slhk,smhk->shlm", query, keys.float()) * query.shape[-1] ** -0.5
        return scores.softmax(dim=-1).amax(dim=1)


class Tokens:
    """Tokens of S reports as rows `[T, ...]`: the real ones packed, or with `every` all places of the padded batch."""

    def __init__(self, attention_mask: Tensor, *, every: bool) -> None:
        mask = never_empty(attention_mask)
        self.reports, self.length = mask.shape
        self.packed = None if every else PackedLayout.from_mask(mask)
        self.layout: PackedLayout | DenseLayout
        if self.packed is not None:
            self.layout, self.place = self.packed, self.packed.token_index
        else:
            self.layout = DenseLayout(self.reports, self.length, key_mask=mask)
            self.place = torch.arange(mask.numel(), device=mask.device)

    def padded(self, rows: Tensor) -> Tensor:
        """`[T, ...]` -> `[S, L, ...]`."""
        if self.packed is None:
            return rows.view(self.reports, self.length, *rows.shape[1:])
        return self.packed.unpack(rows, self.length)

    def rows(self, padded: Tensor) -> Tensor:
        """`[S, L, ...]` -> `[T, ...]`."""
        return padded.flatten(0, 1) if self.packed is None else self.packed.pack(padded)


class ReportCompletion(nn.Module):
    """Text stack with the fusion in front and a masked-word head that shares the embedding table."""

    def __init__(self, text: TextEncoder.Config, image_width: int, scales: Scales) -> None:
        super().__init__()
        self.text = TextEncoder(text)
        self.fusion = ContextFusion(self.text.config, image_width, scales)
        self.mask_token = nn.Parameter(torch.zeros(1, text.width))
        self.dense, self.norm = Linear(text.width, text.width), LayerNorm(text.width, eps=text.norm_epsilon)
        self.word_bias = nn.Parameter(torch.zeros(text.vocab_size))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, text_mask: Tensor, token_weight: Tensor, patches: Tensor
    ) -> Tensor:
        """Weighted sum of the cross-entropies of each report, `[S]` fp32; `patches [S, M, image width]`.

        Words under `text_mask [S, L]` are hidden; those of `token_weight [S, L]` above 0 are predicted, and only their
        logits are computed. Padding is a token only where it is predicted too.
        """
        chosen = token_weight > 0
        tokens = Tokens(attention_mask, every=bool((chosen & ~attention_mask).any()))
        x = self._embedded(input_ids, tokens, text_mask)
        x = self.text.norm(self.text.transformer(self.fusion(x, tokens, patches), tokens.layout))
        place = chosen.flatten().nonzero().squeeze(1)  # [R]
        x = pick_rows(tokens.padded(x).flatten(0, 1), place)
        loss = self._word_loss(x, input_ids.flatten()[place]) * token_weight.flatten()[place]
        return loss.new_zeros(chosen.numel()).index_copy(0, place, loss).view_as(chosen).sum(dim=1)

    def attention_map(self, input_ids: Tensor, attention_mask: Tensor, patches: Tensor) -> Tensor:
        """Where each token of whole reports looks, `[S, L, M]`."""
        tokens = Tokens(attention_mask, every=False)
        return self.fusion.attention_map(self._embedded(input_ids, tokens, None), tokens, patches)

    def _embedded(self, input_ids: Tensor, tokens: Tokens, text_mask: Tensor | None) -> Tensor:
        length, longest = input_ids.shape[1], self.text.config.max_length
        if length > longest:
            raise ConfigError(f"reports of {length} tokens, but text.max_length={longest}; lower data.text_length")
        hidden = None if text_mask is None else (text_mask, self.mask_token)
        return self.text.embed(input_ids, tokens.place, hidden=hidden)

    def _word_loss(self, x: Tensor, words: Tensor) -> Tensor:
        """`x [R, D]`, `words [R]` -> `[R]` fp32.

        The product with the table is in the dtype of the stream: in fp32 it would take as long as all else of a step.
        """
        x = self.norm(activate(self.dense(x), "gelu"))
        logits = F.linear(x, self.text.words.weight.to(x.dtype)).float() + self.word_bias
        with torch.autocast(x.device.type, enabled=False):
            return F.cross_entropy(logits, words, reduction="none")
