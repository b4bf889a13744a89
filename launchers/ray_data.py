"""`shards.workers.in_order` on a Ray cluster, by Ray Data: the same inputs, results and order, on many machines.

Ray is an extra, imported here only. Raw text and the secret travel through the memory of the cluster's machines, so the
cluster must be one that may see them; inputs go out in windows that are small beside the object store, which spills to
disk when it is full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from launchers.command import knock
from shards.errors import ConfigError, DataError

WINDOW = 32  # inputs for each actor; at 256 reports of 2 kB these are 16 MB
BLOCK = 4  # studies that an actor loads before it hands them on


class _Opaque:
    """A value that Ray cannot look into: what it fails to convert it quotes in its logs, and here that is text."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Work:
    """An actor of Ray Data: `function` is built up once and then gets one input a row."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": _Opaque(self._function(row["input"].value))}


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """`ray`, joined to a cluster. Raises ConfigError without Ray or cluster, DataError when work fails there."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError(
            "--ray: Ray is not installed here; pip install 'ray[data]', on every machine of the cluster"
        ) from None
    try:
        knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except Exception as error:  # Ray raises many kinds, the plainest among them
        raise ConfigError(
            f"--ray {address}: no cluster there ({type(error).__name__}); start one with `ray start --head`, or give "
            "--ray local"
        ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise DataError(
            f"--ray {address}: the work failed there ({type(error).__name__}); see the cluster's logs, then run the "
            "same command again: finished parts are kept"
        ) from None
    finally:
        ray.shutdown()


def in_order(
    function: Callable[[Any], Any], inputs: Iterable[Any], workers: int, *, address: str
) -> Generator[Any, None, None]:
    """`function` of every input, in their order, by `workers` actors of the cluster at `address`.

    `address`: "auto" for the cluster of this machine, "local" for one of its own, or HOST:PORT. Raises ConfigError
    without Ray or cluster, DataError when the work fails there.
    """
    ahead = iter(inputs)
    with _cluster(address) as ray:
        while window := list(islice(ahead, WINDOW * workers)):
            mapped = _mapped(ray, function, window, len(window), workers)
            results = {row["number"]: row["result"].value for row in mapped.iter_rows()}
            for number in range(len(window)):
                yield results[number]


def streamed(
    function: Callable[[Any], Any], inputs: Sequence[Any], workers: int, *, address: str
) -> Generator[Any, None, None]:
    """The same for inputs that are all known and small, with results that may be large: one pipeline from end to end.

    Ray Data keeps the order, and holds actors back while results that nobody has taken fill its share of the object
    store.
    """
    if not inputs:
        return
    with _cluster(address) as ray:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        mapped = _mapped(ray, function, inputs, -(-len(inputs) // BLOCK), workers)
        for position, row in enumerate(mapped.iter_rows()):
            assert row["number"] == position, "Ray Data gave rows out of order"
            yield row["result"].value


def _mapped(ray: Any, function: Callable[[Any], Any], inputs: Sequence[Any], blocks: int, workers: int) -> Any:
    rows = [{"number": number, "input": _Opaque(one)} for number, one in enumerate(inputs)]
    pool = ray.data.ActorPoolStrategy(size=min(workers, blocks))
    data = ray.data.from_items(rows, override_num_blocks=blocks)
    return data.map(_Work, fn_constructor_args=(function,), compute=pool)
