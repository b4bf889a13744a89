"""One training step of ECAMP on the CPU: ours against a straight re-statement of the released algorithm.

Released shapes: eight images of 448 px seen at 224 px, ViT-B/16 on a quarter of the patches, an image decoder of four
blocks of width 512, a text stack of six layers of width 768, 30,000 words, 256 tokens. A step is forward, loss,
backward and AdamW, both in bf16 autocast on the same threads, each in a process of its own; the memory is the most that
a process has had resident, weights and optimizer included.

The re-statement (written from the description of the method, ecamp.md 2-5 and 9) does what the released code does in
plain PyTorch and transformers: three equal channels, every report padded to 256 tokens, logits and loss at all of them,
dropout of 0.1 in the text. Ours runs as `chest:ecamp_b16` does. Reports have the lengths of Open-i's (`step`), each
with DISTILLED tokens of distilled sentences; beside it stands the same with reports of 256 tokens throughout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ci.bench import process
from ci.bench.against_release import compare
from ci.bench.figure import Figure
from ci.bench.step import REPORT_TOKENS, plain_step
from configs import chest
from core.models.vision import sincos_positions
from core.tasks.ecamp import ECAMP
from shards.batch import Batch

DESCRIPTION = "training step of ECAMP at its released shapes on the CPU: time and memory against the released algorithm"

THREADS = 2
ROUNDS = 3
BATCH = 8
PATCH = 16
VOCABULARY = 30000
TOKENS = 256
DISTILLED = 28  # of five sentences
PREDICTED = 0.72  # share of the words


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What one process runs. `full`: every report fills its 256 tokens. `depth`, `image_size`: less in a quick form."""

    system: Literal["ours", "released"]
    full: bool = False
    depth: int = 12
    text_depth: int = 6
    image_size: int = 224

    @property
    def lengths(self) -> Tensor:
        """Tokens of each report, [8]."""
        drawn = [TOKENS] * BATCH if self.full else [length + DISTILLED for length in REPORT_TOKENS["bert"][1::2]]
        return torch.tensor(drawn)


def _inputs(contestant: Contestant) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grey images at twice the size `[8, 1, ...]`, ids `[8, 256]`, which are real, which are masked."""
    generator = torch.Generator().manual_seed(1)
    side = 2 * contestant.image_size
    pixels = torch.randn(BATCH, 1, side, side, generator=generator)
    real = torch.arange(TOKENS)[None] < contestant.lengths[:, None]
    ids = torch.randint(5, VOCABULARY, (BATCH, TOKENS), generator=generator) * real
    masked = real & (torch.rand(BATCH, TOKENS, generator=generator) < PREDICTED) & (torch.arange(TOKENS) > 0)
    return pixels, ids, real, masked


# ---- ours ----


def our_batch(contestant: Contestant) -> Batch:
    """What the loader gives."""
    pixels, ids, real, masked = _inputs(contestant)
    longest = int(contestant.lengths.max())
    patches = (contestant.image_size // PATCH) ** 2
    order = torch.rand(BATCH, patches, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return {
        "pixel_values": pixels,
        "study_index": torch.arange(BATCH),
        "valid": torch.ones(BATCH, dtype=torch.bool),
        "input_ids": ids[:, :longest],
        "attention_mask": real[:, :longest],
        "text_mask": masked[:, :longest],
        "token_weight": masked[:, :longest].float(),
        "cut_tokens": torch.zeros(BATCH, dtype=torch.int64),
        "dropped_sentences": torch.zeros(BATCH, dtype=torch.int64),
        "patch_mask": order < round(0.75 * patches),
        "attention_grid": torch.ones(BATCH, patches),
    }


def our_step(contestant: Contestant) -> Callable[[], float]:
    """The task as its recipe builds it, without the engine around it."""
    config = chest.ecamp_b16().task
    assert isinstance(config, ECAMP.Config)
    vision = replace(config.vision, depth=contestant.depth, image_size=contestant.image_size)
    config = replace(config, vision=vision, text=replace(config.text, depth=contestant.text_depth))
    task, batch = config.build(vocab_size=VOCABULARY), our_batch(contestant)
    return plain_step(task, batch, learning_rate=1e-4)


# ---- the released algorithm ----


class _Block(nn.Module):
    """Pre-norm block with all attention weights in memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(images, tokens, width))
        return x + self.mlp(self.norm2(x))


class Released(nn.Module):
    """The released model and its three losses on one process."""

    def __init__(self, contestant: Contestant, *, width: int = 768, narrow: int = 512) -> None:
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        self.size, self.patch = contestant.image_size, PATCH
        self.side = side = contestant.image_size // PATCH
        self.positions: Tensor
        self.decoder_positions: Tensor
        self.embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        for name, of in (("positions", width), ("decoder_positions", narrow)):
            self.register_buffer(name, sincos_positions(side, side, of, base_rows=side, base_columns=side))
        self.blocks = nn.ModuleList(_Block(width, 12) for _ in range(contestant.depth))
        self.norm, self.narrowed = nn.LayerNorm(width), nn.Linear(width, narrow)
        self.decoder = nn.ModuleList(_Block(narrow, 16) for _ in range(4))
        self.decoder_norm, self.pixels = nn.LayerNorm(narrow), nn.Linear(narrow, 3 * PATCH**2)
        self.correct = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=contestant.text_depth, num_attention_heads=6,
            intermediate_size=2 * width, max_position_embeddings=TOKENS,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.bert = BertForMaskedLM(config)
        self.image_in, self.coarse, self.cross_out = (nn.Linear(width, width) for _ in range(3))
        self.itself = nn.MultiheadAttention(width, 6, dropout=0.1, batch_first=True)
        self.look = nn.MultiheadAttention(width, 6, dropout=0.1, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, large: Tensor, ids: Tensor, real: Tensor, masked: Tensor) -> Tensor:
        """The loss, of images of three channels."""
        small = F.interpolate(large, size=(self.size, self.size), mode="bicubic")
        seen, shown, hidden = self._images(small)
        error = (shown - small).square()
        losses = (error * self._pixelwise(hidden)).mean() + self._large(shown, large)
        return losses + self._words(seen, ids, real, masked)

    def _images(self, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Visible tokens, the image as decoded, and which patches are masked."""
        x = self.embed(small).flatten(2).transpose(1, 2) + self.positions
        count = x.shape[1]
        order = torch.rand(x.shape[:2]).argsort(dim=1)
        back = order.argsort(dim=1)
        keep = order[:, : count // 4]
        x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        y = self.narrowed(x)
        tokens = torch.cat([y[:, 1:], self.mask_token.expand(len(y), count - keep.shape[1], -1).to(y.dtype)], dim=1)
        tokens = tokens.gather(1, back[:, :, None].expand(-1, -1, y.shape[2])) + self.decoder_positions
        y = torch.cat([y[:, :1].float(), tokens], dim=1)
        for block in self.decoder:
            y = block(y)
        cut = self.pixels(self.decoder_norm(y))[:, 1:].view(-1, self.side, self.side, self.patch, self.patch, 3)
        shown = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, self.size, self.size)
        return x[:, 1:], shown, (back >= count // 4).float()

    def _pixelwise(self, hidden: Tensor) -> Tensor:
        grid = hidden.view(-1, 1, self.side, self.side)
        return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

    def _large(self, shown: Tensor, large: Tensor) -> Tensor:
        base = F.interpolate(shown, scale_factor=2, mode="bilinear")
        out = F.relu(self.correct[1](F.relu(self.correct[0](base))) + base)
        window = torch.zeros_like(large)
        window[:, :, : -4 * self.patch, : -4 * self.patch] = 1.0
        return ((out - large).square() * window).mean()

    def _words(self, seen: Tensor, ids: Tensor, real: Tensor, masked: Tensor) -> Tensor:
        bert = self.bert.bert
        x = bert.embeddings(input_ids=torch.where(masked, 3, ids))
        x = self.norms[0](x + self.drop(self.itself(x, x, x, key_padding_mask=~real)[0]))
        image = self.image_in(seen)
        context = self.look(x, image, image)[0] + self.coarse(image.mean(dim=1, keepdim=True))
        x = self.norms[1](x + self.drop(self.cross_out(context)))
        x = self.norms[2](x + self.drop(self.mlp(x)))
        mask = torch.zeros(x.shape[0], 1, 1, x.shape[1]).masked_fill(~real[:, None, None], torch.finfo(x.dtype).min)
        x = bert.encoder(x, attention_mask=mask).last_hidden_state
        logits = self.bert.cls(x)
        losses = F.cross_entropy(logits.view(-1, VOCABULARY), ids.flatten(), reduction="none")
        return (losses * torch.ones_like(losses)).mean()


def released_step(contestant: Contestant) -> Callable[[], float]:
    """As its training script takes it, under bf16 autocast in place of its fp16."""
    model = Released(contestant).train()
    pixels, ids, real, masked = _inputs(contestant)
    large = pixels.expand(-1, 3, -1, -1).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4, betas=(0.9, 0.95))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(large, ids, real, masked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


# ---- the benchmark ----


def _made(contestant: Contestant) -> Callable[[], float]:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    return our_step(contestant) if contestant.system == "ours" else released_step(contestant)


def run(quick: bool) -> list[Figure]:
    """The figures of `ecamp_step`; `quick` takes two layers, images of 64 px and one round."""
    shape: dict[str, Any] = {"depth": 2, "text_depth": 1, "image_size": 64} if quick else {}
    base, rounds = Contestant(system="ours", **shape), 1 if quick else ROUNDS
    compared = partial(compare, bench="ecamp_step", rate=("images", BATCH), rounds=rounds, threads=THREADS)
    figures = compared(base)
    if not quick:
        figures += compared(replace(base, full=True), suffix="_full", note="every report fills 256 tokens; ")
    return figures


if __name__ == "__main__":
    process.serve(partial(_made, Contestant(**json.loads(sys.argv[1]))))
