"""The order of samples: (manifest, recipe, seed, step) -> slots of the global batch. Pure NumPy, no state, no queue.

It knows lanes but never the number of ranks: a rank is given some of the lanes and sees some of the rows. Definitions
(design, section 3), for a set of N units of which every global batch takes `quota`:

    X       = perm(0) ++ perm(1) ++ ...      perm(p): all units, chunks permuted by (seed, p), units inside in order
    block e = X[quota * floor(e N / quota) : quota * floor((e + 1) N / quota)]
    lane l  = the l-th contiguous part of a block; a batch takes `widths[l]` units of it
    window  = some neighbouring chunk pieces of one lane; the units of a window are permuted among themselves

A unit is a study, or an image where the recipe samples every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards import keyed
from shards.errors import ConfigError
from shards.manifest import Manifest

# A window's permutation sorts one uint64 a unit: window number, hash, place in the window.
_WINDOW_BITS, _HASH_BITS, _PLACE_BITS = 20, 24, 20


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitTable:
    """The chunks of a set, in manifest order, columns int64 [C]; `first_unit` counts through the whole set."""

    shard: np.ndarray
    chunk_in_shard: np.ndarray
    units: np.ndarray
    first_unit: np.ndarray
    bytes: np.ndarray

    @property
    def total(self) -> int:
        return int(self.first_unit[-1] + self.units[-1])

    def chunk_of(self, units: np.ndarray) -> np.ndarray:
        """The chunk that each unit [n] lies in."""
        return np.searchsorted(self.first_unit, units, "right") - 1

    @classmethod
    def of(cls, manifest: Manifest, *, every_image: bool = False) -> UnitTable:
        """Units are studies, or images if `every_image`."""
        tables = [shard.chunks for shard in manifest.shards]
        units = np.concatenate([table.images if every_image else table.samples for table in tables])
        return cls(
            shard=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
            chunk_in_shard=np.concatenate([np.arange(len(table)) for table in tables]),
            units=units,
            first_unit=np.cumsum(units) - units,
            bytes=np.concatenate([table.bytes for table in tables]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Rows of a global batch, columns int64 [n], in batch order.

    `unit` counts through the set and is the sample id that random choices are keyed by; `epoch` is the perm() it comes
    from; `chunk` a row of the UnitTable; `piece` numbers the chunk pieces of (set, block): a piece lies in one lane and
    one window, so (set, block, piece) names what one reader fetches together.
    """

    set_index: np.ndarray
    epoch: np.ndarray
    unit: np.ndarray
    chunk: np.ndarray
    lane: np.ndarray
    block: np.ndarray
    piece: np.ndarray

    def __len__(self) -> int:
        return len(self.unit)

    def take(self, rows: np.ndarray) -> Slots:
        return Slots(**{name: getattr(self, name)[rows] for name in SLOT_COLUMNS})


SLOT_COLUMNS = ("set_index", "epoch", "unit", "chunk", "lane", "block", "piece")


class Block:
    """One epoch block of one set, cut into lanes, chunk pieces and windows. `batches` of it make the block."""

    def __init__(
        self, table: UnitTable, widths: np.ndarray, window_chunks: int, seed: int, set_index: int, number: int
    ):
        quota, total = int(widths.sum()), table.total
        start = quota * (number * total // quota)
        stop = quota * ((number + 1) * total // quota)
        self.number, self.seed, self.set_index, self.table = number, seed, set_index, table
        self.first_step = start // quota
        self.batches = (stop - start) // quota

        # Chunk pieces in the order of X, first those the block before left over, then this epoch's. Piece bounds are
        # counted from the start of the block; `shift` turns such a position into a unit of the set.
        bounds, chunks, shifts, epochs = [], [], [], []
        for epoch in (number - 1, number):
            low, high = max(start, epoch * total), min(stop, (epoch + 1) * total)
            if epoch < 0 or low >= high:
                continue
            order = keyed.permutation(len(table.units), seed, "chunks", set_index, epoch)
            ends = np.cumsum(table.units[order]) + epoch * total
            inside = slice(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "left") + 1)
            order, ends = order[inside], ends[inside]
            begins = ends - table.units[order]
            bounds.append(np.maximum(begins, low) - start)
            shifts.append(table.first_unit[order] - (begins - start))
            chunks.append(order)
            epochs.append(np.full(len(order), epoch))
        piece_start = np.concatenate(bounds)

        # Lane borders cut pieces too. Both lists ascend, so no sorting (nor hashing, as np.union1d does) is needed.
        lane_start = self.batches * (np.cumsum(widths) - widths)
        # A chunk of no units starts where the next one does.
        distinct = piece_start[np.append(np.diff(piece_start) > 0, True)]
        borders = lane_start[widths > 0]
        place = np.searchsorted(distinct, borders)
        missing = distinct[np.minimum(place, len(distinct) - 1)] != borders
        self.piece_start = np.insert(distinct, place[missing], borders[missing])
        source = np.searchsorted(piece_start, self.piece_start, "right") - 1
        self.piece_chunk = np.concatenate(chunks)[source]
        self.piece_shift = np.concatenate(shifts)[source]
        self.piece_epoch = np.concatenate(epochs)[source]
        used_lanes = np.flatnonzero(widths)
        lane = used_lanes[np.searchsorted(lane_start[used_lanes], self.piece_start, "right") - 1]

        # Windows: `window_chunks` pieces of a lane, the first one shorter by a phase that differs between neighbours,
        # so that lanes do not reach new windows together.
        piece_of_lane = np.arange(len(lane)) - np.searchsorted(lane, lane, "left")
        phase = lane % window_chunks
        new_window = (piece_of_lane == 0) | ((piece_of_lane + phase) % window_chunks == 0)
        self.window_start = self.piece_start[new_window]
        self.window_lane = lane[new_window]
        self.window_units = np.diff(np.append(self.window_start, stop - start))
        self.window_pieces = np.diff(np.append(np.flatnonzero(new_window), len(lane)))
        self.lane_start, self.widths = lane_start, widths
        self.piece_units = np.diff(np.append(self.piece_start, stop - start))
        if self.window_units.max(initial=0) >> _PLACE_BITS:
            raise ConfigError(
                f"a window holds {self.window_units.max()} units, at most {1 << _PLACE_BITS} can be permuted; "
                "lower data.window_chunks or pack smaller chunks"
            )

    def positions(self, step: int, lanes: np.ndarray) -> np.ndarray:
        """Places in the block that the batch of `step` takes from `lanes`, lane by lane. int64 [n]"""
        widths = self.widths[lanes]
        offset = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
        return np.repeat(self.lane_start[lanes] + (step - self.first_step) * widths, widths) + offset

    def consumed(self, step: int, lanes: np.ndarray) -> Slots:
        """Rows of still open windows that batches before `step` have used: what a reader starting there leaves out."""
        used = lanes[self.widths[lanes] > 0]
        now = self.lane_start[used] + (step - self.first_step) * self.widths[used]
        begin = self.window_start[np.searchsorted(self.window_start, now, "right") - 1]
        positions = [np.arange(a, b) for a, b in zip(begin, now, strict=True)]
        return self.slots_at(np.concatenate([np.empty(0, dtype=np.int64), *positions]))

    def units_of(self, piece: int) -> np.ndarray:
        """Units of a piece in tar order. int64 [units]"""
        first = self.piece_start[piece] + self.piece_shift[piece]
        return np.arange(first, first + self.piece_units[piece])

    def slots_at(self, positions: np.ndarray) -> Slots:
        """What stands at these places, which increase, after the windows are permuted."""
        window = np.searchsorted(self.window_start, positions, "right") - 1
        is_new = np.diff(window, prepend=-1) != 0
        needed, row = window[is_new], np.cumsum(is_new) - 1
        source, piece = self._permuted(needed)
        base = np.cumsum(self.window_units[needed]) - self.window_units[needed] - self.window_start[needed]
        place = base[row] + positions
        source, piece = source[place], piece[place]
        return Slots(
            set_index=np.full(len(positions), self.set_index),
            epoch=self.piece_epoch[piece],
            unit=source + self.piece_shift[piece],
            chunk=self.piece_chunk[piece],
            lane=self.window_lane[window],
            block=np.full(len(positions), self.number),
            piece=piece,
        )

    def _permuted(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the block, each window permuted in itself, and the pieces they lie in; both [units]."""
        units = self.window_units[windows]
        if len(windows) >> _WINDOW_BITS:
            raise ValueError(f"{len(windows)} windows at once, at most {1 << _WINDOW_BITS} can be sorted together")
        start = np.repeat(np.cumsum(units) - units, units)
        place = np.arange(len(start)) - start
        window_start = np.repeat(self.window_start[windows], units)
        random = keyed.hash_u64(self.seed, "window", self.set_index, self.number, window_start + place)
        # Sorted as one number: window, then hash, then place.
        word = np.repeat(np.arange(len(windows), dtype=np.uint64) << np.uint64(_HASH_BITS + _PLACE_BITS), units)
        word |= (random >> np.uint64(64 - _HASH_BITS)) << np.uint64(_PLACE_BITS)
        word |= place.view(np.uint64)
        word.sort()
        word &= np.uint64((1 << _PLACE_BITS) - 1)
        place = word.view(np.int64)
        first_piece = np.searchsorted(self.piece_start, self.window_start[windows])
        pieces = self.window_pieces[windows]
        piece = np.arange(int(pieces.sum())) + np.repeat(first_piece - np.cumsum(pieces) + pieces, pieces)
        piece = np.repeat(piece, self.piece_units[piece])
        return window_start + place, piece[start + place]


class Order:
    """The order of one run. Raises ConfigError where sets, quotas, lanes and batch do not fit together."""

    def __init__(
        self,
        tables: Sequence[UnitTable],
        *,
        global_batch_size: int,
        seed: int,
        lanes: int = 48,
        window_chunks: int | None = None,
        quotas: Sequence[int] | None = None,
    ):
        if global_batch_size % lanes:
            near = [max(1, global_batch_size // lanes) * lanes, (global_batch_size // lanes + 1) * lanes]
            divisors = [d for d in range(1, global_batch_size + 1) if global_batch_size % d == 0]
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not divisible by data.lanes={lanes}; use a batch of "
                f"{near[0]} or {near[1]}, or data.lanes={min(divisors, key=lambda d: abs(d - lanes))}"
            )
        self.quotas = list(quotas) if quotas is not None else [global_batch_size]
        if len(self.quotas) != len(tables) or sum(self.quotas) != global_batch_size or min(self.quotas) < 1:
            raise ConfigError(
                f"quotas {self.quotas} of {len(tables)} sets must be positive and add up to "
                f"global_batch_size={global_batch_size}"
            )
        for index, (table, quota) in enumerate(zip(tables, self.quotas, strict=True)):
            if table.total < quota:
                raise ConfigError(
                    f"set {index} has {table.total} units, fewer than the {quota} that one global batch takes of it; "
                    "use a smaller global_batch_size or quota, or more data"
                )
        self.tables, self.lanes, self.seed = list(tables), lanes, seed
        self.global_batch_size = global_batch_size
        # A batch draws its rows from lanes * window_chunks open chunks. Six open chunks for every row make it meet 0.92
        # of the shards that a full shuffle would, however many there are: x (1 - exp(-1/x)) at x = 6.
        self.window_chunks = window_chunks or 6 * (global_batch_size // lanes)

        # Which set each slot of a batch belongs to: the set whose share is furthest behind is due. The pattern is the
        # same for every batch, so a set's slots before any step are a product and integer quotas are exact.
        wanted = np.asarray(self.quotas) / global_batch_size
        given = np.zeros(len(tables))
        self.pattern = np.empty(global_batch_size, dtype=np.int64)
        for slot in range(global_batch_size):
            due = int(np.argmax(np.round((slot + 1) * wanted - given, 9)))
            self.pattern[slot] = due
            given[due] += 1
        by_lane = self.pattern.reshape(lanes, -1)
        self.widths = [(by_lane == index).sum(axis=1) for index in range(len(tables))]
        self.block_of_number = lru_cache(maxsize=2 * len(tables))(self._make_block)

    def _make_block(self, set_index: int, number: int) -> Block:
        table, widths = self.tables[set_index], self.widths[set_index]
        return Block(table, widths, self.window_chunks, self.seed, set_index, number)

    def block_of(self, set_index: int, step: int) -> Block:
        """The block of the set that the batch of `step` lies in."""
        total, quota = self.tables[set_index].total, self.quotas[set_index]
        return self.block_of_number(set_index, -(-(step + 1) * quota // total) - 1)

    @property
    def steps_per_epoch(self) -> float:
        """Of the first set; fractional, since the tail that fills no batch is carried into the next epoch."""
        return self.tables[0].total / self.quotas[0]

    def batch(self, step: int, lanes: range | None = None) -> Slots:
        """The rows of the batch of `step` that lie in `lanes` (default all), in batch order."""
        chosen = np.asarray(lanes if lanes is not None else range(self.lanes))
        pattern = self.pattern.reshape(self.lanes, -1)[chosen].reshape(-1)
        columns = {name: np.empty(len(pattern), dtype=np.int64) for name in SLOT_COLUMNS}
        for set_index in range(len(self.tables)):
            rows = np.flatnonzero(pattern == set_index)
            if len(rows):
                block = self.block_of(set_index, step)
                slots = block.slots_at(block.positions(step, chosen))
                for name in SLOT_COLUMNS:
                    columns[name][rows] = getattr(slots, name)
        return Slots(**columns)

    def window_bytes(self) -> float:
        """Mean bytes of one window of one lane, the unit of a reader's buffer."""
        return self.window_chunks * max(float(table.bytes.mean()) for table in self.tables)


def lanes_of_rank(rank: int, world_size: int, lanes: int, global_batch_size: int) -> range:
    """The neighbouring lanes a rank owns. Raises ConfigError naming what would fit if `world_size` does not divide."""
    if lanes % world_size:
        fitting = [w for w in range(1, lanes + 1) if lanes % w == 0]
        nearest = sorted(fitting, key=lambda w: (abs(w - world_size), w))[:2]
        larger = world_size * -(-lanes // world_size)
        batch = larger * -(-global_batch_size // larger)
        raise ConfigError(
            f"world_size={world_size} does not divide data.lanes={lanes}; use {' or '.join(map(str, sorted(nearest)))} "
            f"ranks, or data.lanes={larger} with global_batch_size={batch}"
        )
    per_rank = lanes // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)
