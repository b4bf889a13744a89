"""Which parameters decay, and how the learning rate moves. No DeepSpeed here: the engine wraps what this module builds.

The learning rate is a pure function of the step, set before every step: there is no scheduler state to restore.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from shards.errors import ConfigError

_BLOCK = re.compile(r"\.blocks\.(\d+)\.")
# Names of parameters that are not matrices to be shrunk, whatever their shape.
NO_DECAY_WORDS = ("bias", "scale", "position", "token", "register", "norm", "gain")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    `learning_rate` is the peak, reached after `warmup_steps`; the factor then falls to `final_factor` at the last step
    (`cosine`, `linear`) or stays (`constant`). `multipliers` maps the beginning of a parameter's name, or its last
    part, to a factor on the learning rate: `{"logit_bias": 10.0}`. `layer_decay` maps a module with blocks, such as
    `towers.vision`, to a factor on the learning rate from what follows its last block down to that block, from each
    block to the one below, and from the first to the embeddings (as BEiT, arXiv 2106.08254, and MAE fine-tune).
    """

    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    weight_decay: float = 0.2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_factor: float = 0.0
    multipliers: dict[str, float] = field(default_factory=dict)
    layer_decay: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"optim.learning_rate={self.learning_rate} must be above 0; try 5e-4")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must lie in [0, 1); try (0.9, 0.98)")
        if not self.epsilon > 0:
            raise ConfigError(f"optim.epsilon={self.epsilon} must be above 0; try 1e-8")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must not be negative; 0 switches it off")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps={self.warmup_steps} must not be negative; 0 switches warm-up off")
        if not 0 <= self.final_factor <= 1:
            raise ConfigError(f"optim.final_factor={self.final_factor} must lie in [0, 1]")
        for module, factor in self.layer_decay.items():
            if not 0 < factor <= 1:
                raise ConfigError(f"optim.layer_decay: {module}={factor} must lie in (0, 1]; leave it out for none")


def schedule_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate for the step that leads from `step` to `step + 1`; 0 <= factor <= 1."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_factor + (1.0 - config.final_factor) * shape


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels; not biases, norms, scales, positions and learned tokens."""
    last = name.lower().rsplit(".", 1)[-1]
    return parameter.ndim >= 2 and not any(word in last for word in NO_DECAY_WORDS) and "position" not in name.lower()


def _multiplier(name: str, multipliers: dict[str, float]) -> float:
    for pattern, factor in multipliers.items():
        if name.startswith(pattern) or name.rsplit(".", 1)[-1] == pattern:
            return factor
    return 1.0


def _layer_factors(names: Sequence[str], layer_decay: dict[str, float]) -> dict[str, float]:
    """Name -> factor, of the parameters in modules whose learning rate falls from block to block.

    Names come in the order of the modules: what stands before the first block lies below it, what stands behind the
    last one above. Raises ConfigError for a module without trainable blocks.
    """
    factors: dict[str, float] = {}
    for module, decay in layer_decay.items():
        inside = [name for name in names if name.startswith(f"{module}.")]
        numbers = [int(found[1]) if (found := _BLOCK.search(name)) else None for name in inside]
        depth = 1 + max((number for number in numbers if number is not None), default=-1)
        if not depth:
            raise ConfigError(
                f"optim.layer_decay: {module!r} has no trainable blocks; name one such as 'towers.vision'"
            )
        seen = False
        for name, number in zip(inside, numbers, strict=True):
            seen = seen or number is not None
            layer = number + 1 if number is not None else depth + 1 if seen else 0
            factors[name] = decay ** (depth + 1 - layer)
    return factors


def turn_of(name: str, turns: Sequence[str]) -> int | None:
    """Which of the modules that learn in turn a parameter belongs to; None if it learns at every step."""
    return next((turn for turn, module in enumerate(turns) if name.startswith(f"{module}.")), None)


def parameter_groups(module: nn.Module, config: OptimConfig, turns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Groups of equal decay, learning-rate multiplier and turn, in the order of first appearance.

    That order is the same on every rank. `turns`: names of modules that learn in turn (core.tasks).

    Raises:
        ConfigError: nothing to train, a multiplier that matches no parameter, or layers to decay where there are none.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("no parameter is trainable; unfreeze a tower in the recipe")
    possible = [*(name for name, _ in named), *getattr(module, "optional_parameters", ())]
    for pattern in config.multipliers:
        if not any(_multiplier(name, {pattern: 0.0}) == 0.0 for name in possible):
            raise ConfigError(
                f"optim.multipliers: {pattern!r} matches no trainable parameter, such as {named[0][0]!r}; mend it or "
                "leave it out"
            )
    layer_factors = _layer_factors([name for name, _ in named], config.layer_decay)
    groups: dict[tuple[bool, float, int | None], list[nn.Parameter]] = {}
    for name, parameter in named:
        factor = _multiplier(name, config.multipliers) * layer_factors.get(name, 1.0)
        kind = (decays(name, parameter), factor, turn_of(name, turns))
        groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decay else 0.0,
            "lr": config.learning_rate * multiplier,
            "multiplier": multiplier,
            "turn": turn,
            "rests": False,
        }
        for (decay, multiplier, turn), parameters in groups.items()
    ]


class AdamW(torch.optim.AdamW):
    """torch's own, without its compiler: importing that takes five seconds of a start, and it compiles nothing here.

    torch imports it at an optimizer's first calls, to keep it out of them, and around every step.
    """

    # Adam's own function, below what asks the compiler to break its graph around it.
    step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[attr-defined]


@contextlib.contextmanager
def keeping_compiler_out() -> Iterator[None]:
    """What is imported in here and would keep torch's compiler out of its functions leaves that to itself."""
    before = torch._disable_dynamo
    torch._disable_dynamo = lambda function=None, recursive=True: function or (lambda each: each)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._disable_dynamo = before


def keep_compiler_out(*functions: Callable[..., Any]) -> None:
    """Of functions that torch would disable its compiler in at their first call: take them as they are."""
    for function in functions:
        function.__wrapped__.__dynamo_disable = function.__wrapped__  # type: ignore[attr-defined]


keep_compiler_out(
    torch.utils.checkpoint.checkpoint,
    *(
        getattr(torch.optim.Optimizer, name)
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    ),
)


class AdamWInTurns(AdamW):
    """AdamW that passes over groups which rest: their weights, moments and count of steps stay as they are.

    A gradient of zero would not do: weights would decay, and moments fade.
    """

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["rests"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def build(module: nn.Module, config: OptimConfig, turns: Sequence[str] = ()) -> torch.optim.Optimizer:
    """AdamW in one pass over memory (`fused`), which torch offers on CPU too."""
    kind = AdamWInTurns if turns else AdamW
    return kind(parameter_groups(module, config, turns), betas=config.betas, eps=config.epsilon, fused=True)
