"""The short training of a downstream head, with or without its encoder: AdamW, warm-up, cosine, gradients clipped.

The order of images is keyed, so the same seed gives the same head. Where someone judges the weights on the way, the
best count. One process; nothing is resumed, since it takes minutes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core.models.vision import VisionEncoder
from shards import keyed


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """`encoder_lr`: of an encoder that is fine-tuned with its head. `judged`: how often on the way, if at all."""

    steps: int = 500
    batch_size: int = 32
    lr: float = 5e-4
    encoder_lr: float = 5e-5
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    judged: int = 5
    seed: int = 0


def row_batches(count: int, config: FitConfig) -> Iterator[Tensor]:
    """`config.steps` batches of places among `count` images: epoch after epoch, each in an order of its own."""
    size = min(config.batch_size, count)
    rest, epoch = np.zeros(0, dtype=np.int64), 0
    for _ in range(config.steps):
        while len(rest) < size:
            rest = np.concatenate([rest, keyed.permutation(count, config.seed, "transfer: order", epoch)])
            epoch += 1
        yield torch.from_numpy(rest[:size])
        rest = rest[size:]


def lr_factor(step: int, config: FitConfig) -> float:
    """Linear warm-up, then half a cosine to 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def fit(
    head: nn.Module,
    encoder: VisionEncoder | None,
    count: int,
    loss_of: Callable[[Tensor], Tensor],
    config: FitConfig,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    judge: Callable[[], float] | None = None,
) -> None:
    """Teach `head`, and `encoder` if there is one, in place. `loss_of(rows)`: the loss of the images at these places.

    `judge`: how good the weights are, higher is better, in evaluation mode; asked `config.judged` times, the last time
    after the last step. The best weights stay, the later of equal ones; those of the last step where it cannot tell
    (NaN), or without a judge. Both parts are left in evaluation mode. Raises FloatingPointError where a loss is not
    finite.
    """
    parts = [(head, config.lr)] if encoder is None else [(head, config.lr), (encoder, config.encoder_lr)]
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in parts]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    due = {round(config.steps * part / config.judged) for part in range(1, config.judged + 1)} if judge else set()
    best, kept = -math.inf, None
    for part, _ in parts:
        part.train()
    for step, rows in enumerate(row_batches(count, config)):
        loss = loss_of(rows)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss of step {step} is {loss.item()}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for part, _ in parts for parameter in part.parameters()], config.clip)
        optimizer.step()
        schedule.step()
        if judge is not None and step + 1 in due:
            for part, _ in parts:
                part.eval()
            with torch.no_grad():
                score = judge()
            if score >= best:
                best, kept = score, [copy.deepcopy(part.state_dict()) for part, _ in parts]
            for part, _ in parts:
                part.train()
        on_step(step + 1, config.steps)
    for place, (part, _) in enumerate(parts):
        if kept is not None:
            part.load_state_dict(kept[place])
        part.eval()


def drawn(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A head with torch's own first values, drawn from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
