"""The ablations of ECAMP's experiment are settings of its recipe; a gain counts by the lower end of its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ci.bench import ecamp, ecamp_step
from ci.bench.figure import bars
from configs.schema import apply_overrides, load_recipe, to_json
from core.tasks.ecamp import ECAMP


def test_every_contestant_is_a_setting_of_its_own() -> None:
    seen = [
        to_json(apply_overrides(load_recipe(recipe), change))
        for recipe, change in (ecamp.JUDGED | ecamp.VARIANTS).values()
    ]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert len({(one["seed"], one["trainer"]["steps"], one["global_batch_size"]) for one in seen}) == 1


def test_intervals_and_figures() -> None:
    gains = [0.01, 0.03, 0.05, 0.02, 0.04]
    low, mean, high = ecamp.interval(gains)
    expected = stats.t.interval(0.95, 4, loc=np.mean(gains), scale=stats.sem(gains))
    assert (low, high) == pytest.approx(expected) and mean == pytest.approx(0.03)
    half = 4.3027 * 0.02 / 3**0.5  # of two degrees of freedom, as tables have it
    assert ecamp.interval(gains[:3]) == pytest.approx((0.03 - half, 0.03, 0.03 + half), abs=1e-5)

    def row(name: str, seed: int, probe: float) -> ecamp.Row:
        return ecamp.Row(contestant=name, seed=seed, probe=probe, dice=0.5 + probe / 10, train_s=1.0, commit="c")

    rows = [
        row(name, seed, 0.7 + gain * (name == ecamp.OURS)) for name in ecamp.JUDGED for seed, gain in enumerate(gains)
    ]
    figures = {one.id: one for one in ecamp.summary(rows, 1.0)}
    assert set(figures) == {name for name in bars() if name.startswith("ecamp.")}
    judged = figures["ecamp.probe1_minus_mae"]
    wider = stats.t.interval(0.975, 4, loc=np.mean(gains), scale=stats.sem(gains))  # two looks were taken
    assert judged.value == pytest.approx(wider[0]) and wider[0] < low and judged.holds is bool(wider[0] >= 0)
    assert f"5 seeds: +0.0300 ({low:+.4f} to {high:+.4f})" in judged.note
    assert "the first 3 alone: +0.0300 (-0.0197 to +0.0797)" in judged.note


def test_equal_time_gives_mae_as_many_more_steps_as_its_steps_are_cheaper() -> None:
    def row(name: str, seed: int, probe: float, train_s: float) -> ecamp.Row:
        return ecamp.Row(contestant=name, seed=seed, probe=probe, dice=probe / 2, train_s=train_s, commit="c")

    rows = [row(ecamp.OURS, seed, 0.7 + seed / 100, 300.0 + 30 * seed) for seed in range(3)]
    rows += [row(ecamp.MAE, seed, 0.6, 100.0) for seed in range(3)]
    assert [ecamp.equal_time_steps(rows, seed, 1500) for seed in range(3)] == [4500, 4950, 5400]
    rows += [row(ecamp.EQUAL_TIME, seed, 0.65, 330.0) for seed in range(3)]
    line = ecamp.equal_time_line(rows)
    low, mean, high = ecamp.interval([0.05, 0.06, 0.07])
    assert f"probe {mean:+.3f} ({low:+.3f} to {high:+.3f}), Dice +0.030" in line
    assert line.endswith("330 s against 330 s of a rank")


def test_both_contestants_of_the_step_are_given_the_same_words() -> None:
    contestant = ecamp_step.Contestant(system="ours", depth=1, text_depth=1, image_size=32)
    _, ids, real, masked = ecamp_step._inputs(contestant)
    assert real.sum(dim=1).tolist() == contestant.lengths.tolist() and contestant.lengths.max() <= ecamp_step.TOKENS
    assert not (masked & ~real).any() and not ids[~real].any()
    batch = ecamp_step.our_batch(contestant)
    assert set(ECAMP.fields) == set(batch) and (batch["input_ids"] == ids[:, : batch["input_ids"].shape[1]]).all()
