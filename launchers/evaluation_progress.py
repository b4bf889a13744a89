"""Progress of an evaluation on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_REPORT_S = 10.0  # without a terminal, a line of progress this often


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal; on anything else a line when a part is done, and every ten seconds on the way."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}
        started: dict[str, float] = {}
        said = 0.0

        def show(what: str, done: int, total: int) -> None:
            nonlocal said
            now = time.monotonic()
            if what not in tasks:
                tasks[what], started[what], said = bars.add_task(what, total=total), now, now
            bars.update(tasks[what], completed=done)
            if done < total and now - said < QUIET_REPORT_S:
                return
            said = now
            if not console.is_terminal:
                console.print(f"{what}: {done} of {total}, {now - started[what]:.1f} s", soft_wrap=True)

        yield show
