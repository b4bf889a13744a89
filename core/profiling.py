"""A timeline of some steps of every rank, for Perfetto or chrome://tracing: `trainer.profile_steps=FROM:TO`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.world import World

log = logging.getLogger(__name__)

FOLDER = "profile"


class StepProfiler:
    """Records steps `steps` and writes `profile/steps-FROM-TO-rank-N.json.gz` after the last of them."""

    def __init__(self, folder: Path, world: World, steps: range) -> None:
        self._folder, self._world, self._steps = folder / FOLDER, world, steps
        self._profile: Any = None
        self._first = 0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """One step of training."""
        if step not in self._steps:
            yield
            return
        if self._profile is None:
            self._start(step)
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step + 1 == self._steps.stop:
            self.close(step + 1)

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile, self._first = torch.profiler.profile(activities=activities), step
        self._profile.start()

    def close(self, step: int | None = None) -> None:
        """Write what was recorded, also of steps that were cut short. A full disk costs the timeline only."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        end = self._steps.stop if step is None else step
        path = self._folder / f"steps-{self._first}-{end}-rank-{self._world.rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            log.info("timeline of steps %d to %d: %s", self._first, end - 1, path)
        except (OSError, RuntimeError) as error:
            log.warning("%s: the timeline was not written (%s)", path, type(error).__name__)
