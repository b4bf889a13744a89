"""The D-MLM experiment: how runs become figures and a table, and that every variant is a recipe that can be built."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ci.bench.dmlm import CLIP, DMLM, VARIANTS, Row, print_rows, row_of, summary
from configs.schema import apply_overrides, load_recipe

ONE = Row(
    variant=DMLM, seed=0, zero_shot=0.70, degraded=0.84, degraded_normal=0.9, degraded_abnormal=0.8,
    degraded_max_probability=0.6, area_logvar=0.15, area_max_probability=0.20, area_fitted_probability=0.14,
    area_oracle=0.1, logvar_spread=0.3, train_s=200.0, commit="abc",
)  # fmt: skip


def of_clip(seed: int, zero_shot: float) -> Row:
    return replace(ONE, variant=CLIP, seed=seed, zero_shot=zero_shot, degraded=math.nan, area_logvar=math.nan)


def test_figures_are_of_all_seeds_and_worst_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    second = replace(ONE, seed=1, degraded=0.60, zero_shot=0.74, area_logvar=0.25)
    rows = [of_clip(0, 0.71), ONE, of_clip(1, 0.75), second, replace(ONE, variant="no forecast", degraded=0.1)]
    found = {one.id: one for one in summary(rows, 10.0)}
    assert found["dmlm.degraded_auc"].value == pytest.approx(0.72)
    assert found["dmlm.degraded_auc"].holds is False and "0.840, 0.600" in found["dmlm.degraded_auc"].note
    assert found["dmlm.degraded_auc_worst_seed"].value == 0.60
    assert found["dmlm.zero_shot_minus_clip"].value == pytest.approx(-0.01)
    assert found["dmlm.zero_shot_minus_clip"].holds is True
    assert found["dmlm.risk_coverage_gain"].value == pytest.approx(0.0)
    assert found["dmlm.risk_coverage_gain"].seeds == (0, 1)
    print_rows(rows)
    shown = capsys.readouterr().out
    assert shown.count("dmlm") == 2 and "no forecast" in shown


def test_a_row_reads_the_reports_of_evaluate() -> None:
    figures = {"degraded_auc": {"value": 0.8}, "area_logvar": {"value": None}}
    reports = {"zero_shot": {"macro": {"value": 0.7}}, "uncertainty": {"figures": figures}}
    row = row_of(DMLM, 3, reports, 5.0)
    assert (row.seed, row.zero_shot, row.degraded) == (3, 0.7, 0.8)
    assert math.isnan(row.area_logvar) and math.isnan(row.gain)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_recipe(name: str) -> None:
    recipe = load_recipe("chest:dmlm_tiny")
    changed = apply_overrides(recipe, VARIANTS[name])
    assert changed.identity() != recipe.identity()
    changed.task.build(vocab_size=30)
