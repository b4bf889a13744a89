"""Pictures of a split for evaluate.py: a map of its studies, and the views that a text query finds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import precision
from core.evaluation.latent_map import LatentMap
from core.evaluation.studies import StudySplit
from core.evaluation.targets import target_named
from core.evaluation.text_query import TextQuery
from launchers.past_run import PastRun
from launchers.transfer_study_data import read_studies
from shards.batch import Batch

AT_ONCE = 64  # studies or views
Progress = Callable[[str, int, int], None]


def read_split(run: PastRun, url: str, split: str, limit: int, progress: Progress) -> StudySplit:
    """Studies as the run's encoder wants them, with what is known of each."""
    device: Literal["mixed", "cpu"] = "mixed" if run.device.type == "cuda" else "cpu"
    decode = replace(run.decode, device=device, threads=os.cpu_count() or 1)
    return read_studies(url, split, decode, limit=limit, progress=progress)


@torch.no_grad()
def study_vectors(run: PastRun, split: StudySplit, of: Callable[[Batch], Tensor]) -> Tensor:
    """`of` a batch of studies, for all studies, float32 on the CPU."""
    found = []
    for start in range(0, len(split), AT_ONCE):
        chosen = np.arange(start, min(start + AT_ONCE, len(split)))
        pixels, index = split.views_of(chosen)
        batch: Batch = {
            "pixel_values": pixels, "study_index": index, "valid": torch.ones(len(chosen), dtype=torch.bool),
        }  # fmt: skip
        with precision(run.device, run.autocast):
            found.append(of({name: tensor.to(run.device) for name, tensor in batch.items()}).float().cpu())
    return torch.cat(found)


def attributes_of(split: StudySplit) -> Mapping[str, tuple[str | None, ...]]:
    """What a map may be coloured by: groups, labels, and grades; ages and angles come in bands of their quarters."""
    words = {0: "absent", 1: "present"}
    found: dict[str, tuple[str | None, ...]] = dict(split.groups)
    for column, name in enumerate(split.label_names):
        found[name] = tuple(words.get(int(value)) for value in split.labels[:, column])
    for name, values in split.measurements.items():
        known = np.isfinite(values)
        if target_named(name, split).kind == "grade":
            found[name] = tuple(f"{value:g}" if ok else None for value, ok in zip(values, known, strict=True))
        elif known.any():
            ends = np.quantile(values[known], [0.0, 0.25, 0.5, 0.75, 1.0])
            band = np.searchsorted(ends[1:-1], values, "right")
            found[name] = tuple(
                f"{one + 1}: {ends[one]:g} to {ends[one + 1]:g}" if ok else None
                for one, ok in zip(band.tolist(), known, strict=True)
            )
    return found


def ask_map(run: PastRun, split: StudySplit, seed: int) -> tuple[LatentMap, dict[str, float]]:
    """(the map, its figures)."""
    asked = LatentMap(LatentMap.Config(seed=seed))
    features = study_vectors(run, split, run.task.image_features)  # type: ignore[arg-type]
    scores = asked.run(features.double().numpy(), attributes_of(split), split.patient_key.numpy())
    return asked, dict(scores)


@torch.no_grad()
def ask_query(run: PastRun, split: StudySplit, queries: tuple[str, ...]) -> tuple[TextQuery, dict[str, float]]:
    """(what the queries found, their figures). Raises ConfigError for a query without a word."""
    asked = TextQuery(queries)
    # Each view counts for itself, as a study of its own.
    alone = replace(split, study_index=torch.arange(len(split.study_index)), labels=split.labels[split.study_index])
    views = study_vectors(run, alone, run.encoders.embed_images)
    ids, mask = run.tokenizer.encode(list(queries), run.text_length)
    with precision(run.device, run.autocast):
        texts = run.encoders.embed_texts(ids.to(run.device), mask.to(run.device)).float().cpu()
    return asked, dict(asked.run(texts, views, split.pixel_values, split.study_index, split.keys))
