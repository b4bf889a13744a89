"""Losses over all pairs against stored fp64 formulas: alone, over 2 and 4 ranks, both ways to meet their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import collectives
from core.losses import contrast
from core.tasks import Gathered
from kernels.gaussian_similarity import blocked, reference
from tests.distributed import run_distributed

LOSSES = ("info_nce", "pairwise_sigmoid")
SIMILARITIES: tuple[contrast.Similarity, ...] = ("cosine", "wasserstein", "sampled")
SIZES = [(1, 3), (5, 4), (13, 7), (33, 17)]
Inputs = dict[str, Tensor]  # embeddings, means and log-variances [B, E], scale [] and bias []


def inputs_of(rows: int, size: int, *, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    found: Inputs = {}
    for side in ("image", "text"):
        mean, spread = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for _ in range(2))
        found[f"{side}_embeds"] = F.normalize(mean, dim=1)
        found[f"{side}_mean"], found[f"{side}_logvar"] = 0.5 * mean + 0.3, 0.4 * spread - 1.0
    found["scale"] = torch.tensor(0.9, dtype=torch.float64)
    found["bias"] = torch.tensor(-1.2, dtype=torch.float64)
    return {name: value.to(dtype) for name, value in found.items()}


def keys_and_valid(rows: int, case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    key = torch.arange(rows)
    valid = torch.ones(rows, dtype=torch.bool)
    if case in ("repeated", "void"):
        key = torch.randint(0, max(1, rows // 2), (rows,), generator=generator)
    elif case == "all_equal":
        key = torch.full((rows,), 7)
    if case == "void":
        valid = torch.rand(rows, generator=generator) < 0.6
    elif case == "none_valid":
        valid = torch.zeros(rows, dtype=torch.bool)
    return key, valid


def leaves(inputs: Inputs) -> Inputs:
    return {name: value.clone().requires_grad_() for name, value in inputs.items()}


def dense(loss: str, similarity: str, inputs: Inputs, key: Tensor, valid: Tensor) -> Tensor:
    """The definition on the valid rows alone, stored."""
    if not valid.any():
        return sum((value.sum() for value in inputs.values()), torch.zeros(())) * 0
    kept = {name: value[valid] if value.ndim else value for name, value in inputs.items()}
    if similarity == "cosine":
        pairs = kept["image_embeds"] @ kept["text_embeds"].T
    else:
        four = [kept[f"{side}_{part}"] for side in ("image", "text") for part in ("mean", "logvar")]
        formula = reference.squared_wasserstein if similarity == "wasserstein" else reference.sampled_distance
        pairs = -formula(*four)
    logits = kept["scale"] * pairs
    if loss == "info_nce":
        return reference.info_nce(logits, key[valid], key[valid])
    return reference.pairwise_sigmoid(logits + kept["bias"], key[valid], key[valid])


def share(loss: str, similarity: Any, inputs: Inputs, key: Tensor, valid: Tensor, exchange: Any, **more: Any) -> Tensor:
    rows = {name: value for name, value in inputs.items() if value.ndim}
    gathered = collectives.gather({**rows, "report_key": key, "valid": valid}, exchange=exchange)
    if loss == "info_nce":
        return contrast.info_nce(gathered, scale=inputs["scale"], similarity=similarity, **more).loss
    return contrast.pairwise_sigmoid(
        gathered, scale=inputs["scale"], bias=inputs["bias"], similarity=similarity, **more
    )


def gradients(loss: Tensor, inputs: Inputs) -> Inputs:
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize(("rows", "size"), SIZES)
@pytest.mark.parametrize("case", ["distinct", "repeated", "all_equal", "void", "none_valid"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_equal_the_dense_formula(
    loss: str, similarity: str, rows: int, size: int, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "TILE_ROWS", 4)
    monkeypatch.setattr(blocked, "TILE_COLUMNS", 5)
    key, valid = keys_and_valid(rows, case)
    wanted = leaves(inputs_of(rows, size))
    expected = dense(loss, similarity, wanted, key, valid)
    given = leaves(inputs_of(rows, size))
    found = share(loss, similarity, given, key, valid, "gather", precision="fp32")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, check_dtype=False)
    of_given, of_wanted = gradients(found, given), gradients(expected, wanted)
    for name in given:
        torch.testing.assert_close(of_given[name], of_wanted[name], rtol=1e-10, atol=1e-12)
    if case == "none_valid":
        assert found.item() == 0 and not any(value.any() for value in of_given.values())


@pytest.mark.parametrize("case", ["distinct", "repeated", "all_equal", "void"])
def test_excess_is_what_each_study_costs_above_the_least_its_keys_allow(case: str) -> None:
    key, valid = keys_and_valid(13, case)
    inputs = inputs_of(13, 7)
    gathered = collectives.gather(
        {name: value for name, value in inputs.items() if value.ndim} | {"report_key": key, "valid": valid}
    )
    found = contrast.info_nce(gathered, scale=inputs["scale"])
    logits = (inputs["scale"] * inputs["image_embeds"] @ inputs["text_embeds"].T)[valid][:, valid]
    positive = (key[valid][:, None] == key[valid]).double()
    target = positive / positive.sum(1, keepdim=True)
    for excess, seen in ((found.row_excess, logits), (found.column_excess, logits.T)):
        divergence = torch.special.xlogy(target, target).sum(1) - (target * seen.log_softmax(1)).sum(1)
        torch.testing.assert_close(excess, divergence, rtol=1e-10, atol=1e-12)
        assert not excess.requires_grad


# ---- over ranks: rows of the 13 studies that each rank holds; the fourth study is void ----

SPLITS = {1: ((13,),), 2: ((7, 6), (13, 0)), 4: ((4, 3, 3, 3), (6, 0, 2, 5))}
STUDIES, SIZE = 13, 6


def studies() -> tuple[Tensor, Tensor]:
    key, valid = keys_and_valid(STUDIES, "repeated")
    return key, valid & (torch.arange(STUDIES) != 3)


def on_rank(rank: int, world_size: int) -> dict[Any, Any]:
    """Share and gradients of own rows of every case, those of the scale and the bias as this rank's share."""
    found: dict[Any, Any] = {}
    cases = product(LOSSES, SIMILARITIES, ("gather", "ring"), SPLITS[world_size], ("float32", "float64"))
    for case in cases:
        loss, similarity, exchange, split, dtype = case
        found[case] = of_rows(loss, similarity, exchange, own_of(split, rank), dtype, "fp32")
    none = torch.zeros(3, dtype=torch.bool)
    for loss, exchange in product(LOSSES, ("gather", "ring")):
        inputs = leaves(inputs_of(3, SIZE))
        result = share(loss, "wasserstein", inputs, torch.arange(3), none, exchange)
        largest = max(float(value.abs().max()) for value in gradients(result, inputs).values())
        found["nothing valid", loss, exchange] = (result.item(), largest)
    for loss, exchange in product(LOSSES, ("gather", "ring")):
        own = own_of(SPLITS[world_size][-1], rank)
        found["rounded", loss, exchange] = of_rows(loss, "wasserstein", exchange, own, "float32", "bf16")
    return found


def own_of(split: tuple[int, ...], rank: int) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def of_rows(loss: str, similarity: str, exchange: str, own: slice, dtype: str, precision: str) -> dict[str, np.ndarray]:
    """A rank's share and the gradients of its own rows, and of the scale and the bias."""
    key, valid = studies()
    whole = inputs_of(STUDIES, SIZE, dtype=getattr(torch, dtype))
    inputs = leaves({name: value[own] if value.ndim else value for name, value in whole.items()})
    result = share(loss, similarity, inputs, key[own], valid[own], exchange, precision=precision)
    found = gradients(result, inputs) | {"loss": result.detach()}
    return {name: value.numpy() for name, value in found.items()}


def over_ranks(ranks: list[dict[Any, Any]], case: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """All rows' gradients, and what the ranks' shares add up to."""
    return {
        name: (np.concatenate if value.ndim else sum)([rank[case][name] for rank in ranks])
        for name, value in ranks[0][case].items()
    }


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float, case: object) -> None:
    for name, value in joined(wanted).items():
        error = np.linalg.norm(joined(found)[name] - value)
        assert error <= bound * np.linalg.norm(value), (case, name, error)


def joined(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All embeddings' gradients as one vector, since what cancels in one tensor does so at the size of the others."""
    embeddings = np.concatenate([value.ravel() for value in found.values() if value.ndim])
    return {"embeddings": embeddings} | {name: value for name, value in found.items() if not value.ndim}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_gives_the_dense_loss_and_gradients(world_size: int) -> None:
    """Both exchanges, ranks of different numbers of rows, one of them without any."""
    ranks = [on_rank(0, 1)] if world_size == 1 else run_distributed(on_rank, world_size)
    key, valid = studies()
    for case in (case for case in ranks[0] if len(case) == 5):
        loss, similarity, _, _, dtype = case
        bound = 1e-6 if dtype == "float32" else 1e-13
        given = inputs_of(STUDIES, SIZE, dtype=getattr(torch, dtype))
        wanted = leaves({name: value.double() for name, value in given.items()})
        expected = dense(loss, similarity, wanted, key, valid)
        exact = gradients(expected, wanted) | {"loss": expected.detach()}
        assert_close(over_ranks(ranks, case), {name: value.numpy() for name, value in exact.items()}, bound, case)
    for rank in ranks:
        for loss, exchange in product(LOSSES, ("gather", "ring")):
            assert rank["nothing valid", loss, exchange] == (0.0, 0.0)
    # Columns that travel in two bytes are the ones that were rounded: no ring, no rank changes a value.
    for loss, exchange in product(LOSSES, ("gather", "ring")):
        alone = of_rows(loss, "wasserstein", "gather", slice(None), "float32", "bf16")
        assert_close(over_ranks(ranks, ("rounded", loss, exchange)), alone, 1e-6, ("rounded", loss, exchange))


# ---- one process ----


def paired(rows: int, size: int, **changed: Tensor) -> Gathered:
    inputs = inputs_of(rows, size, dtype=torch.float32)
    rows_only = {name: value for name, value in inputs.items() if value.ndim}
    more = {"report_key": torch.arange(rows), "valid": torch.ones(rows, dtype=torch.bool)}
    return collectives.gather({**rows_only, **more, **changed})


def both(gathered: Gathered, similarity: contrast.Similarity = "cosine") -> list[Tensor]:
    scale, bias = torch.tensor(8.0), torch.tensor(-1.0)
    return [
        contrast.info_nce(gathered, scale=scale, similarity=similarity).loss,
        contrast.pairwise_sigmoid(gathered, scale=scale, bias=bias, similarity=similarity),
    ]


def test_directions_are_the_halves_of_the_loss() -> None:
    """Rows and columns that differ in what they find: three images of one place, one text apart."""
    gathered = paired(7, 4)
    shares = contrast.info_nce(gathered, scale=torch.tensor(8.0))
    logits = 8.0 * gathered.own["image_embeds"] @ gathered.own["text_embeds"].T
    target = torch.arange(7)
    torch.testing.assert_close(shares.row_to_column, F.cross_entropy(logits, target), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shares.column_to_row, F.cross_entropy(logits.T, target), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shares.loss, (shares.row_to_column + shares.column_to_row) / 2)
    assert not shares.row_to_column.requires_grad


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_void_rows_may_hold_anything(similarity: contrast.Similarity) -> None:
    valid = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    clean = paired(6, 4, valid=valid)
    spoilt = {name: value.clone() for name, value in clean.own.items()}
    for name, value in spoilt.items():
        if value.is_floating_point():
            value[2], value[4] = torch.nan, torch.inf
            spoilt[name] = value.requires_grad_()
    for ours, wanted in zip(both(collectives.gather(spoilt), similarity), both(clean, similarity), strict=True):
        assert torch.equal(ours, wanted)
        used = [value for value in spoilt.values() if value.requires_grad]
        for gradient in torch.autograd.grad(ours, used, allow_unused=True):
            assert gradient is None or (gradient.isfinite().all() and not gradient[~valid].any())


def test_a_valid_row_that_is_not_finite_is_left_for_the_engine_to_see() -> None:
    gathered = paired(5, 4)
    gathered.own["image_embeds"][1] = torch.nan
    assert all(torch.isnan(loss) for loss in both(gathered))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_shift_of_all_means_changes_nothing(similarity: contrast.Similarity) -> None:
    """The common centre is taken off before values are rounded to bf16."""
    gathered = paired(40, 32)
    moved = {name: value + 50.0 if name.endswith("_mean") else value for name, value in gathered.own.items()}
    for ours, wanted in zip(both(collectives.gather(moved), similarity), both(gathered, similarity), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_loss_is_fp32_under_autocast_and_for_half_input() -> None:
    gathered = paired(8, 16)
    plain = both(gathered)
    with torch.autocast("cpu", torch.bfloat16):
        cast = both(gathered)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in gathered.own.items()}
    assert all(loss.dtype is torch.float32 for loss in both(collectives.gather(half)))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_what_backward_keeps_is_linear_in_the_batch(similarity: contrast.Similarity) -> None:
    """No tensor of the size of the logits lives on after forward, at any number of rows."""
    rows, size = 512, 4
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    gathered = paired(rows, size)
    for value in gathered.own.values():
        value.requires_grad_(value.is_floating_point())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        both(gathered, similarity)
    assert kept and max(kept) <= 2 * rows * size


def test_no_graph_is_kept_without_need() -> None:
    gathered = paired(4, 3)
    gathered.own["image_embeds"].requires_grad_()
    with torch.no_grad():
        assert not any(loss.requires_grad for loss in both(gathered))


def test_a_key_of_another_name_and_sides_of_other_names() -> None:
    gathered = paired(6, 4, finding_key=torch.tensor([0, 0, 1, 1, 2, 3]))
    own = {**gathered.own, "study_embeds": gathered.own["image_embeds"]}
    chosen: dict[str, Any] = {"row": "study", "column": "text", "key": "finding_key"}
    renamed = contrast.info_nce(collectives.gather(own), scale=torch.tensor(8.0), **chosen).loss
    by_report: Callable[..., Any] = contrast.info_nce
    same_key = collectives.gather({**gathered.own, "report_key": gathered.own["finding_key"]})
    assert torch.equal(renamed, by_report(same_key, scale=torch.tensor(8.0)).loss)
    assert not torch.equal(renamed, by_report(gathered, scale=torch.tensor(8.0)).loss)


def test_what_cannot_be_compared_is_refused_with_its_name() -> None:
    gathered = paired(6, 4)
    for name, changed, said in (
        ("report_key", torch.arange(6.0), r"report_key is torch.float32 \(6,\); int64 \(6,\) was expected"),
        ("report_key", torch.arange(5), r"report_key is torch.int64 \(5,\)"),
        ("text_embeds", torch.zeros(6, 5), r"image_embeds \(6, 4\), text_embeds \(6, 5\): must be alike"),
    ):
        with pytest.raises(ValueError, match=said):
            both(replace(gathered, own={**gathered.own, name: changed}))
    with pytest.raises(ValueError, match=r"text_mean \(6, 5\).*: must be alike"):
        both(replace(gathered, own={**gathered.own, "text_mean": torch.zeros(6, 5)}), "wasserstein")
