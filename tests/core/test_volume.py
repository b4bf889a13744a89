"""The ViT-3D and the pooling of anatomies: patches, positions, inflation, bounded memory, one embedding a pair."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from core.models.anatomy_pool import AnatomyPool
from core.models.attention import DenseLayout
from core.models.initialise import draw_weights, load_weights
from core.models.vision import VisionEncoder
from core.models.volume import VolumeEncoder, VolumeOutput, resize_positions, vit_b_volume, vit_tiny_volume
from shards.errors import ConfigError

SMALL = VolumeEncoder.Config(
    volume_size=(8, 8, 16), patch_size=(4, 4, 8), width=16, depth=3, heads=2, levels=(1, 3)
)  # 2 x 2 x 2 patches


def build(config: VolumeEncoder.Config) -> VolumeEncoder:
    encoder = VolumeEncoder(config)
    draw_weights(encoder, seed=0)
    return encoder


def volumes(count: int, channels: int, *size: int) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def test_levels_are_the_stream_after_named_blocks_the_last_one_normed() -> None:
    encoder, x = build(SMALL), volumes(2, 1, 8, 8, 16)
    found = encoder(x)
    assert [level.shape for level in found.levels] == [(2, 8, 16)] * 2
    deeper = build(replace(SMALL, levels=(1, 2, 3)))(x).levels
    assert torch.equal(deeper[0], found.levels[0]) and torch.equal(deeper[2], found.levels[1])
    last = encoder.transformer.blocks[2](deeper[1].flatten(0, 1), DenseLayout(2, 8))
    assert torch.equal(encoder.norm(last), found.levels[1].flatten(0, 1))
    torch.testing.assert_close(found.pooled, found.levels[1].mean(1))
    sum(level.square().sum() for level in found.levels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_patches_are_the_convolution_in_rows_of_z_y_x() -> None:
    encoder = build(replace(SMALL, channels=3))
    x = volumes(2, 3, 8, 12, 16)
    kernel = encoder.patch.weight.view(16, 3, 4, 4, 8)
    expected = F.conv3d(x, kernel, encoder.patch.bias, stride=(4, 4, 8)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch(encoder.patches(x)), expected, atol=1e-5, rtol=1e-5)


def test_a_stem_halves_every_side_before_patches_are_cut_and_moves_with_its_input() -> None:
    config = replace(SMALL, stem=(4, 6), channels=2)
    encoder, x = build(config), volumes(1, 2, 8, 8, 32)
    found = encoder(x)
    assert found.fine is not None and found.fine.shape == (1, 6, 2, 2, 8) and config.fine_size == (4, 4, 4)
    assert found.grid == (2, 2, 4) and found.levels[0].shape == (1, 16, 16)
    one = torch.zeros(1, 2, 8, 8, 32)
    one[..., 9] = 1
    further = one.roll(8, dims=4)  # two values of the map
    assert encoder.stem is not None
    before, after = (encoder.stem(volume)[0, :, 1, 1] for volume in (one, further))
    torch.testing.assert_close(before[:, 1:5], after[:, 3:7])
    assert not torch.allclose(before, after)
    sum(level.square().sum() for level in found.levels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    for bad in ((4, 6, 8), (0,)):
        with pytest.raises(ConfigError, match="convolutions halve patch_size"):
            replace(SMALL, stem=bad)


def test_positions_of_another_grid_are_interpolated() -> None:
    ramp = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 1).reshape(24, 1)
    larger = resize_positions(ramp, (4, 2, 3), (8, 4, 3)).view(8, 4, 3)
    assert torch.allclose(larger, larger[:, :1, :1].expand_as(larger)) and (larger.diff(dim=0) >= 0).all()
    torch.testing.assert_close(larger[1:7, 0, 0], torch.tensor([0.25, 0.75, 1.25, 1.75, 2.25, 2.75]))
    assert resize_positions(ramp, (4, 2, 3), (4, 2, 3)) is ramp
    assert build(SMALL)(volumes(1, 1, 12, 8, 24)).levels[0].shape == (1, 18, 16)


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"volume_size=\(9, 8, 16\) is not divisible .*; use \(8, 8, 16\)"):
        replace(SMALL, volume_size=(9, 8, 16))
    for levels in ((), (1, 2), (0, 3), (2, 1, 3)):
        with pytest.raises(ConfigError, match="must rise from 1 at least and end with the last block, depth=3"):
            replace(SMALL, levels=levels)
    for shape in ((1, 2, 8, 8, 16), (1, 1, 8, 9, 16), (1, 1, 8, 8)):
        with pytest.raises(ConfigError, match="do not fit channels=1"):
            build(SMALL)(torch.zeros(shape))
    assert vit_b_volume().grid == (7, 16, 11) and vit_tiny_volume().grid == (6, 8, 8)


def test_ten_thousand_tokens_keep_only_block_inputs_for_backward() -> None:
    """What is held between the passes grows with tokens x width x depth, never with tokens squared."""
    config = VolumeEncoder.Config(
        volume_size=(32, 32, 80), patch_size=(2, 2, 2), width=8, depth=3, heads=1, levels=(2, 3),
        checkpoint_activations=True,
    )  # fmt: skip
    encoder, x = build(config), volumes(1, 1, 32, 32, 80)
    tokens = 16 * 16 * 40
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = encoder(x)
    assert out.levels[0].shape == (1, tokens, 8)
    assert max(kept.values()) <= tokens * 8 and sum(kept.values()) <= (config.depth + 6) * tokens * 8


def test_weights_of_a_2d_mae_are_inflated(tmp_path: Path) -> None:
    flat = VisionEncoder(VisionEncoder.Config(image_size=16, patch_size=4, channels=3, width=16, depth=3, heads=2))
    draw_weights(flat, seed=3)
    names = {name.removeprefix("transformer."): value for name, value in flat.state_dict().items()}
    weights = {"cls_token": names.pop("class_token")[None], "patch_embed.proj.bias": names.pop("patch.bias")}
    weights["patch_embed.proj.weight"] = names.pop("patch.weight").view(16, 3, 4, 4)
    weights["pos_embed"] = torch.cat([torch.zeros(1, 16), names.pop("positions")])[None]
    renamed = {"qkv": "attn.qkv", "attention_out": "attn.proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
    for name, value in names.items():
        part = next((part for part in renamed if f".{part}." in name), None)
        theirs = name if part is None else name.replace(part, renamed[part])
        weights[theirs] = value.T if theirs.endswith(("qkv.weight", "fc1.weight")) else value
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "mae.safetensors")

    encoder = build(replace(SMALL, channels=2))
    report = load_weights(encoder, tmp_path / "mae.safetensors")
    assert not report.missing and report.unexpected == ("cls_token",)
    for ours, theirs in zip(encoder.transformer.parameters(), flat.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # A volume of one grey is answered as an image of that grey was.
    grey = torch.full((1, 2, 8, 8, 16), 0.7)
    expected = flat.patch(flat.patches(torch.full((1, 3, 16, 16), 0.7)))[0, 0]
    torch.testing.assert_close(encoder.patch(encoder.patches(grey))[0], expected.expand(8, -1), atol=1e-5, rtol=1e-5)
    positions = encoder.positions.view(2, 4, 16)
    assert torch.equal(positions[0], positions[1]) and "alike in all slices" in " ".join(report.reshaped)

    with_stem = build(replace(SMALL, stem=(4,)))
    drawn = with_stem.patch.weight.clone()
    assert "patch_embed.proj.weight" in load_weights(with_stem, tmp_path / "mae.safetensors").unexpected
    assert torch.equal(with_stem.patch.weight, drawn)

    save_file({name: value.clone() for name, value in encoder.state_dict().items()}, tmp_path / "own.safetensors")
    again = build(replace(SMALL, channels=2))
    assert not load_weights(again, tmp_path / "own.safetensors").reshaped
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))


# ---- pooling ----

WIDTH, EMBED = 8, 6


def pool_of(*, stem: int = 0, **changed: object) -> AnatomyPool:
    config = AnatomyPool.Config(heads=2, **changed)  # type: ignore[arg-type]
    pool = AnatomyPool(config, anatomies=3, levels=2, width=WIDTH, embed_dim=EMBED, stem=stem)
    draw_weights(pool, seed=1)
    return pool


def levels_and_share() -> tuple[list[Tensor], Tensor]:
    """Two volumes of 10 patches; anatomy 1 is missing in volume 0, anatomy 2 in both."""
    generator = torch.Generator().manual_seed(2)
    levels = [torch.randn(2, 10, WIDTH, generator=generator) for _ in range(2)]
    share = torch.rand(2, 3, 10, generator=generator) * (torch.rand(2, 3, 10, generator=generator) < 0.5)
    share[0, 1] = 0
    share[:, 2] = 0
    return levels, share


def seen(levels: list[Tensor], fine: Tensor | None = None) -> VolumeOutput:
    """Tokens of a grid of 1 x 2 x 5 patches."""
    return VolumeOutput(levels=levels, grid=(1, 2, 5), fine=fine)


def pair_by_pair(pool: AnatomyPool, levels: list[Tensor], share: Tensor) -> Tensor:
    """Keys and values of each pair's own tokens, one pair after the other."""
    found = torch.zeros(*share.shape[:2], EMBED)
    for volume, anatomy in (share > 0).any(2).nonzero().tolist():
        own = share[volume, anatomy] > 0
        tokens = [level[volume, own] for level in levels]
        if pool.config.normalised:
            tokens = [norm(x) + token for x, norm, token in zip(tokens, pool.norms, pool.level_tokens, strict=True)]
        x = torch.cat(tokens)
        query = pool.query_tokens[anatomy].view(2, 1, -1)
        key = (x @ pool.key_weight.T).view(len(x), 2, -1).transpose(0, 1)
        value = (x @ pool.value_weight.T + pool.value_bias).view(len(x), 2, -1).transpose(0, 1)
        bias = None
        if pool.config.weighting == "share":
            bias = share[volume, anatomy, own].log().repeat(len(levels))[None, None].expand(2, 1, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).flatten()
        found[volume, anatomy] = pool.projection[anatomy] @ pool.out(mixed[None])[0]
    return found


@pytest.mark.parametrize("weighting", ["flag", "share"])
@pytest.mark.parametrize("normalised", [True, False])
def test_all_pairs_at_once_equal_a_loop_over_pairs(weighting: str, normalised: bool) -> None:
    pool = pool_of(weighting=weighting, normalised=normalised)
    levels, share = levels_and_share()
    with torch.no_grad():
        pool.query_tokens.normal_(generator=torch.Generator().manual_seed(7))
    levels = [level.requires_grad_() for level in levels]
    wanted, found = pair_by_pair(pool, levels, share), pool(seen(levels), share)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(8))
    inputs = [*levels, *pool.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_an_anatomy_starts_as_the_mean_of_its_projected_tokens() -> None:
    pool = pool_of(normalised=False)
    levels, share = levels_and_share()
    own = share[1, 0] > 0
    value = torch.cat([level[1, own] for level in levels]) @ pool.value_weight.T + pool.value_bias
    expected = pool.projection[0] @ pool.out(value.mean(0, keepdim=True))[0]
    torch.testing.assert_close(pool(seen(levels), share)[1, 0], expected)


def test_an_anatomy_that_is_nowhere_is_zero_and_moves_nothing() -> None:
    pool = pool_of()
    levels, share = levels_and_share()
    found = pool(seen([level.requires_grad_() for level in levels]), share)
    assert not found[:, 2].any() and not found[0, 1].any() and found[1, 1].any()
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pool.parameters())
    assert not pool.projection.grad[2].any() and not pool.query_tokens.grad[2].any()  # type: ignore[index]
    everywhere_empty = pool(seen(levels), torch.zeros_like(share))
    assert not everywhere_empty.any() and everywhere_empty.requires_grad


def test_with_a_stem_the_mean_of_its_map_over_the_anatomy_is_added() -> None:
    levels, _ = levels_and_share()
    generator = torch.Generator().manual_seed(3)
    fine = torch.randn(2, 4, 2, 4, 10, generator=generator)  # 2 x 2 x 2 places a patch
    share = torch.rand(2, 3, 80, generator=generator) * (torch.rand(2, 3, 80, generator=generator) < 0.3)
    share[0, 1] = 0
    with_stem, plain = pool_of(stem=4), pool_of()
    plain.load_state_dict({name: value for name, value in with_stem.state_dict().items() if "stem" not in name})
    found = with_stem(seen(levels, fine), share)
    coarse = torch.zeros(2, 3, 10)
    for z, y, x in itertools.product(range(2), range(4), range(10)):
        coarse[:, :, y // 2 * 5 + x // 2] += share.view(2, 3, 2, 4, 10)[:, :, z, y, x] / 8
    assert not found[0, 1].any()
    for volume, anatomy in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        weight = share[volume, anatomy] / share[volume, anatomy].sum()
        mean = F.layer_norm(fine[volume].flatten(1) @ weight, (4,), eps=1e-6)
        expected = plain(seen(levels), coarse)[volume, anatomy] + with_stem.stem_projection[anatomy] @ mean
        torch.testing.assert_close(found[volume, anatomy], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"anatomy_share \(2, 3, 79\) does not fit the stem's map of \(2, 4, 10\)"):
        with_stem(seen(levels, fine), share[:, :, :79])


def test_masks_of_another_grid_are_refused() -> None:
    levels, share = levels_and_share()
    with pytest.raises(ConfigError, match=r"anatomy_share \(2, 3, 9\) does not fit 3 anatomies and 10 patches"):
        pool_of()(seen(levels), share[:, :, :9])
    with pytest.raises(ConfigError, match=r"pool\.heads=3 does not divide"):
        AnatomyPool(AnatomyPool.Config(heads=3), anatomies=3, levels=2, width=WIDTH, embed_dim=EMBED)
