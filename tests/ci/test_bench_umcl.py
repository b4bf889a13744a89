"""The UMCL experiment: how runs become figures and a table, and that every contestant is another recipe."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ci.bench.umcl import (
    CLIP_HAND,
    CLIP_PAIRS,
    JUDGED,
    OURS,
    SHARES,
    VARIANTS,
    Row,
    mixture,
    print_rows,
    row_of,
    summary,
)
from configs.schema import apply_overrides, load_recipe

ONE = Row(
    contestant=OURS, seed=0, written=0.70, learned=0.80, paraphrases=0.74, spread=0.01, pushed_apart=0.3, train_s=9.0,
    commit="abc",
)  # fmt: skip


def of(name: str, seed: int, written: float) -> Row:
    return replace(ONE, contestant=name, seed=seed, written=written, learned=math.nan, spread=0.02, pushed_apart=0.5)


def test_figures_are_means_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ONE, replace(ONE, seed=1, learned=0.82)]
    rows += [of(CLIP_PAIRS, 0, 0.70), of(CLIP_PAIRS, 1, 0.78), of(CLIP_HAND, 0, 0.79), of(CLIP_HAND, 1, 0.85)]
    found = {one.id: one for one in summary(rows, 10.0)}
    assert found["umcl.zero_shot_minus_clip_pairs"].value == pytest.approx(0.07)
    assert found["umcl.zero_shot_minus_clip_pairs"].holds is True
    assert found["umcl.zero_shot_minus_clip_hand"].value == pytest.approx(-0.01)
    assert found["umcl.zero_shot_minus_clip_hand"].holds is False
    assert found["umcl.spread_vs_hand"].value == pytest.approx(0.5) and found["umcl.spread_vs_hand"].holds is True
    assert found["umcl.pushed_apart_minus_clip"].value == pytest.approx(-0.2)
    print_rows([*rows, replace(ONE, contestant=next(iter(VARIANTS)))])
    assert next(iter(VARIANTS)) in capsys.readouterr().out


def test_a_row_reads_the_report_of_evaluate() -> None:
    figures = {"written": {"value": 0.7}, "paraphrases_deviation": {"value": 0.02}}
    row = row_of(CLIP_PAIRS, 3, {"wording": {"figures": figures}}, 5.0)
    assert (row.seed, row.zero_shot, row.spread) == (3, 0.7, 0.02) and math.isnan(row.learned)


def test_every_contestant_is_another_recipe() -> None:
    contestants = JUDGED | VARIANTS
    assert len(VARIANTS) == 11
    built = []
    for name, contestant in contestants.items():
        train = mixture(contestant, {kind: Path(kind) for kind in SHARES})
        change = [*contestant.change, f"data.train={json.dumps(train)}"]
        config = apply_overrides(load_recipe(contestant.recipe), change)
        built.append((config.identity(), train))
        assert all(other != built[-1] for other in built[:-1]), name
