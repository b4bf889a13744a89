"""CLIP and SigLIP losses against dense fp64 formulas, and one rank against several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from core.losses import clip as clip_module
from core.losses.clip import clip, rows_per_block
from core.losses.siglip import siglip

SIZES = [(1, 3), (5, 4), (13, 7), (33, 17)]


def embeddings(rows: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, size, generator=generator, dtype=torch.float64), dim=1)


def keys_and_valid(rows: int, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    key = torch.arange(rows)
    valid = torch.ones(rows, dtype=torch.bool)
    if case == "repeated":
        key = torch.randint(0, max(1, rows // 2), (rows,), generator=generator)
    elif case == "all_equal":
        key = torch.full((rows,), 7)
    elif case == "void":
        key = torch.randint(0, max(1, rows // 2), (rows,), generator=generator)
        valid = torch.rand(rows, generator=generator) < 0.6
    elif case == "none_valid":
        valid = torch.zeros(rows, dtype=torch.bool)
    return key, valid


def dense_clip(image, text, scale, key, valid):  # type: ignore[no-untyped-def]
    """The definition on the valid rows alone, [n, n] and all."""
    image, text, key = image[valid], text[valid], key[valid]
    if not len(key):
        return (image.sum() + text.sum() + scale) * 0
    logits = scale * image @ text.T
    target = (key[:, None] == key[None, :]).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    rows = -(target * logits.log_softmax(1)).sum(1).mean()
    columns = -(target * logits.T.log_softmax(1)).sum(1).mean()
    return 0.5 * (rows + columns)


def dense_siglip(image, text, scale, bias, key, valid):  # type: ignore[no-untyped-def]
    image, text, key = image[valid], text[valid], key[valid]
    if not len(key):
        return (image.sum() + text.sum() + scale + bias) * 0
    sign = 2.0 * (key[:, None] == key[None, :]) - 1.0
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(key)


@pytest.mark.parametrize(("rows", "size"), SIZES)
@pytest.mark.parametrize("case", ["distinct", "repeated", "all_equal", "void", "none_valid"])
@pytest.mark.parametrize("block_rows", [1, 4, None])
@pytest.mark.parametrize("which", ["clip", "siglip"])
def test_loss_and_gradients_equal_the_dense_formula(which: str, rows: int, size: int, case: str, block_rows) -> None:
    key, valid = keys_and_valid(rows, case)
    inputs = [embeddings(rows, size, 1), embeddings(rows, size, 2), torch.tensor(9.3).double()]
    if which == "siglip":
        inputs.append(torch.tensor(-4.2).double())
    expected_inputs = [x.clone().requires_grad_() for x in inputs]
    expected = (dense_clip if which == "clip" else dense_siglip)(*expected_inputs, key, valid)
    expected.backward()

    given = [x.clone().requires_grad_() for x in inputs]
    shared = {"own_key": key, "all_key": key, "own_valid": valid, "all_valid": valid, "block_rows": block_rows}
    if which == "clip":
        image, text, scale = given
        first, second = clip(image, text, image, text, scale, **shared)
        loss = 0.5 * (first + second)
    else:
        loss = siglip(*given, **shared)
    loss.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for ours, reference in zip(given, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-10, atol=1e-12)
    if case == "none_valid":
        assert loss.item() == 0 and all(x.grad is not None and not x.grad.any() for x in given)


@pytest.mark.parametrize("which", ["clip", "siglip"])
def test_shares_of_ranks_add_up(which: str) -> None:
    """Three ranks' row-local shares are the loss of the joined batch; gradients too."""
    rows, size = 12, 5
    key, valid = keys_and_valid(rows, "void")
    image, text = embeddings(rows, size, 3).requires_grad_(), embeddings(rows, size, 4).requires_grad_()
    scale, bias = torch.tensor(5.0).double().requires_grad_(), torch.tensor(-1.0).double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, 4):
        own = slice(start, start + 4)
        shared = {"own_key": key[own], "all_key": key, "own_valid": valid[own], "all_valid": valid}
        if which == "clip":
            total = total + 0.5 * sum(clip(image[own], text[own], image, text, scale, **shared))
        else:
            total = total + siglip(image[own], text, scale, bias, **shared)
    inputs = [image, text, scale] if which == "clip" else [image, text, scale, bias]
    found = torch.autograd.grad(total, inputs)
    expected = dense_clip(*inputs, key, valid) if which == "clip" else dense_siglip(*inputs, key, valid)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", ["clip", "siglip"])
def test_void_rows_may_hold_anything(which: str) -> None:
    rows = 6
    key, valid = torch.arange(rows), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    image, text = embeddings(rows, 4, 5), embeddings(rows, 4, 6)
    image[2], text[4] = torch.nan, torch.inf
    image.requires_grad_()
    shared = {"own_key": key, "all_key": key, "own_valid": valid, "all_valid": valid}
    scale = torch.tensor(8.0).double()
    if which == "clip":
        loss = sum(clip(image, text, image, text, scale, **shared))
    else:
        loss = siglip(image, text, scale, torch.tensor(0.0).double(), **shared)
    (gradient,) = torch.autograd.grad(loss, image)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and not gradient[2].any()


def test_loss_is_fp32_under_autocast_and_for_half_input() -> None:
    image, text = embeddings(8, 16, 7).float(), embeddings(8, 16, 8).float()
    key, valid = torch.arange(8), torch.ones(8, dtype=torch.bool)
    shared = {"own_key": key, "all_key": key, "own_valid": valid, "all_valid": valid}
    plain = clip(image, text, image, text, torch.tensor(50.0), **shared)
    with torch.autocast("cpu", torch.bfloat16):
        cast = clip(image, text, image, text, torch.tensor(50.0), **shared)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])
    half = clip(image.bfloat16(), text.bfloat16(), image.bfloat16(), text.bfloat16(), torch.tensor(50.0), **shared)
    assert half[0].dtype is torch.float32


def test_what_backward_keeps_is_linear_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the size of the logits lives on after forward, at any number of rows."""
    monkeypatch.setattr(clip_module, "BLOCK_ELEMENTS", 1 << 10)
    rows, size = 512, 4
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    image, text = (embeddings(rows, size, seed).float().requires_grad_() for seed in (9, 10))
    key, valid = torch.arange(rows), torch.ones(rows, dtype=torch.bool)
    shared = {"own_key": key, "all_key": key, "own_valid": valid, "all_valid": valid}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        sum(clip(image, text, image, text, torch.tensor(5.0), **shared))
        siglip(image, text, torch.tensor(5.0), torch.tensor(0.0), **shared)
    assert kept and max(kept) <= rows * size


def test_no_gradient_is_formed_without_need() -> None:
    image, text = embeddings(4, 3, 11), embeddings(4, 3, 12)
    key, valid = torch.arange(4), torch.ones(4, dtype=torch.bool)
    shared = {"own_key": key, "all_key": key, "own_valid": valid, "all_valid": valid}
    with torch.no_grad():
        loss = siglip(image, text, torch.tensor(1.0), torch.tensor(0.0), **shared)
    assert not loss.requires_grad


def test_block_rows() -> None:
    assert rows_per_block(0) == 1 << 22
    assert rows_per_block(1 << 23) == 1
    assert rows_per_block(1024, block_elements=4096) == 4
