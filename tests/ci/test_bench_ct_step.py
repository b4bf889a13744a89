"""Both contestants of ct_step are given the same problem."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ci.bench.ct_step import ANATOMIES, PATIENTS, Contestant, Inputs, our_batch
from core.tasks.fvlm import FVLM

SIZE, PATCH = (64, 64, 96), (16, 16, 32)


def test_our_batch_has_the_flags_texts_and_targets_of_the_released_step() -> None:
    inputs = Inputs.of(SIZE)
    batch = our_batch(inputs, PATCH)
    assert set(FVLM.fields) <= set(batch)
    for anatomy in range(len(ANATOMIES)):
        mask = (inputs.labels == anatomy + 1).float()[:, None]
        flags = F.max_pool3d(mask, PATCH, PATCH).flatten(1) > 0
        assert torch.equal(batch["anatomy_share"][:, anatomy] > 0, flags) and flags.any(dim=1).all()
        for axis in (2, 3, 4):  # no face cuts it: `anatomy_intact`
            assert not mask.index_select(axis, torch.tensor([0, mask.shape[axis] - 1])).any()
    keys, normal = batch["anatomy_key"], inputs.normal
    assert torch.equal(keys == 0, normal) and len(keys[~normal].unique()) == int((~normal).sum())
    ids = inputs.input_ids.flatten(0, 1)
    for text in batch["anatomy_text_key"].unique():
        same = ids[batch["anatomy_text_key"].flatten() == text]
        assert (same == same[0]).all()
    assert len(ids.unique(dim=0)) == len(batch["anatomy_text_key"].unique()) == PATIENTS * len(ANATOMIES) - 2


def test_levels_of_the_quick_form_end_with_its_last_block() -> None:
    assert Contestant(system="ours").levels == (4, 7, 10, 12) and Contestant(system="ours", depth=2).levels == (1, 2)
