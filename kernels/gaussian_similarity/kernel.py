"""The sweeps as Triton kernels, for Hopper; they run from sm_80 on.

One pass over tiles gives row and column statistics. Gradients form their seed for a strip of rows at a time, all
columns wide, and multiply the strip with columns and rows: one product again and two more, strips of bounded size,
nothing of N x M. No sum is atomic: partial sums go to a workspace and are added in one order, so a result has the same
bits every time. After the product everything is fp32.

The tensors may lie on the CPU only where Triton interprets (TRITON_INTERPRET=1), which is for tests.
"""

# Kernels are no Python functions: their arguments have types of Triton's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gaussian_similarity import blocked
from kernels.gaussian_similarity.densities import Gaussians, Name
from kernels.gaussian_similarity.expansion import Precision
from kernels.gaussian_similarity.problem import Gradients, Problem, Statistics, Teacher, joint_ids

# Rows whose column statistics share one workspace, and elements of a strip of seeds: bounds on what is held.
SLAB_ROWS = 8192
STRIP_ELEMENTS = 1 << 27
# Programs that a launch should have at least, so that 132 processors have several each.
PROGRAMS = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a tile [rows, columns], K of the product in steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


SHAPES: dict[Precision, Shape] = {
    "bf16": Shape(rows=128, columns=128, depth=64, warps=8, stages=3),
    "tf32": Shape(rows=128, columns=64, depth=32, warps=8, stages=3),
    "split": Shape(rows=128, columns=64, depth=32, warps=8, stages=3),
    "fp32": Shape(rows=64, columns=32, depth=16, warps=8, stages=2),  # no tensor cores: more registers an element
}
# Groups and the sigmoid keep more beside the logits of a tile, a teacher a second tile, and from sm_100 on
# logits come out of memory of their own: narrower tiles fit into registers there.
NARROW_COLUMNS, TEACHER_COLUMNS = 64, 32


# Triton's interpreter takes the bits of bf16 numbers for whole numbers in a product.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(a, a_low, b, b_low, total, SPLIT: tl.constexpr, INPUT: tl.constexpr):
    """total + a b; split values are a sum of two bf16 numbers, and the product of both low ones is left out."""
    if INTERPRETED:
        a, a_low, b, b_low = a.to(tl.float32), a_low.to(tl.float32), b.to(tl.float32), b_low.to(tl.float32)
    if SPLIT:
        total = tl.dot(a_low, b, total)
        total = tl.dot(a, b_low, total)
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a, b, total, input_precision=INPUT)
    return total


@triton.jit
def _logits(
    rows, rows_low, columns, columns_low, row_bias, column_bias, scale, first_row, first_column, n, m, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """A tile [I, J] of logits, -inf beyond the last row and column."""
    # Offsets of 64 bits are for the tile; within it 32 do, and take half the registers.
    to_rows, to_columns = tl.cast(first_row, tl.int64) * K, tl.cast(first_column, tl.int64) * K
    i = tl.minimum(tl.arange(0, ROWS), n - 1 - first_row)
    j = tl.minimum(tl.arange(0, COLUMNS), m - 1 - first_column)
    k = tl.arange(0, DEPTH)
    of_a, of_b = i[:, None] * K + k[None, :], j[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        a, b = tl.load(rows + to_rows + start + of_a), tl.load(columns + to_columns + start + of_b)
        a_low, b_low = a, b
        if SPLIT:
            a_low = tl.load(rows_low + to_rows + start + of_a)
            b_low = tl.load(columns_low + to_columns + start + of_b)
        total = _dot(a, a_low, b, b_low, total, SPLIT, INPUT)
    own, other = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    by_row = tl.load(row_bias + first_row + own, own < n - first_row, float("-inf"))
    by_column = tl.load(column_bias + first_column + other, other < m - first_column, float("-inf"))
    return scale * (total + by_row[:, None] + by_column[None, :])


@triton.jit
def _exist(i, j, n, m, row_groups, column_groups, GROUPED: tl.constexpr):
    """Which pairs of a tile there are."""
    pairs = (i < n)[:, None] & (j < m)[None, :]
    if GROUPED:
        own, other = tl.load(row_groups + i, i < n, -1), tl.load(column_groups + j, j < m, -1)
        pairs = pairs & (own[:, None] == other[None, :])
    return pairs


@triton.jit
def _alike(i, j, n, m, row_ids, column_ids):
    """Which pairs of a tile are positives: ids of rows and of columns that have no partner never agree."""
    own, other = tl.load(row_ids + i, i < n, -1), tl.load(column_ids + j, j < m, -2)
    return own[:, None] == other[None, :]


@triton.jit
def _columns_of_run(q, tiles_each, m, first_column, last_column, block, GROUPED: tl.constexpr, COLUMNS: tl.constexpr):
    """First and past-the-last column of the q-th run of tiles; of the groups of a block of rows, where there are."""
    start, end = q * tiles_each * COLUMNS, tl.minimum((q + 1) * tiles_each * COLUMNS, m)
    if GROUPED:
        start = tl.maximum(start, tl.load(first_column + block) // COLUMNS * COLUMNS)
        end = tl.minimum(end, tl.load(last_column + block))
    return start, end


@triton.jit(do_not_specialize=["n", "m", "first_row", "slab", "tiles_each"])
def _statistics(
    rows, rows_low, columns, columns_low, row_bias, column_bias, scale_at, row_ids, column_ids,
    row_groups, column_groups, first_column, last_column,
    other_rows, other_rows_low, other_columns, other_columns_low, other_row_bias, other_column_bias, other_scale_at,
    other_row_shift, other_column_shift,
    row_parts, column_parts, n, m, first_row, slab, tiles_each,
    K: tl.constexpr, OTHER_K: tl.constexpr, GROUPED: tl.constexpr, TEACHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, INPUT: tl.constexpr,
    OTHER_DEPTH: tl.constexpr, OTHER_SPLIT: tl.constexpr, OTHER_INPUT: tl.constexpr,
):  # fmt: skip
    """Row block p of the slab against the q-th run of column tiles.

    row_parts [q, maximum | sum | positive | teacher, slab], column_parts [p, the same, m].
    """
    p, q = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_at)
    within = p * ROWS + tl.arange(0, ROWS)
    top = first_row + p * ROWS
    i = first_row + within
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    positive = tl.zeros((ROWS,), tl.float32)
    taught = tl.zeros((ROWS,), tl.float32)
    start, end = _columns_of_run(q, tiles_each, m, first_column, last_column, first_row // ROWS + p, GROUPED, COLUMNS)
    for column in range(start, end, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        logits = _logits(
            rows, rows_low, columns, columns_low, row_bias, column_bias, scale, top, column, n, m,
            K, ROWS, COLUMNS, DEPTH, SPLIT, INPUT,
        )  # fmt: skip
        of_column = column_parts + tl.cast(p, tl.int64) * 4 * m + j
        if TEACHER:
            others = _logits(
                other_rows, other_rows_low, other_columns, other_columns_low, other_row_bias, other_column_bias,
                tl.load(other_scale_at), top, column, n, m,
                OTHER_K, ROWS, COLUMNS, OTHER_DEPTH, OTHER_SPLIT, OTHER_INPUT,
            )  # fmt: skip
            exist = _exist(i, j, n, m, row_groups, column_groups, GROUPED)
            by_row = tl.exp(others + tl.load(other_row_shift + i, i < n, 0.0)[:, None])
            taught += tl.sum(tl.where(exist, by_row * logits, 0.0), 1)
            by_column = tl.exp(others + tl.load(other_column_shift + j, j < m, 0.0)[None, :])
            tl.store(of_column + 3 * m, tl.sum(tl.where(exist, by_column * logits, 0.0), 0), j < m)
        of_positive = tl.where(_alike(i, j, n, m, row_ids, column_ids), logits, 0.0)
        positive += tl.sum(of_positive, 1)
        tl.store(of_column + 2 * m, tl.sum(of_positive, 0), j < m)
        if GROUPED:
            logits = tl.where(_exist(i, j, n, m, row_groups, column_groups, GROUPED), logits, float("-inf"))
        highest = tl.max(logits, 0)
        # Without any pair the maximum is -inf, and -inf - -inf no number.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(of_column, highest, j < m)
        tl.store(of_column + m, tl.sum(tl.exp(logits - reference[None, :]), 0), j < m)
        new = tl.maximum(maximum, tl.max(logits, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(maximum - reference) + tl.sum(tl.exp(logits - reference[:, None]), 1)
        maximum = new
    of_row = row_parts + tl.cast(q, tl.int64) * 4 * slab + within
    tl.store(of_row, maximum, within < slab)
    tl.store(of_row + slab, total, within < slab)
    tl.store(of_row + 2 * slab, positive, within < slab)
    tl.store(of_row + 3 * slab, taught, within < slab)


@triton.jit
def _log1p(x):
    """Of x >= 0, to the last digits for small x too: billions of those are summed."""
    more = 1.0 + x
    return tl.where(more == 1.0, x, tl.log(more) * (x / (more - 1.0)))


@triton.jit(do_not_specialize=["n", "m", "tiles_each"])
def _sigmoid_loss(
    rows, rows_low, columns, columns_low, row_bias, column_bias, scale_at, row_ids, column_ids,
    row_groups, column_groups, first_column, last_column, bias_at, parts, n, m, tiles_each,
    K: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """Sum over a run of column tiles of -log sigmoid(y (logit + bias)): parts [q, rows in whole blocks]."""
    p, q = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_at), tl.load(bias_at)
    top = p * ROWS
    i = top + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    start, end = _columns_of_run(q, tiles_each, m, first_column, last_column, p, GROUPED, COLUMNS)
    for column in range(start, end, COLUMNS):
        j = column + tl.arange(0, COLUMNS)
        logits = bias + _logits(
            rows, rows_low, columns, columns_low, row_bias, column_bias, scale, top, column, n, m,
            K, ROWS, COLUMNS, DEPTH, SPLIT, INPUT,
        )  # fmt: skip
        # softplus(z), of positives less by z
        losses = tl.maximum(logits, 0.0) + _log1p(tl.exp(-tl.abs(logits)))
        losses -= tl.where(_alike(i, j, n, m, row_ids, column_ids), logits, 0.0)
        if GROUPED:
            losses = tl.where(_exist(i, j, n, m, row_groups, column_groups, GROUPED), losses, 0.0)
        total += tl.sum(losses, 1)
    tl.store(parts + tl.cast(q, tl.int64) * tl.num_programs(0) * ROWS + p * ROWS + tl.arange(0, ROWS), total)


@triton.jit(do_not_specialize=["n", "m", "first_row", "row_blocks", "column_blocks"])
def _seed(
    rows, rows_low, columns, columns_low, row_bias, column_bias, scale_at, row_ids, column_ids,
    row_groups, column_groups, first_column, last_column,
    other_rows, other_rows_low, other_columns, other_columns_low, other_row_bias, other_column_bias, other_scale_at,
    other_row_shift, other_column_shift,
    row_shift, column_shift, row_target, column_target, bias_at,
    strip, strip_low, row_parts, column_parts, logit_parts, n, m, first_row, row_blocks, column_blocks,
    K: tl.constexpr, OTHER_K: tl.constexpr, GROUPED: tl.constexpr, TEACHER: tl.constexpr, SIGMOID: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, INPUT: tl.constexpr,
    OTHER_DEPTH: tl.constexpr, OTHER_SPLIT: tl.constexpr, OTHER_INPUT: tl.constexpr,
):  # fmt: skip
    """Derivative by each logit of tile (p, q) of a strip, whose last rows and columns are filled up with zeros.

    strip [row_blocks * ROWS, column_blocks * COLUMNS], row_parts [q, rows of the strip], column_parts [p, columns of
    the strip], logit_parts [q, rows of the strip]: sum of seed * logit.
    """
    # Tiles that run at the same time share rows and columns.
    GROUP: tl.constexpr = 8
    place = tl.program_id(0)
    group = place // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    p = group * GROUP + place % (GROUP * column_blocks) % height
    q = place % (GROUP * column_blocks) // height
    if GROUPED:
        start, end = tl.load(first_column + first_row // ROWS + p), tl.load(last_column + first_row // ROWS + p)
        block = q * COLUMNS // ROWS * ROWS  # what the products read as one is written as one
        if (block >= end) | (block + ROWS <= start):
            return
    top, column = first_row + p * ROWS, q * COLUMNS
    within, j = p * ROWS + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    i = first_row + within
    logits = _logits(
        rows, rows_low, columns, columns_low, row_bias, column_bias, tl.load(scale_at), top, column, n, m,
        K, ROWS, COLUMNS, DEPTH, SPLIT, INPUT,
    )  # fmt: skip
    exist = _exist(i, j, n, m, row_groups, column_groups, GROUPED)
    alike = _alike(i, j, n, m, row_ids, column_ids)
    if SIGMOID:
        seed = tl.sigmoid(logits + tl.load(bias_at)) - tl.where(alike, 1.0, 0.0)
    else:
        seed = tl.exp(logits + tl.load(row_shift + i, i < n, 0.0)[:, None])
        seed += tl.exp(logits + tl.load(column_shift + j, j < m, 0.0)[None, :])
        target = tl.load(row_target + i, i < n, 0.0)[:, None] + tl.load(column_target + j, j < m, 0.0)[None, :]
        seed -= tl.where(alike, target, 0.0)
    if TEACHER:
        others = _logits(
            other_rows, other_rows_low, other_columns, other_columns_low, other_row_bias, other_column_bias,
            tl.load(other_scale_at), top, column, n, m, OTHER_K, ROWS, COLUMNS, OTHER_DEPTH, OTHER_SPLIT, OTHER_INPUT,
        )  # fmt: skip
        seed -= tl.exp(others + tl.load(other_row_shift + i, i < n, 0.0)[:, None])
        seed -= tl.exp(others + tl.load(other_column_shift + j, j < m, 0.0)[None, :])
    seed, logits = tl.where(exist, seed, 0.0), tl.where(exist, logits, 0.0)
    width = column_blocks * COLUMNS
    of_rows = tl.cast(q, tl.int64) * row_blocks * ROWS + within
    tl.store(row_parts + of_rows, tl.sum(seed, 1))
    tl.store(column_parts + tl.cast(p, tl.int64) * width + j, tl.sum(seed, 0))
    tl.store(logit_parts + of_rows, tl.sum(seed * logits, 1))
    to_strip = tl.cast(p * ROWS, tl.int64) * width + column
    of_strip = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :]
    high = seed.to(strip.dtype.element_ty)
    tl.store(strip + to_strip + of_strip, high)
    if SPLIT:
        tl.store(strip_low + to_strip + of_strip, (seed - high.to(tl.float32)).to(tl.bfloat16))


@triton.jit(do_not_specialize=["blocks_across", "first", "outer_count", "inner_first", "inner_count"])
def _times_strip(
    strip, strip_low, values, values_low, found, first_inner, last_inner, blocks_across, first, outer_count,
    inner_first, inner_count,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, ADD: tl.constexpr, GROUPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """found[first + o] (+)= sum over s of strip[o, s] * values[inner_first + s]; transposed: of strip[s, o] * values.

    `found` [*, K], `values` [*, K], K a multiple of COLUMNS; a row of the strip is `blocks_across` times ROWS long.
    """
    width = blocks_across * ROWS
    top, left = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    o, k, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    start, end = 0, inner_count
    if GROUPED:  # elsewhere the strip was never written
        block = (first // ROWS) + tl.program_id(0)
        end = tl.minimum(end, tl.load(last_inner + block) - inner_first)
        low = tl.load(first_inner + block) - inner_first
        # Of an empty range not even the whole step that it would begin in.
        start = tl.where(low < end, tl.maximum(low, 0) // DEPTH * DEPTH, end)
    if TRANSPOSED:
        of_strip = step[None, :] * width + o[:, None]
    else:
        of_strip = o[:, None] * width + step[None, :]
    for inner in range(start, end, DEPTH):
        if TRANSPOSED:
            to_strip = tl.cast(inner, tl.int64) * width + top
        else:
            to_strip = tl.cast(top, tl.int64) * width + inner
        # The strip is zero beyond the last row and column, where any finite value will do.
        to_values = tl.cast(inner_first + inner, tl.int64) * K + left
        of_values = tl.minimum(step, inner_count - 1 - inner)[:, None] * K + k[None, :]
        a, b = tl.load(strip + to_strip + of_strip), tl.load(values + to_values + of_values)
        a_low, b_low = a, b
        if SPLIT:
            a_low, b_low = tl.load(strip_low + to_strip + of_strip), tl.load(values_low + to_values + of_values)
        total = _dot(a, a_low, b, b_low, total, SPLIT, INPUT)
    to = found + tl.cast(first + top, tl.int64) * K + left + o[:, None] * K + k[None, :]
    real = (top + o < outer_count)[:, None]
    if ADD:
        total += tl.load(to, real, 0.0)
    tl.store(to, total, real)


@triton.jit(do_not_specialize=["n", "m", "dimensions"])
def _density(
    mean_a, variance_a, mean_b, variance_b, of_row, of_column, values, apart_weight, log_weight, n, m, dimensions,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """values[i, j] = apart_weight * sum(d^2 / (v + w)) + log_weight * sum(log(v + w)) + of_row[i] + of_column[j].

    Inputs are [D, N] and [D, M], D a multiple of 4: the logarithm is taken of products of four summed variances.
    """
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, column = tl.minimum(i, n - 1).to(tl.int64), tl.minimum(j, m - 1).to(tl.int64)
    apart = tl.zeros((ROWS, COLUMNS), tl.float32)
    logarithms = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, dimensions, 4):
        product = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
        for within in tl.static_range(4):
            a, b = row + (start + within) * tl.cast(n, tl.int64), column + (start + within) * tl.cast(m, tl.int64)
            summed = tl.load(variance_a + a)[:, None] + tl.load(variance_b + b)[None, :]
            distance = tl.load(mean_a + a)[:, None] - tl.load(mean_b + b)[None, :]
            apart += distance * distance / summed
            product *= summed
        logarithms += tl.log(product)
    constant = tl.load(of_row + row)[:, None] + tl.load(of_column + column)[None, :]
    result = apart_weight * apart + log_weight * logarithms + constant
    tl.store(values + tl.cast(i, tl.int64)[:, None] * m + j[None, :], result, (i < n)[:, None] & (j < m)[None, :])


@triton.jit(do_not_specialize=["n", "m", "dimensions"])
def _density_gradient(
    mean_a, variance_a, mean_b, variance_b, upstream, of_mean, of_logvar, apart_weight, log_weight, n, m, dimensions,
    ROWS: tl.constexpr, DIMENSIONS: tl.constexpr,
):  # fmt: skip
    """Of sum(upstream * values) by mean_a and its logvar [N, D], constants aside; inputs [*, D], upstream [M, N]."""
    i, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * DIMENSIONS + tl.arange(0, DIMENSIONS)
    real = (i < n)[:, None] & (k < dimensions)[None, :]
    at = tl.cast(i, tl.int64)[:, None] * dimensions + k[None, :]
    mean, variance = tl.load(mean_a + at, real, 0.0), tl.load(variance_a + at, real, 1.0)
    by_mean = tl.zeros((ROWS, DIMENSIONS), tl.float32)
    by_variance = tl.zeros((ROWS, DIMENSIONS), tl.float32)
    for j in range(m):
        other = tl.cast(j, tl.int64) * dimensions + k
        weight = tl.load(upstream + tl.cast(j, tl.int64) * n + i, i < n, 0.0)[:, None]
        precise = 1.0 / (variance + tl.load(variance_b + other, k < dimensions, 1.0)[None, :])
        pull = (mean - tl.load(mean_b + other, k < dimensions, 0.0)[None, :]) * precise
        by_mean += weight * pull
        by_variance += weight * (log_weight * precise - apart_weight * pull * pull)
    tl.store(of_mean + at, 2.0 * apart_weight * by_mean, real)
    tl.store(of_logvar + at, by_variance * variance, real)


def statistics(problem: Problem, *, teacher: Teacher | None = None) -> Statistics:
    """Of the logits of every row and column, in one walk; a slab of rows at a time shares a workspace."""
    n, m = len(problem.rows), len(problem.columns)
    if 0 in (n, m):
        return blocked.statistics(problem, teacher=teacher)
    pairs = _Pairs(problem, taught=teacher is not None)
    taught, shape = _taught(pairs, teacher), pairs.shape
    rows: list[Tensor] = []
    columns: Tensor | None = None
    for first in range(0, n, SLAB_ROWS):
        slab = min(SLAB_ROWS, n - first)
        row_blocks = triton.cdiv(slab, shape.rows)
        runs, tiles_each = _runs(m, row_blocks, shape)
        row_parts = _empty(problem.rows, runs, 4, slab)
        column_parts = _empty(problem.rows, row_blocks, 4, m)
        if pairs.grouped:  # tiles that lie between groups are not visited
            column_parts.zero_()[:, 0] = -torch.inf
        _launch(
            _statistics, (row_blocks, runs), *pairs.tensors, *pairs.positives, *pairs.groups, *pairs.column_ranges,
            *taught[0], row_parts, column_parts, n, m, first, slab, tiles_each,
            **pairs.constants, **taught[1], **_options(shape),
        )  # fmt: skip
        rows.append(_reduced(row_parts))
        of_slab = _reduced(column_parts)
        columns = of_slab if columns is None else _reduced(torch.stack([columns, of_slab]))
    assert columns is not None
    return _of_parts(torch.cat(rows, 1), columns, taught=teacher is not None)


def sigmoid_statistics(problem: Problem, bias: Tensor) -> Tensor:
    """`-sum(log sigmoid(y * (logit + bias)))` []."""
    n, m = len(problem.rows), len(problem.columns)
    if 0 in (n, m):
        return problem.rows.new_zeros(())
    pairs = _Pairs(problem, narrow=True)
    row_blocks = triton.cdiv(n, pairs.shape.rows)
    runs, tiles_each = _runs(m, row_blocks, pairs.shape)
    parts = _empty(problem.rows, runs, row_blocks * pairs.shape.rows)
    _launch(
        _sigmoid_loss, (row_blocks, runs), *pairs.tensors, *pairs.positives, *pairs.groups, *pairs.column_ranges,
        _aligned(bias), parts, n, m, tiles_each, **pairs.constants, **_options(pairs.shape),
    )  # fmt: skip
    return parts.sum()


def gradients(
    problem: Problem,
    *,
    row_shift: Tensor,
    column_shift: Tensor,
    row_target: Tensor,
    column_target: Tensor,
    teacher: Teacher | None = None,
) -> Gradients:
    """Of `sum(seed * logit)`; the seed is made of exponentials, class targets and the teacher's."""
    return _gradients(problem, (row_shift, column_shift, row_target, column_target), None, teacher)


def sigmoid_gradients(problem: Problem, bias: Tensor) -> Gradients:
    """Of `sigmoid_statistics`."""
    return _gradients(problem, (problem.row_bias, problem.column_bias) * 2, bias, None)


def _gradients(problem: Problem, seeds: tuple[Tensor, ...], bias: Tensor | None, teacher: Teacher | None) -> Gradients:
    n, m = len(problem.rows), len(problem.columns)
    if 0 in (n, m):
        zero = {
            name: torch.zeros_like(getattr(problem, name)) for name in ("rows", "columns", "row_bias", "column_bias")
        }
        nothing = problem.rows.new_zeros(())
        return Gradients(**zero, scale=nothing, bias=None if bias is None else nothing)
    seeds = tuple(_aligned(each) for each in seeds)
    pairs = _Pairs(problem, taught=teacher is not None, narrow=bias is not None)
    taught, shape = _taught(pairs, teacher), pairs.shape
    blocks_across = triton.cdiv(m, shape.rows)
    width = blocks_across * shape.rows
    column_blocks = width // shape.columns
    strip_rows = min(max(STRIP_ELEMENTS // width // shape.rows, 1), triton.cdiv(n, shape.rows)) * shape.rows
    strip = _empty(pairs.tensors[0], strip_rows, width)
    strip_low = _empty(strip, strip_rows, width) if pairs.constants["SPLIT"] else strip
    of_rows, of_columns = _empty(problem.rows, n, pairs.k), _empty(problem.rows, m, pairs.k)
    of_row, of_column, of_logits = [], problem.rows.new_zeros(width), problem.rows.new_zeros(())
    for first in range(0, n, strip_rows):
        count = min(strip_rows, n - first)
        row_blocks = triton.cdiv(count, shape.rows)
        parts = [
            _empty(problem.rows, column_blocks, row_blocks * shape.rows),
            _empty(problem.rows, row_blocks, width),
            _empty(problem.rows, column_blocks, row_blocks * shape.rows),
        ]
        if pairs.grouped:  # tiles that lie between groups are not visited
            parts = [part.zero_() for part in parts]
        _launch(
            _seed, (row_blocks * column_blocks,), *pairs.tensors, *pairs.positives, *pairs.groups,
            *pairs.column_ranges, *taught[0], *seeds, pairs.tensors[6] if bias is None else _aligned(bias),
            strip, strip_low, *parts, n, m, first, row_blocks, column_blocks, SIGMOID=bias is not None,
            **pairs.constants, **taught[1], **_options(shape),
        )  # fmt: skip
        of_row.append(parts[0].sum(0)[:count])
        of_column += parts[1].sum(0)
        of_logits += parts[2].sum()
        values = min(shape.rows, pairs.k & -pairs.k)  # columns of `found` in a tile: the power of two in K
        for blocks, other, found, ranges, numbers, transposed in (
            (row_blocks, pairs.tensors[2:4], of_rows, pairs.column_ranges, (first, count, 0, m), False),
            (blocks_across, pairs.tensors[:2], of_columns, pairs.row_ranges, (0, m, first, count), True),
        ):
            _launch(
                _times_strip, (blocks, pairs.k // values), strip, strip_low, *other, found, *ranges, blocks_across,
                *numbers, TRANSPOSED=transposed, ADD=transposed and first > 0,
                **(pairs.constants | {"COLUMNS": values}), **_options(shape),
            )  # fmt: skip
    scale = problem.scale
    k = problem.rows.shape[1]
    row_bias = torch.cat(of_row)
    return Gradients(
        rows=of_rows.mul_(scale)[:, :k],
        columns=of_columns.mul_(scale)[:, :k],
        row_bias=row_bias * scale,
        column_bias=of_column[:m] * scale,
        scale=of_logits / scale,
        bias=None if bias is None else row_bias.sum(),
    )


def density(name: Name, gaussians: Gaussians) -> Tensor:
    """Similarity [N, M] of every pair of a kind that is no matrix product."""
    mean_a, logvar_a, mean_b, logvar_b = (each.float() for each in gaussians)
    n, m, dimensions = len(mean_a), len(mean_b), mean_a.shape[1]
    values = _empty(mean_a, n, m)
    if 0 in (n, m):
        return values
    apart, logarithm, of_logvar, constant = _density_weights(name)
    fill = -dimensions % 4  # dimensions whose summed variance is 1 and whose distance is 0 add nothing
    inputs = []
    for mean, logvar in ((mean_a, logvar_a), (mean_b, logvar_b)):
        inputs.append(torch.nn.functional.pad(mean, (0, fill)).T.contiguous())
        inputs.append(torch.nn.functional.pad(logvar.exp(), (0, fill), value=0.5).T.contiguous())
    of_row = of_logvar * logvar_a.sum(1) + dimensions * constant
    of_column = of_logvar * logvar_b.sum(1)
    _launch(
        _density, (triton.cdiv(n, 64), triton.cdiv(m, 64)), *inputs, of_row, of_column, values, apart, logarithm, n, m,
        dimensions + fill, ROWS=64, COLUMNS=64, num_warps=8,
    )  # fmt: skip
    return torch.expm1(values) if name == "hellinger" else values


def density_gradients(name: Name, gaussians: Gaussians, upstream: Tensor) -> Gaussians:
    """Of `sum(upstream * density)`, upstream [N, M]."""
    mean_a, logvar_a, mean_b, logvar_b = (each.float().contiguous() for each in gaussians)
    if 0 in upstream.shape:
        zero = [torch.zeros_like(each) for each in gaussians]
        return zero[0], zero[1], zero[2], zero[3]
    if name == "hellinger":  # of expm1(-Bhattacharyya distance)
        upstream = upstream * (density("bhattacharyya", gaussians)).exp()
    apart, logarithm, of_logvar, _ = _density_weights(name)
    found = []
    sides = ((mean_a, logvar_a, upstream.T), (mean_b, logvar_b, upstream))
    for (mean, logvar, weights), (other_mean, other_logvar, _) in (sides, sides[::-1]):
        n, dimensions = mean.shape
        by_mean, by_logvar = _empty(mean, n, dimensions), _empty(mean, n, dimensions)
        _launch(
            _density_gradient, (triton.cdiv(n, 16), triton.cdiv(dimensions, 64)), mean, logvar.exp(), other_mean,
            other_logvar.exp(), weights.contiguous(), by_mean, by_logvar, apart, logarithm, n, len(other_mean),
            dimensions, ROWS=16, DIMENSIONS=64, num_warps=4,
        )  # fmt: skip
        found += [by_mean, by_logvar + of_logvar * weights.sum(0)[:, None]]
    return found[0], found[1], found[2], found[3]


def _density_weights(name: Name) -> tuple[float, float, float, float]:
    """Of sum(d^2 / (v + w)), of sum(log(v + w)), of the sum of both log-variances, and what each dimension adds."""
    if name == "expected_likelihood":
        return -0.5, -0.5, 0.0, -0.5 * math.log(2 * math.pi)
    # log cosh((s - t) / 2) = log(v + w) - (s + t) / 2 - log 2
    return -0.25, -0.5, 0.25, 0.5 * math.log(2)


class _Pairs:
    """A problem as the kernels read it."""

    def __init__(self, problem: Problem, *, taught: bool = False, narrow: bool = False) -> None:
        if problem.rows.dtype != torch.float32:
            raise ValueError(f"rows are {problem.rows.dtype}; the kernels take float32")
        self.grouped = problem.row_groups is not None and problem.column_groups is not None
        self.shape = SHAPES[problem.precision]
        width = self.shape.columns
        late = _capability(problem.rows.device) >= 100
        if narrow or self.grouped or late:
            width = min(width, NARROW_COLUMNS)
        if taught:
            width = min(width, TEACHER_COLUMNS)
        if late and self.grouped:
            width //= 2
        self.shape = replace(self.shape, columns=width)
        n = len(problem.rows)
        (rows, rows_low), (columns, columns_low) = (
            _operands(side, problem.precision, self.shape.depth) for side in (problem.rows, problem.columns)
        )
        self.k = rows.shape[1]
        biases = _aligned(problem.row_bias), _aligned(problem.column_bias)
        self.tensors: tuple[Tensor, ...] = (rows, rows_low, columns, columns_low, *biases, _aligned(problem.scale))
        ids = joint_ids(problem.row_keys, problem.column_keys, problem.row_groups, problem.column_groups).int()
        self.positives = _split(ids, n)
        # Kernels without groups are handed tensors that they do not read.
        self.groups = self.column_ranges = self.row_ranges = self.positives
        if problem.row_groups is not None and problem.column_groups is not None:
            _, groups = torch.unique(torch.cat([problem.row_groups, problem.column_groups]), return_inverse=True)
            self.groups = _split(groups.int(), n)
            self.column_ranges = _ranges(*self.groups, self.shape.rows)
            self.row_ranges = _ranges(*self.groups[::-1], self.shape.rows)
        self.constants: dict[str, Any] = {
            "K": self.k,
            "GROUPED": self.grouped,
            "ROWS": self.shape.rows,
            "COLUMNS": self.shape.columns,
            "DEPTH": self.shape.depth,
            "SPLIT": problem.precision == "split",
            "INPUT": "tf32" if problem.precision == "tf32" else "ieee",
        }


def _operands(side: Tensor, precision: Precision, depth: int) -> tuple[Tensor, Tensor]:
    """[N, K] as high and low part, K filled up with zeros to a multiple of `depth`; one tensor twice without parts."""
    side = _aligned(torch.nn.functional.pad(side, (0, -side.shape[1] % depth)))
    if precision in ("tf32", "fp32"):
        return side, side
    high = side.bfloat16()
    return high, (side - high).bfloat16() if precision == "split" else high


def _aligned(value: Tensor) -> Tensor:
    """`value` contiguous, from an address that 16 divides: a kernel is compiled again for any other.

    Where a slice begins moves with the number of valid rows, so ranks would stop to compile in the middle of training.
    """
    value = value.contiguous()
    return value if value.data_ptr() % 16 == 0 else value.clone()


def _split(whole: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of rows [n] and of columns."""
    return whole[:n], _aligned(whole[n:])


def _ranges(own: Tensor, other: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and past-the-last of `other` in the groups of each block of `size` of `own`; both sorted groups."""
    first, last = own[::size].contiguous(), torch.cat([own[size - 1 :: size], own[-1:]])[: -(-len(own) // size)]
    return torch.searchsorted(other, first).int(), torch.searchsorted(other, last, right=True).int()


def _taught(pairs: _Pairs, teacher: Teacher | None) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tensors and constants of the teacher; without one those of the problem, which are not read."""
    other = pairs if teacher is None else _Pairs(teacher.problem)
    shifts = pairs.tensors[4:6] if teacher is None else (_aligned(teacher.row_shift), _aligned(teacher.column_shift))
    named = {"OTHER_K": "K", "OTHER_DEPTH": "DEPTH", "OTHER_SPLIT": "SPLIT", "OTHER_INPUT": "INPUT"}
    constants = {ours: other.constants[theirs] for ours, theirs in named.items()}
    return (*other.tensors, *shifts), {"TEACHER": teacher is not None, **constants}


def _runs(columns: int, row_blocks: int, shape: Shape) -> tuple[int, int]:
    """(runs that the column tiles are divided into, tiles in each)."""
    tiles = triton.cdiv(columns, shape.columns)
    tiles_each = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, row_blocks)))
    return triton.cdiv(tiles, tiles_each), tiles_each


def _reduced(parts: Tensor) -> Tensor:
    """[parts, maximum | sum | positive | teacher, *] -> [4, *] of all parts."""
    maximum = parts[:, 0].amax(0)
    reference = torch.where(maximum.isneginf(), 0.0, maximum)
    total = (parts[:, 1] * torch.exp(parts[:, 0] - reference)).sum(0)
    return torch.stack([maximum, total, parts[:, 2].sum(0), parts[:, 3].sum(0)])


def _of_parts(rows: Tensor, columns: Tensor, *, taught: bool) -> Statistics:
    return Statistics(
        row_maximum=rows[0],
        row_sum=rows[1],
        row_positive=rows[2],
        row_teacher=rows[3] if taught else None,
        column_maximum=columns[0],
        column_sum=columns[1],
        column_positive=columns[2],
        column_teacher=columns[3] if taught else None,
    )


def _options(shape: Shape) -> dict[str, int]:
    return {"num_warps": shape.warps, "num_stages": shape.stages}


def _capability(device: torch.device) -> int:
    """80, 90, 100, ...; on the CPU that of Hopper."""
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _empty(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start one kernel, on the device of its tensors."""
    device = arguments[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)
