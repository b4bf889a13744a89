"""Blocks and their linear layers: the CPU's half-precision path is the plain product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from core.models.attention import DenseLayout
from core.models.initialise import draw_weights
from core.models.transformer import Linear, Transformer, TransformerConfig


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_linear_in_bf16_is_the_product_with_its_gradients(inputs: int, outputs: int, rows: int) -> None:
    layer = Linear(inputs, outputs)
    draw_weights(layer, 1)
    generator = torch.Generator().manual_seed(rows)
    with torch.no_grad():
        layer.bias.normal_(generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    grad = torch.randn(rows, outputs, generator=generator)
    assert layer.weight.shape == (min(inputs, outputs), max(inputs, outputs)) and layer.wide == (outputs > inputs)

    def through(dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        out = layer(given)
        assert out.dtype is dtype
        gradients = torch.autograd.grad(out, [given, layer.weight, layer.bias], grad.to(dtype))
        return [out.float(), *(g.float() for g in gradients)]

    plain = F.linear(x, layer.weight.T if layer.wide else layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain)
    for half, full in zip(through(torch.bfloat16), through(torch.float32), strict=True):
        assert (half - full).norm() <= 0.01 * full.norm()


def test_input_without_gradient_gets_none() -> None:
    layer = Linear(8, 16)
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert x.grad is None and layer.weight.grad is not None and layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [3.0] * 16


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_autocast_stays_close_to_fp32(norm, activation) -> None:
    stack = Transformer(TransformerConfig(width=32, depth=2, heads=4, norm=norm, activation=activation))
    draw_weights(stack, 2)
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(3))
    full = stack(x, DenseLayout(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        half = stack(x.bfloat16(), DenseLayout(2, 5))
    assert half.dtype is torch.bfloat16
    assert (half.float() - full).norm() <= 0.02 * full.norm()
