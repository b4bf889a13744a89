"""Image encoders of others from a path alone: shape and settings are read off the file, the weights by `initialise`.

Understood: names of timm, MAE, ECAMP and DINOv2, of Hugging Face's ViT and DINOv2 (RAD-DINO), of open_clip, and ours,
behind any prefix. What a file cannot say (heads, activation, how pixels were normalised) comes from the `config.json`
and `preprocessor_config.json` beside it (Hugging Face's or timm's), else from the dialect's custom, and can be given.

Letters: D = width, P = patch side, C = channels, N = patches.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.models.initialise import VISION_RULES, LoadReport, load_weights, read_weights, translate
from core.models.transformer import Activation
from core.models.vision import VisionEncoder
from shards.errors import ConfigError

# The patch kernel in each dialect: what stands before it in a file is the prefix of all of the encoder's names.
_KERNELS = (
    "visual.conv1.weight",
    "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.weight",
    "patch.weight",
)
_HEAD_WIDTH = 64  # of nearly every ViT
_HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16}  # ViT-H, -g and -G
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_OPEN_CLIP_EPSILON = 1e-5
# Of RGB in [0, 1], where nothing else is said: open_clip's own; for the others ImageNet's.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPEN_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the caller knows better than the file; None leaves it to the file or to custom."""

    heads: int | None = None
    activation: Activation | None = None
    pool: Literal["class", "mean"] | None = None
    mean: tuple[float, ...] | None = None  # of pixels in [0, 1], one a channel
    std: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ForeignEncoder:
    """`report`: what matched. `mean`, `std`: of pixels in [0, 1], how each channel of the input is normalised."""

    encoder: VisionEncoder
    report: LoadReport
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def takes_grey_as(self, mean: float, std: float) -> None:
        """From now on the encoder takes grey pixels normalised by `mean` and `std`, and sees what it saw before.

        Channel c of the original is (g - m_c) / s_c of the grey value g = z std + mean: the factor std / s_c goes into
        the kernel, the constant into its bias. Call it once.
        """
        patch, channels = self.encoder.patch, self.encoder.config.channels
        with torch.no_grad():
            kernel = patch.weight.view(patch.weight.shape[0], channels, -1)  # [D, C, P P]
            own_mean, own_std = (
                torch.tensor(values, dtype=kernel.dtype, device=kernel.device) for values in (self.mean, self.std)
            )
            assert patch.bias is not None, "a foreign encoder is built with a bias"
            patch.bias.add_((kernel.sum(2) * ((mean - own_mean) / own_std)).sum(1))
            kernel.mul_((std / own_std)[:, None])


def load_encoder(path: str | Path, given: Given | None = None) -> ForeignEncoder:
    """The image encoder in a weights file or Hugging Face folder, in evaluation mode, at its own image size.

    Raises ConfigError where the file holds no image encoder of a known dialect, one with parts that ours lacks, or
    values that are not finite.
    """
    given = given or Given()
    weights = read_weights(path)
    prefix, kernel_name = _kernel_of(path, weights)
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    beside = _json_beside(path, "config.json")
    config = _config_of(path, own, kernel_name, beside, given)
    encoder = VisionEncoder(config)
    with torch.no_grad():  # a bias or positions that the file leaves out are none
        encoder.patch.bias.zero_()
    report = load_weights(encoder, path, prefix=prefix)
    # Weight and bias of a dialect without patch bias: ours is there for the normalisation.
    missing = tuple(name for name in report.missing if name != "patch.bias")
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} tensors of the encoder are missing: {', '.join(missing[:5])}; the file is cut, or "
            f"names them otherwise: it has {', '.join(report.unexpected[:5]) or 'nothing else'}"
        )
    broken = [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ConfigError(f"{path}: not a number in {', '.join(broken[:5])} ({len(broken)} tensors); use other weights")
    mean, std = _normalisation(path, kernel_name, config.channels, given)
    return ForeignEncoder(encoder=encoder.eval(), report=replace(report, missing=missing), mean=mean, std=std)


def _kernel_of(path: str | Path, weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """(prefix, name of the patch kernel without it); the shortest prefix, where a file holds several encoders."""
    found = [
        (name.removesuffix(kernel), kernel)
        for kernel in _KERNELS
        for name in weights
        if name == kernel or name.endswith(f".{kernel}")
    ]
    if not found:
        raise ConfigError(
            f"{path}: no patch kernel of an image encoder under {', '.join(_KERNELS)}; it names "
            f"{', '.join(sorted(weights)[:5])}"
        )
    return min(found, key=lambda one: len(one[0]))


def _config_of(
    path: str | Path, own: Mapping[str, Tensor], kernel_name: str, beside: Mapping[str, Any], given: Given
) -> VisionEncoder.Config:
    ours: dict[str, Tensor] = {}
    for name, tensor in own.items():
        known = translate(name, VISION_RULES)
        ours.setdefault(name if known is None else known, tensor)
    kernel = ours["patch.weight"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3] or kernel.shape[1] not in (1, 3):
        raise ConfigError(
            f"{path}: patch kernel {tuple(kernel.shape)}; use one of [D, 1 or 3, P, P] (for a run of our own give its "
            "run directory)"
        )
    width, channels, patch = int(kernel.shape[0]), int(kernel.shape[1]), int(kernel.shape[2])
    depth = 1 + max((int(found[1]) for name in ours if (found := re.match(r"transformer\.blocks\.(\d+)\.", name))),
                    default=-1)  # fmt: skip
    hidden = ours.get("transformer.blocks.0.mlp_in.bias")
    if not depth or hidden is None:
        raise ConfigError(f"{path}: no blocks with a plain two-layer MLP in it; gated ones (SwiGLU) are not understood")
    if "positions" not in ours:
        raise ConfigError(f"{path}: no positions in it; encoders with rotary or relative ones are not understood")
    count = ours["positions"].numel() // width
    side = next((math.isqrt(n) for n in (count, count - 1) if math.isqrt(n) ** 2 == n), None)
    if side is None:
        raise ConfigError(f"{path}: {count} positions are no square of patches; square images are needed")
    timm = _part(beside, "model_args")
    named = beside.get("num_attention_heads") or timm.get("num_heads")
    heads = given.heads or named or _HEADS_OF_WIDTH.get(width) or width // _HEAD_WIDTH
    if not heads or width % int(heads):
        raise ConfigError(f"{path}: width {width} says nothing of its heads; give their number")
    class_token = "class_token" in ours
    mean_pooled = timm.get("global_pool") == "avg" or any(name.startswith("fc_norm.") for name in own)
    pool = given.pool or ("class" if class_token and not mean_pooled else "mean")
    scale = "transformer.blocks.0.scale1.gamma" in ours
    registers = ours["registers"].numel() // width if "registers" in ours else 0
    open_clip = kernel_name.startswith("visual.")
    return VisionEncoder.Config(
        image_size=side * patch, patch_size=patch, channels=channels, width=width, depth=depth, heads=int(heads),
        mlp_ratio=hidden.numel() / width, class_token=class_token, registers=registers, pool=pool,
        input_norm="input_norm.weight" in ours, activation=given.activation or _activation(path, beside),
        norm_epsilon=float(beside.get("layer_norm_eps", _OPEN_CLIP_EPSILON if open_clip else 1e-6)),
        layer_scale=1.0 if scale else None,
    )  # fmt: skip


def _activation(path: str | Path, beside: Mapping[str, Any]) -> Activation:
    named = str(beside.get("hidden_act") or _part(beside, "model_args").get("act_layer") or "gelu")
    if named not in _ACTIVATIONS:
        raise ConfigError(f"{path}: activation {named!r} of its config.json is not understood")
    return _ACTIVATIONS[named]


def _normalisation(
    path: str | Path, kernel_name: str, channels: int, given: Given
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    beside = _json_beside(path, "preprocessor_config.json")
    timm = _part(_json_beside(path, "config.json"), "pretrained_cfg")
    custom = OPEN_CLIP if kernel_name.startswith("visual.") else IMAGENET
    found = []
    for name, chosen, usual in (("image_mean", given.mean, custom[0]), ("image_std", given.std, custom[1])):
        said = beside.get(name) or timm.get(name.removeprefix("image_"))
        values = tuple(float(value) for value in chosen or said or usual)
        if channels == 1 and len(values) == 3:
            values = (sum(values) / 3,)
        if len(values) != channels or (name == "image_std" and min(values) <= 0):
            raise ConfigError(f"{path}: {name} {values} does not fit an encoder of {channels} channels")
        found.append(values)
    return found[0], found[1]


def _part(beside: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = beside.get(name)
    return found if isinstance(found, dict) else {}


def _json_beside(path: str | Path, name: str) -> dict[str, Any]:
    """A JSON file in the folder of the weights; {} without one."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        found = json.loads((folder / name).read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{folder / name}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
