"""Collectives: identity alone, exact values and gradients on two gloo ranks; both losses equal one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core import collectives
from core.losses.clip import clip
from core.losses.siglip import siglip
from tests.distributed import run_distributed

ROWS, SIZE = 6, 5  # of the joined batch


def joined() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": F.normalize(torch.randn(ROWS, SIZE, generator=generator), dim=1),
        "text": F.normalize(torch.randn(ROWS, SIZE, generator=generator), dim=1),
        "key": torch.tensor([3, 1, 3, 0, 1, 0]),
        "valid": torch.tensor([1, 1, 1, 0, 1, 1]).bool(),
    }


def share_and_gradients(own: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Both losses on this rank's rows through the collectives; the share and the gradient of every input."""
    out: dict[str, Any] = {}
    for which in ("clip", "siglip"):
        image, text = own["image"].clone().requires_grad_(), own["text"].clone().requires_grad_()
        scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
        gathered = collectives.gather({"image": image, "text": text, "key": own["key"], "valid": own["valid"]})
        everyone = gathered.all
        shared = {
            "own_key": own["key"],
            "all_key": everyone["key"],
            "own_valid": own["valid"],
            "all_valid": everyone["valid"],
        }
        if which == "clip":
            share = 0.5 * sum(clip(image, text, everyone["image"], everyone["text"], scale, **shared))
        else:
            share = siglip(image, everyone["text"], scale, bias, **shared)
        share.backward()
        # A parameter's gradient is summed over ranks by data parallelism; done by hand here.
        bias_grad = torch.zeros(()) if bias.grad is None else bias.grad
        out[which] = {
            "loss": collectives.sum_over_ranks(share).numpy(),
            "scale": collectives.sum_over_ranks(scale.grad).numpy(),
            "bias": collectives.sum_over_ranks(bias_grad).numpy(),
            "image": image.grad.numpy(),
            "text": text.grad.numpy(),
        }
    return out


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    rows = ROWS // world_size
    own = {name: value[rank * rows : (rank + 1) * rows] for name, value in joined().items()}
    votes = [collectives.any_rank(False), collectives.any_rank(rank == 1), collectives.any_rank(True)]
    flags = collectives.all_gather_rows(torch.tensor([rank == 0, True]))
    gathered = collectives.gather({"x": torch.full((2, 3), float(rank), requires_grad=True)})
    weights = torch.arange(float(2 * world_size))[:, None] * (rank + 1.0)
    (weights * gathered.all["x"]).sum().backward()
    half = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    collectives.all_gather_rows(half).sum().backward()
    return {
        "losses": share_and_gradients(own),
        "votes": votes,
        "flags": flags.numpy(),
        "offset": gathered.offset,
        "x": gathered.all["x"].detach().numpy(),
        "x_grad": gathered.own["x"].grad.numpy(),
        "half_grad": half.grad.float().numpy(),
    }


def test_alone_everything_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert collectives.all_gather_rows(x) is x
    assert collectives.any_rank(True) and not collectives.any_rank(False)
    total = collectives.sum_over_ranks(x)
    assert torch.equal(total, x) and not total.requires_grad and total.data_ptr() != x.data_ptr()
    gathered = collectives.gather({"x": x})
    assert gathered.own["x"] is x and gathered.all["x"] is x and gathered.offset == 0


def test_rows_must_agree() -> None:
    with pytest.raises(AssertionError, match="differ in rows"):
        collectives.gather({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_two_ranks_equal_one_process() -> None:
    alone = share_and_gradients(joined())
    ranks = run_distributed(on_rank, 2)
    for which in ("clip", "siglip"):
        for rank in ranks:
            for name in ("loss", "scale", "bias"):
                np.testing.assert_allclose(rank["losses"][which][name], alone[which][name], rtol=1e-6, atol=1e-7)
        for name in ("image", "text"):
            together = np.concatenate([rank["losses"][which][name] for rank in ranks])
            np.testing.assert_allclose(together, alone[which][name], rtol=1e-5, atol=1e-7)
    for place, rank in enumerate(ranks):
        assert rank["votes"] == [False, True, True]
        assert rank["flags"].tolist() == [True, True, False, True]
        assert rank["offset"] == 2 * place
        assert rank["x"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        # d/dx of sum over ranks r of (r + 1) * row number * x
        assert rank["x_grad"].tolist() == [[3.0 * (2 * place + row)] * 3 for row in range(2)]
        assert rank["half_grad"].tolist() == [[2.0, 2.0]]
