"""The table of real images: which encoders and sets, and how a report becomes figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ci.bench import transfer
from configs.schema import load_recipe
from shards.ingest.table import TableMapping


def test_every_tiny_recipe_is_judged() -> None:
    assert {"clip_tiny", "siglip_tiny", "dmlm_tiny"} <= set(transfer.RECIPES)
    for name in transfer.RECIPES:
        load_recipe(f"chest:{name}")


def test_arrays_become_a_table_in_their_own_splits(tmp_path: Path) -> None:
    parts = {"train": 3, "val": 2, "test": 1}
    arrays = {f"{part}_images": np.full((count, 28, 28), 7, np.uint8) for part, count in parts.items()}
    arrays |= {f"{part}_labels": np.arange(count)[:, None] % 2 for part, count in parts.items()}
    np.savez(tmp_path / "set.npz", **arrays)
    table = transfer.as_table(tmp_path / "set.npz", tmp_path / "table")
    rows = (table / "labels.csv").read_text().split()
    assert rows[1:] and len(list((table / "images").iterdir())) == 6
    assert sum("validation" in row for row in (table / "labels.csv").read_text().splitlines()) == 2
    assert TableMapping.read(table / "mapping.toml").columns.split == "split"


def test_a_report_becomes_figures() -> None:
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8}
    of = {"figure": "macro AUC", "seeds": 3, "figures": {"clip_tiny": estimate, "random": dict.fromkeys(estimate)}}
    report = {"tasks": {"fine_tune": {"10": of}}, "images": {"test": 150}}
    found = {one.id: one for one in transfer.figures_of("nih_cxr", "fine_tune", report, 1.0)}
    ours = found["transfer.nih_cxr.fine_tune_10.clip_tiny"]
    assert ours.value == 0.7 and ours.holds is None and "0.600 to 0.800, 150 images" in ours.note
    assert math.isnan(found["transfer.nih_cxr.fine_tune_10.random"].value)
