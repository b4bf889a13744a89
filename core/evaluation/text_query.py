"""Views that are nearest to words: what a text query finds, as a picture with the keys of studies and nothing else.

Letters: V = views, E = shared embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.evaluation.pictures import as_image, new_figure
from shards.errors import ConfigError


class TextQuery:
    """The `shown` studies with the view that is nearest to each query, best first."""

    protocol = "query"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`columns` of the picture."""

        shown: int = 12
        columns: int = 4

    def __init__(self, queries: Sequence[str], config: Config | None = None) -> None:
        """Raises ConfigError for a query without a word."""
        if not queries or not all(query.strip() for query in queries):
            raise ConfigError('--query: says nothing; write what to look for, such as "fracture du radius"')
        self.queries, self.config = tuple(queries), config or TextQuery.Config()
        self._pictures: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {}

    def run(
        self, text_embeds: Tensor, view_embeds: Tensor, pixel_values: Tensor, study_index: Tensor, keys: Sequence[str]
    ) -> Iterator[tuple[str, float]]:
        """Yields (number of the query from 1, its highest similarity).

        `text_embeds [queries, E]` and `view_embeds [V, E]` of unit length; `pixel_values [V, C, S, S]`, `study_index
        [V]`, places in `keys` of studies.
        """
        found: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        for number, query in enumerate(self.queries, start=1):
            similarity = (view_embeds @ text_embeds[number - 1]).numpy()
            best: dict[int, int] = {}  # study -> its view
            for view in np.argsort(-similarity, kind="stable").tolist():
                best.setdefault(int(study_index[view]), view)
                if len(best) == self.config.shown:
                    break
            hits = [
                {"study": keys[study], "view": view - int(torch.searchsorted(study_index, study)),
                 "similarity": round(float(similarity[view]), 6)}
                for study, view in best.items()
            ]  # fmt: skip
            self._pictures[str(number)] = self._drawn(pixel_values[list(best.values())], hits)
            found[str(number)] = {"query": query, "found": hits}
            value = float(similarity[next(iter(best.values()))])
            figures[f"{number}: highest similarity"] = {"value": value, "low": None, "high": None}
            yield str(number), value
        self._report = {
            "protocol": self.protocol, "studies": len(keys), "views": len(view_embeds), "figures": figures,
            "queries": found,
        }  # fmt: skip

    def pictures(self) -> dict[str, Tensor]:
        """Number of the query -> picture [3, H, W] of the last run."""
        return self._pictures

    def report(self) -> dict[str, Any]:
        """What the last run found, ready for JSON: keys of studies, numbers of their views, similarities."""
        return self._report

    def _drawn(self, pixels: Tensor, hits: Sequence[dict[str, Any]]) -> Tensor:
        rows = -(-len(hits) // self.config.columns)
        figure = new_figure(2.0 * self.config.columns, 2.2 * rows)
        for place, (image, hit) in enumerate(zip(pixels, hits, strict=True), start=1):
            axes = figure.add_subplot(rows, self.config.columns, place)
            axes.imshow(image.float().mean(dim=0).numpy(), cmap="gray")
            axes.set_title(f"{hit['study'][:12]} / {hit['view']}: {hit['similarity']:.2f}", fontsize=7)
            axes.axis("off")
        return as_image(figure)
