"""Weights from local files: every dialect of names, shapes that are changed, files that are refused."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.models.initialise import draw_weights, load_weights, read_weights
from core.models.text import TextEncoder
from core.models.vision import VisionEncoder, resize_patches, resize_positions
from shards.errors import ConfigError

VISION = VisionEncoder.Config(image_size=32, patch_size=8, channels=3, width=12, depth=2, heads=2, registers=2)
TEXT = TextEncoder.Config(vocab_size=30, max_length=10, width=12, depth=2, heads=2, norm="pre", token_types=0)


def vision(config: VisionEncoder.Config = VISION, seed: int = 0) -> VisionEncoder:
    encoder = VisionEncoder(config)
    draw_weights(encoder, seed)
    with torch.no_grad():  # nothing left at 1 or 0, where a swap would go unseen
        for number, parameter in enumerate(encoder.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + number)))
    return encoder


def timm_names(encoder: VisionEncoder) -> dict[str, torch.Tensor]:
    """The weights of `encoder` as timm would name and shape them, class position apart from the token."""
    config = encoder.config
    renamed = {}
    for name, value in encoder.state_dict().items():
        name = name.removeprefix("transformer.")
        if name.endswith(("qkv.weight", "mlp_in.weight")):
            value = value.T  # theirs are [out, in] throughout
        for ours, theirs in (
            (".qkv.", ".attn.qkv."),
            (".attention_out.", ".attn.proj."),
            (".mlp_in.", ".mlp.fc1."),
            (".mlp_out.", ".mlp.fc2."),
            ("patch.", "patch_embed.proj."),
            ("scale1.", "ls1."),
            ("scale2.", "ls2."),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = value
    if "registers" in renamed:
        renamed["reg_token"] = renamed.pop("registers")[None]
    class_position = torch.full((1, config.width), 0.25)
    renamed["cls_token"] = (renamed.pop("class_token") - class_position)[None]
    renamed["pos_embed"] = torch.cat([class_position, renamed.pop("positions")])[None]
    kernel = renamed["patch_embed.proj.weight"]
    renamed["patch_embed.proj.weight"] = kernel.view(config.width, config.channels, config.patch_size, -1)
    return {name: value.contiguous() for name, value in renamed.items()}


def hugging_face_names(weights: dict[str, torch.Tensor], dinov2: bool) -> dict[str, torch.Tensor]:
    """timm's names -> those of transformers' ViT or DINOv2 with registers."""
    renamed = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = third.contiguous()
            continue
        for theirs, new in (
            ("attn.proj", "attention.output.dense"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"),
            ("reg_token", "embeddings.register_tokens"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
        ):
            name = name.replace(theirs, new)
        if not dinov2:
            for theirs, new in (
                (".norm1.", ".layernorm_before."),
                (".norm2.", ".layernorm_after."),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
            ):
                name = name.replace(theirs, new)
        if name.startswith("norm."):
            name = f"layernorm.{name.removeprefix('norm.')}"
        renamed[name] = value
    prefix = "" if dinov2 else "vit."
    return {prefix + name.replace("blocks.", "encoder.layer."): value for name, value in renamed.items()}


@pytest.mark.parametrize("dialect", ["ours", "timm", "vit", "dinov2"])
def test_vision_dialects(dialect: str, tmp_path: Path) -> None:
    config = replace(VISION, layer_scale=0.1) if dialect == "dinov2" else VISION
    source, target = vision(config, seed=1), vision(config, seed=2)
    weights = dict(source.state_dict())
    if dialect != "ours":
        weights = timm_names(source)
    if dialect in ("vit", "dinov2"):
        weights = hugging_face_names(weights, dialect == "dinov2")
    save_file(weights | {"head.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    report = load_weights(target, tmp_path)
    assert report.missing == () and report.unexpected == ("head.weight",)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(target(x).pooled, source(x).pooled)
    torch.testing.assert_close(target(x).tokens, source(x).tokens)


def test_transformers_vit_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        ),
        add_pooling_layer=False,
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = VisionEncoder(replace(VISION, width=24, heads=3, mlp_ratio=2.0, registers=0, norm_epsilon=1e-12))
    assert load_weights(ours, tmp_path).missing == ()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
        out = ours(x)
    torch.testing.assert_close(out.tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.pooled, expected[:, 0], atol=1e-5, rtol=1e-4)


def test_open_clip_text_names(tmp_path: Path) -> None:
    source, target = TextEncoder(TEXT), TextEncoder(TEXT)
    draw_weights(source, 1)
    weights = {}
    for name, value in source.state_dict().items():
        if name.endswith(("qkv.weight", "mlp_in.weight")):
            value = value.T.contiguous()
        for ours, theirs in (
            ("transformer.blocks.", "transformer.resblocks."),
            (".norm1.", ".ln_1."),
            (".norm2.", ".ln_2."),
            (".qkv.", ".attn.in_proj_"),
            (".attention_out.", ".attn.out_proj."),
            (".mlp_in.", ".mlp.c_fc."),
            (".mlp_out.", ".mlp.c_proj."),
            ("words.", "token_embedding."),
        ):
            name = name.replace(ours, theirs)
        name = "positional_embedding" if name == "positions" else name
        weights[name.replace("norm.", "ln_final.") if name.startswith("norm.") else name] = value
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "clip.pt")
    report = load_weights(target, tmp_path / "clip.pt")
    assert report.missing == () and report.unexpected == ()
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sizes_are_fitted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = vision(seed=1)
    save_file(timm_names(source), tmp_path / "vit.safetensors")
    grey = vision(replace(VISION, channels=1, image_size=48), seed=2)
    with caplog.at_level(logging.INFO, logger="core.models.initialise"):
        report = load_weights(grey, tmp_path / "vit.safetensors")
    assert [line.split(":")[0] for line in report.reshaped] == ["patch.weight", "positions", "positions"]
    assert "0 missing" in caplog.text and "interpolated to another grid, (16, 12) -> (36, 12)" in caplog.text
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey.patch(grey.patches(x)), source.patch(source.patches(x)), atol=1e-4, rtol=1e-4)
    assert source.positions is not None and grey.positions is not None
    expected = resize_positions(source.positions, (4, 4), (6, 6))
    torch.testing.assert_close(grey.positions, expected)


def test_text_positions_are_cut_or_kept(tmp_path: Path) -> None:
    source = TextEncoder(TEXT)
    draw_weights(source, 1)
    save_file(dict(source.state_dict()), tmp_path / "text.safetensors")
    for length in (6, 14):
        target = TextEncoder(replace(TEXT, max_length=length))
        draw_weights(target, 2)
        drawn = target.positions.detach().clone()
        report = load_weights(target, tmp_path / "text.safetensors")
        rows = min(length, 10)
        assert len(report.reshaped) == 1
        assert torch.equal(target.positions[:rows], source.positions[:rows])
        assert torch.equal(target.positions[rows:], drawn[rows:])


def test_mae_with_fixed_positions_and_a_prefix(tmp_path: Path) -> None:
    source = vision(seed=1)
    weights = {f"encoder.{name}": value for name, value in timm_names(source).items()}
    torch.save({"model": weights | {"decoder.pos_embed": torch.zeros(1, 17, 4)}}, tmp_path / "mae.pth")
    target = vision(replace(VISION, positions="sincos"), seed=2)
    report = load_weights(target, tmp_path / "mae.pth", prefix="encoder.")
    assert report.missing == () and report.unexpected == ("decoder.pos_embed", "encoder.pos_embed")


def test_misfits_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    save_file(timm_names(vision(seed=1)), tmp_path / "vit.safetensors")
    wide = vision(replace(VISION, width=16), seed=2)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(ConfigError, match=r"shapes do not fit: .*class_token \(1, 12\) in the file, \(1, 16\) here"):
        load_weights(wide, tmp_path / "vit.safetensors")
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())
    with pytest.raises(ConfigError, match=r"only 2 of the encoder's 28 tensors"):
        load_weights(TextEncoder(TEXT), tmp_path / "vit.safetensors")
    words = TextEncoder(replace(TEXT, vocab_size=31))
    save_file(dict(words.state_dict()), tmp_path / "words.safetensors")
    with pytest.raises(ConfigError, match=r"words.weight \(31, 12\) in the file, \(30, 12\) here"):
        load_weights(TextEncoder(TEXT), tmp_path / "words.safetensors")


@pytest.mark.parametrize(("old", "new"), [(8, 12), (8, 16), (16, 8)])
def test_resized_patches_answer_to_resized_images_as_before(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(1)
    kernel = torch.randn(5, 2, old, old, generator=generator)
    image = torch.nn.functional.interpolate(torch.randn(3, 2, 2, 2, generator=generator), size=(old, old))
    larger = torch.nn.functional.interpolate(image, size=(new, new), mode="bilinear", antialias=True)
    before = torch.einsum("dchw,nchw->nd", kernel, image)
    after = torch.einsum("dchw,nchw->nd", resize_patches(kernel, new), larger)
    if new > old:  # nothing of the patch is lost: the answers are the same
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-4)
        back = resize_patches(resize_patches(kernel, new), old)
        assert back.shape == kernel.shape
    else:
        plain = torch.nn.functional.interpolate(kernel, size=(new, new), mode="bilinear", antialias=True)
        missed = torch.einsum("dchw,nchw->nd", plain, larger) - before
        assert (after - before).norm() < 0.5 * missed.norm()
    assert resize_patches(kernel, old) is kernel


@pytest.mark.parametrize("dialect", ["timm", "ours"])
def test_an_encoder_of_larger_images_takes_larger_patches(dialect: str, tmp_path: Path) -> None:
    """Twice the image size and patch size: the grid stays, and so do the features of an enlarged image."""
    small = vision(replace(VISION, channels=1))
    names = timm_names(small) if dialect == "timm" else dict(small.state_dict())
    save_file(names, tmp_path / "vit.safetensors")
    large = vision(replace(VISION, channels=1, image_size=64, patch_size=16), seed=2)
    report = load_weights(large, tmp_path / "vit.safetensors")
    assert not report.missing and any("pseudo-inverse" in line for line in report.reshaped)
    # Each patch is resized by itself, so that none sees its neighbours.
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(4))
    patches = images.view(2, 4, 8, 4, 8).transpose(2, 3).reshape(32, 1, 8, 8)
    enlarged = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bilinear", antialias=True)
    whole = enlarged.view(2, 4, 4, 16, 16).transpose(2, 3).reshape(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(large(whole).pooled, small(images).pooled, atol=1e-4, rtol=1e-3)


class Payload:
    """Unpickled, it would say so."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (print, ("executed",))


def test_a_stems_patch_weights_are_neither_resized_nor_replaced(tmp_path: Path) -> None:
    config = VisionEncoder.Config(image_size=32, patch_size=8, width=8, depth=1, heads=1, stem=(4, 4, 256))
    ours, other = (VisionEncoder(config) for _ in range(2))
    draw_weights(ours, 0)
    draw_weights(other, 1)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    report = load_weights(other, tmp_path / "ours.safetensors")
    assert not report.missing and not report.reshaped and torch.equal(other.patch.weight, ours.patch.weight)

    for prefix in ("", "vision."):
        save_file(
            {f"{prefix}{name}": value for name, value in ours.state_dict().items()}, tmp_path / "prefixed.safetensors"
        )
        with pytest.raises(ConfigError, match=r"has a stem of convolutions; give this one the same"):
            load_weights(VisionEncoder(replace(config, stem=())), tmp_path / "prefixed.safetensors", prefix=prefix)

    drawn = other.patch.weight.clone()
    save_file({**other.state_dict(), "patch.weight": torch.zeros(8, 1, 8, 8)}, tmp_path / "pixels.safetensors")
    assert load_weights(other, tmp_path / "pixels.safetensors").unexpected == ("patch.weight",)
    assert torch.equal(other.patch.weight, drawn)

    # Pixels of our own patches, as many as the stem's map has numbers, are pixels all the same.
    plain, stemmed = (VisionEncoder(replace(config, depth=4, stem=stem)) for stem in ((), (4, 4, 64)))
    draw_weights(plain, 0)
    draw_weights(stemmed, 1)
    assert plain.patch.weight.shape == stemmed.patch.weight.shape
    drawn = stemmed.patch.weight.clone()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    report = load_weights(stemmed, tmp_path / "plain.safetensors")
    assert report.unexpected == ("patch.weight",) and "patch.weight" in report.missing
    assert torch.equal(stemmed.patch.weight, drawn)


def test_only_data_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("weights.pkl", "weights.npz", "weights"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": torch.zeros(1)}))
        with pytest.raises(ConfigError, match=r"is refused; convert the weights to \.safetensors"):
            read_weights(tmp_path / name)
    torch.save({"x": Payload()}, tmp_path / "evil.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.bin", "plain.bin"):
        with pytest.raises(ConfigError, match="weights_only"):
            read_weights(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match="no such weights file"):
        read_weights(tmp_path / "absent.safetensors")
    with pytest.raises(ConfigError, match=r"holds none of model\.safetensors"):
        read_weights(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="not a table of tensors"):
        read_weights(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="holds no tensors"):
        read_weights(tmp_path / "none.pt")


def test_sharded_folder(tmp_path: Path) -> None:
    source = vision(seed=1)
    names = sorted(source.state_dict())
    save_file({name: source.state_dict()[name] for name in names[:5]}, tmp_path / "a.safetensors")
    save_file({name: source.state_dict()[name] for name in names[5:]}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    parts = ", ".join(f'"{name}": "{"a" if i < 5 else "b"}.safetensors"' for i, name in enumerate(names))
    index.write_text(f'{{"weight_map": {{{parts}}}}}')
    assert load_weights(vision(seed=2), tmp_path).missing == ()
    index.write_text('{"weight_map": {"x": "../b.safetensors"}}')
    with pytest.raises(ConfigError, match="outside its folder"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="no weight_map"):
        read_weights(tmp_path)
