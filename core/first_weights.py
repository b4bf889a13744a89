"""The weights that a run starts from: drawn, those of another run, or of a tower that someone else trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from core.checkpoint_files import LATEST, find_weights
from core.models.initialise import load_weights, read_weights
from core.models.text import TextEncoder
from core.models.vision import VisionEncoder
from core.models.volume import VolumeEncoder
from core.tasks import Task
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Weights to start from when the run directory holds no checkpoint.

    `checkpoint`: a run directory, or a weights file of the same task; every weight must match. `vision`, `text`: one
    tower, from another run's directory, whatever its task (an MAE's encoder), or from local weights (ours, timm,
    Hugging Face, open_clip); what matched is reported.
    """

    checkpoint: str | None = None
    vision: str | None = None
    text: str | None = None


def load_checkpoint_weights(task: Task, source: str) -> str:
    """Load all weights of a run directory's newest checkpoint, or of a weights file, into `task`; all must match.

    Raises:
        ConfigError: names that differ, listed.
    """
    path = _newest(Path(source))
    weights = read_weights(path)
    own = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    extra = [name for name in weights if name not in own]
    if wrong or extra:
        parts = [f"{len(wrong)} missing or of another shape, such as {wrong[0]}"] if wrong else []
        parts += [f"{len(extra)} unknown, such as {extra[0]}"] if extra else []
        raise ConfigError(f"{path}: weights of another task ({'; '.join(parts)}); check init.checkpoint and the recipe")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])
    return f"all weights of {path}"


def load_towers(task: Task, init: InitConfig) -> str:
    """Load the towers' weights named by the recipe; returns what matched, '' if none are named."""
    reports = []
    sides: dict[str, list[VisionEncoder | VolumeEncoder | TextEncoder]] = {
        "vision": [module for module in task.modules() if isinstance(module, VisionEncoder | VolumeEncoder)],
        "text": [module for module in task.modules() if isinstance(module, TextEncoder)],
    }
    for side, path in (("vision", init.vision), ("text", init.text)):
        if path is None:
            continue
        towers = sides[side]
        if len(towers) != 1:
            raise ConfigError(f"{path}: this task has {len(towers)} {side} towers, not one")
        weights = _newest(Path(path))
        prefix = tower_prefix(towers[0], weights) if weights != Path(path) else ""
        reports.append(load_weights(towers[0], weights, prefix=prefix).summary())
    return "; ".join(reports)


def _newest(path: Path) -> Path:
    """The newest checkpoint's weights where this is a run directory, else the path itself."""
    return find_weights(path) if (path / LATEST).is_file() else path


def tower_prefix(tower: VisionEncoder | VolumeEncoder | TextEncoder, weights: Path) -> str:
    """What the names of such a tower begin with in a safetensors file of another task's weights.

    Raises:
        ConfigError: there is none, or more than one.
    """
    with safe_open(weights, framework="pt") as file:  # their names alone, without reading them
        names = set(file.keys())
    own = [name for name, _ in tower.named_parameters()]
    found = [
        name.removesuffix(own[0])
        for name in names
        if name.endswith(own[0]) and all(name.removesuffix(own[0]) + other in names for other in own)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{weights}: {len(found)} towers in it have the parts of this task's {type(tower).__name__}, not one; take "
            "a run whose tower has the same depth, tokens and positions, or export.py's file of the one that is meant"
        )
    return found[0]
