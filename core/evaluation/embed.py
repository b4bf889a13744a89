"""A split through the encoders once: what every evaluator of embeddings starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from core.collectives import all_gather_rows
from core.world import World
from shards.batch import Batch
from shards.errors import DataError

PARTS = ("image_embeds", "text_embeds", "features")


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
    world: World | None = None,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], None] = lambda studies: None,
) -> EmbeddedSplit:
    """Embed every valid study of `batches`. `autocast`: bfloat16 where the run used it, None: as outside this call.

    With several ranks, all are given the same batches; each encodes its share of the rows and all get the whole result,
    so that ranks stay in step whatever shards their weights (ZeRO 3). `on_batch(studies)` is told of progress.
    The task is put in evaluation mode, then back. Raises DataError when no study is valid.
    """
    world = world or World(device=device)
    kept: dict[str, list[Tensor]] = {}
    was_training = getattr(task, "training", False)
    if isinstance(task, torch.nn.Module):
        task.eval()
    try:
        for batch in batches:
            valid = batch["valid"].cpu()
            own = rows_of_rank(batch, world.rank, world.world_size)
            own = {name: tensor.to(device, non_blocking=True) for name, tensor in own.items()}
            found: dict[str, Tensor] = {}
            with precision(device, autocast):
                if "image_embeds" in parts:
                    found["image_embeds"] = task.embed_images(own)
                if "text_embeds" in parts:
                    found["text_embeds"] = task.embed_texts(own["input_ids"], own["attention_mask"])
                if "features" in parts:
                    found["features"] = task.image_features(own)
            for name, rows in found.items():
                whole = all_gather_rows(rows.float().contiguous()) if world.world_size > 1 else rows.float()
                kept.setdefault(name, []).append(whole[: len(valid)].cpu()[valid])
            for name in ("labels", "report_key", "patient_key", "sample_id"):
                kept.setdefault(name, []).append(batch[name].cpu()[valid])
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


def rows_of_rank(batch: Batch, rank: int, world_size: int) -> Batch:
    """This rank's equal share of a batch's studies with their images; void rows fill up what does not divide.

    The joined shares of all ranks are the batch again, then the void rows.
    """
    if world_size == 1:
        return batch
    studies = len(batch["valid"])
    share = -(-studies // world_size)
    first, last = min(studies, rank * share), min(studies, (rank + 1) * share)
    images = (batch["study_index"] >= first) & (batch["study_index"] < last)
    missing = share - (last - first)
    part: Batch = {}
    for name, tensor in batch.items():
        if name == "pixel_values":
            rows, filler = tensor[images.to(tensor.device)], missing
        elif name == "study_index":
            rows, filler = tensor[images] - first, 0
        else:
            rows, filler = tensor[first:last], missing
        part[name] = torch.cat([rows, rows.new_zeros((filler, *tensor.shape[1:]))]) if filler else rows
    if missing:
        voids = torch.arange(last - first, share, device=part["study_index"].device, dtype=torch.int64)
        part["study_index"] = torch.cat([part["study_index"], voids])
        # A text row needs a token to attend to, void or not.
        if "attention_mask" in part:
            part["attention_mask"][last - first :, 0] = True
    return part
