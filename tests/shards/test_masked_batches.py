"""Structured reports and masks as fields of batches: made if asked, keyed, zero in void slots."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.batch import FIELDS, Batch
from shards.collate import ENTITY_FIELDS
from shards.decode import Decoder
from shards.errors import ConfigError
from shards.ingest import Item, Loaded
from shards.ingest.phantom_chest import ChestPhantom
from shards.loader import Loader, corpus
from shards.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer, train_wordpiece
from shards.transforms.masking import Config as Masking
from shards.writer import WriterConfig, write_shards

BATCH = 12
OPTIONAL = ("section_ids", "text_mask", "patch_mask", "finding_key", "draw_key")
OF_IMAGES = {name for name in FIELDS if not name.startswith("anatomy_")} - ENTITY_FIELDS
OF_IMAGES -= {"attention_grid", "text_is_report"}  # of other objectives
ALL = ("pixel_values", "study_index", "valid", "input_ids", "attention_mask", *OPTIONAL)


@dataclass
class PartlyBroken(ChestPhantom):
    """Of every six studies one has no structured report, one a broken one, one an image that does not decode."""

    def __init__(self) -> None:
        super().__init__(ChestPhantom.Config(train=36, validation=14, test=0, size=32, masks=False, structured=True))

    def load(self, item: Item) -> Loaded:
        sample = super().load(item).sample
        assert sample is not None
        report = sample.record.structured_report
        assert report is not None
        if item.payload % 6 == 1:
            report = None
        if item.payload % 6 == 2:
            report = {"study": "s", "items": []}
        images = sample.images
        if item.payload % 6 == 3:
            images = (replace(images[0], data=images[0].data[:60]),)
        record = sample.record.model_copy(update={"structured_report": report})
        return Loaded(sample=replace(sample, record=record, images=images))


def pack(folder: Path, source: ChestPhantom) -> str:
    write_shards(source, str(folder), WriterConfig(shard_samples=12, chunk_bytes=6000))
    return str(folder / "manifest.json")


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    options: dict[str, Any] = {"train": 48, "validation": 14, "test": 0, "size": 32, "masks": False}
    return {
        "whole": pack(folder / "whole", ChestPhantom(ChestPhantom.Config(**options, structured=True, degraded=0.3))),
        "raw": pack(folder / "raw", ChestPhantom(ChestPhantom.Config(**options))),
        "broken": pack(folder / "broken", PartlyBroken()),
    }


@pytest.fixture(scope="module")
def tokenizer(manifests: dict[str, str]) -> Tokenizer:
    config = Loader.Config(train=manifests["whole"], report="structured")
    return train_wordpiece(corpus(config, BATCH), 1500)


@pytest.fixture
def config(manifests: dict[str, str]) -> Loader.Config:
    return Loader.Config(
        train=manifests["whole"], report="structured", lanes=12, window_chunks=3, text_length=160,
        decode=Decoder.Config(image_size=32), masking=Masking(patch_size=8), buffer_bytes=1 << 28,
    )  # fmt: skip


def batches(
    config: Loader.Config, tokenizer: Tokenizer, first: int, count: int, rank: int = 0, world_size: int = 1, **more: Any
) -> list[Batch]:
    options = {"fields": ALL} | more
    loader = Loader(
        config, global_batch_size=BATCH, seed=5, rank=rank, world_size=world_size, tokenizer=tokenizer, **options
    )
    with loader.start(first) as run:
        return [next(run) for _ in range(count)]


def by_study(parts: list[Batch], name: str) -> dict[tuple[int, int], list[Any]]:
    """(epoch, sample) -> its row of a field, without the padding that other rows bring."""
    rows = {}
    for part in parts:
        for row, (epoch, sample) in enumerate(zip(part["epoch"].tolist(), part["sample_id"].tolist(), strict=True)):
            values = part[name][row]
            keep = part["attention_mask"][row] if values.shape == part["attention_mask"][row].shape else slice(None)
            rows[epoch, sample] = values[keep].tolist() if values.ndim else [values.item()]
    return rows


def test_all_fields_of_structured_batches(config: Loader.Config, tokenizer: Tokenizer) -> None:
    separators = {tokenizer.pad_id, *tokenizer.special_ids}
    for batch in batches(config, tokenizer, 0, 4):
        rows, length = batch["input_ids"].shape
        assert set(batch) == OF_IMAGES
        assert batch["section_ids"].dtype == batch["finding_key"].dtype == batch["draw_key"].dtype == torch.int64
        assert batch["text_mask"].dtype == batch["patch_mask"].dtype == torch.bool
        assert batch["section_ids"].shape == batch["text_mask"].shape == (rows, length)
        assert batch["patch_mask"].shape == (rows, 16)
        special = torch.isin(batch["input_ids"], torch.tensor(sorted(separators)))
        assert (special == (batch["section_ids"] == 0)).all()
        assert not batch["text_mask"][special].any()
        assert batch["text_mask"].any(dim=1).all()
        assert (batch["patch_mask"].sum(dim=1) == round(0.6 * 16)).all()
        for row in range(rows):
            sections = batch["section_ids"][row]
            assert {2, 3, 4} <= set(sections.tolist())
            changes = sections[1:][sections[1:] != sections[:-1]].tolist()
            named = [section for section in changes if section]
            assert [section for section in named if section != 1] == [2, 3, 4] * 3
            assert batch["input_ids"][row].tolist().count(tokenizer.sep_id or 0) == len(named)
        words = tokenizer.tokens(batch["input_ids"][0].tolist())
        for place, word in enumerate(words):
            if word.startswith("##"):  # a word is masked whole
                assert batch["text_mask"][0, place] == batch["text_mask"][0, place - 1]
        assert tokenizer.unk_id not in batch["input_ids"]


def test_ranks_and_restarts_see_the_same_draws(config: Loader.Config, tokenizer: Tokenizer) -> None:
    whole = batches(config, tokenizer, 2, 3)
    again = batches(config, tokenizer, 3, 2)
    parts = [part for rank in range(2) for part in batches(config, tokenizer, 2, 3, rank, 2)]
    for name in ("input_ids", *OPTIONAL):
        assert by_study(parts, name) == by_study(whole, name)
        for before, after in zip(whole[1:], again, strict=True):
            assert torch.equal(before[name], after[name])


def test_epochs_draw_anew(config: Loader.Config, tokenizer: Tokenizer) -> None:
    walked = batches(config, tokenizer, 0, 9)
    for name in ("input_ids", "patch_mask", "draw_key"):
        rows = by_study(walked, name)
        twice = [sample for epoch, sample in rows if epoch == 1 and (0, sample) in rows]
        assert len(twice) > 20
        assert sum(rows[0, sample] == rows[1, sample] for sample in twice) <= 1
    keys = by_study(walked, "finding_key")
    assert all(keys[0, sample] == keys[epoch, sample] for epoch, sample in keys if (0, sample) in keys)


def test_raw_reports_with_masks(config: Loader.Config, tokenizer: Tokenizer) -> None:
    raw = replace(config, report="raw")
    plain = batches(raw, tokenizer, 0, 3, fields=("pixel_values", "input_ids"))
    masked = batches(raw, tokenizer, 0, 3)
    for before, after in zip(plain, masked, strict=True):
        assert set(before) == OF_IMAGES - set(OPTIONAL)
        for name, values in before.items():
            assert torch.equal(values, after[name]), name
        real = ~torch.isin(after["input_ids"], torch.tensor(sorted(tokenizer.special_ids)))
        assert (after["section_ids"] == 3 * real).all()
        assert after["text_mask"].any(dim=1).all()


def test_finding_keys_fall_back_to_the_reports(
    config: Loader.Config, manifests: dict[str, str], tokenizer: Tokenizer
) -> None:
    raw = replace(config, train=manifests["raw"], report="raw")
    for batch in batches(raw, tokenizer, 0, 2):
        assert torch.equal(batch["finding_key"], batch["report_key"])
    for batch in batches(config, tokenizer, 0, 2):
        same_finding = batch["finding_key"][:, None] == batch["finding_key"]
        assert (same_finding | (batch["report_key"][:, None] != batch["report_key"])).all()
        assert not torch.equal(batch["finding_key"], batch["report_key"])


def test_long_texts_lose_definitions_first(config: Loader.Config, tokenizer: Tokenizer) -> None:
    long, short = (batches(replace(config, text_length=length), tokenizer, 0, 2) for length in (240, 96))
    for before, after in zip(long, short, strict=True):
        assert after["input_ids"].shape[1] <= 96
        for section in (3, 4):
            assert torch.equal((before["section_ids"] == section).sum(1), (after["section_ids"] == section).sum(1))
        assert (before["section_ids"] == 1).sum() > 2 * (after["section_ids"] == 1).sum()


def test_void_slots_are_empty(config: Loader.Config, manifests: dict[str, str], tokenizer: Tokenizer) -> None:
    events: list[Any] = []
    seen = 0
    for batch in batches(replace(config, train=manifests["broken"]), tokenizer, 0, 3, on_event=events.append):
        void = ~batch["valid"]
        seen += int(void.sum())
        for name in OPTIONAL:
            assert not batch[name][void].any(), name
            assert batch[name][~void].any() or name == "finding_key", name
    assert seen == 18
    causes = {event["cause"] for event in events}
    assert {"no structured report", "structured report: value_error at its top; see shards/README.md"} < causes


def test_evaluation_is_the_same_every_time(config: Loader.Config, tokenizer: Tokenizer) -> None:
    loader = Loader(config, global_batch_size=BATCH, seed=5, fields=ALL, tokenizer=tokenizer)
    other = Loader(replace(config), global_batch_size=BATCH, seed=77, fields=ALL, tokenizer=tokenizer)
    first, second, seeded = (list(one.evaluate(batch_size=6)) for one in (loader, loader, other))
    for a, b, c in zip(first, second, seeded, strict=True):
        for name in ("input_ids", *OPTIONAL):
            assert torch.equal(a[name], b[name])
        assert torch.equal(a["input_ids"], c["input_ids"])
        assert (a["section_ids"] == 1).any(dim=1)[a["valid"]].all()
    assert sum(int(batch["valid"].sum()) for batch in first) == 14


def test_what_cannot_be_made_is_refused(
    config: Loader.Config, manifests: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def build(changed: Loader.Config, own: Tokenizer = tokenizer) -> None:
        Loader(changed, global_batch_size=BATCH, seed=5, fields=ALL, tokenizer=own)

    with pytest.raises(ConfigError, match=r"no study has a structured report.*pack\.py --structured"):
        build(replace(config, train=manifests["raw"]))
    with pytest.raises(ConfigError, match="text_length=40 is too short for structured reports of 3 diseases; use 48"):
        build(replace(config, text_length=40))
    with pytest.raises(ConfigError, match="patch_size=5 does not divide the image size 32"):
        build(replace(config, masking=Masking(patch_size=5)))
    with pytest.raises(ConfigError, match=r"data\.report='prose'"):
        build(replace(config, report="prose"))  # type: ignore[arg-type]
    files = tokenizer.to_files()
    nameless = files[CONFIG_FILE].replace(b' "mask_token": "[MASK]"', b' "mask_token": null')
    assert nameless != files[CONFIG_FILE]
    with pytest.raises(ConfigError, match="masked text needs a tokenizer with a mask token"):
        build(config, Tokenizer.from_files({TOKENIZER_FILE: files[TOKENIZER_FILE], CONFIG_FILE: nameless}))
    bare = json.dumps(json.loads(files[TOKENIZER_FILE]) | {"post_processor": None}).encode()
    with pytest.raises(ConfigError, match="masked text needs a tokenizer that puts a token before every text"):
        build(config, Tokenizer.from_files({TOKENIZER_FILE: bare, CONFIG_FILE: files[CONFIG_FILE]}))


def test_parts_of_text_shorten_in_order_of_their_sections(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    parts = [[(1, "the heart is normal"), (4, "no effusion"), (1, "the lungs are clear and normal")], []]
    whole, tight = again.encode_parts(parts, 40), again.encode_parts(parts, 9)
    assert again.tokens(whole.input_ids[0].tolist())[:6] == ["[CLS]", "the", "heart", "is", "normal", "[SEP]"]
    assert whole.words[0].tolist() == [-1, 0, 1, 2, 3, -1, 4, 5, -1, 6, 7, 8, 9, 10, 11, -1]
    assert tight.input_ids.shape == (2, 9)
    assert tight.section_ids[0].tolist() == [0, 1, 1, 0, 4, 4, 0, 1, 0]
    assert tight.section_ids[1].tolist() == [0] * 9
    assert again.tokens(tight.input_ids[1].tolist())[:3] == ["[CLS]", "[SEP]", "[PAD]"]
    single = again.encode_parts([[(3, text)] for text in ("no effusion", "the lungs are clear")], 5)
    ids, mask = again.encode(["no effusion", "the lungs are clear"], 5)
    assert torch.equal(single.input_ids, ids)
    assert torch.equal(single.attention_mask, mask)
    assert np.array_equal(single.words >= 0, single.section_ids == 3)
