"""One training step of fVLM on the CPU: ours against a straight re-statement of the released algorithm.

Released shapes: two volumes of 112 x 256 x 352 voxels, patches of 16 x 16 x 32, ViT-B, four anatomies, BERT-base. A
step is forward, loss, backward and AdamW, both in bf16 autocast on the same threads, each in a process of its own; the
memory is the most that a process has had resident, weights and optimizer included.

The re-statement (written from the description of the method, fvlm.md 1-3 and 8) does what the released code does, in
plain PyTorch and transformers: attention by matmul and softmax, dropout of 0.1, token flags by max-pooling each mask,
faces and pooling by loops over patients and anatomies, one pass of the text encoder an anatomy, every text padded to
384 tokens. Ours runs as `ct:fvlm_b` does, without soft targets, which the release has not; flags come with its batch.
Texts have the lengths of TEXT_TOKENS, which are assumed, and three of the eight are the same template.
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
from ci.bench.step import plain_step
from core.models.text import bert_base
from core.models.volume import vit_b_volume
from core.tasks.fvlm import FVLM
from shards.batch import Batch

DESCRIPTION = "training step of fVLM at its released shapes on the CPU: time and memory against the released algorithm"

THREADS = 2
ROUNDS = 3
ANATOMIES = ("lung", "heart", "esophagus", "aorta")
PATIENTS = 2
VOCABULARY = 30522
PADDED_TOKENS = 384
# Of each patient's lung, heart, esophagus, aorta; 0: the template of a normal organ.
TEXT_TOKENS = ((112, 41, 0, 33), (74, 0, 0, 27))
TEMPLATE_TOKENS = 12
# Where the organs lie, as shares of the volume's sides: z, y, x from, to.
BOXES = {
    "lung": ((0.10, 0.90), (0.15, 0.85), (0.10, 0.90)),
    "heart": ((0.20, 0.60), (0.25, 0.60), (0.40, 0.70)),
    "esophagus": ((0.10, 0.90), (0.60, 0.66), (0.48, 0.52)),
    "aorta": ((0.15, 0.90), (0.50, 0.62), (0.52, 0.58)),
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What one process runs. `depth`: of both towers, below 12 in a quick form."""

    system: Literal["ours", "released"]
    volume_size: tuple[int, int, int] = (112, 256, 352)
    depth: int = 12

    @property
    def levels(self) -> tuple[int, ...]:
        """Blocks whose tokens are pooled."""
        return (4, 7, 10, 12) if self.depth == 12 else tuple(range(1, self.depth + 1))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`pixels [2, 1, D, H, W]`, `labels [2, D, H, W]` (0 background, a + 1 anatomy a), tokens `[2, 4, 384]`."""

    pixels: Tensor
    labels: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    normal: Tensor  # [2, 4]

    @staticmethod
    def of(size: tuple[int, int, int]) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        labels = torch.zeros(PATIENTS, *size, dtype=torch.int64)
        for number, box in enumerate(BOXES.values()):  # later organs lie in front
            where = tuple(
                slice(int(first * side), max(int(last * side), int(first * side) + 1))
                for (first, last), side in zip(box, size, strict=True)
            )
            labels[(slice(None), *where)] = number + 1
        lengths = torch.tensor(TEXT_TOKENS)
        mask = torch.arange(PADDED_TOKENS) < torch.where(lengths == 0, TEMPLATE_TOKENS, lengths)[..., None]
        ids = torch.randint(5, VOCABULARY, (PATIENTS, len(ANATOMIES), PADDED_TOKENS), generator=generator)
        ids[lengths == 0] = ids[0, 2].clone()
        return Inputs(
            pixels=torch.rand(PATIENTS, 1, *size, generator=generator),
            labels=labels,
            input_ids=ids * mask,
            attention_mask=mask,
            normal=lengths == 0,
        )


# ---- ours ----


def our_batch(inputs: Inputs, patch_size: tuple[int, int, int]) -> Batch:
    """What the loader gives."""
    masks = torch.stack([(inputs.labels == number + 1).float() for number in range(len(ANATOMIES))], dim=1)
    key = torch.arange(1, PATIENTS * len(ANATOMIES) + 1).view(PATIENTS, -1)
    return {
        "pixel_values": inputs.pixels,
        "study_index": torch.arange(PATIENTS),
        "valid": torch.ones(PATIENTS, dtype=torch.bool),
        "anatomy_share": F.avg_pool3d(masks, patch_size).flatten(2),
        "anatomy_intact": torch.ones(PATIENTS, len(ANATOMIES), dtype=torch.bool),
        "anatomy_input_ids": inputs.input_ids,
        "anatomy_attention_mask": inputs.attention_mask,
        "anatomy_text_key": torch.where(inputs.normal, -1, key),
        "anatomy_key": torch.where(inputs.normal, 0, key),
        "anatomy_state": (~inputs.normal).to(torch.int8),
    }


def our_step(contestant: Contestant) -> Callable[[], float]:
    """The task as its recipe builds it, without the engine around it."""
    vision = replace(
        vit_b_volume(), volume_size=contestant.volume_size, depth=contestant.depth, levels=contestant.levels
    )
    text = replace(bert_base(), depth=contestant.depth)
    task = FVLM.Config(vision=vision, text=text, anatomies=ANATOMIES, soft="none").build(vocab_size=VOCABULARY)
    batch = our_batch(Inputs.of(contestant.volume_size), vision.patch_size)
    return plain_step(task, batch, learning_rate=1e-5)


# ---- the released algorithm ----


class _Block(nn.Module):
    """Pre-norm block with all attention weights in memory and dropout throughout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        patients, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(patients, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = self.drop((query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1))
        mixed = (weights @ value).transpose(1, 2).reshape(patients, tokens, width)
        x = x + self.drop(self.out(mixed))
        return x + self.mlp(self.norm2(x))


class Released(nn.Module):
    """The released model and loss on one process."""

    def __init__(self, contestant: Contestant, *, width: int = 768, heads: int = 12, embed_dim: int = 256) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.patch_size, self.levels = vit_b_volume().patch_size, contestant.levels
        self.patch = nn.Conv3d(1, width, kernel_size=self.patch_size, stride=self.patch_size)
        sides = zip(contestant.volume_size, self.patch_size, strict=True)
        tokens = int(torch.tensor([size // patch for size, patch in sides]).prod())
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(contestant.depth))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, width)) for _ in ANATOMIES)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, embed_dim) for _ in ANATOMIES)
        config = BertConfig(vocab_size=VOCABULARY, num_hidden_layers=contestant.depth)
        config._attn_implementation = "eager"
        self.bert = BertModel(config, add_pooling_layer=False)
        self.text_head = nn.Linear(width, embed_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, inputs: Inputs) -> Tensor:
        """The loss."""
        levels = self._levels(inputs.pixels)
        loss = levels[0].new_zeros(())
        for anatomy in range(len(ANATOMIES)):
            mask = (inputs.labels == anatomy + 1).float()[:, None]
            flags = F.max_pool3d(mask, self.patch_size, self.patch_size).flatten(1) > 0
            patients = [patient for patient in range(PATIENTS) if self._intact(mask[patient, 0])]
            if not patients:
                continue
            images = torch.cat([self._pooled(levels, flags[patient], patient, anatomy) for patient in patients])
            images = F.normalize(images, dim=-1)
            ids, seen = inputs.input_ids[patients, anatomy], inputs.attention_mask[patients, anatomy]
            hidden = self.bert(input_ids=ids, attention_mask=seen.long()).last_hidden_state[:, 0]
            texts = F.normalize(self.text_head(hidden), dim=-1)
            loss = loss + self._contrast(images, texts, inputs.normal[patients, anatomy])
        return loss

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = self.drop(x + self.positions)
        levels = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in self.levels[:-1]:
                levels.append(x)
        return [*levels, self.norm(x)]

    def _intact(self, mask: Tensor) -> bool:
        faces = (mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
        return bool(mask.any()) and not any(bool(face.any()) for face in faces)

    def _pooled(self, levels: list[Tensor], flags: Tensor, patient: int, anatomy: int) -> Tensor:
        tokens = torch.cat([level[patient, flags] for level in levels])[None]
        pooled, _ = self.attention(self.queries[anatomy], tokens, tokens)
        embedded: Tensor = self.heads[anatomy](pooled[:, 0])
        return embedded

    def _contrast(self, images: Tensor, texts: Tensor, normal: Tensor) -> Tensor:
        target = torch.eye(len(normal)).bool() | (normal[:, None] & normal)
        if bool(target.all()):
            return images.new_zeros(())
        share = target.float() / target.float().sum(1, keepdim=True)
        logits = images @ texts.T / self.temperature
        rows = -(share * logits.log_softmax(1)).sum(1).mean()
        return (rows - (share * logits.T.log_softmax(1)).sum(1).mean()) / 2


def released_step(contestant: Contestant) -> Callable[[], float]:
    """As its training script takes it, under autocast, which it leaves out and which is twice as fast here."""
    model = Released(contestant).train()
    inputs = Inputs.of(contestant.volume_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs)
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
    """The figures of `ct_step`; `quick` takes two layers, small volumes and one round."""
    shape: dict[str, Any] = {"volume_size": (32, 64, 64), "depth": 2} if quick else {}
    ours = Contestant(system="ours", **shape)
    return compare(ours, bench="ct_step", rate=("steps", 1), rounds=1 if quick else ROUNDS, threads=THREADS)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    arguments["volume_size"] = tuple(arguments["volume_size"])
    process.serve(partial(_made, Contestant(**arguments)))
