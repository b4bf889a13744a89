"""The text encoder: packed equals padded, parity with transformers' BERT, pooling, void rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.models.initialise import draw_weights, load_weights
from core.models.text import TextEncoder, bert_base, bert_config, clip_text_b16, xlm_roberta_base
from shards.errors import ConfigError

SMALL = TextEncoder.Config(vocab_size=50, max_length=20, width=16, depth=2, heads=2)
FORMS = {
    "bert": SMALL,
    "clip": replace(SMALL, norm="pre", causal=True, pool="eos", token_types=0),
    "mean": replace(SMALL, norm="pre", pool="mean", token_types=0),
}


def build(config: TextEncoder.Config) -> TextEncoder:
    encoder = TextEncoder(config)
    draw_weights(encoder, seed=0)
    return encoder


def reports(lengths: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(4))
    return ids * mask, mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[5], [3, 11, 1, 7, 7], [12, 12], [0, 4]])
def test_packed_equals_padded_forward_and_backward(form: str, lengths: list[int]) -> None:
    ids, mask = reports(lengths, 12)
    # fp64: tables start small, so a first LayerNorm multiplies rounding by 50.
    packed, padded = build(FORMS[form]).double(), build(replace(FORMS[form], unpadded=False)).double()
    outputs = [encoder(ids, mask) for encoder in (packed, padded)]
    torch.testing.assert_close(outputs[0].pooled, outputs[1].pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0].tokens, outputs[1].tokens, atol=1e-5, rtol=1e-4)
    for out in outputs:
        (out.pooled.square().sum() + out.tokens.square().sum()).backward()
    for (name, a), b in zip(packed.named_parameters(), padded.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_report_does_not_depend_on_its_neighbours(form: str) -> None:
    encoder = build(FORMS[form])
    ids, mask = reports([4, 9, 2], 9)
    together = encoder(ids, mask).pooled
    alone = encoder(ids[:1, :4], mask[:1, :4]).pooled
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_pooling_takes_the_named_token() -> None:
    ids, mask = reports([4, 9, 2], 9)
    for pool, place in (("cls", [0, 0, 0]), ("eos", [3, 8, 1])):
        out = build(replace(SMALL, pool=pool))(ids, mask)  # type: ignore[arg-type]
        torch.testing.assert_close(out.pooled, out.tokens[torch.arange(3), place])
    out = build(replace(SMALL, pool="mean"))(ids, mask)
    torch.testing.assert_close(out.pooled[2], out.tokens[2, :2].mean(0))


def test_void_rows_are_finite() -> None:
    encoder = build(SMALL)
    out = encoder(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool))
    out.pooled.sum().backward()
    assert out.pooled.isfinite().all() and not out.tokens[:, 1:].any()


def test_bert_of_transformers_loads_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=30,
        type_vocab_size=2,
    )
    theirs = transformers.BertModel(config).eval()
    for parameter in theirs.parameters():  # norms and biases away from 1 and 0, or the test would not see them swapped
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = TextEncoder(bert_config(tmp_path))
    report = load_weights(ours, tmp_path)
    assert report.missing == () and report.reshaped == ()
    assert all(name.startswith("pooler.") or "position_ids" in name for name in report.unexpected)
    ids = torch.randint(1, 61, (4, 17), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(17)[None] < torch.tensor([17, 5, 1, 9])[:, None]
    types = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for token_types in (None, types):
            expected = theirs(ids, attention_mask=mask.long(), token_type_ids=token_types).last_hidden_state
            for encoder in (ours, _padded_twin(ours)):
                out = encoder(ids, mask, token_types)
                torch.testing.assert_close(out.tokens[mask], expected[mask], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(out.pooled, expected[:, 0], atol=1e-5, rtol=1e-4)


def test_xlm_roberta_of_transformers_loads_and_agrees(tmp_path: Path) -> None:
    """Its positions begin behind two rows of padding, and it has one type of tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=32, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    named = {f"roberta.{name}": value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(named, tmp_path / "model.safetensors")  # as in a checkpoint with a head
    shape = replace(xlm_roberta_base(), vocab_size=61, max_length=30, width=24, depth=2, heads=4, mlp_ratio=40 / 24)
    ours = TextEncoder(shape)
    report = load_weights(ours, tmp_path)
    assert report.missing == () and report.reshaped == ("positions: rows of padding left out, (32, 24) -> (30, 24)",)
    ids = torch.randint(2, 61, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 9])[:, None]
    with torch.no_grad():
        expected = theirs(ids.where(mask, torch.ones_like(ids)), attention_mask=mask.long()).last_hidden_state
        found = ours(ids, mask)
    torch.testing.assert_close(found.tokens[mask], expected[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, expected[:, 0], atol=1e-5, rtol=1e-4)


def _padded_twin(encoder: TextEncoder) -> TextEncoder:
    twin = TextEncoder(replace(encoder.config, unpadded=False))
    twin.load_state_dict(encoder.state_dict())
    return twin


def test_forms_are_those_of_the_papers() -> None:
    def weights(config: TextEncoder.Config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in TextEncoder(config).parameters())

    # bert-base-uncased has 109,482,240 with its pooler of 768 * 768 + 768.
    assert weights(replace(bert_base(), vocab_size=30522)) == 109_482_240 - 768 * 769
    # open_clip's ViT-B-16 text tower without its projection of 512 x 512.
    assert weights(replace(clip_text_b16(), vocab_size=49408)) == 63_428_096 - 512 * 512


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        TextEncoder(bert_base())
    with pytest.raises(ConfigError, match=r"reports of 21 tokens, but text\.max_length=20"):
        build(SMALL)(*reports([3], 21))
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        bert_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type='gpt2'"):
        bert_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 3}))
    with pytest.raises(ConfigError, match="'max_position_embeddings' is missing"):
        bert_config(tmp_path)
    known = {"model_type": "bert", "hidden_act": "mish"}
    (tmp_path / "config.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match="hidden_act='mish'"):
        bert_config(tmp_path)
