"""Image and report tokens in one: pairs of co-attention layers, and the heads that read what comes out.

(MAP, CVPR 2023.) The i-th row of the image stream meets the i-th row of the text stream; who is paired with whom is the
caller's business. Blocks draw nothing at random, as in `core.models.transformer`.

Letters: P = pairs, N = image tokens, L = text tokens, D = width, H = heads, K = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.models.attention import DenseLayout, Layout, cross_attention
from core.models.transformer import Block, LayerNorm, Linear, TransformerConfig, activate
from shards.errors import ConfigError


class CrossBlock(Block):
    """A pre-norm block that looks at another stream between its self-attention and its MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.norm_cross = LayerNorm(config.width, eps=config.norm_epsilon)
        self.norm_other = LayerNorm(config.width, eps=config.norm_epsilon)
        self.query = Linear(config.width, config.width)
        self.key_value = Linear(config.width, 2 * config.width)
        self.cross_out = Linear(config.width, config.width)

    def branch_ends(self) -> tuple[Linear, ...]:
        return *super().branch_ends(), self.cross_out

    def keys_of(self, other: Tensor) -> Tensor:
        """Keys and values of another stream `[P, m, D]`, `[P, m, 2, H, K]`."""
        pairs, length, _ = other.shape
        key_value: Tensor = self.key_value(self.norm_other(other.flatten(0, 1)))
        return key_value.view(pairs, length, 2, self.heads, -1)

    def look_at(self, x: Tensor, key_value: Tensor, other_mask: Tensor | None) -> Tensor:
        """`x [P * n, D]`, `key_value [P, m, 2, H, K]`, `other_mask [P, m]` -> `[P * n, D]`."""
        pairs = len(key_value)
        query = self.query(self.norm_cross(x)).view(pairs, len(x) // max(1, pairs), self.heads, -1)
        mixed: Tensor = self.cross_out(cross_attention(query, key_value, other_mask).flatten(0, 1))
        return mixed

    def meet(self, x: Tensor, layout: Layout, other: Tensor, other_mask: Tensor | None) -> Tensor:
        """The whole block on `x [P * n, D]`."""
        return self.meet_known(x, layout, self.keys_of(other), other_mask)

    def meet_known(self, x: Tensor, layout: Layout, key_value: Tensor, other_mask: Tensor | None) -> Tensor:
        """`meet` of a stream whose keys and values `[P, m, 2, H, K]` are there."""
        x = x + self.attend(self.norm1(x), layout)
        x = x + self.look_at(x, key_value, other_mask)
        return x + self.mlp(self.norm2(x))

    def meet_next(self, x: Tensor, past: Tensor, key_value: Tensor, other_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The whole block on the next token of a causal stream, `x [P, D]`.

        `past [P, t, 2, H, K]`: keys and values of the tokens before it; given back with its own at the end.
        """
        qkv = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1)
        past = torch.cat([past, qkv[:, None, 1:]], dim=1)
        x = x + self.attention_out(cross_attention(qkv[:, :1], past, None).flatten(0, 1))
        x = x + self.look_at(x, key_value, other_mask)
        return x + self.mlp(self.norm2(x)), past


class CrossStack(nn.Module):
    """One stream's blocks, in order."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))


@dataclass(frozen=True, kw_only=True)
class Streams:
    """`image [P, N, D]` and `text [P, L, D]`, first tokens global; `text_mask [P, L]` bool.

    A stream that was not asked for is as it entered its last layer.
    """

    image: Tensor
    text: Tensor
    text_mask: Tensor


class Fusion(nn.Module):
    """Tokens of both encoders in, fused tokens of both streams out. `depth` counts pairs of layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Shape of the fusion; `width` is that of both streams."""

        width: int = 768
        depth: int = 6
        heads: int = 12
        mlp_ratio: float = 4.0

        def __post_init__(self) -> None:
            if self.depth < 1:
                raise ConfigError(f"fusion.depth={self.depth} must be at least 1; weights of 0 switch fusion off")

    def __init__(self, config: Fusion.Config, *, image_width: int, text_width: int, patches: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        shape = TransformerConfig(
            width=width, depth=config.depth, heads=config.heads, mlp_ratio=config.mlp_ratio, norm="pre"
        )
        self.image_in, self.text_in = Linear(image_width, width), Linear(text_width, width)
        # Which stream a token is of, where a patch lies, and what stands for a patch that nobody encoded.
        self.token_types = nn.Parameter(torch.zeros(2, width))
        self.positions = nn.Parameter(torch.zeros(patches, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.image, self.text = CrossStack(shape), CrossStack(shape)
        self.image_norm, self.text_norm = LayerNorm(width, eps=1e-6), LayerNorm(width, eps=1e-6)

    def embed_image(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens `[P, 1 + M, image_width]`, the global one first -> `[P, 1 + N, D]`.

        `keep [P, M]` says which of the N patches they are, else M = N; the mask token takes the others' places.
        """
        x = self.image_in(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        patches = x[:, 1:]
        if keep is not None:
            masked = self.mask_token.to(x.dtype).expand(x.shape[0], len(self.positions), -1)
            patches = masked.scatter(1, keep[:, :, None].expand(-1, -1, x.shape[2]), patches)
        patches = patches + self.positions.to(x.dtype)
        return torch.cat([x[:, :1], patches], dim=1) + self.token_types[0].to(x.dtype)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """`[P, L, text_width]` -> `[P, L, D]`."""
        x = self.text_in(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
        return x + self.token_types[1].to(x.dtype)

    def forward(
        self, image: Tensor, text: Tensor, text_mask: Tensor, *, want_image: bool = True, want_text: bool = True
    ) -> Streams:
        """Of what `embed_image` and `embed_text` gave; a stream that nobody wants skips its last layer."""
        pairs, patches, _ = image.shape
        image_layout = DenseLayout(pairs, patches)
        text_layout = DenseLayout(pairs, text.shape[1], key_mask=text_mask)
        last = self.config.depth - 1
        for i, (of_image, of_text) in enumerate(zip(self.image.blocks, self.text.blocks, strict=True)):
            assert isinstance(of_image, CrossBlock) and isinstance(of_text, CrossBlock)
            before_image, before_text = image, text  # both read the other's input, not its output
            if i < last or want_image:
                flat = of_image.meet(before_image.flatten(0, 1), image_layout, before_text, text_mask)
                image = flat.view_as(before_image)
            if i < last or want_text:
                flat = of_text.meet(before_text.flatten(0, 1), text_layout, before_image, None)
                text = flat.view_as(before_text)
        return Streams(
            image=self.image_norm(image) if want_image else image,
            text=self.text_norm(text) if want_text else text,
            text_mask=text_mask,
        )


class WordHead(nn.Module):
    """`[n, D]` fp32 -> logits over the vocabulary `[n, words]` fp32; the layer before the last computes in `dtype`."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.norm = LayerNorm(width, eps=1e-6)
        self.decoder = Linear(width, words)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.norm(activate(self.dense(x.to(dtype)), "gelu")).float()
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.decoder(x)
            return logits


class PatchHead(nn.Module):
    """`[..., D]` -> pixels of a patch `[..., pixels]`, fp32."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.linear = Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            pixels: Tensor = self.linear(x.float())
            return pixels


class MatchHead(nn.Module):
    """First tokens of both streams, `[..., D]` each -> the logit `[...]` fp32 that they belong together.

    One logit where MAP has two classes: a softmax over two is a sigmoid of their difference.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_pool, self.text_pool = Linear(width, width), Linear(width, width)
        self.out = Linear(2 * width, 1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            pooled = [self.image_pool(image.float()).tanh(), self.text_pool(text.float()).tanh()]
            logit: Tensor = self.out(torch.cat(pooled, dim=-1))
            return logit.squeeze(-1)
