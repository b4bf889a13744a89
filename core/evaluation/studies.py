"""Studies of several views with all that is known of them, in memory, and what a frozen encoder makes of them.

Letters: n = studies, V = images of all of them, K = labels, S = pixels a side, D = width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import precision
from core.models.towers import mean_over_views
from core.models.vision import VisionEncoder
from shards import keyed

Pool = Callable[[Tensor, Tensor, int], Tensor]  # views [V, D], study_index [V], n -> [n, D]: GatedViewPool, or a mean


@dataclass(frozen=True, kw_only=True)
class StudySplit:
    """`pixel_values [V, 1, S, S]` float32, normalised; `study_index [V]` int64, ascending; `labels [n, K]` int8.

    `measurements`: name -> `[n]` float64, NaN where nobody measured. `sex`: F, M, O or None of each study. `groups`:
    attribute -> value of each study. `keys`: of studies, as the data have them. `skipped`: cause -> how many studies or
    views were left out.
    """

    pixel_values: Tensor
    study_index: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    measurements: Mapping[str, np.ndarray]
    sex: tuple[str | None, ...]
    patient_key: Tensor
    groups: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: np.ndarray) -> StudySplit:
        """The studies at these places."""
        pixels, of = self.views_of(chosen)
        return replace(
            self,
            pixel_values=pixels,
            study_index=of,
            labels=self.labels[torch.from_numpy(chosen)],
            measurements={name: values[chosen] for name, values in self.measurements.items()},
            sex=tuple(self.sex[row] for row in chosen),
            patient_key=self.patient_key[torch.from_numpy(chosen)],
            groups={name: tuple(values[row] for row in chosen) for name, values in self.groups.items()},
            keys=tuple(self.keys[row] for row in chosen) if self.keys else (),
        )

    def views_of(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels of all views of the studies at these places, and the place in `chosen` that each belongs to."""
        ends = torch.searchsorted(self.study_index, torch.arange(len(self) + 1))
        ranges = [torch.arange(int(ends[place]), int(ends[place + 1])) for place in chosen.tolist()]
        of = torch.cat([torch.full((len(views),), number) for number, views in enumerate(ranges)])
        return self.pixel_values[torch.cat(ranges)], of


def pool_of(pool: Pool | None) -> Pool:
    """The mean over views, where an encoder has learned none."""
    return mean_over_views if pool is None else pool


@torch.no_grad()
def study_features(
    encoder: VisionEncoder,
    pool: Pool | None,
    split: StudySplit,
    *,
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """`[n, D]` float64 of the frozen encoder, the views of each study pooled."""
    device = encoder.patch.weight.device
    found = []
    for pixels in split.pixel_values.split(batch_size):
        with precision(device, autocast):
            found.append(encoder(pixels.to(device)).pooled.float())
    views = torch.cat(found)
    rows = []
    for start in range(0, len(split), 256):  # a pool's memory is studies times views
        stop = min(start + 256, len(split))
        first, last = torch.searchsorted(split.study_index, torch.tensor([start, stop])).tolist()
        index = (split.study_index[first:last] - start).to(device)
        rows.append(pool_of(pool)(views[first:last], index, stop - start).cpu())
    return torch.cat(rows).double().numpy()


def share_of_known(patient_key: np.ndarray, known: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Places of the studies of this share of the patients of whom it is `known [n]` bool, at least one patient.

    A smaller share's lie within a larger one's of the same seed.
    """
    places = np.flatnonzero(known)
    patients, patient = np.unique(patient_key[places], return_inverse=True)
    if not len(patients):
        return places
    order = np.argsort(keyed.uniform(seed, "transfer: share of labels", patients)[:, 0], kind="stable")
    chosen = np.zeros(len(patients), dtype=bool)
    chosen[order[: max(1, round(share * len(patients)))]] = True
    return places[chosen[patient]]
