"""Text transformer for reports: BERT's form (post-norm, token types) and CLIP's (pre-norm, causal, last-token pooling).

Tokens are packed: a batch of reports of different lengths is one `[T, D]` matrix without padding, for every layer but
attention. `unpadded=False` is the plain twin that computes the padding too, for tests and for timing.

Letters: S = reports, L = padded length, T = real tokens, D = width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout, PackedLayout, pick_rows
from core.models.transformer import Activation, LayerNorm, Norm, Transformer, TransformerConfig, compute_dtype
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextOutput:
    """`tokens [S, L, D]`, zeros in the padding, and `pooled [S, D]`."""

    tokens: Tensor
    pooled: Tensor


def never_empty(mask: Tensor) -> Tensor:
    """`mask [S, L]` bool with every first token on: attention over no key at all has no value."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)


class TextEncoder(nn.Module):
    """Own text encoder. Weights of BERT and open_clip key names load through `initialise`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`pool`: the first token (`cls`), the last real one (`eos`) or the mean of real tokens.

        `vocab_size` 0 means: that of the tokenizer, filled in when the task is built. `token_types` 0 has no table.
        """

        vocab_size: int = 0
        max_length: int = 512
        width: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4.0
        norm: Norm = "post"
        causal: bool = False
        pool: Literal["cls", "eos", "mean"] = "cls"
        token_types: int = 2
        activation: Activation = "gelu"
        norm_epsilon: float = 1e-12
        unpadded: bool = True
        checkpoint_activations: bool = False

    def __init__(self, config: TextEncoder.Config) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ConfigError("text.vocab_size is not set; give it, or build the task with the tokenizer's vocab_size")
        self.config = config
        width = config.width
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(config.max_length, width))
        self.token_types = nn.Parameter(torch.zeros(config.token_types, width)) if config.token_types else None
        # BERT normalises after the embedding, pre-norm transformers after the last block.
        post = config.norm == "post"
        self.input_norm: nn.Module = LayerNorm(width, eps=config.norm_epsilon) if post else nn.Identity()
        self.transformer = Transformer(
            TransformerConfig(
                width=width,
                depth=config.depth,
                heads=config.heads,
                mlp_ratio=config.mlp_ratio,
                norm=config.norm,
                activation=config.activation,
                norm_epsilon=config.norm_epsilon,
                checkpoint_activations=config.checkpoint_activations,
            )
        )
        self.norm: nn.Module = nn.Identity() if post else LayerNorm(width, eps=config.norm_epsilon)

    def embed(
        self,
        input_ids: Tensor,
        place: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        hidden: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the blocks are given of the tokens `place [T]` of the flattened `[S, L]`; others as of `forward`."""
        x = self.words(input_ids.flatten()[place])  # [T, D]
        if hidden is not None:
            replaced, vectors = hidden
            vectors = vectors.flatten(0, 1)[place] if vectors.ndim == 3 else vectors
            x = torch.where(replaced.flatten()[place][:, None], vectors.to(x.dtype), x)
        # F.embedding, not indexing: its backward adds rows of equal position in one pass.
        x = x + F.embedding(place % max(1, input_ids.shape[1]), self.positions)
        if self.token_types is not None:
            if token_type_ids is None:
                x = x + self.token_types[0]
            else:
                x = x + F.embedding(token_type_ids.flatten()[place], self.token_types)
        normed: Tensor = self.input_norm(x.to(compute_dtype(self.words.weight)))
        return normed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        hidden: tuple[Tensor, Tensor] | None = None,
    ) -> TextOutput:
        """`input_ids [S, L]` int64, `attention_mask [S, L]` bool, real tokens first; both may be all-padding rows.

        An empty row (a void slot) is encoded as its one first token: finite, and its owner masks it. `hidden`: which
        words are replaced, `[S, L]` bool, and by what: one vector `[1, D]`, or the vector of each place `[S, L, D]`.
        """
        config = self.config
        sequences, length = input_ids.shape
        if length > config.max_length:
            raise ConfigError(
                f"reports of {length} tokens, but text.max_length={config.max_length}; lower data.text_length"
            )
        mask = never_empty(attention_mask.bool())
        packed = PackedLayout.from_mask(mask, causal=config.causal)
        if config.unpadded:
            place = packed.token_index
            layout: PackedLayout | DenseLayout = packed
        else:
            place = torch.arange(sequences * length, device=input_ids.device)
            layout = DenseLayout(sequences, length, causal=config.causal, key_mask=None if config.causal else mask)
        x = self.embed(input_ids, place, token_type_ids, hidden=hidden)
        x = self.norm(self.transformer(x, layout))
        if config.unpadded:
            tokens = packed.unpack(x, length)
            first, last = packed.first_token, packed.last_token
        else:
            tokens = x.view(sequences, length, -1) * mask[:, :, None]
            first = torch.arange(sequences, device=x.device) * length
            last = first + packed.lengths - 1
        if config.pool == "mean":
            pooled = tokens.float().sum(dim=1) / packed.lengths[:, None]
        else:
            pooled = pick_rows(x, first if config.pool == "cls" else last)
        return TextOutput(tokens=tokens, pooled=pooled)


def bert_base() -> TextEncoder.Config:
    """BERT-base: 12 post-norm layers of width 768."""
    return TextEncoder.Config()


def xlm_roberta_base() -> TextEncoder.Config:
    """XLM-RoBERTa, CamemBERT, DrBERT (base): BERT-base with one type of tokens."""
    return TextEncoder.Config(token_types=1, norm_epsilon=1e-5)


def clip_text_b16() -> TextEncoder.Config:
    """The text tower of CLIP ViT-B/16: 12 causal pre-norm layers of width 512, 77 positions, last-token pooling."""
    return TextEncoder.Config(
        max_length=77, width=512, heads=8, norm="pre", causal=True, pool="eos", token_types=0, norm_epsilon=1e-5
    )


def text_tiny() -> TextEncoder.Config:
    """A few hundred thousand weights: for tests and the demo's CPU."""
    return TextEncoder.Config(
        max_length=128, width=128, depth=2, heads=4, norm="pre", pool="mean", token_types=0, norm_epsilon=1e-6
    )


def bert_config(folder: str | Path) -> TextEncoder.Config:
    """The shape of the BERT in a Hugging Face folder, from its `config.json`. ConfigError where it is not a BERT."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no readable config.json ({type(error).__name__}); name a BERT folder") from error
    if found.get("model_type") != "bert" or found.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError(
            f"{path}: model_type={found.get('model_type')!r}, positions {found.get('position_embedding_type')!r};"
            " only BERT with absolute positions is read"
        )
    activations: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    if found.get("hidden_act", "gelu") not in activations:
        raise ConfigError(f"{path}: hidden_act={found['hidden_act']!r}; known are {', '.join(activations)}")
    try:
        return TextEncoder.Config(
            vocab_size=found["vocab_size"],
            max_length=found["max_position_embeddings"],
            width=found["hidden_size"],
            depth=found["num_hidden_layers"],
            heads=found["num_attention_heads"],
            mlp_ratio=found["intermediate_size"] / found["hidden_size"],
            token_types=found.get("type_vocab_size", 2),
            activation=activations[found.get("hidden_act", "gelu")],
            norm_epsilon=found.get("layer_norm_eps", 1e-12),
        )
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]!r} is missing; this is no complete BERT config") from error
