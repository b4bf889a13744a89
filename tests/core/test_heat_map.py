"""Where a score comes from: the slope by attention, the planted patch, the slices that are drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from core.evaluation.heat_map import SLICES, HeatMap, HeatMaps, of_voxels
from core.models.anatomy_pool import AnatomyPool
from core.models.volume import VolumeOutput
from core.tasks.fvlm import FVLM
from shards.batch import Batch
from tests.core.test_fvlm import CONFIG, VISION, WORDS, volume_batch

CPU = torch.device("cpu")
STEMMED = replace(VISION, stem=(6,))
DIRECTIONS = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))


def trained(**changed: Any) -> FVLM:
    """As after some steps: no weight at its first value, queries among them."""
    options: dict[str, Any] = {"pool": AnatomyPool.Config(weighting="share"), "soft": "none", **changed}
    task = replace(CONFIG, **options).build(vocab_size=WORDS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return task.eval().requires_grad_(False)


@pytest.mark.parametrize("changed", [{}, {"similarity": "wasserstein", "scale_init": 7.0}, {"vision": STEMMED}])
def test_evidence_is_the_slope_of_the_score_by_the_weight_of_a_place(changed: dict[str, Any]) -> None:
    """Shares weigh places, so the slope by the logarithm of a share is what autograd finds on the model itself."""
    task, batch, place = trained(**changed), volume_batch(), [1, 0, 1]
    if changed.get("vision"):
        generator = torch.Generator().manual_seed(8)
        batch["anatomy_share"] = torch.rand(7, 3, 4 * 8 * 8 // 8, generator=generator)
    share = batch["anatomy_share"].requires_grad_()
    with torch.no_grad():
        found, score = task.evidence(batch, place, DIRECTIONS)
    pooled = task.towers.pool(task.towers.vision(batch["pixel_values"]), share)
    for k, anatomy in enumerate(place):
        expected = task.towers.of_pooled(pooled[:, anatomy]) @ DIRECTIONS[:, k]
        torch.testing.assert_close(score[:, k], expected)
        (slope,) = torch.autograd.grad(expected.sum(), share, retain_graph=True)
        torch.testing.assert_close(found[:, k], (slope * share)[:, anatomy], atol=1e-6, rtol=1e-4)
        assert found[:, k].abs().max() > 1e-3
    torch.testing.assert_close(found.sum(dim=2), torch.zeros(found.shape[:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weighting", ["share", "flag"])
def test_a_planted_patch_has_the_most_evidence_and_the_map_shows_it(
    weighting: Literal["share", "flag"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of like tokens one is moved along what raises the score."""
    task = trained(pool=AnatomyPool.Config(weighting=weighting))
    batch = {"pixel_values": torch.zeros(1, 1, 4, 8, 8), "anatomy_share": torch.ones(1, 3, 8)}
    base = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(1, 8, 16)
    seen = VolumeOutput(levels=[base.clone().requires_grad_() for _ in VISION.levels], grid=(2, 2, 2))
    pooled = task.towers.pool(seen, batch["anatomy_share"])[0, 1]
    upward = torch.autograd.grad(task.towers.of_pooled(pooled) @ DIRECTIONS[:, 1], seen.levels)
    planted = [level.detach().clone() for level in seen.levels]
    for level, up in zip(planted, upward, strict=True):
        level[0, 5] += up[0, 5] / up[0, 5].norm()
    monkeypatch.setattr(task.towers.vision, "forward", lambda pixels: replace(seen, levels=planted))
    found = task.evidence(batch, [1], DIRECTIONS[:, 1:2])[0][0, 0]
    assert found.argmax() == 5 and found[5] > 0 and (found[torch.arange(8) != 5] < 0).all()

    voxels = of_voxels(found.numpy(), VISION.volume_size, VISION.patch_size)
    assert voxels.shape == VISION.volume_size
    assert np.argwhere(voxels == voxels.max()).min(axis=0).tolist() == [2, 0, 4]  # patch 5 of 2 x 2 x 2
    assert np.argwhere(voxels == voxels.max()).max(axis=0).tolist() == [3, 3, 7]


def test_slices_span_the_anatomy_and_hold_the_peak() -> None:
    inside = np.zeros((60, 20, 20), bool)
    inside[5:55, 4:12, 6:15] = True
    evidence = np.zeros(inside.shape)
    evidence[24:28] = 1.0
    inside[24:28, 2:4, 6:15] = inside[26, 1, 6:15] = True
    heat = HeatMap(shown=np.random.default_rng(0).random(inside.shape), evidence=evidence, inside=inside, title="a")
    slices = heat.slices()
    assert len(slices) == SLICES and slices[0] == 5 and slices[-1] == 54 and 26 in slices
    picture = heat.draw()
    assert picture.shape[0] == 3 and 0 <= picture.min() and picture.max() <= 1
    assert torch.equal(picture, heat.draw())
    for sign, most in ((1, 0), (-1, 2)):  # red where it speaks for the disease, blue where against
        drawn = replace(heat, evidence=sign * evidence, shown=0 * evidence).draw()[:, 60:, :1040]
        assert (drawn[most] - drawn[2 - most]).gt(0.3).sum() > 500


def test_the_first_study_with_a_disease_and_its_anatomy_is_drawn() -> None:
    task = trained()
    batch: Batch = volume_batch() | {"labels": torch.zeros(6, 2, dtype=torch.int8)}
    batch["labels"][:, 1] = 1  # a label of the liver; the first view that shows it whole
    view = int(batch["anatomy_intact"][:, 1].nonzero()[0, 0])
    batch["anatomy_labels"] = torch.zeros(7, 4, 8, 8, dtype=torch.uint8)
    batch["anatomy_labels"][view, 1:3, 2:6, 2:6] = 2
    maps = HeatMaps(["cyst", "nodule"], {"cyst": "liver", "nodule": "lung"}, CONFIG.anatomies)
    drawn = dict(maps.run(task, DIRECTIONS[:, :2], [batch, batch], ["nodule", "cyst"], VISION.patch_size, CPU))
    assert list(drawn) == ["cyst"]  # nobody has a nodule
    assert maps.name_of("liver mass") == "anatomy/heat_map/liver_mass"
