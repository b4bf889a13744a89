"""A split through the encoders once: what every evaluator of embeddings starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from core.collectives import all_gather_rows
from shards.batch import Batch
from shards.errors import DataError

PARTS = ("image_embeds", "text_embeds", "features")
METADATA = ("valid", "labels", "report_key", "patient_key", "sample_id")


class Encoders(Protocol):
    """What a task offers an evaluator. E = shared embedding, D = width of the image encoder."""

    def embed_images(self, batch: Batch) -> Tensor:
        """[b, E], unit length, one row a study."""

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[n, E], unit length."""

    def image_features(self, batch: Batch) -> Tensor:
        """[b, D], pooled tokens before the projection, one row a study."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedSplit:
    """The valid studies of a split, in its order, on the CPU. n = studies, K = labels.

    `image_embeds [n, E]`, `text_embeds [n, E]`, `features [n, D]` are float32, or None where not asked for;
    `labels [n, K] int8`, `report_key [n]`, `patient_key [n]`, `sample_id [n]` int64 are as in a batch.
    """

    image_embeds: Tensor | None
    text_embeds: Tensor | None
    features: Tensor | None
    labels: Tensor
    report_key: Tensor
    patient_key: Tensor
    sample_id: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor) -> EmbeddedSplit:
        """The studies at these places, or where this mask is True."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            taken[field.name] = None if value is None else value[chosen]
        return replace(self, **taken)

    def need(self, part: str) -> Tensor:
        """One of PARTS, float32. An evaluator that asks for a part which was not embedded is wrongly wired."""
        value = getattr(self, part)
        assert value is not None, f"{part} was not embedded; name it in embed_split(parts=...)"
        return value


@torch.no_grad()
def embed_split(
    task: Encoders,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    parts: Sequence[str] = PARTS,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] = lambda studies: None,
) -> EmbeddedSplit:
    """Embed every valid study of `batches`. `autocast`: bfloat16 where the run used it, None: as outside this call.

    With several ranks, each is given its equal share of every batch and all get the whole result, in rank order, so
    that ranks stay in step whatever shards their weights (ZeRO 3). `on_batch(studies)` is told of progress.
    The task is put in evaluation mode, then back. Raises DataError when no study is valid.
    """
    kept: dict[str, list[Tensor]] = {}
    was_training = getattr(task, "training", False)
    if isinstance(task, torch.nn.Module):
        task.eval()
    try:
        for batch in batches:
            own = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            found = {name: own[name] for name in METADATA}
            with precision(device, autocast):
                if "image_embeds" in parts:
                    found["image_embeds"] = task.embed_images(own).float()
                if "text_embeds" in parts:
                    found["text_embeds"] = task.embed_texts(own["input_ids"], own["attention_mask"]).float()
                if "features" in parts:
                    found["features"] = task.image_features(own).float()
            everyone = {name: all_gather_rows(found[name].contiguous()).cpu() for name in sorted(found)}
            valid = everyone.pop("valid")
            for name, rows in everyone.items():
                kept.setdefault(name, []).append(rows[valid])
            on_batch(int(valid.sum()))
    finally:
        if isinstance(task, torch.nn.Module):
            task.train(was_training)
    if not sum(len(rows) for rows in kept.get("labels", [])):
        raise DataError("no usable study in the split to evaluate; see the skip events for why each was left out")
    joined = {name: torch.cat(rows) for name, rows in kept.items()}
    absent = {name: None for name in PARTS if name not in parts}
    return EmbeddedSplit(**joined, **absent)  # type: ignore[arg-type]


def precision(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Products in `autocast`; None leaves whatever is set outside, such as the engine's own, as it is."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
