"""Which rank the others wait for, and whether all wait for the store: curves, and an event when it lasts.

Seconds of a rank are its own: those it waits for data, and those from the start of a step to the first exchange with
other ranks. What comes later is spent waiting for each other and tells nothing. (ZeRO 3 exchanges weights before that.)
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable
from typing import Any

import torch

from core.collectives import all_gather_rows
from core.world import World

TIMES_MEDIAN, AT_LEAST_S = 1.5, 0.02  # a rank is slow when it takes so many times the median, and so much longer
SLOW_STORE_SHARE = 0.5  # of a step's time, waited for data by every rank
PATIENCE = 3  # log intervals in a row, before it is said
KINDS = ("compute", "data")


class SlowRanks:
    """Compares the ranks' seconds a step. Collective; every rank learns the same."""

    def __init__(self, world: World, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._world, self._on_event = world, on_event
        self._in_a_row: dict[str, tuple[int | None, int]] = {}
        self._host = socket.gethostname()

    def look(self, step: int, *, compute_s: float, data_s: float, step_s: float) -> dict[str, float]:
        """This rank's mean seconds a step since the last look, and those of the whole step; returns curves."""
        own = torch.tensor([[compute_s, data_s]], dtype=torch.float64, device=self._world.device)
        seconds = all_gather_rows(own).tolist()
        curves: dict[str, float] = {}
        for kind, of_ranks in zip(KINDS, zip(*seconds, strict=True), strict=True):
            median, slowest = statistics.median_low(of_ranks), max(of_ranks)
            rank = of_ranks.index(slowest)
            curves |= {f"ranks/{kind}_median_s": median, f"ranks/{kind}_slowest_s": slowest}
            curves[f"ranks/{kind}_slowest_rank"] = float(rank)
            is_slow = slowest > TIMES_MEDIAN * median and slowest - median > AT_LEAST_S
            if self._lasts(kind, rank if is_slow else None) and self._world.rank == rank:
                self._say("slow_rank", step, of=kind, host=self._host, seconds=slowest, median_s=median)
        all_wait = min(data_s for _, data_s in seconds) > SLOW_STORE_SHARE * max(step_s, 1e-9)
        if self._lasts("store", 0 if all_wait else None) and self._world.is_first:
            self._say("slow_store", step, waited_s=min(data_s for _, data_s in seconds), step_s=step_s)
        return curves

    def _lasts(self, kind: str, who: int | None) -> bool:
        """Whether it is the same one `PATIENCE` times in a row now; once."""
        before, count = self._in_a_row.get(kind, (None, 0))
        count = count + 1 if who is not None and who == before else int(who is not None)
        self._in_a_row[kind] = (who, count)
        return count == PATIENCE

    def _say(self, event: str, step: int, **values: Any) -> None:
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
        self._on_event({"event": event, "step": step, **rounded})
