"""Learned prompts: vectors in the place of words around the name of a class (CoOp, arXiv 2109.01134; umcl.md 3).

Nothing of a class but its name enters a prompt with a shared context, so classes can be added after training. The
names' tokens are no weights: they are read from the tokenizer when it is known, and a checkpoint holds contexts alone.

Letters: C = classes, M = vectors of a context, L = tokens of a prompt, D = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.keyed import hash_keys, uniform
from core.models.text import TextEncoder
from shards.errors import ConfigError


class Words(Protocol):
    """What a tokenizer says of names: ids of texts between `prefix` and `suffix`, which it puts around every text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """`input_ids [n, L]`, `attention_mask [n, L]`."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Prompts as they are encoded, each `[C, L]`: ids, which are real, which are of the context, and its vector."""

    input_ids: Tensor
    attention_mask: Tensor
    is_context: Tensor
    vector: Tensor  # row of the table of vectors

    def to(self, device: torch.device) -> _Layout:
        return _Layout(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class PromptBank(nn.Module):
    """Prompts of classes, through a text encoder that is given: the bank holds contexts alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`length`: vectors of a context. `shared`: one context for all classes, or one for each.

        `position` of the name: after the context, before it, or in its midst. `dropout`: share of the vectors that are
        nothing at a training step.
        """

        length: int = 16
        shared: bool = True
        position: Literal["end", "front", "middle"] = "end"
        dropout: float = 0.1

        def __post_init__(self) -> None:
            if self.length < 1:
                raise ConfigError(f"bank.length={self.length} leaves nothing to learn; use 16, or task.prompts=hand")
            if not 0 <= self.dropout < 1:
                raise ConfigError(f"bank.dropout={self.dropout} is no share of vectors below 1; 0 switches it off")

    def __init__(self, config: PromptBank.Config, text: TextEncoder.Config, names: Sequence[str]) -> None:
        """Raises ConfigError for a name that is empty or stands twice."""
        super().__init__()
        self.config, self.text, self.names = config, text, tuple(names)
        check_names(self.names)
        self.context_tokens = nn.Parameter(
            torch.zeros(config.length * (1 if config.shared else len(names)), text.width)
        )
        self._layout: _Layout | None = None
        self._words: Words | None = None

    def take_tokenizer(self, words: Words) -> None:
        """Lay the prompts out. Raises ConfigError for one that is longer than the text encoder reads."""
        self._words = words
        length = self.config.length
        before = {"end": length, "front": 0, "middle": length // 2}[self.config.position]
        stop = _tokens(words, ["."])[0]
        rows: list[list[int]] = []
        vectors: list[list[int]] = []  # of each token the number of its vector, -1 for a word
        for number, (name, tokens) in enumerate(zip(self.names, _tokens(words, self.names), strict=True)):
            first = 0 if self.config.shared else number * length
            context = list(range(first, first + length))
            if not tokens:
                raise ConfigError(f"class {name!r}: the tokenizer reads nothing in its name; give it another")
            vectors.append(
                [-1] * len(words.prefix) + context[:before] + [-1] * len(tokens) + context[before:]
                + [-1] * (len(stop) + len(words.suffix))
            )  # fmt: skip
            rows.append([*words.prefix, *[0] * before, *tokens, *[0] * (length - before), *stop, *words.suffix])
            if len(rows[-1]) > self.text.max_length:
                raise ConfigError(
                    f"the prompt of class {name!r} has {len(rows[-1])} tokens, {length} of them learned, but "
                    f"text.max_length={self.text.max_length}; lower task.bank.length or raise text.max_length"
                )
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        vector = torch.tensor([row + [-1] * (longest - len(row)) for row in vectors])
        lengths = torch.tensor([len(row) for row in rows])
        self._layout = _Layout(
            input_ids=ids,
            attention_mask=torch.arange(longest) < lengths[:, None],
            is_context=vector >= 0,
            vector=vector.clamp(min=0),
        )

    def of_names(self, names: Sequence[str]) -> PromptBank:
        """The same context around other names. Raises ConfigError where each class has a context of its own."""
        if not self.config.shared:
            raise ConfigError("bank.shared=false: each class has a context of its own, and other names have none")
        assert self._words is not None, "take_tokenizer was not called"
        other = PromptBank(self.config, self.text, names)
        other.context_tokens = self.context_tokens
        other.take_tokenizer(self._words)
        return other

    def forward(self, encoder: TextEncoder, draw_key: Tensor | None = None) -> Tensor:
        """`[C, D]`, pooled as texts are. `draw_key` []: int64 that drop-out is keyed by, None: nothing is dropped."""
        assert self._layout is not None, "take_tokenizer was not called"
        if self._layout.input_ids.device != self.context_tokens.device:
            self._layout = self._layout.to(self.context_tokens.device)
        layout = self._layout
        context: Tensor = self.context_tokens
        if draw_key is not None and self.config.dropout:
            vectors = torch.arange(len(context), device=context.device)
            kept = uniform(hash_keys("prompt drop-out", draw_key, vectors)) >= self.config.dropout
            context = context * kept[:, None]
        vectors = F.embedding(layout.vector, context)  # [C, L, D]
        pooled: Tensor = encoder(
            layout.input_ids, layout.attention_mask, hidden=(layout.is_context, vectors)
        ).pooled  # fmt: skip
        return pooled


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for no name, an empty one, or one that stands twice but for case and space."""
    plain = [" ".join(name.lower().split()) for name in names]
    if not names or not all(plain):
        raise ConfigError(f"classes={list(names)} must be names, at least one and none of them empty")
    twice = sorted({name for name in plain if plain.count(name) > 1})
    if twice:
        raise ConfigError(f"class {', '.join(map(repr, twice))} is named twice; each name makes one prompt")


def _tokens(words: Words, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without what is put around it."""
    ids, mask = words.encode(list(texts), 4096)
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    return [row[len(words.prefix) : len(row) - len(words.suffix)] for row in rows]
