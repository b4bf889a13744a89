"""One function over many inputs in worker processes: results in the order of the inputs, memory bounded, no orphan."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

Input = TypeVar("Input")
Result = TypeVar("Result")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerDiedError(Exception):
    """A worker process ended while it worked on the input at `position`."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Loop of a worker process; ends when the pipe closes, so that it never outlives a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    while True:
        try:
            argument = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer: Any = function(argument)
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionError):
            return


def in_order(
    function: Callable[[Input], Result], inputs: Iterable[Input], workers: int
) -> Generator[Result, None, None]:
    """`function` of every input, in their order, by up to `workers` processes (1: in this one).

    Pipes only, no queue or semaphore: nothing is left behind after SIGKILL. A worker holds one input at a time, and at
    most 4 x workers inputs are read ahead of the result that is waited for, so memory is bounded. `function` is sent to
    each process once. Raises what it raises, and WorkerDiedError.
    """
    ahead = iter(inputs)
    first = list(islice(ahead, 2))
    if workers == 1 or len(first) < 2:
        yield from map(function, chain(first, ahead))
        return
    yield from _in_processes(function, chain(first, ahead), workers)


def _in_processes(
    function: Callable[[Input], Result], inputs: Iterator[Input], workers: int
) -> Generator[Result, None, None]:
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes: list[BaseProcess] = []
    # Workers are many and small: one thread each, or their libraries fight over the cores.
    threads = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: "1" for name, value in threads.items() if value is None})
    try:
        idle = deque[Connection]()
        busy: dict[Connection, int] = {}
        results: dict[int, Any] = {}
        sent, position, more = 0, 0, True
        while True:
            while more and sent < position + 4 * workers and (idle or len(connections) < workers):
                try:
                    argument = next(inputs)
                except StopIteration:
                    more = False
                    break
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(theirs, function), daemon=True)
                    process.start()
                    theirs.close()
                    connections.append(ours)
                    processes.append(process)
                    idle.append(ours)
                connection = idle.popleft()
                busy[connection] = sent
                try:
                    connection.send(argument)
                except (BrokenPipeError, ConnectionError):
                    raise WorkerDiedError(sent) from None
                sent += 1
            if position in results:
                yield results.pop(position)
                position += 1
                continue
            if not busy:
                return
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                number = busy.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, ConnectionError):
                    raise WorkerDiedError(number) from None
                if isinstance(answer, BaseException):
                    raise answer
                results[number] = answer
                idle.append(connection)
    finally:
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name, None)
        for connection in connections:
            connection.close()
        for started in processes:
            started.join(timeout=5)
            if started.is_alive():
                started.kill()
                started.join()
