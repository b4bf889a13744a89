"""First values of weights: drawn from a seed by parameter name, or read from local files of common key names.

Files are data: safetensors, or torch files read with `weights_only=True`; anything else is refused by name. Nothing is
downloaded. Names understood: ours, timm / MAE / DINOv2, Hugging Face ViT and DINOv2, open_clip, BERT and RoBERTa.

Letters: D = width, P = patch side, C = channels, N = patches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.models.anatomy_pool import AnatomyPool
from core.models.fusion import CrossStack
from core.models.heads import LogitBias, LogitScale, Projection
from core.models.text import TextEncoder
from core.models.transformer import Block, LayerScale, Linear, Transformer
from core.models.vision import VisionEncoder, resize_patches, resize_positions
from core.models.volume import VolumeEncoder
from shards.errors import ConfigError

log = logging.getLogger(__name__)

TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth"})
ROBERTA_PADDING = 2  # rows of its table of positions that no token has
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw every parameter of `module` from (seed, its own name): the order of construction plays no part.

    Scales are CLIP's (arXiv 2103.00020): matrices 1 / sqrt(fan-in), those that end a residual branch smaller by
    sqrt(2 depth), so that the stream keeps its size; tables and tokens 0.02; biases 0; norms 1.
    """
    with torch.no_grad():
        for path, part in module.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                full_name = f"{path}.{name}" if path else name
                digest = hashlib.sha256(f"{seed}:{full_name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                _draw(part, name, parameter, generator)
        for stack in module.modules():
            if isinstance(stack, Transformer | CrossStack):
                for block in stack.blocks:
                    assert isinstance(block, Block)
                    for layer in block.branch_ends():
                        layer.weight.mul_((len(block.branch_ends()) * len(stack.blocks)) ** -0.5)


def _draw(part: nn.Module, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    if isinstance(part, LogitScale | LogitBias | LayerScale):
        parameter.fill_(part.initial)
    elif isinstance(part, nn.LayerNorm | nn.GroupNorm):
        parameter.fill_(1.0 if name == "weight" else 0.0)
    elif name == "bias":
        parameter.fill_(part.first_bias if isinstance(part, Linear) else 0.0)
    elif isinstance(part, Linear):
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values / math.sqrt(part.fan_in) if part.std is None else values * part.std)
    elif isinstance(part, AnatomyPool):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * part.first_std(name))
    elif isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d | Projection):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel()))
    else:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of a file's tensors and of the encoder's: names only, in sorted order."""

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # of the encoder, left as drawn
    unexpected: tuple[str, ...]  # of the file, not used
    reshaped: tuple[str, ...]  # matched after a stated change

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.source}: {len(self.matched)} tensors matched ({len(self.reshaped)} reshaped),"
            f" {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or torch file, or of a Hugging Face folder. ConfigError for anything else.

    A torch file may nest the weights under `model`, `state_dict`, `module`, `teacher` or `params`.
    """
    path = Path(path)
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                return _read_index(path / name) if name.endswith(".index.json") else read_weights(path / name)
        raise ConfigError(f"{path}: holds none of {', '.join(FOLDER_FILES)}; save the weights as model.safetensors")
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file; give a local safetensors file or Hugging Face folder")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a readable safetensors file ({error})") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise ConfigError(f"{path}: {path.suffix or 'no suffix'} is refused; convert the weights to .safetensors")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ConfigError(
            f"{path}: torch.load(weights_only=True) refuses it ({type(error).__name__}): it holds more than tensors or"
            " is damaged; convert it to .safetensors where you trust it"
        ) from error
    return _tensors(path, loaded)


def _read_index(path: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: no weight_map in it; the folder is incomplete") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{path}: names {name!r} outside its folder; refused")
        weights |= read_weights(path.parent / name)
    return weights


def _tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    for nest in ("state_dict", "model", "module", "teacher", "params"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nest), Mapping):
            loaded = loaded[nest]
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}, not a table of tensors; convert to .safetensors")
    weights = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not weights:
        raise ConfigError(f"{path}: holds no tensors under {', '.join(map(str, list(loaded)[:5]))}")
    return weights


# Dialects, as (pattern, ours): the first that matches the whole name wins. `{}` stands for the block's number.
_BLOCK = r"(\d+)\."
VISION_RULES: tuple[tuple[str, str], ...] = (
    # timm, MAE, DINOv2
    (r"cls_token", "class_token"),
    (r"(?:reg_token|register_tokens)", "registers"),
    (r"pos_embed", "positions"),
    (r"patch_embed\.proj\.(weight|bias)", "patch.{}"),
    (r"blocks\." + _BLOCK + r"attn\.qkv\.(weight|bias)", "transformer.blocks.{}.qkv.{}"),
    (r"blocks\." + _BLOCK + r"attn\.proj\.(weight|bias)", "transformer.blocks.{}.attention_out.{}"),
    (r"blocks\." + _BLOCK + r"(norm[12])\.(weight|bias)", "transformer.blocks.{}.{}.{}"),
    (r"blocks\." + _BLOCK + r"mlp\.fc1\.(weight|bias)", "transformer.blocks.{}.mlp_in.{}"),
    (r"blocks\." + _BLOCK + r"mlp\.fc2\.(weight|bias)", "transformer.blocks.{}.mlp_out.{}"),
    (r"blocks\." + _BLOCK + r"ls([12])\.gamma", "transformer.blocks.{}.scale{}.gamma"),
    (r"(?:norm|fc_norm)\.(weight|bias)", "norm.{}"),
    # Hugging Face ViT and DINOv2
    (r"(?:vit|dinov2|dinov2_with_registers)\.(.+)", "again:{}"),
    (r"embeddings\.cls_token", "class_token"),
    (r"embeddings\.register_tokens", "registers"),
    (r"embeddings\.position_embeddings", "positions"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", "patch.{}"),
    (
        r"encoder\.layer\." + _BLOCK + r"attention\.attention\.(query|key|value)\.(weight|bias)",
        "transformer.blocks.{}.{}.{}",
    ),
    (
        r"encoder\.layer\." + _BLOCK + r"attention\.output\.dense\.(weight|bias)",
        "transformer.blocks.{}.attention_out.{}",
    ),
    (r"encoder\.layer\." + _BLOCK + r"layernorm_before\.(weight|bias)", "transformer.blocks.{}.norm1.{}"),
    (r"encoder\.layer\." + _BLOCK + r"layernorm_after\.(weight|bias)", "transformer.blocks.{}.norm2.{}"),
    (r"encoder\.layer\." + _BLOCK + r"(norm[12])\.(weight|bias)", "transformer.blocks.{}.{}.{}"),
    (r"encoder\.layer\." + _BLOCK + r"layer_scale([12])\.lambda1", "transformer.blocks.{}.scale{}.gamma"),
    (r"encoder\.layer\." + _BLOCK + r"intermediate\.dense\.(weight|bias)", "transformer.blocks.{}.mlp_in.{}"),
    (r"encoder\.layer\." + _BLOCK + r"output\.dense\.(weight|bias)", "transformer.blocks.{}.mlp_out.{}"),
    (r"encoder\.layer\." + _BLOCK + r"mlp\.fc1\.(weight|bias)", "transformer.blocks.{}.mlp_in.{}"),
    (r"encoder\.layer\." + _BLOCK + r"mlp\.fc2\.(weight|bias)", "transformer.blocks.{}.mlp_out.{}"),
    (r"layernorm\.(weight|bias)", "norm.{}"),
    # open_clip
    (r"visual\.class_embedding", "class_token"),
    (r"visual\.positional_embedding", "positions"),
    (r"visual\.conv1\.weight", "patch.weight"),
    (r"visual\.ln_pre\.(weight|bias)", "input_norm.{}"),
    (r"visual\.ln_post\.(weight|bias)", "norm.{}"),
    (r"visual\.(transformer\.resblocks\..+)", "open_clip:{}"),
)
_TEXT_RULES: tuple[tuple[str, str], ...] = (
    # BERT, RoBERTa
    (r"(?:bert|roberta|camembert)\.(.+)", "again:{}"),
    (r"embeddings\.word_embeddings\.weight", "words.weight"),
    (r"embeddings\.position_embeddings\.weight", "positions"),
    (r"embeddings\.token_type_embeddings\.weight", "token_types"),
    (r"embeddings\.LayerNorm\.(weight|bias|gamma|beta)", "input_norm.{}"),
    (
        r"encoder\.layer\." + _BLOCK + r"attention\.self\.(query|key|value)\.(weight|bias)",
        "transformer.blocks.{}.{}.{}",
    ),
    (
        r"encoder\.layer\." + _BLOCK + r"attention\.output\.dense\.(weight|bias)",
        "transformer.blocks.{}.attention_out.{}",
    ),
    (
        r"encoder\.layer\." + _BLOCK + r"attention\.output\.LayerNorm\.(weight|bias|gamma|beta)",
        "transformer.blocks.{}.norm1.{}",
    ),
    (r"encoder\.layer\." + _BLOCK + r"intermediate\.dense\.(weight|bias)", "transformer.blocks.{}.mlp_in.{}"),
    (r"encoder\.layer\." + _BLOCK + r"output\.dense\.(weight|bias)", "transformer.blocks.{}.mlp_out.{}"),
    (
        r"encoder\.layer\." + _BLOCK + r"output\.LayerNorm\.(weight|bias|gamma|beta)",
        "transformer.blocks.{}.norm2.{}",
    ),
    # open_clip
    (r"token_embedding\.weight", "words.weight"),
    (r"positional_embedding", "positions"),
    (r"ln_final\.(weight|bias)", "norm.{}"),
    (r"(transformer\.resblocks\..+)", "open_clip:{}"),
)
_OPEN_CLIP_BLOCK: tuple[tuple[str, str], ...] = (
    (r"transformer\.resblocks\." + _BLOCK + r"ln_([12])\.(weight|bias)", "transformer.blocks.{}.norm{}.{}"),
    (r"transformer\.resblocks\." + _BLOCK + r"attn\.in_proj_(weight|bias)", "transformer.blocks.{}.qkv.{}"),
    (
        r"transformer\.resblocks\." + _BLOCK + r"attn\.out_proj\.(weight|bias)",
        "transformer.blocks.{}.attention_out.{}",
    ),
    (r"transformer\.resblocks\." + _BLOCK + r"mlp\.c_fc\.(weight|bias)", "transformer.blocks.{}.mlp_in.{}"),
    (r"transformer\.resblocks\." + _BLOCK + r"mlp\.c_proj\.(weight|bias)", "transformer.blocks.{}.mlp_out.{}"),
    (r"transformer\.resblocks\." + _BLOCK + r"ls_([12])\.gamma", "transformer.blocks.{}.scale{}.gamma"),
)


_OF_STEM = re.compile(r"(?:.*\.)?stem\.convolutions\.")


def translate(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    """Our name of a foreign tensor (query, key and value still apart); None if no rule knows it."""
    for pattern, ours in rules:
        found = re.fullmatch(pattern, name)
        if found is None:
            continue
        translated = ours.format(*found.groups())
        if translated.startswith("again:"):
            return translate(translated.removeprefix("again:"), rules)
        if translated.startswith("open_clip:"):
            return translate(translated.removeprefix("open_clip:"), _OPEN_CLIP_BLOCK)
        # Old BERT files name a norm's parameters as TensorFlow did.
        return (
            re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", translated))
            if "norm" in translated
            else translated
        )
    return None


@dataclass
class _Load:
    """A load in progress: tensors under our names, and what was changed on the way."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)

    def change(self, name: str, new: Tensor, why: str) -> None:
        old = tuple(self.tensors[name].shape)
        self.tensors[name] = new
        self.reshaped.append(f"{name}: {why}, {old} -> {tuple(new.shape)}")

    @property
    def has_stem(self) -> bool:
        """Whether the file's patches are of a stem's map, whatever their number."""
        return any(name.startswith("stem.") for name in self.tensors)

    def leave_out(self, name: str) -> None:
        """Not used after all."""
        self.unexpected.extend(self.origin.get(name, [name]))
        del self.tensors[name]


def load_weights(
    encoder: VisionEncoder | VolumeEncoder | TextEncoder, path: str | Path, *, prefix: str = ""
) -> LoadReport:
    """Copy a local file's weights into `encoder` and report, also to the log, what matched.

    `prefix` is cut from the file's names first (`image_encoder.` and the like), names without it are left out. Learned
    positions are interpolated (vision) or cut or left partly as drawn (text) when sizes differ, patch weights are
    resized (`resize_patches`), and summed for a grey encoder; a volume encoder inflates those of a 2D one. An encoder
    with a stem keeps the patch weights that it has, unless the file's take a stem's map as well. RoBERTa's table of
    positions (XLM-R, CamemBERT) loses its first two rows, which stand for padding. ConfigError, with the list, when
    shapes disagree, less than half of the encoder is there (a norm fits anything) or only the file has a stem; the
    encoder is then unchanged.
    """
    wanted = dict(encoder.named_parameters())
    rules = _TEXT_RULES if isinstance(encoder, TextEncoder) else VISION_RULES
    load = _Load()
    for name, tensor in sorted(read_weights(path).items()):
        if not name.startswith(prefix):
            load.unexpected.append(name)
            continue
        own = name.removeprefix(prefix)
        ours = own if own in wanted else translate(own, rules)
        if ours is None or ours in load.tensors:
            load.unexpected.append(name)
            continue
        load.tensors[ours] = tensor.to(torch.float32)
        load.origin[ours] = [name]
    if not any(name.startswith("stem.") for name in wanted) and any(_OF_STEM.match(name) for name in load.unexpected):
        raise ConfigError(f"{path}: its encoder has a stem of convolutions; give this one the same (task.vision.stem)")
    _join_qkv(load)
    for name, part in encoder.named_modules():
        weight = f"{name}.weight"
        # Ours are stored smaller side first; a file with our own names already is.
        if (
            isinstance(part, Linear)
            and part.wide
            and load.origin.get(weight, [f"{prefix}{weight}"]) != [f"{prefix}{weight}"]
        ):
            load.tensors[weight] = load.tensors[weight].T
    if isinstance(encoder, VisionEncoder):
        _fit_vision(encoder, load)
    elif isinstance(encoder, VolumeEncoder):
        _inflate(encoder, load)
    else:
        _fit_text(encoder, load)
    for name in sorted(set(load.tensors) - set(wanted)):
        load.leave_out(name)
    misfits = [
        f"{name} {tuple(tensor.shape)} in the file, {tuple(wanted[name].shape)} here"
        for name, tensor in sorted(load.tensors.items())
        if tensor.shape != wanted[name].shape
    ]
    if misfits:
        raise ConfigError(f"{path}: {len(misfits)} shapes do not fit: {'; '.join(misfits[:5])}; change the config")
    if 2 * len(load.tensors) < len(wanted):
        raise ConfigError(
            f"{path}: only {len(load.tensors)} of the encoder's {len(wanted)} tensors are in it, and it names"
            f" {', '.join(load.unexpected[:5]) or 'nothing else'}; it is another model, or needs a prefix"
        )
    with torch.no_grad():
        for name, tensor in load.tensors.items():
            wanted[name].copy_(tensor)
    report = LoadReport(
        source=str(path),
        matched=tuple(sorted(load.tensors)),
        missing=tuple(sorted(set(wanted) - set(load.tensors))),
        unexpected=tuple(sorted(load.unexpected)),
        reshaped=tuple(load.reshaped),
    )
    log.info("%s", report.summary())
    for kind in ("missing", "unexpected", "reshaped"):
        if getattr(report, kind):
            log.info("%s %s: %s", report.source, kind, ", ".join(getattr(report, kind)))
    return report


def _join_qkv(load: _Load) -> None:
    """query, key and value `[D, D]` of a block -> our one `[3 D, D]`; biases alike."""
    for name in sorted(load.tensors):
        if ".query." not in name:
            continue
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in load.tensors for part in parts):
            joined = name.replace(".query.", ".qkv.")
            load.tensors[joined] = torch.cat([load.tensors.pop(part) for part in parts])
            load.origin[joined] = [origin for part in parts for origin in load.origin.pop(part)]


def _fit_vision(encoder: VisionEncoder, load: _Load) -> None:
    config, tensors = encoder.config, load.tensors
    kernel, pixels = tensors.get("patch.weight"), config.channels * config.patch_size**2
    if kernel is not None and config.stem:
        if kernel.ndim == 4 or not load.has_stem:
            load.leave_out("patch.weight")  # those of a stem take its map, not pixels
    elif kernel is not None and kernel.ndim == 2 and kernel.shape[1] != pixels:
        patch = math.isqrt(kernel.shape[1] // config.channels)  # our own, of another patch
        if patch * patch * config.channels == kernel.shape[1]:
            tensors["patch.weight"] = kernel.view(-1, config.channels, patch, patch)
    if "patch.weight" in tensors and tensors["patch.weight"].ndim == 4:
        kernel = tensors["patch.weight"]  # [D, C, P, P]
        if kernel.shape[1] == 3 and config.channels == 1:
            load.change("patch.weight", kernel.sum(1, keepdim=True), "channels summed for grey input")
        elif kernel.shape[1] == 1 and config.channels == 3:
            load.change("patch.weight", kernel.expand(-1, 3, -1, -1) / 3, "grey weights spread over channels")
        if kernel.shape[2] == kernel.shape[3] != config.patch_size:
            resized = resize_patches(tensors["patch.weight"], config.patch_size)
            load.change("patch.weight", resized, "resized by the pseudo-inverse of a patch's resize")
        if tensors["patch.weight"].shape[2:] == (config.patch_size, config.patch_size):
            tensors["patch.weight"] = tensors["patch.weight"].flatten(1)
    for name in ("class_token", "registers"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(-1, tensors[name].shape[-1])
    side = _square_grid(load)
    if side and encoder.positions is not None and (side, side) != config.grid:
        resized = resize_positions(tensors["positions"], (side, side), config.grid)
        load.change("positions", resized, "interpolated to another grid")


def _square_grid(load: _Load) -> int | None:
    """Side of the grid that the file's positions lie on, a class token's own one taken off; None if there is none."""
    tensors = load.tensors
    if "positions" not in tensors:
        return None
    positions = tensors["positions"]
    tensors["positions"] = positions = positions.reshape(-1, positions.shape[-1])
    side = math.isqrt(len(positions))
    if side * side == len(positions):
        return side
    # A square grid and one position more: the class token's, which ours carries itself.
    side = math.isqrt(len(positions) - 1)
    if side * side != len(positions) - 1:
        return None  # named as a misfit by the caller
    load.change("positions", positions[1:], "class position folded into class_token")
    if "class_token" in tensors:
        tensors["class_token"] = tensors["class_token"] + positions[:1]
    return side


def _inflate(encoder: VolumeEncoder, load: _Load) -> None:
    """2D patch weights and positions to 3D; a file of our own volume encoder is left as it is.

    A kernel is resized to the patch's rows and columns, shared out over its slices and channels, so that a patch of one
    grey answers as it did. An encoder with a stem keeps the patch weights that it has: they take the stem's map.
    Positions are resized across and alike in all slices: depth is learned.
    """
    config, tensors = encoder.config, load.tensors
    depth, height, width = config.patch_size
    kernel = tensors.get("patch.weight")
    if kernel is not None and config.stem and (kernel.ndim == 4 or not load.has_stem):
        load.leave_out("patch.weight")
    elif kernel is not None and kernel.ndim == 4:  # [D, C, P, P]
        grey = kernel.sum(1, keepdim=True)
        resized = F.interpolate(grey, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
        resized = resized * (grey.shape[2] * grey.shape[3] / (height * width)) / (depth * config.channels)
        inflated = resized[:, :, None].expand(-1, config.channels, depth, -1, -1).flatten(1)
        load.change("patch.weight", inflated, "inflated to a volume's patch")
    given = tensors.get("positions", encoder.positions)
    if given.shape == encoder.positions.shape or given.shape[-1] != config.width:
        return
    side = _square_grid(load)
    if side:
        slices, rows, columns = config.grid
        across = resize_positions(tensors["positions"], (side, side), (rows, columns))
        load.change("positions", across.repeat(slices, 1), "interpolated, alike in all slices")


def _fit_text(encoder: TextEncoder, load: _Load) -> None:
    table, types = load.tensors.get("positions"), load.tensors.get("token_types")
    if table is not None and types is not None and len(types) == 1 and len(table) > ROBERTA_PADDING:
        # Only RoBERTa's family has one type of tokens; its positions start behind the padding's.
        load.change("positions", table[ROBERTA_PADDING:], "rows of padding left out")
        table = load.tensors["positions"]
    if table is None or table.shape[1:] != encoder.positions.shape[1:] or len(table) == encoder.config.max_length:
        return
    rows = min(len(table), encoder.config.max_length)
    fitted = encoder.positions.detach().clone()
    fitted[:rows] = table[:rows]
    why = "cut to max_length" if rows < len(table) else f"rows from {rows} left as drawn"
    load.change("positions", fitted, why)
