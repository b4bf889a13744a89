"""An image encoder of ours as timm has it: tensors under timm's names, and the `config.json` that builds the model.

A folder of both opens with `timm.create_model("local-dir:FOLDER", pretrained=True)` and with `load_encoder`.

Letters: D = width, P = patch side, C = channels, N = patches, R = registers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from core.models.transformer import Linear
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

ARCHITECTURE = "vit_base_patch16_224"  # timm's name of any ViT; `model_args` says which
NORM_EPSILON = 1e-6  # timm's; a config.json cannot name another

_NAMES = (
    (r"transformer\.blocks\.(\d+)\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"transformer\.blocks\.(\d+)\.attention_out\.", r"blocks.\1.attn.proj."),
    (r"transformer\.blocks\.(\d+)\.mlp_in\.", r"blocks.\1.mlp.fc1."),
    (r"transformer\.blocks\.(\d+)\.mlp_out\.", r"blocks.\1.mlp.fc2."),
    (r"transformer\.blocks\.(\d+)\.scale([12])\.", r"blocks.\1.ls\2."),
    (r"transformer\.blocks\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
    (r"patch\.", "patch_embed.proj."),
    (r"norm\.", "norm."),
)


def timm_weights(encoder: VisionEncoder) -> dict[str, Tensor]:
    """fp32 tensors on the CPU: kernel `[D, C, P, P]`, `cls_token [1, 1, D]`, `reg_token [1, R, D]`, `pos_embed`.

    Positions are `[1, 1 + N, D]`, the class token's being 0 since ours has it in the token; `[1, N, D]` where there is
    no class token, or registers are. Fixed positions are written out. Raises ConfigError naming what timm's model has
    no place for.
    """
    config = encoder.config
    for name, unlike in (
        ("input_norm", config.input_norm), ("patch_bias", not config.patch_bias),
        ("norm_epsilon", config.norm_epsilon != NORM_EPSILON), ("stem", config.stem != ()),
        ("pool", config.pool == "max"),
    ):  # fmt: skip
        if unlike:
            raise ConfigError(
                f"task.vision.{name}={getattr(config, name)}: timm's ViT cannot be told so; export in the usual form"
            )
    wide = {f"{name}.weight" for name, part in encoder.named_modules() if isinstance(part, Linear) and part.wide}
    weights: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        if name in ("class_token", "registers", "positions"):
            continue
        value = value.detach().float().cpu()
        weights[_timm_name(name)] = (value.T if name in wide else value).contiguous()
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel.view(len(kernel), config.channels, config.patch_size, -1)
    if encoder.class_token is not None:
        weights["cls_token"] = encoder.class_token.detach().float().cpu()[None].contiguous()
    if encoder.registers is not None:
        weights["reg_token"] = encoder.registers.detach().float().cpu()[None].contiguous()
    positions = encoder.positions_for(config.image_size, config.image_size).detach().float().cpu()
    if _class_has_position(config):
        positions = torch.cat([torch.zeros(1, config.width), positions])
    weights["pos_embed"] = positions[None].contiguous()
    return weights


def timm_config(config: VisionEncoder.Config, *, mean: float, std: float) -> dict[str, Any]:
    """What timm's `config.json` says of this encoder; `mean`, `std`: of grey pixels in [0, 1], how they are given."""
    size = (config.channels, config.image_size, config.image_size)
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "token" if config.pool == "class" else "avg",
        "model_args": {
            "img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.channels,
            "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio, "class_token": config.class_token, "reg_tokens": config.registers,
            "no_embed_class": not _class_has_position(config),
            "init_values": config.layer_scale, "act_layer": config.activation,
            "global_pool": "token" if config.pool == "class" else "avg",
            "fc_norm": False,  # the mean is taken of normed tokens
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "num_classes": 0, "input_size": size, "fixed_input_size": True, "crop_pct": 1.0,
            "interpolation": "bilinear", "mean": [mean] * config.channels, "std": [std] * config.channels,
        },
    }  # fmt: skip


def _class_has_position(config: VisionEncoder.Config) -> bool:
    return config.class_token and not config.registers


def _timm_name(name: str) -> str:
    for pattern, theirs in _NAMES:
        renamed, count = re.subn(rf"^{pattern}", theirs, name)
        if count:
            return renamed
    raise AssertionError(f"no name of timm's for {name}")
