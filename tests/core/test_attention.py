"""Attention twins agree, forward and backward, dense and packed."""

from __future__ import annotations

import logging

import pytest
import torch

from core.models import attention
from core.models.attention import DenseLayout, PackedLayout, dense_attention, pick_rows


def reference(qkv: torch.Tensor, key_mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v, written out."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / qkv.shape[-1] ** 0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("implementation", ["matmul", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_twins_equal_the_formula(implementation, causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 7, 3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    key_mask = torch.arange(7)[None] < torch.tensor([7, 3, 1])[:, None] if masked else None
    weight = torch.randn(3, 7, 10, generator=generator, dtype=torch.float64)
    if key_mask is not None:
        weight = weight * key_mask[:, :, None]  # outputs of ignored rows are unspecified
    ours = dense_attention(qkv, key_mask=key_mask, causal=causal, implementation=implementation)
    expected = reference(qkv, key_mask, causal)
    torch.testing.assert_close(ours * (weight != 0), expected * (weight != 0))
    (grad,) = torch.autograd.grad((ours * weight).sum(), qkv)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), qkv)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[4], [1, 1], [5, 2, 9, 9, 1, 3, 7], [6, 6, 6], [1, 30, 2, 17, 5, 5, 8, 9, 21]])
@pytest.mark.parametrize("max_buckets", [1, 4])
def test_packed_equals_padded(causal: bool, lengths: list[int], max_buckets: int) -> None:
    generator = torch.Generator().manual_seed(2)
    sequences, length = len(lengths), max(lengths) + 1
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    padded = torch.randn(sequences, length, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    layout = PackedLayout.from_mask(mask, causal=causal, max_buckets=max_buckets)
    packed = layout.pack(padded)
    assert packed.shape[0] == sum(lengths) and sum(bucket.tokens for bucket in layout.buckets) == sum(lengths)
    ours = layout.unpack(layout.attend(packed), length)
    dense = DenseLayout(sequences, length, causal, mask).attend(padded.flatten(0, 1)).view(sequences, length, -1)
    expected = dense * mask[:, :, None]
    torch.testing.assert_close(ours, expected)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((ours * weight).sum(), padded)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), padded)
    torch.testing.assert_close(grad, expected_grad)
    flat = padded.detach().flatten(0, 1)
    last = torch.tensor(lengths) - 1
    first_row = torch.arange(sequences) * length
    torch.testing.assert_close(pick_rows(packed, layout.first_token), flat[first_row])
    torch.testing.assert_close(pick_rows(packed, layout.last_token), flat[first_row + last])


def test_half_precision_stays_close() -> None:
    qkv = torch.randn(2, 33, 3, 4, 16, generator=torch.Generator().manual_seed(3))
    full = dense_attention(qkv, implementation="matmul")
    for implementation in ("matmul", "sdpa"):
        half = dense_attention(qkv.bfloat16(), implementation=implementation)  # type: ignore[arg-type]
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), full, atol=0.03, rtol=0.05)


def test_choice_depends_on_device_and_length_only_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention.choose.cache_clear()
    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="core.models.attention"):
        for length in (197, 197, 64):
            assert attention.choose("cpu", length, True) == "matmul"
    assert len(caplog.records) == 1 and "matmul" in caplog.records[0].getMessage()
    assert attention.choose("cpu", attention.CPU_MATMUL_MAX_LENGTH + 1, True) == "sdpa"
    if not attention.flash_attention_installed():
        assert attention.choose("cuda", 197, True) == "sdpa"


def test_no_sequences() -> None:
    layout = PackedLayout.from_mask(torch.zeros(0, 3, dtype=torch.bool))
    assert layout.buckets == () and layout.max_length == 0
