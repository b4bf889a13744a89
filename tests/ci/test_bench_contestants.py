"""Every contestant of a learning experiment can start: its task is built, its optimizer finds what it is told of."""

from __future__ import annotations

import pytest

from ci.bench import dmlm, ecamp, fvlm, umcl
from configs.schema import apply_overrides, load_recipe
from core.optim import parameter_groups

CONTESTANTS = {
    **{f"umcl: {name}": (of.recipe, of.change) for name, of in (umcl.JUDGED | umcl.VARIANTS).items()},
    **{f"fvlm: {name}": (of.recipe, of.change) for name, of in (fvlm.JUDGED | fvlm.VARIANTS).items()},
    **{f"ecamp: {name}": of for name, of in (ecamp.JUDGED | ecamp.VARIANTS).items()},
    **{f"dmlm: {name}": ("chest:dmlm_tiny", change) for name, change in dmlm.VARIANTS.items()},
}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_contestant_starts(name: str) -> None:
    recipe, change = CONTESTANTS[name]
    config = apply_overrides(load_recipe(recipe), change)
    task = config.task.build(vocab_size=64)
    groups = parameter_groups(task, config.optim, task.turns)
    assert sum(len(group["params"]) for group in groups) == len(list(task.parameters()))
