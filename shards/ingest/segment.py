"""Masks of volumes that have none, by a segmentation model that is installed apart: TotalSegmentator, `total` task.

Results are kept by the content of volume and model, so that a pack that goes on segments nothing twice.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError
from shards.ingest.nifti import as_nifti, save_nifti
from shards.ingest.volume import Array, Grid, VolumeRefusedError
from shards.ingest.volume_masks import LabelMap, read_labels

MODULE, PACKAGE = "totalsegmentator", "TotalSegmentator"


def _version() -> str:
    try:
        if importlib.util.find_spec(MODULE) is not None:
            return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        pass
    raise ConfigError(f"--segment totalsegmentator: not installed here; run `pip install {PACKAGE}`")


@dataclass(frozen=True, kw_only=True)
class TotalSegmentator:
    """Labels of the class map `totalseg_v2`; `cache` is a folder, made when first written to. Picklable."""

    cache: Path
    version: str = field(default_factory=_version)

    @property
    def name(self) -> str:
        return f"{MODULE} {self.version}"

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the output."""
        return {"model": self.name, "task": "total"}

    def label_map(self, hu: Array, grid: Grid) -> LabelMap:
        """Label ids of an upright volume [D, H, W] int16. Raises VolumeRefusedError where the model fails."""
        digest = hashlib.sha256(repr((self.name, hu.shape, grid.matrix.tolist(), grid.origin.tolist())).encode())
        digest.update(np.ascontiguousarray(hu).data)
        path = self.cache / f"{digest.hexdigest()[:32]}.nii.gz"
        if not path.exists():
            self._segment(hu, grid, path)
        ids, own = read_labels(path)
        return LabelMap(ids=ids, grid=own)

    def _segment(self, hu: Array, grid: Grid, path: Path) -> None:
        run = importlib.import_module(f"{MODULE}.python_api").totalsegmentator
        try:
            made = run(as_nifti(hu, grid), None, task="total", quiet=True)
        except (Exception, SystemExit):  # it leaves the process for a missing licence; messages may name paths
            raise VolumeRefusedError("segmentation failed") from None
        self.cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{os.getpid()}-{path.name}")
        save_nifti(made, unfinished)
        unfinished.replace(path)
