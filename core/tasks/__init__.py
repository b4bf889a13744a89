"""What a pre-training objective is: encoders, then a loss on the gathered embeddings of the whole global batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from shards.batch import Batch

# How a loss over all pairs of the global batch reaches the rows of other ranks (core.losses.contrast).
Exchange = Literal["gather", "ring"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What one (micro-)batch contributes. b = studies of the (micro-)batch.

    `gather`: tensors [b, ...] that ranks need from each other (embeddings in fp32, integer keys, `valid`).
    `local`: per-study losses [b] that need no other study, 0 in void slots; averaged over the global valid count.
    """

    gather: dict[str, Tensor]
    local: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The global batch: `own` this rank's rows [b, ...], `all` everyone's [B, ...], in the order of ranks.

    A tensor of `all` travels when it is first read, so every rank must read the same ones in the same order. Losses
    over all pairs do not read it: they exchange what they need, the way that `exchange` says. `ranks`: how many.
    """

    own: dict[str, Tensor]
    all: Mapping[str, Tensor]
    ranks: int
    exchange: Exchange = "gather"


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """This rank's SHARE of the global loss: the shares of all ranks add up to it, and so do the detached `metrics`.

    (Metrics that are equal on all ranks, such as a scale, are therefore divided by the number of ranks before they are
    put here; `share_of_constant` does so.)
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def share_of_constant(value: Tensor, gathered: Gathered) -> Tensor:
    """This rank's share of a metric `value []` that is equal on all ranks, detached."""
    return value.detach() / gathered.ranks


class Task(nn.Module, ABC):
    """One pre-training objective. The engine calls `encode`, gathers, calls `objective`; nothing else knows a loss."""

    fields: ClassVar[tuple[str, ...]]  # of shards.batch.FIELDS that encode() reads
    # Names of modules that learn in turn: at each step one of them, with all that is in none; () if nothing rests.
    turns: tuple[str, ...] = ()
    turn: int = 0  # which of `turns` learns at this step; set by the engine
    # Parameters that a setting of the task leaves out: a recipe's multiplier of theirs is no mistake then.
    optional_parameters: ClassVar[tuple[str, ...]] = ()

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Called once before anything is encoded, with the tokenizer of the texts: for words of the task's own."""
        return

    @abstractmethod
    def encode(self, batch: Batch) -> Encoded:
        """Run the encoders on this rank's (micro-)batch."""

    @abstractmethod
    def objective(self, gathered: Gathered, local: dict[str, Tensor]) -> LossOutput:
        """This rank's share of the loss of the whole global batch; touches no encoder weight."""

    def after_step(self, whole: Callable[[nn.Parameter], Tensor]) -> None:
        """Called on every rank once the optimizer has moved the weights, without gradients.

        `whole(parameter)`: its value in fp32 and in one piece. Collective where weights are sharded: every rank asks
        for the same ones in the same order.
        """
