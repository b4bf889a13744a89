"""Encoders of others by path alone: the same features as ours, whatever their names; and files that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.models.foreign import Given, load_encoder
from core.models.timm_names import timm_config, timm_weights
from core.models.vision import VisionEncoder
from shards.errors import ConfigError
from tests.core.test_initialise import VISION, hugging_face_names, timm_names, vision

WIDE = replace(VISION, width=128, registers=0)  # two heads of the usual 64


def open_clip_names(encoder: VisionEncoder) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in timm_names(encoder).items():
        for theirs, new in (
            ("blocks.", "transformer.resblocks."),
            (".norm1.", ".ln_1."),
            (".norm2.", ".ln_2."),
            (".attn.qkv.", ".attn.in_proj_"),
            (".attn.proj.", ".attn.out_proj."),
            (".mlp.fc1.", ".mlp.c_fc."),
            (".mlp.fc2.", ".mlp.c_proj."),
            ("patch_embed.proj.", "conv1."),
            ("input_norm.", "ln_pre."),
        ):
            name = name.replace(theirs, new)
        name = f"ln_post.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        name = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        if name in ("class_embedding", "positional_embedding"):
            value = value[0].squeeze(0)
        renamed[f"visual.{name}"] = value
    return renamed


def sample(dialect: str, folder: Path) -> tuple[VisionEncoder, Path]:
    """(an encoder, a file or folder with its weights in the names of `dialect`)."""
    config: VisionEncoder.Config = WIDE
    if dialect in ("dinov2", "rad_dino"):
        config = replace(WIDE, layer_scale=0.1, registers=2 if dialect == "dinov2" else 0)
    if dialect == "open_clip":
        config = replace(WIDE, input_norm=True, norm_epsilon=1e-5, patch_bias=False)
    source = vision(config, seed=1)
    weights = timm_names(source)
    if dialect in ("mae", "ecamp"):
        rest = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
        if dialect == "ecamp":
            rest |= {
                "bert_encoder.model.embeddings.word_embeddings.weight": torch.zeros(30, 8),
                "fusion.x": torch.ones(1),
            }
        torch.save({"model": weights | rest, "epoch": 7, "args": {}}, folder / "checkpoint.pth")
        return source, folder / "checkpoint.pth"
    if dialect in ("vit", "dinov2", "rad_dino"):
        weights = hugging_face_names(weights, dialect != "vit")
        (folder / "config.json").write_text(
            json.dumps({"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6})
        )
        save_file(weights | {"embeddings.mask_token": torch.zeros(1, 128)}, folder / "model.safetensors")
        return source, folder
    if dialect == "open_clip":
        torch.save({"state_dict": open_clip_names(source) | {"logit_scale": torch.ones(())}}, folder / "clip.pt")
        return source, folder / "clip.pt"
    prefix = "module.backbone." if dialect == "prefixed timm" else ""
    save_file({prefix + name: value for name, value in weights.items()}, folder / "timm.safetensors")
    return source, folder / "timm.safetensors"


@pytest.mark.parametrize("dialect", ["timm", "prefixed timm", "mae", "ecamp", "vit", "dinov2", "rad_dino", "open_clip"])
def test_the_same_features_by_path_alone(dialect: str, tmp_path: Path) -> None:
    source, path = sample(dialect, tmp_path)
    found = load_encoder(path)
    assert found.report.missing == ()
    assert not any("blocks.0.norm" in name for name in found.report.unexpected if not name.startswith("decoder"))
    rgb = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.encoder(rgb).tokens, source(rgb).tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.encoder(rgb).pooled, source(rgb).pooled, atol=1e-4, rtol=1e-4)
    # Grey pixels in our normalisation: what the original sees of the same picture in its own.
    grey = rgb[:, :1]
    theirs = (grey - torch.tensor(found.mean)[:, None, None]) / torch.tensor(found.std)[:, None, None]
    expected = source(theirs).tokens
    found.takes_grey_as(0.5, 0.25)
    # These weights are large, so that every swap shows; so does fp32's rounding.
    torch.testing.assert_close(found.encoder((grey - 0.5) / 0.25).tokens, expected, atol=5e-3, rtol=5e-3)
    # Another image size: positions are interpolated.
    assert found.encoder(torch.zeros(1, 1, 48, 48)).tokens.shape == (1, 36, 128)


def plain_timm(weights: dict[str, torch.Tensor], args: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """Pooled features as timm's VisionTransformer computes them from its state and arguments."""
    norm = partial(torch.nn.functional.layer_norm, normalized_shape=(args["embed_dim"],), eps=1e-6)
    linear = torch.nn.functional.linear

    def of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    x = torch.nn.functional.conv2d(pixels, *of("patch_embed.proj"), stride=args["patch_size"]).flatten(2).mT
    prefix = [weights[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in weights]
    positions = weights["pos_embed"]
    x = torch.cat([*prefix, x + positions], 1) if args["no_embed_class"] else torch.cat([*prefix, x], 1) + positions
    for number in range(args["depth"]):
        block = f"blocks.{number}."
        scale = [weights[f"{block}ls{i}.gamma"] if args["init_values"] else 1.0 for i in (1, 2)]
        weight, bias = of(f"{block}norm1")
        qkv = linear(norm(x, weight=weight, bias=bias), *of(f"{block}attn.qkv"))
        query, key, value = qkv.unflatten(2, (3, args["num_heads"], -1)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
        x = x + scale[0] * linear(mixed.transpose(1, 2).flatten(2), *of(f"{block}attn.proj"))
        weight, bias = of(f"{block}norm2")
        hidden = torch.nn.functional.gelu(linear(norm(x, weight=weight, bias=bias), *of(f"{block}mlp.fc1")))
        x = x + scale[1] * linear(hidden, *of(f"{block}mlp.fc2"))
    weight, bias = of("norm")
    x = norm(x, weight=weight, bias=bias)
    return x[:, 0] if args["global_pool"] == "token" else x[:, sum(one.shape[1] for one in prefix) :].mean(1)


@pytest.mark.parametrize(
    "changed",
    [
        {"registers": 0},
        {"registers": 2, "layer_scale": 0.1},
        {"registers": 0, "pool": "mean", "positions": "sincos", "channels": 1},
        {"registers": 0, "pool": "mean", "class_token": False},
    ],
)
def test_our_encoders_under_timms_names(changed: dict[str, Any], tmp_path: Path) -> None:
    source = vision(replace(VISION, **changed), seed=1)
    weights, config = timm_weights(source), timm_config(source.config, mean=0.4, std=0.3)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = torch.randn(2, source.config.channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(pixels).pooled
        args = config["model_args"]
        torch.testing.assert_close(plain_timm(weights, args, pixels), expected, atol=1e-4, rtol=1e-4)
        found = load_encoder(tmp_path)
        assert torch.equal(found.encoder(pixels).pooled, expected)
    assert found.report.missing == found.report.unexpected == () and found.mean == (0.4,) * source.config.channels


def test_what_timm_has_no_place_for_is_refused_by_name() -> None:
    for changed in (
        {"norm_epsilon": 1e-5}, {"input_norm": True}, {"patch_bias": False}, {"stem": (4, 4)}, {"pool": "max"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"task\.vision\.{next(iter(changed))}="):
            timm_weights(vision(replace(VISION, **changed)))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_transformers_models_agree(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
        **({"intermediate_size": 48} if kind == "ViT" else {"mlp_ratio": 2}),
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}')
    found = load_encoder(tmp_path)
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)) and found.encoder.config.heads == 3
    rgb = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(rgb).last_hidden_state
        torch.testing.assert_close(found.encoder(rgb).tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.encoder(rgb).pooled, expected[:, 0], atol=1e-5, rtol=1e-4)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    save_file({"words.weight": torch.zeros(3, 3)}, tmp_path / "text.safetensors")
    with pytest.raises(ConfigError, match=r"no patch kernel of an image encoder .*it names words\.weight"):
        load_encoder(tmp_path / "text.safetensors")
    _, path = sample("timm", tmp_path)
    weights = timm_names(vision(WIDE, seed=1))
    save_file({name: value for name, value in weights.items() if "blocks.1.mlp.fc2" not in name}, path)
    with pytest.raises(ConfigError, match=r"2 tensors of the encoder are missing: transformer\.blocks\.1\.mlp_out"):
        load_encoder(path)
    gated = {name.replace("mlp.fc1", "mlp.w12"): value for name, value in weights.items()}
    save_file(gated, path)
    with pytest.raises(ConfigError, match="gated ones"):
        load_encoder(path)
    save_file(weights | {"pos_embed": torch.zeros(1, 15, 128)}, path)
    with pytest.raises(ConfigError, match="15 positions are no square"):
        load_encoder(path)
    save_file(weights, path)
    with pytest.raises(ConfigError, match="says nothing of its heads"):
        load_encoder(path, Given(heads=3))
    save_file(weights | {"blocks.1.norm1.bias": torch.full((128,), torch.nan)}, path)
    with pytest.raises(ConfigError, match=r"not a number in transformer\.blocks\.1\..* \(1 tensors\)"):
        load_encoder(path)
