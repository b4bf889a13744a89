"""A small causal transformer that writes a report while it looks at the anatomies of a volume (fvlm.md, 6.3).

What it looks at comes from an encoder that is not trained with it: an embedding of each anatomy, and the tokens of the
patches of anatomies that were found abnormal. Nothing here knows how they were found, or a word of any language.

Letters: S = studies, A = anatomies, T = patches, M = what is looked at, 1 + A + T, L = tokens of a report, E = width of
the embeddings, D = width here, B = beams, W = words of the vocabulary, H = heads, K = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.attention import DenseLayout
from core.models.fusion import CrossBlock, CrossStack, WordHead
from core.models.initialise import draw_weights
from core.models.transformer import LayerNorm, Linear, TransformerConfig
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Anatomies:
    """What an encoder made of studies: `embeds [S, A, E]` of the anatomies that are `present [S, A]` bool, `tokens
    [S, T, tokens_width]` of patches, and which of them belong to an abnormal anatomy, `abnormal [S, A, T]` bool.
    """

    embeds: Tensor
    present: Tensor
    tokens: Tensor
    abnormal: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, chosen: Tensor) -> Anatomies:
        """The studies at these places, without the patches that none of them shows."""
        abnormal = self.abnormal[chosen]
        shown = abnormal.any(dim=1)  # [S, T]
        first = shown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(shown.sum(dim=1).max())]
        return Anatomies(
            embeds=self.embeds[chosen],
            present=self.present[chosen],
            tokens=self.tokens[chosen].gather(1, first[:, :, None].expand(-1, -1, self.tokens.shape[2])),
            abnormal=abnormal.gather(2, first[:, None].expand(-1, abnormal.shape[1], -1)),
        )

    def to(self, device: torch.device) -> Anatomies:
        """On another device, in fp32."""
        return Anatomies(
            embeds=self.embeds.to(device).float(),
            present=self.present.to(device),
            tokens=self.tokens.to(device).float(),
            abnormal=self.abnormal.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Keys and values of each block, `[S, M, 2, H, K]`, and which of them are there, `mask [S, M]` bool."""

    key_values: list[Tensor]
    mask: Tensor

    def repeated(self, beams: int) -> Seen:
        """Each study `beams` times in a row."""
        return Seen(
            key_values=[one.repeat_interleave(beams, dim=0) for one in self.key_values],
            mask=self.mask.repeat_interleave(beams, dim=0),
        )


class ReportDecoder(nn.Module):
    """Anatomies in, words of the report out, one after the other."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`max_length`: tokens of a report, those that open and close it included."""

        width: int = 128
        depth: int = 2
        heads: int = 4
        mlp_ratio: float = 4.0
        max_length: int = 256

        def __post_init__(self) -> None:
            if self.depth < 1 or self.max_length < 2:
                raise ConfigError(
                    f"depth={self.depth} must be at least 1 and max_length={self.max_length} at least 2: "
                    "the first token of a report only opens it"
                )

    def __init__(
        self,
        config: ReportDecoder.Config,
        *,
        vocab_size: int,
        anatomies: int,
        embed_dim: int,
        tokens_width: int,
        seed: int = 0,
    ) -> None:
        """With weights drawn from `seed`."""
        super().__init__()
        self.config = config
        width = config.width
        self.embeds_in, self.tokens_in = Linear(embed_dim, width), Linear(tokens_width, width)
        self.anatomy_tokens = nn.Parameter(torch.zeros(anatomies, width))
        # Always there to be looked at: attention over nothing has no value.
        self.nothing_token = nn.Parameter(torch.zeros(1, width))
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(config.max_length, width))
        self.stack = CrossStack(
            TransformerConfig(width=width, depth=config.depth, heads=config.heads, mlp_ratio=config.mlp_ratio)
        )
        self.norm = LayerNorm(width, eps=1e-6)
        self.head = WordHead(width, vocab_size)
        draw_weights(self, seed)

    def look(self, anatomies: Anatomies) -> Seen:
        """What all tokens of a report look at, made once."""
        studies, width = len(anatomies), self.config.width
        embeds = self.embeds_in(anatomies.embeds.flatten(0, 1)).view(studies, -1, width) + self.anatomy_tokens
        patches = anatomies.tokens.shape[1]  # of which there may be none
        tokens = self.tokens_in(anatomies.tokens.flatten(0, 1)).view(studies, patches, width)
        # A patch is told which anatomies it is shown for.
        tokens = tokens + anatomies.abnormal.transpose(1, 2).to(tokens.dtype) @ self.anatomy_tokens
        nothing = self.nothing_token.expand(studies, 1, -1)
        memory = torch.cat([nothing, embeds, tokens], dim=1)  # [S, M, D]
        there = torch.ones(studies, 1, dtype=torch.bool, device=memory.device)
        mask = torch.cat([there, anatomies.present, anatomies.abnormal.any(dim=1)], dim=1)
        return Seen(key_values=[block.keys_of(memory) for block in self._blocks()], mask=mask)

    def forward(self, anatomies: Anatomies, input_ids: Tensor) -> Tensor:
        """`input_ids [S, L]` of reports from their first token on -> logits of the token after each, `[S, L, W]`."""
        studies, length = input_ids.shape
        seen = self.look(anatomies)
        layout = DenseLayout(studies, length, causal=True)
        x = (self.words(input_ids) + self.positions[:length]).flatten(0, 1)
        for block, key_value in zip(self._blocks(), seen.key_values, strict=True):
            x = block.meet_known(x, layout, key_value, seen.mask)
        return self._logits(x).view(studies, length, -1)

    def loss(self, anatomies: Anatomies, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens of reports `[S, L]` but their first."""
        logits = self(anatomies, input_ids[:, :-1])
        target = input_ids[:, 1:].masked_fill(~attention_mask[:, 1:], -100)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, anatomies: Anatomies, *, first: int, end: int, beams: int = 1) -> Tensor:
        """`[S, L]` tokens after `first`, filled up with `end`; at most as many as fit `max_length`.

        The report of the highest mean log-probability a token that a search of width `beams` meets; 1 is greedy.
        """
        limit, device = self.config.max_length - 1, anatomies.embeds.device
        seen = self.look(anatomies).repeated(beams)
        search = _Search.begin(len(anatomies), beams, limit, end, device)
        token = torch.full((len(anatomies) * beams,), first, device=device)
        past = [one[:, :0] for one in seen.key_values]  # [S * B, 0, 2, H, K]
        for position in range(limit):
            x = self.words(token) + self.positions[position]
            for number, block in enumerate(self._blocks()):
                x, past[number] = block.meet_next(x, past[number], seen.key_values[number], seen.mask)
            token, parent = search.take(self._logits(x).log_softmax(dim=-1), position)
            if bool(search.done.all()):
                break
            past = [one[parent] for one in past]
        return search.tokens[:, 0, : position + 1]

    def _blocks(self) -> list[CrossBlock]:
        return [block for block in self.stack.blocks if isinstance(block, CrossBlock)]

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x).float(), x.dtype)
        return logits


@dataclass(kw_only=True)
class _Search:
    """The best beginnings so far, best first: `tokens [S, B, limit]`, sums of log-probabilities `total [S, B]` over
    `length [S, B]` tokens, and which have ended, `done [S, B]`.
    """

    tokens: Tensor
    total: Tensor
    length: Tensor
    done: Tensor
    end: int

    @staticmethod
    def begin(studies: int, beams: int, limit: int, end: int, device: torch.device) -> _Search:
        total = torch.full((studies, beams), -torch.inf, device=device)
        total[:, 0] = 0.0  # all beams begin alike: one of them counts
        return _Search(
            tokens=torch.full((studies, beams, limit), end, device=device),
            total=total,
            length=torch.zeros(studies, beams, device=device),
            done=torch.zeros(studies, beams, dtype=torch.bool, device=device),
            end=end,
        )

    def take(self, log_probability: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Go on by the best tokens, given `[S * B, W]`: (token, row it goes on from), `[S * B]` each."""
        studies, beams = self.total.shape
        words = log_probability.shape[1]
        step = log_probability.view(studies, beams, words)
        # What has ended stays as it is, against what still grows.
        ended = torch.full((words,), -torch.inf, device=step.device)
        ended[self.end] = 0.0
        step = torch.where(self.done[:, :, None], ended, step)
        total = self.total[:, :, None] + step
        length = self.length + (~self.done).float()
        order = (total / length[:, :, None]).flatten(1).topk(beams, dim=1).indices
        parent, token = order // words, order % words
        self.tokens = self.tokens.gather(1, parent[:, :, None].expand_as(self.tokens))
        self.tokens[:, :, position] = token
        self.total = total.flatten(1).gather(1, order)
        self.length = length.gather(1, parent)
        self.done = self.done.gather(1, parent) | (token == self.end)
        rows = parent + beams * torch.arange(studies, device=parent.device)[:, None]
        return token.flatten(), rows.flatten()
