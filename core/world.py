"""Who this process is among the ranks. Found once by a launcher, then passed as an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class World:
    """`rank` in [0, world_size), `local_rank` within the node, `device` this rank computes on."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0
