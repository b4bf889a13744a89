"""One function over many inputs: order, bounded memory, errors, death of a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from shards.workers import WorkerDiedError, in_order


def square(number: int) -> int:
    if number == 100:
        os._exit(3)
    if number == 200:
        raise ValueError("two hundred")
    return number * number


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 2), (9, 1), (9, 2)])
def test_results_in_the_order_of_the_inputs(count: int, workers: int) -> None:
    assert list(in_order(square, range(count), workers)) == [number**2 for number in range(count)]


def test_inputs_are_read_as_they_are_needed() -> None:
    read = []

    def inputs() -> Iterator[int]:
        for number in range(90):
            read.append(number)
            yield number

    results = in_order(square, inputs(), 2)
    assert next(results) == 0
    assert len(read) <= 1 + 4 * 2
    results.close()


def test_a_dead_worker_is_named_by_its_input() -> None:
    with pytest.raises(WorkerDiedError) as died:
        list(in_order(square, [1, 2, 100, 3], 2))
    assert died.value.position == 2
    with pytest.raises(ValueError, match="two hundred"):
        list(in_order(square, [1, 200, 3], 2))
