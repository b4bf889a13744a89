"""The ViT: shapes, visible patches only, other image sizes, grey and colour, checkpointed activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.models.initialise import draw_weights
from core.models.vision import VisionEncoder, resize_positions, sincos_positions, vit_b16
from shards.errors import ConfigError

SMALL = VisionEncoder.Config(image_size=24, patch_size=8, width=16, depth=2, heads=2)


def build(config: VisionEncoder.Config) -> VisionEncoder:
    encoder = VisionEncoder(config)
    draw_weights(encoder, seed=0)
    return encoder


def pixels(images: int, channels: int, side: int) -> torch.Tensor:
    return torch.randn(images, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["class", "mean", "max"])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("stem", [(), (4, 6)])
def test_shapes_and_gradients(pool, registers: int, positions, stem: tuple[int, ...]) -> None:
    config = replace(
        SMALL, pool=pool, registers=registers, positions=positions, layer_scale=1e-2, input_norm=True, stem=stem
    )
    encoder = build(config)
    out = encoder(pixels(2, 1, 24))
    assert out.tokens.shape == (2, 9, 16) and out.prefix.shape == (2, 1 + registers, 16) and out.pooled.shape == (2, 16)
    (out.pooled.square().sum() + out.tokens.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_no_class_token() -> None:
    out = build(replace(SMALL, class_token=False, pool="mean"))(pixels(2, 1, 24))
    assert out.prefix.shape == (2, 0, 16)
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))


def test_the_maximum_of_the_patches() -> None:
    out = build(replace(SMALL, pool="max"))(pixels(2, 1, 24))
    torch.testing.assert_close(out.pooled, out.tokens.max(dim=1).values)


def test_patches_are_the_convolution() -> None:
    encoder = build(replace(SMALL, channels=3))
    x = pixels(2, 3, 24)
    kernel = encoder.patch.weight.view(16, 3, 8, 8)
    expected = torch.nn.functional.conv2d(x, kernel, encoder.patch.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch(encoder.patches(x)), expected, atol=1e-5, rtol=1e-5)


def test_grey_images_into_three_channels() -> None:
    encoder = build(replace(SMALL, channels=3))
    x = pixels(2, 1, 24)
    torch.testing.assert_close(encoder(x).pooled, encoder(x.repeat(1, 3, 1, 1)).pooled)


def test_a_stem_halves_both_sides_in_each_stage_and_moves_with_its_input() -> None:
    encoder = build(replace(SMALL, stem=(4, 6), channels=3))
    assert encoder.stem is not None and encoder.patch.weight.shape == (16, 6 * 2 * 2)
    one = torch.zeros(1, 3, 48, 48)
    one[..., 16:20, 16:20] = pixels(1, 3, 4)
    further = one.roll((4, 8), dims=(2, 3))
    before, after = (encoder.stem(image) for image in (one, further))
    assert before.shape == (1, 6, 12, 12) and before.std() > 0
    torch.testing.assert_close(before[..., 2:8, 2:8], after[..., 3:9, 4:10])  # the border is further off


def test_blanked_places_are_to_a_stem_as_if_the_image_ended_there() -> None:
    stem = build(replace(SMALL, stem=(4, 6))).stem
    assert stem is not None
    small, larger, shown = pixels(1, 1, 24), torch.zeros(1, 1, 24, 72), torch.zeros(1, 1, 24, 72)
    larger[..., :24], shown[..., :24] = small, 1.0
    expected, found = stem(small), stem(larger, shown)
    torch.testing.assert_close(found[..., :6], expected, atol=1e-5, rtol=1e-5)
    assert (found[..., 6:] == 0).all()
    torch.testing.assert_close(stem(small, torch.ones_like(small)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [(4, 4, 4, 4), (0,)])
def test_a_stem_that_does_not_fit_the_patch_is_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"stages halve patch_size=8 as often; give fewer, of at least 1 channel"):
        replace(SMALL, stem=bad)


@pytest.mark.parametrize("stem", [(), (4, 6)])
def test_keep_encodes_only_the_visible_patches_in_their_order(stem: tuple[int, ...]) -> None:
    encoder = build(replace(SMALL, stem=stem))
    x = pixels(2, 1, 24)
    everything = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(encoder(x, everything).pooled, encoder(x).pooled)
    keep = torch.tensor([[0, 4, 8], [2, 1, 5]])
    kept = encoder(x, keep)
    assert kept.tokens.shape == (2, 3, 16)
    hidden = torch.ones(2, 9, dtype=torch.bool).scatter_(1, keep, False)
    patches = encoder.patches(x)
    changed = torch.where(hidden[:, :, None], patches + 5.0, patches)
    changed = changed.view(2, 3, 3, 1, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 1, 24, 24)
    torch.testing.assert_close(encoder(changed, keep).pooled, kept.pooled)
    swapped = encoder(x, keep[:, [2, 0, 1]])
    torch.testing.assert_close(swapped.tokens, kept.tokens[:, [2, 0, 1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_other_image_sizes(positions) -> None:
    encoder = build(replace(SMALL, positions=positions))
    assert encoder(pixels(1, 1, 40)).tokens.shape == (1, 25, 16)
    assert encoder(torch.zeros(1, 1, 16, 32)).tokens.shape == (1, 8, 16)


def test_resized_positions_keep_a_ramp() -> None:
    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 1).reshape(16, 1)
    larger = resize_positions(ramp, (4, 4), (8, 8)).view(8, 8)
    assert torch.allclose(larger, larger[:, :1]) and (larger[1:, 0] > larger[:-1, 0]).all()
    assert resize_positions(ramp, (4, 4), (4, 4)) is ramp


def test_sincos_positions_are_those_of_mae() -> None:
    """At the base grid: sin and cos of column, then of row, over frequencies 10000^(-4 i / D)."""
    table = sincos_positions(3, 3, 8, base_rows=3, base_columns=3).view(3, 3, 8)
    row, column = 2, 1
    omega = [1.0, 10000.0**-0.5]
    angles = torch.tensor([column * o for o in omega] + [row * o for o in omega])
    expected = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
    torch.testing.assert_close(table[row, column], expected)


def test_checkpointed_activations_change_nothing() -> None:
    plain, cheap = build(SMALL), build(replace(SMALL, checkpoint_activations=True))
    x = pixels(3, 1, 24)
    for encoder in (plain, cheap):
        with torch.autocast("cpu", torch.bfloat16):
            loss = encoder(x).pooled.float().square().sum()
        loss.backward()
    for a, b in zip(plain.parameters(), cheap.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ConfigError, match="image_size=225 is not divisible by patch_size=16; use 224"):
        replace(vit_b16(), image_size=225)
    with pytest.raises(ConfigError, match="pool='mean'"):
        replace(SMALL, class_token=False)
    with pytest.raises(ConfigError, match="channels=2"):
        replace(SMALL, channels=2)
    with pytest.raises(ConfigError, match="width=15 is not divisible by heads=2"):
        VisionEncoder(replace(SMALL, width=15))
    with pytest.raises(ConfigError, match="do not fit channels=1"):
        build(SMALL)(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ConfigError, match="divisible by 4"):
        build(replace(SMALL, width=18, heads=3, positions="sincos"))(pixels(1, 1, 24))
