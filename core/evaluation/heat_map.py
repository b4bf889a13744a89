"""Where in an anatomy the score of a disease comes from: slices of a volume with a map over them.

What is drawn for each place is the slope of the score by the emphasis that the pool puts on it: its weight in the
anatomy times what its value says beyond what the other places of the anatomy say. It is exact for the pool, adds up to
0 over an anatomy, and is what the score is made of. The similarity of single tokens with a prompt is not: no token was
ever compared with a text, and tokens without attention would glow. A map says what the model looked at within the
anatomy, not that the finding is there: blocks of the encoder have mixed patches before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.evaluation.embed import precision
from core.evaluation.pictures import as_image, new_figure
from shards.batch import Batch

SLICES, COLUMNS = 8, 4


class Explained(Protocol):
    """A task that can say where its scores come from."""

    def evidence(self, batch: Batch, place: Sequence[int], directions: Tensor) -> tuple[Tensor, Tensor]:
        """`[V, K, F]` of the places that shares are counted in, and scores `[V, K]`.

        `directions [E, K]`, `place [K]` of anatomies.
        """


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One anatomy of one volume: `shown [D, H, W]` grey, `evidence [D, H, W]`, `inside [D, H, W]` bool the anatomy."""

    shown: np.ndarray
    evidence: np.ndarray
    inside: np.ndarray
    title: str

    def slices(self) -> list[int]:
        """Up to SLICES slices spread over the anatomy from the feet up, that with most evidence among them."""
        where = np.flatnonzero(self.inside.any(axis=(1, 2)))
        picked = np.unique(np.linspace(where[0], where[-1], SLICES).round().astype(int))
        most = self.evidence[self.inside].max()
        # Evidence is alike in all voxels of a place: of the slices of the best one, that which has most of it.
        peak = np.argmax((self.inside & (self.evidence == most)).sum(axis=(1, 2)))
        picked[np.argmin(np.abs(picked - peak))] = peak
        return [int(number) for number in picked]

    def draw(self) -> Tensor:
        """[3, H, W] in [0, 1]: slices as a radiologist has them, front up and the patient's right on the left."""
        numbers = self.slices()
        rows, columns = self._window()
        columns_drawn = min(COLUMNS, len(numbers))
        lines = -(-len(numbers) // columns_drawn)
        figure = new_figure(2.6 * columns_drawn + 1.0, 2.7 * lines + 0.5)
        axes = figure.subplots(lines, columns_drawn, squeeze=False)
        limit = float(np.abs(self.evidence[self.inside]).max()) or 1.0
        peak = float(self.evidence[self.inside].max())
        drawn = None
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, number in zip(axes.flat, numbers, strict=False):
            grey, heat, inside = (
                volume[number, rows, columns][::-1, ::-1] for volume in (self.shown, self.evidence, self.inside)
            )
            axis.imshow(grey, cmap="gray", vmin=self.shown.min(), vmax=self.shown.max())
            alpha = np.where(inside, 0.65 * np.abs(heat) / limit, 0.0)
            drawn = axis.imshow(heat, cmap="coolwarm", vmin=-limit, vmax=limit, alpha=alpha, interpolation="nearest")
            if inside.any() and not inside.all():
                axis.contour(inside, levels=[0.5], colors="yellow", linewidths=0.7)
            most = " (peak)" if np.where(inside, heat, -np.inf).max() == peak else ""
            axis.set_title(f"slice {number}{most}", fontsize=8)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("for absence  <-  part in the score  ->  for presence", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        figure.suptitle(self.title, fontsize=10)
        return as_image(figure)

    def _window(self) -> tuple[slice, slice]:
        """Rows and columns around the anatomy, with a rim of a quarter of it."""
        found = []
        for axis, side in ((1, self.inside.shape[1]), (2, self.inside.shape[2])):
            where = np.flatnonzero(self.inside.any(axis=tuple(one for one in range(3) if one != axis)))
            rim = max(4, (where[-1] - where[0] + 1) // 4)
            found.append(slice(max(0, where[0] - rim), min(side, where[-1] + 1 + rim)))
        return found[0], found[1]


class HeatMaps:
    """For each disease, the first study of the batches that has it and shows its anatomy: none is picked by hand."""

    def __init__(self, names: Sequence[str], anatomy_of: Mapping[str, str], anatomies: Sequence[str]) -> None:
        """`names`: labels, each with an anatomy among the model's `anatomies`."""
        self.names, self.anatomies = list(names), list(anatomies)
        self.place = [self.anatomies.index(anatomy_of[name]) for name in names]

    @staticmethod
    def name_of(label: str) -> str:
        """Of a label's picture."""
        return f"anatomy/heat_map/{label.replace(' ', '_')}"

    @torch.no_grad()
    def run(
        self,
        task: Explained,
        directions: Tensor,
        batches: Iterable[Batch],
        labels: Sequence[str],
        size_of_place: tuple[int, int, int],
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields (label, picture [3, H, W] in [0, 1]), until each label has one.

        `directions [E, K]` of the labels; `size_of_place`: voxels that a share is counted in; `labels` name the columns
        of the batches' labels; batches have `anatomy_labels`.
        """
        wanted = list(range(len(self.names)))
        for batch in batches:
            places = {k: self._first(batch, labels, k) for k in wanted}
            chosen = {k: view for k, view in places.items() if view is not None}
            if chosen:
                own = {name: tensor.to(device) for name, tensor in batch.items()}
                with precision(device, autocast):
                    evidence, score = task.evidence(own, self.place, directions.to(device))
                for k, view in chosen.items():
                    yield (
                        self.names[k],
                        self._map(batch, k, view, evidence[view, k], float(score[view, k]), size_of_place),
                    )
            wanted = [k for k in wanted if k not in chosen]
            if not wanted:
                return

    def _first(self, batch: Batch, labels: Sequence[str], k: int) -> int | None:
        """The first view of a study with label k that shows its anatomy whole."""
        has = (batch["labels"][:, list(labels).index(self.names[k])] == 1) & batch["valid"]
        shows = has[batch["study_index"]] & batch["anatomy_intact"][:, self.place[k]]
        views = shows.nonzero().flatten().tolist()
        return views[0] if views else None

    def _map(
        self, batch: Batch, k: int, view: int, evidence: Tensor, score: float, size_of_place: tuple[int, int, int]
    ) -> Tensor:
        channels = batch["pixel_values"][view].float().cpu().numpy()  # [C, D, H, W]
        inside = (batch["anatomy_labels"][view] == self.place[k] + 1).cpu().numpy()
        name = self.names[k]
        anatomy = self.anatomies[self.place[k]].replace("_", " ")
        # The window in which this anatomy has most contrast.
        contrast = [float(channel[inside].std()) for channel in channels]
        return HeatMap(
            shown=channels[int(np.argmax(contrast))],
            evidence=of_voxels(evidence.float().cpu().numpy(), inside.shape, size_of_place),
            inside=inside,
            title=f"{name} in {anatomy}: score {score:+.3f}; the study has it",
        ).draw()


def of_voxels(places: np.ndarray, size: Sequence[int], size_of_place: Sequence[int]) -> np.ndarray:
    """`[F]` of places in rows of z, y, x -> `[D, H, W]`, each voxel its place's."""
    grid = places.reshape([side // part for side, part in zip(size, size_of_place, strict=True)])
    for axis, part in enumerate(size_of_place):
        grid = np.repeat(grid, part, axis=axis)
    return grid
