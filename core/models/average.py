"""A slow copy of a module, whose weights are a running mean of the original's: a teacher that never learns itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shards.errors import ConfigError


class RunningMean(nn.Module):
    """What `module` would say with the mean of its weights over past steps; 0 weights before the first update.

    All weights lie in one buffer, which is saved with the task and is alike on all ranks, at every ZeRO stage. It holds
    the bits of fp32 numbers as int32, since a cast of the task to bf16 would round what moves by a two-hundredth a
    step to no movement at all. The module that computes with them is a shell without memory, and no part of the task's
    modules: nothing in it is trained, sharded, or found as a second tower.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"teacher_decay={decay} must lie in [0, 1); try 0.995")
        self.decay = decay
        shell = copy.deepcopy(module).to("meta").requires_grad_(False)
        self._shell = (shell,)  # in a tuple, which registers nothing
        self._shapes = {name: parameter.shape for name, parameter in shell.named_parameters()}
        self.register_buffer("bits", torch.zeros(sum(map(torch.Size.numel, self._shapes.values())), dtype=torch.int32))

    def weights(self) -> dict[str, Tensor]:
        """Name -> fp32 view into the buffer."""
        bits = self.bits
        assert isinstance(bits, Tensor)
        pieces = bits.view(torch.float32).split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    @torch.no_grad()
    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the module makes of the arguments, without gradient."""
        return functional_call(self._shell[0], self.weights(), arguments, named)

    @torch.no_grad()
    def update(self, module: nn.Module, whole: Callable[[nn.Parameter], Tensor], *, first: Tensor) -> None:
        """Move towards `module`, by `1 - decay`; where `first []` bool is set, all the way.

        `whole`: fp32 value of a weight that may be sharded; collective.
        """
        step = torch.where(first, 1.0, 1.0 - self.decay)
        mean = self.weights()
        for name, parameter in module.named_parameters():
            mean[name].lerp_(whole(parameter).to(mean[name]), step.to(mean[name]))
