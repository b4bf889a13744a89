"""Does an embedding tell which set a study is from? Then it has learned hospitals and scanners, too (umcl.md 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import EmbeddedSplit
from core.evaluation.probe import LinearProbe
from shards import keyed


class SetIdentity:
    """AUC of a linear probe of frozen image embeddings for each training set against the others, and their mean.

    0.5 tells nothing apart. Sets differ in diseases as well, so a high figure is a warning and no proof; figures of
    encoders on the same sets compare. Half of each set's patients teach and choose, the other half is tested.
    """

    protocol = "set_identity"

    def __init__(self, config: LinearProbe.Config | None = None) -> None:
        self._probe = LinearProbe(config)
        self._report: dict[str, Any] = {}

    def run(
        self, sets: Mapping[str, EmbeddedSplit], on_fit: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[str, float]]:
        """Yields (set, AUC) and ("macro", their mean). `sets`: name -> its studies with `image_embeds`, two or more."""
        seed = self._probe.config.seed
        halves: tuple[list[EmbeddedSplit], list[EmbeddedSplit]] = ([], [])
        for number, of in enumerate(sets.values()):
            # Patients of different sets may have equal keys by chance of their names, and are different people.
            hashes = keyed.hash_u64(seed, "set identity", number, of.patient_key.numpy()) >> np.uint64(1)
            patients = torch.from_numpy(hashes.astype(np.int64))
            labels = torch.zeros(len(of), len(sets), dtype=torch.int8)
            labels[:, number] = 1
            mine = torch.from_numpy(keyed.uniform(seed, "set identity: tested", patients.numpy())[:, 0] < 0.5)
            features = of.need("image_embeds")
            for half, chosen in zip(halves, (~mine, mine), strict=True):
                half.append(_studies(features[chosen], labels[chosen], patients[chosen]))
        train, test = (_joined(half) for half in halves)
        yield from self._probe.run(train, None, test, list(sets), on_fit)
        self._report = self._probe.report() | {"protocol": self.protocol}

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: what a linear probe reports."""
        return self._report


def _studies(features: Tensor, labels: Tensor, patients: Tensor) -> EmbeddedSplit:
    return EmbeddedSplit(
        image_embeds=None, text_embeds=None, features=features, labels=labels,
        report_key=torch.arange(len(labels)), patient_key=patients, sample_id=torch.arange(len(labels)),
    )  # fmt: skip


def _joined(parts: list[EmbeddedSplit]) -> EmbeddedSplit:
    return _studies(
        torch.cat([part.need("features") for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.patient_key for part in parts]),
    )
