"""A run directory as pretrain.py leaves it, made in a second: tiny data, tiny weights that were never trained."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from configs import schema, tiny
from configs.schema import TrainConfig
from core.checkpoint_files import SUMS, checksums
from shards import keyed
from shards.batch import EncodedImage, Sample, StudyRecord, ViewRecord
from shards.ingest import Item, Loaded, Plan, hashed_key
from shards.manifest import Manifest
from shards.tokenizer import train_wordpiece
from shards.writer import WriterConfig, write_shards

SPLITS = {"train": 60, "validation": 24, "test": 40}
STEP = 4
SENTENCES = {
    1: ("Left pleural effusion.", "A small effusion on the left.", "Large left effusion, heart normal."),
    0: ("No pleural effusion.", "The lungs are clear.", "Normal chest, heart normal."),
}


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Noise images whose lower left is bright where the label says effusion. Study 3 of `test` has no report."""

    name: str = "halves"
    labels: tuple[str, ...] = ("effusion", "nodule")
    masks: Mapping[str, int] = field(default_factory=dict)
    key_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    without_report: bool = True

    def plan(self) -> Plan:
        items = []
        for split, count in SPLITS.items():
            for i in range(count):
                key, patient = (
                    hashed_key(None, "study", f"{split} {i}"),
                    hashed_key(None, "patient", f"{split} {i // 2}"),
                )
                items.append(Item(key=key, patient=patient, split=split, payload=[split, i]))
        return Plan(items=items)

    def load(self, item: Item) -> Loaded:
        split, i = item.payload
        seed = list(SPLITS).index(split)
        label = int(keyed.integers(0, 2, seed, "label", i)[0])
        pixels = keyed.integers(0, 120, seed, "pixels", i, draws=40 * 40).reshape(40, 40)
        pixels[20:, 20:] += 100 * label
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        text = SENTENCES[label][i % 3]
        record = StudyRecord(
            study=item.key,
            patient=item.patient,
            report={} if self.without_report and (split, i) == ("test", 3) else {"findings": f"{text} Study {i % 7}."},
            labels={"effusion": label} | ({"nodule": -1} if i % 5 == 0 else {}),
            views=[ViewRecord(id="0", height=40, width=40)],
        )
        image = EncodedImage(data=buffer.getvalue(), extension="png")
        return Loaded(sample=Sample(key=item.key, record=record, images=(image,), split=split))


def pack(folder: Path) -> Path:
    write_shards(Halves(), str(folder), WriterConfig(shard_samples=16, chunk_bytes=6000, workers=1))
    return folder / "manifest.json"


def make_run(
    folder: Path, manifest: Path, config: TrainConfig | None = None, corpus: Sequence[str] = (), **of_data: Any
) -> Path:
    """`folder` with config.json, tokenizer, one checkpoint (step 4, latest and best) and events.jsonl.

    Of `tiny:clip` on SENTENCES, or of another `config` whose tokenizer is trained on `corpus`.
    """
    config = config or replace(tiny.clip(), recipe="tiny:clip")
    config = replace(config, data=replace(config.data, train=str(manifest), sections=("findings",), **of_data))
    folder.mkdir(parents=True)
    texts = list(corpus) or [text for texts in SENTENCES.values() for text in texts]
    tokenizer = train_wordpiece(texts * 2, 400 if corpus else 128, folder / "tokenizer")
    (folder / "config.json").write_text(schema.dumps(config))
    task = config.task.build(vocab_size=tokenizer.vocab_size, seed=7)
    checkpoint = folder / "checkpoints" / f"step-{STEP}"
    checkpoint.mkdir(parents=True)
    weights = {**dict(task.named_parameters()), **dict(task.named_buffers())}
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value.detach() + 0.02 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in weights.items()
    }
    save_file({name: value.contiguous() for name, value in moved.items()}, checkpoint / "weights.safetensors")
    recipe = {
        "manifests_sha256": [Manifest.from_bytes(manifest.read_bytes()).sha256],
        "tokenizer_sha256": tokenizer.sha256,
    }
    (checkpoint / "state.json").write_text(json.dumps({"recipe": recipe}))
    (checkpoint / SUMS).write_text(checksums(checkpoint))
    (folder / "latest").write_text(f"step-{STEP}\n")
    (folder / "best").write_text(json.dumps({"checkpoint": f"step-{STEP}"}))
    (folder / "events.jsonl").write_text("")
    return folder
