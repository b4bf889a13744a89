"""How long the order of a large set takes to compute, and how well its batches mix shards."""

from __future__ import annotations

import multiprocessing
import resource
import time

import numpy as np

from ci.bench.figure import Figure, figure
from shards import keyed
from shards.order import Order, UnitTable

DESCRIPTION = "planning an epoch of 10 million samples; shards seen in a batch against a full shuffle"

BATCH = 768
SAMPLES_PER_CHUNK = 20  # of 100 kB in a chunk of 2 MB
SLICE = 1_000_000


def _table(samples: int, chunks_per_shard: int) -> UnitTable:
    chunks = samples // SAMPLES_PER_CHUNK
    number = np.arange(chunks)
    units = SAMPLES_PER_CHUNK + keyed.integers(-5, 6, 0, "chunk sizes", number)[:, 0]
    rest = samples - int(units.sum())
    units[: abs(rest)] += np.sign(rest)
    return UnitTable(
        shard=number // chunks_per_shard,
        chunk_in_shard=number % chunks_per_shard,
        units=units,
        first_unit=np.cumsum(units) - units,
        bytes=units * 100_000,
    )


def _plan(samples: int) -> tuple[float, float, float]:
    """Seconds to the first batch, seconds to every row of an epoch block, peak memory added in GB."""
    table = _table(samples, 50)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    order = Order([table], global_batch_size=BATCH, seed=0)
    order.batch(0)
    first_s = time.perf_counter() - started
    block = order.block_of(0, 0)
    rows = block.batches * BATCH
    checksum = 0
    for low in range(0, rows, SLICE):
        checksum += int(block.slots_at(np.arange(low, min(low + SLICE, rows))).unit.sum())
    whole_s = time.perf_counter() - started
    if samples % BATCH == 0 and checksum != samples * (samples - 1) // 2:
        raise AssertionError("the planned epoch does not hold every sample once")
    added_gb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) * 1024 / 1e9
    return first_s, whole_s, added_gb


def _shards_seen(shards: int, batch: int, chunks_per_shard: int = 25) -> tuple[float, float]:
    """Mean distinct shards in a batch: ours, and of a full shuffle of the same set."""
    table = _table(shards * chunks_per_shard * SAMPLES_PER_CHUNK, chunks_per_shard)
    order = Order([table], global_batch_size=batch, seed=0)
    steps = min(50, int(order.steps_per_epoch))
    ours = np.mean([len(np.unique(table.shard[order.batch(step).chunk])) for step in range(steps)])
    shuffled = np.repeat(table.shard, table.units)[keyed.permutation(table.total, 0, "full shuffle")]
    full = np.mean([len(np.unique(shuffled[i * batch : (i + 1) * batch])) for i in range(steps)])
    return float(ours), float(full)


def run(quick: bool) -> list[Figure]:
    """Planning in a fresh process three times (median), mixing for 64 to 4,096 shards."""
    samples = 98_304 if quick else 9_999_360  # a multiple of the batch, so that the sum of the plan can be checked
    started = time.perf_counter()
    plans = []
    for _ in range(1 if quick else 3):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            plans.append(pool.apply(_plan, (samples,)))
    first_s, whole_s, added_gb = (float(np.median([plan[i] for plan in plans])) for i in range(3))
    wall_s = time.perf_counter() - started
    figures = []
    for batch in (96, 768):
        for shards in (64, 512, 4096):
            ours, full = _shards_seen(shards, batch)
            judged = (shards, batch) == (64, 768)
            figures.append(
                figure(
                    "order.shards_seen_vs_full_shuffle" if judged else f"order.shards_seen_{shards}_batch_{batch}",
                    ours / full,
                    ours=ours,
                    peer=full,
                    peer_name="full shuffle",
                    unit="ratio",
                    better="higher",
                    threads=1,
                    note=f"{shards} shards, batch {batch}",
                )
            )
    note = f"first batch after {first_s:.2f} s; {samples:,} samples in {samples // SAMPLES_PER_CHUNK:,} chunks"
    repeats = len(plans)
    return [
        *figures,
        figure("order.plan_10m_gb", added_gb, repeats=repeats, threads=1, wall_s=wall_s, note="peak of the process"),
        figure("order.plan_10m_s", whole_s, repeats=repeats, threads=1, wall_s=wall_s, note=note),
    ]
