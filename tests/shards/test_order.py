"""Properties of the order over random sets: exactly once, independent of ranks, nothing fetched twice, well mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.order import Order, Slots, UnitTable, lanes_of_rank

WORLD_SIZES = (1, 2, 3, 4, 8, 16, 48)


def make_table(units: list[int], chunks_per_shard: int = 4) -> UnitTable:
    count = np.asarray(units)
    number = np.arange(len(units))
    return UnitTable(
        shard=number // chunks_per_shard,
        chunk_in_shard=number % chunks_per_shard,
        units=count,
        first_unit=np.cumsum(count) - count,
        bytes=count * 100_000,
    )


chunk_lists = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.sampled_from([1, 2, 6, 48]))
    per_lane = draw(st.integers(1, 3))
    batch = lanes * per_lane
    sets = draw(st.integers(1, min(3, batch)))
    tables = []
    quotas = [batch // sets] * sets
    quotas[0] += batch - sum(quotas)
    for quota in quotas:
        units = draw(chunk_lists)
        if sum(units) < quota:
            units = [*units, quota]
        tables.append(make_table(units))
    return Order(
        tables,
        global_batch_size=batch,
        seed=draw(st.integers(0, 2**63)),
        lanes=lanes,
        window_chunks=draw(st.integers(1, 9)),
        quotas=quotas,
    )


@settings(max_examples=60, deadline=None)
@given(orders())
def test_every_unit_exactly_once_an_epoch(order: Order):
    epochs = 3
    for set_index, (table, quota) in enumerate(zip(order.tables, order.quotas, strict=True)):
        last_step = (epochs + 1) * table.total // quota  # the carried tail of an epoch is used in the block after it
        if last_step > 400:
            continue
        seen = [order.batch(step) for step in range(last_step)]
        unit = np.concatenate([slots.unit[slots.set_index == set_index] for slots in seen])
        epoch = np.concatenate([slots.epoch[slots.set_index == set_index] for slots in seen])
        chunk = np.concatenate([slots.chunk[slots.set_index == set_index] for slots in seen])
        for number in range(epochs):
            assert sorted(unit[epoch == number]) == list(range(table.total))
        # A unit lies in the chunk that it is said to lie in.
        assert (table.first_unit[chunk] <= unit).all() and (unit < table.first_unit[chunk] + table.units[chunk]).all()
        assert all((slots.set_index == set_index).sum() == quota for slots in seen)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), chunk_lists, st.integers(0, 500), st.booleans())
def test_batches_do_not_depend_on_ranks(seed: int, units: list[int], step: int, mixed: bool):
    tables = [make_table([*units, 96])] + ([make_table([7] * 30)] if mixed else [])
    quotas = [83, 13] if mixed else [96]
    order = Order(tables, global_batch_size=96, seed=seed, quotas=quotas)
    whole = order.batch(step)
    for world_size in WORLD_SIZES:
        parts = [order.batch(step, lanes_of_rank(r, world_size, 48, 96)) for r in range(world_size)]
        for name in ("set_index", "unit", "epoch", "chunk", "lane", "block", "piece"):
            assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(whole, name)).all()


def test_a_step_needs_no_history():
    tables = [make_table([20] * 50)]
    walked = [Order(tables, global_batch_size=96, seed=3).batch(step).unit for step in range(60)]
    fresh = [Order(tables, global_batch_size=96, seed=3).batch(step).unit for step in range(60)]
    jumped = Order(tables, global_batch_size=96, seed=3).batch(59).unit
    assert (walked[59] == jumped).all() and all((a == b).all() for a, b in zip(walked, fresh, strict=True))
    assert (Order(tables, global_batch_size=96, seed=4).batch(59).unit != jumped).any()


@settings(max_examples=20, deadline=None)
@given(orders())
def test_open_pieces_are_bounded_and_of_one_lane(order: Order):
    """So a reader that keeps open pieces fetches no member twice in an epoch, in a buffer of known size."""
    steps = min(300, int(3 * order.steps_per_epoch) + 1)
    rows = [order.batch(step) for step in range(steps)]
    last_of_run = max(int(slots.block.max()) for slots in rows)
    for set_index in range(len(order.tables)):
        lane_of, remaining = {}, {}
        for slots in rows:
            chosen = slots.set_index == set_index
            for block, piece, lane, unit in zip(
                slots.block[chosen], slots.piece[chosen], slots.lane[chosen], slots.unit[chosen], strict=True
            ):
                name = (int(block), int(piece))
                assert lane_of.setdefault(name, lane) == lane
                units = order.block_of_number(set_index, name[0]).units_of(name[1])
                remaining.setdefault(name, set(units.tolist())).remove(int(unit))
            still_open = [lane_of[name] for name, left in remaining.items() if left]
            assert max(np.bincount(still_open), default=0) <= order.window_chunks
        assert all(not left for name, left in remaining.items() if name[0] < min(last_of_run, rows[-1].block.min()))


@settings(max_examples=20, deadline=None)
@given(orders(), st.integers(0, 200))
def test_a_start_knows_what_was_used(order: Order, step: int):
    for set_index in range(len(order.tables)):
        block = order.block_of(set_index, step)
        used = set()
        for slots in (order.batch(s) for s in range(block.first_step, step)):
            mine = slots.take(np.flatnonzero(slots.set_index == set_index))
            used |= set(zip(mine.piece.tolist(), mine.unit.tolist(), strict=True))
        slots = block.consumed(step, np.arange(order.lanes))
        consumed = set(zip(slots.piece.tolist(), slots.unit.tolist(), strict=True))
        assert consumed <= used
        now = order.batch(step)
        touched = set(now.piece[now.set_index == set_index].tolist())
        assert {pair for pair in used if pair[0] in touched} == {pair for pair in consumed if pair[0] in touched}


def distinct_shards(order: Order, steps: int) -> float:
    table = order.tables[0]
    return float(np.mean([len(np.unique(table.shard[order.batch(step).chunk])) for step in range(steps)]))


@pytest.mark.parametrize(
    ("shards", "chunks_per_shard", "units"), [(64, 1, 100), (64, 4, 20), (64, 30, 20), (300, 2, 50)]
)
@pytest.mark.parametrize("batch", [96, 768])
def test_batches_see_nearly_as_many_shards_as_a_full_shuffle(
    shards: int, chunks_per_shard: int, units: int, batch: int
):
    table = make_table([units] * (shards * chunks_per_shard), chunks_per_shard)
    order = Order([table], global_batch_size=batch, seed=1)
    steps = min(40, int(order.steps_per_epoch))
    shard_of_unit = np.repeat(table.shard, table.units)
    generator = np.random.default_rng(0)
    full = np.mean([len(np.unique(generator.choice(shard_of_unit, batch, replace=False))) for _ in range(200)])
    assert distinct_shards(order, steps) >= 0.9 * full


def test_windows_mix_within_and_between_epochs():
    order = Order([make_table([25] * 80)], global_batch_size=48, seed=0, lanes=4, window_chunks=4)
    first, second = [np.concatenate([order.batch(s).unit for s in range(e * 41, e * 41 + 41)]) for e in (0, 1)]
    assert abs(np.corrcoef(first[: len(second)], second[: len(first)])[0, 1]) < 0.1
    steps = np.abs(np.diff(order.batch(3).unit[:12]))
    assert (steps != 1).mean() > 0.8  # neighbours in the tar are not neighbours in the batch


def test_mixture_spreads_each_set_over_the_lanes():
    order = Order([make_table([50] * 9), make_table([50] * 9)], global_batch_size=96, seed=0, quotas=[64, 32])
    assert order.widths[0].min() >= 1 and order.widths[1].max() <= 1
    slots: Slots = order.batch(7)
    assert (slots.set_index == 0).sum() == 64 and (slots.set_index == 1).sum() == 32


def test_misfits_are_refused_with_the_way_out():
    table = make_table([100])
    with pytest.raises(ConfigError, match=r"global_batch_size=100 .* use a batch of 96 or 144"):
        Order([table], global_batch_size=100, seed=0)
    with pytest.raises(
        ConfigError, match=r"world_size=5 does not divide data.lanes=48; use 4 or 6 ranks, or data.lanes=50"
    ):
        lanes_of_rank(0, 5, 48, 96)
    with pytest.raises(ConfigError, match=r"has 100 units, fewer than the 144"):
        Order([table], global_batch_size=144, seed=0)
    with pytest.raises(ConfigError, match=r"quotas \[50, 50\]"):
        Order([table, table], global_batch_size=96, seed=0, quotas=[50, 50])
