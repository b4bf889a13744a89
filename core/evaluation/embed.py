"""A split through the encoders once: what every evaluator of embeddings starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from core.collectives import all_gather_rows
from core.models.gaussian import Gaussian
from core.tasks import Task
from shards.batch import Batch
from shards.errors import DataError

PARTS = ("image_embeds", "text_embeds", "features")  # of every task
GAUSSIAN_PARTS = ("image_mean", "image_logvar", "text_logvar")  # of a GaussianTask
NORM_PART = "image_norm"  # of a task with `image_norms`
ANATOMY_PARTS = ("anatomy_embeds", "anatomy_present")  # of a task with `embed_anatomies`; they come together
ANATOMY_TEXT_PARTS = ("anatomy_text_embeds", "anatomy_said")  # of a task with `embed_anatomy_texts`, likewise
PATCH_PARTS = ("patch_tokens", "patch_member")  # of a task with `embed_patches`, which gives ANATOMY_PARTS too
LABEL_PART = "label_logits"  # of a task that is taught labels
ALL_PARTS = (*PARTS, *GAUSSIAN_PARTS, NORM_PART, *ANATOMY_PARTS, *ANATOMY_TEXT_PARTS, *PATCH_PARTS, LABEL_PART)
METADATA = ("valid", "labels", "report_key", "patient_key", "sample_id")
KNOWN_OF_SOME = ("degradation_grade", "uncertain_verdicts", "anatomy_text_key")  # batches of some loaders have them


class Encoders(Protocol):
    """What a task offers an evaluator. E = shared embedding, D = width of the image encoder."""

    def embed_images(self, batch: Batch) -> Tensor:
        """[b, E], unit length, one row a study."""

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[n, E], unit length."""

    def image_features(self, batch: Batch) -> Tensor:
        """[b, D], pooled tokens before the projection, one row a study."""


@runtime_checkable
class GaussianTask(Protocol):
    """A task that says how sure it is of an embedding."""

    def distribution_of_images(self, batch: Batch) -> Gaussian:
        """One row a study."""

    def distribution_of_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Gaussian:
        """One row a text."""


def parts_of_uncertainty(task: object) -> set[str]:
    """What of an image says how sure the task is of it, as far as the task can say."""
    gaussian = {"image_mean", "image_logvar"} if isinstance(task, GaussianTask) else set()
    return gaussian | ({NORM_PART} if callable(getattr(task, "image_norms", None)) else set())


def parts_of_retrieval(task: object) -> set[str]:
    """What of images and reports is compared: anatomy by anatomy, where the task can."""
    by_anatomy = callable(getattr(task, "embed_anatomy_texts", None))
    return {*ANATOMY_PARTS, *ANATOMY_TEXT_PARTS} if by_anatomy else {"image_embeds", "text_embeds"}


def protocols_in_training(task: type[Task]) -> set[str]:
    """Those that a task can be asked while it trains, of batches that hold its `fields` and nothing else."""

    def has(*methods: str) -> bool:
        return all(callable(getattr(task, name, None)) for name in methods)

    answered = set()
    if has("embed_images", "embed_texts"):
        answered |= {"zero_shot", "uncertainty"}
        if "text_embeds" not in parts_of_retrieval(task) or "input_ids" in task.fields:
            answered.add("retrieval")
    if has("embed_anatomies", "embed_texts"):
        answered.add("anatomy")
    if has("label_logits"):
        answered.add("supervised")
    return answered


@dataclass(frozen=True, kw_only=True)
class EmbeddedSplit:
    """The valid studies of a split, in its order, on the CPU. n = studies, K = labels.

    `image_embeds [n, E]`, `text_embeds [n, E]`, `features [n, D]` are float32, or None where not asked for, and so are
    `image_mean [n, E]`, `image_logvar [n, E]`, `text_logvar [n, E]`, `image_norm [n]`, `anatomy_embeds [n, A, E]`,
    `anatomy_present [n, A]` (1 or 0), `anatomy_text_embeds [n, A, E]`, `anatomy_said [n, A]` (1 or 0),
    `label_logits [n, K]`, but `patch_tokens [n, T, D]` is bfloat16 and `patch_member [n, A, T]` bool;
    `labels [n, K] int8`, `report_key [n]`, `patient_key [n]`, `sample_id [n]` int64 are as in a batch, and so are
    `degradation_grade [n]`, `uncertain_verdicts [n]` and `anatomy_text_key [n, A]`, None where batches lack them.
    """

    image_embeds: Tensor | None
    text_embeds: Tensor | None
    features: Tensor | None
    labels: Tensor
    report_key: Tensor
    patient_key: Tensor
    sample_id: Tensor
    image_mean: Tensor | None = None
    image_logvar: Tensor | None = None
    text_logvar: Tensor | None = None
    image_norm: Tensor | None = None
    anatomy_embeds: Tensor | None = None
    anatomy_present: Tensor | None = None
    patch_tokens: Tensor | None = None
    patch_member: Tensor | None = None
    anatomy_text_embeds: Tensor | None = None
    anatomy_said: Tensor | None = None
    anatomy_text_key: Tensor | None = None
    label_logits: Tensor | None = None
    degradation_grade: Tensor | None = None
    uncertain_verdicts: Tensor | None = None

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
        """One of ALL_PARTS. An evaluator that asks for a part which was not embedded is wrongly wired."""
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

    Parts: all of ALL_PARTS that the task can give; of a GaussianTask, embeddings are its means at unit length, so that
    mean and log-variance cost one pass.
    """
    kept: dict[str, list[Tensor]] = {}
    was_training = getattr(task, "training", False)
    if isinstance(task, torch.nn.Module):
        task.eval()
    try:
        for batch in batches:
            own = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            found = {name: own[name] for name in (*METADATA, *KNOWN_OF_SOME) if name in own}
            with precision(device, autocast):
                found |= _encode(task, own, set(parts))
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


def _encode(task: Encoders, own: Batch, parts: set[str]) -> dict[str, Tensor]:
    """The wanted parts of one batch, float32 but for those of patches, which are many."""
    unknown = parts - set(ALL_PARTS)
    assert not unknown, f"{', '.join(sorted(unknown))}: no part of a split; there are {', '.join(ALL_PARTS)}"
    found: dict[str, Tensor] = {}
    if {"image_mean", "image_logvar"} & parts:
        assert isinstance(task, GaussianTask), f"{type(task).__name__} has no distributions"
        images = task.distribution_of_images(own)
        found |= {"image_mean": images.mean, "image_logvar": images.logvar}
        if "image_embeds" in parts:
            found["image_embeds"] = normalize(images.mean.float(), dim=-1)
    elif "image_embeds" in parts:
        found["image_embeds"] = task.embed_images(own)
    text = (own["input_ids"], own["attention_mask"]) if {"text_embeds", "text_logvar"} & parts else ()
    if "text_logvar" in parts:
        assert isinstance(task, GaussianTask), f"{type(task).__name__} has no distributions"
        texts = task.distribution_of_texts(*text)
        found["text_logvar"] = texts.logvar
        if "text_embeds" in parts:
            found["text_embeds"] = normalize(texts.mean.float(), dim=-1)
    elif "text_embeds" in parts:
        found["text_embeds"] = task.embed_texts(*text)
    if "features" in parts:
        found["features"] = task.image_features(own)
    if NORM_PART in parts:
        found[NORM_PART] = task.image_norms(own)  # type: ignore[attr-defined]
    of_patches: dict[str, Tensor] = {}
    if set(PATCH_PARTS) & parts:
        *anatomies, tokens, member = task.embed_patches(own)  # type: ignore[attr-defined]
        found |= zip(ANATOMY_PARTS, anatomies, strict=True)
        of_patches = {"patch_tokens": tokens.bfloat16(), "patch_member": member}
    elif set(ANATOMY_PARTS) & parts:
        found |= zip(ANATOMY_PARTS, task.embed_anatomies(own), strict=True)  # type: ignore[attr-defined]
    if set(ANATOMY_TEXT_PARTS) & parts:
        found |= zip(ANATOMY_TEXT_PARTS, task.embed_anatomy_texts(own), strict=True)  # type: ignore[attr-defined]
    if LABEL_PART in parts:
        found[LABEL_PART] = task.label_logits(own)  # type: ignore[attr-defined]
    return {name: rows.float() for name, rows in found.items() if name in parts} | of_patches


def precision(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Products in `autocast`; None leaves whatever is set outside, such as the engine's own, as it is."""
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
