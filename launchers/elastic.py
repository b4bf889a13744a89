"""What a run on changing machines decides: how many workers, whether to start again, what its ranks are told.

Plain Python that knows nothing of Ray, so that every decision can be tested without a cluster.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.errors import ConfigError

STOPPED = (130, 143)  # codes of ranks that saved and left because they were asked to
FINAL = (2, 3, 4)  # codes of ranks that would end the same way if they were started again
OUTDATED = -1  # what a rank of an earlier attempt is told: end at once, others go on from the checkpoint


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers a run may have."""

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> Workers:
        """`4`, or `2:8` for a run that may shrink and grow. Raises ConfigError."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None:
            raise ConfigError(f"--workers {text!r} is not a number or MIN:MAX, such as 4 or 2:8")
        minimum = int(match[1])
        maximum = int(match[2]) if match[2] is not None else minimum
        if not 1 <= minimum <= maximum:
            raise ConfigError(f"--workers {text}: needs 1 <= MIN <= MAX")
        return cls(minimum=minimum, maximum=maximum)


def fitting(workers: Workers, lanes: int) -> list[int]:
    """Numbers of workers that divide the lanes, so that the global batches stay the same; largest first.

    Raises:
        ConfigError: none is in the range; names the nearest.
    """
    found = [count for count in range(workers.maximum, workers.minimum - 1, -1) if lanes % count == 0]
    if not found:
        below = max(count for count in range(1, workers.minimum + 1) if count == 1 or lanes % count == 0)
        above = next((count for count in range(workers.maximum, lanes + 1) if lanes % count == 0), None)
        near = f"{below} or {above}" if above is not None else f"{below}"
        asked = str(workers.maximum) if workers.minimum == workers.maximum else f"{workers.minimum}:{workers.maximum}"
        raise ConfigError(f"--workers {asked}: no such number divides data.lanes={lanes}; use {near}")
    return found


def shortage(need: Mapping[str, float], count: int, free: Mapping[str, float], total: Mapping[str, float]) -> str:
    """What `count` workers of `need` lack, what is free and what there is at all."""
    parts = []
    for name, amount in need.items():
        wanted, here, all_of_it = amount * count, free.get(name, 0.0), total.get(name, 0.0)
        missing = max(0.0, wanted - here)
        lack = f", {missing:g} missing" if missing else ""
        parts.append(f"{count} workers need {wanted:g} {name}, {here:g} of {all_of_it:g} are free{lack}")
    if all(free.get(name, 0.0) >= amount * count for name, amount in need.items()):
        parts.append("the free ones lie on nodes that cannot hold a whole worker, or on nodes that have just died")
    return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended. `ranks`: code, message, agreed of those that could say; `failure`: what Ray saw, or None.

    `notice`: a node was told that it will leave; `resizing`: the driver wanted more workers; `stopped_early`: before
    any rank trained.
    """

    workers: int
    start: int | None = None
    ranks: Mapping[int, tuple[int, str, bool]] = field(default_factory=dict)
    notice: bool = False
    resizing: bool = False
    stopped_early: bool = False
    failure: str | None = None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`code`: end with it, saying `message`; None: start again because of `cause`."""

    code: int | None = None
    message: str = ""
    cause: str = ""
    is_failure: bool = False


def verdict(ended: Ended, *, stop: int) -> Verdict:
    """What follows from how an attempt ended. `stop`: the exit code that the driver was asked to end with, or 0."""
    codes = {rank: code for rank, (code, _, _) in ended.ranks.items()}
    final = sorted(
        (not agreed, rank, code, message) for rank, (code, message, agreed) in ended.ranks.items() if code in FINAL
    )
    if final:
        # What all agree on is said by one; of one rank's own trouble others know nothing.
        _, rank, code, _ = final[0]
        own = [message for _, _, other, message in final if other == code and message]
        texts = list(dict.fromkeys(own))
        said = next((text for text in texts if "another rank" not in text), texts[0] if texts else f"rank {rank}")
        return Verdict(code=code, message=said)
    if ended.stopped_early:
        return Verdict(code=stop)
    # What Ray saw fail after every rank came to its end changes nothing.
    whole = len(codes) == ended.workers
    if whole and set(codes.values()) == {0}:
        return Verdict(code=0)
    left = whole and set(codes.values()) <= {0, *STOPPED}
    if stop:
        if left:
            return Verdict(code=stop)
        return Verdict(code=1, message=f"asked to stop, but not all ranks could save: {ended.failure or codes}")
    if left and ended.resizing:
        return Verdict(cause="more workers have room")
    if ended.notice:
        return Verdict(cause="a node leaves")
    if left:
        return Verdict(cause="a rank was asked to stop", is_failure=True)
    lost = sorted(set(range(ended.workers)) - set(codes))
    if lost and codes and "died" not in (ended.failure or ""):
        # The others told of it before Ray did.
        return Verdict(cause=f"rank {', '.join(map(str, lost))} was lost", is_failure=True)
    return Verdict(cause=ended.failure or "the ranks ended without a word", is_failure=True)


class Restarts:
    """Counts restarts, and those in a row that began no further than an earlier one."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._limit, self._barren, self._furthest = limit, 0, -1

    def count(self, ended: Ended, *, counts: bool = True) -> str | None:
        """One more; why to give up, or None. `counts`: whether it was a failure, not a wanted restart."""
        if ended.start is not None and ended.start > self._furthest:
            self._furthest, self._barren = ended.start, 0
        self._barren += counts
        if self._barren > self._limit:
            where = f"step {self._furthest}" if self._furthest >= 0 else "their start"
            return f"gave up after {self._limit} restarts in a row that did not get beyond {where} (--max-restarts)"
        self.total += 1
        return None


class Board:
    """What the driver asks of the ranks and what they tell it; an actor on the driver's node, one a run."""

    def __init__(self) -> None:
        self._attempt = -1
        self._unwritten: list[dict[str, Any]] = []
        self._clear()

    def _clear(self) -> None:
        self._asked = 0
        self._start: int | None = None
        self._ranks: dict[int, tuple[int, str, bool]] = {}
        self._notice = False

    # ---- the driver ----

    def open(self, attempt: int, restart: dict[str, Any] | None) -> None:
        """A new attempt; `restart`: why, to be written once it trains."""
        self._attempt = attempt
        if restart is not None:
            self._unwritten.append(restart)
        self._clear()

    def ask(self, number: int) -> None:
        """Have the ranks save and stop as on signal `number`."""
        self._asked = number

    def state(self) -> dict[str, Any]:
        """`start`: step from which the ranks train, None before; `ranks`: how they ended; `notice`: of a node."""
        return {"start": self._start, "ranks": dict(self._ranks), "notice": self._notice}

    # ---- the ranks ----

    def asked(self, attempt: int) -> int:
        """Signal to stop as upon, 0: go on, OUTDATED."""
        return self._asked if attempt == self._attempt else OUTDATED

    def started(self, attempt: int, step: int) -> list[dict[str, Any]]:
        """Rank 0 is about to train from `step`; the restarts that it should write into events.jsonl."""
        if attempt != self._attempt:
            return []
        self._start = step
        now = time.time()
        written = []
        for restart in self._unwritten:
            event = dict(restart)
            event["seconds"] = round(now - event.pop("ended_at"), 1)
            written.append(event)
        self._unwritten = []
        return written

    def ended(self, attempt: int, rank: int, code: int, message: str, agreed: bool) -> None:
        """How a rank ended."""
        if attempt == self._attempt:
            self._ranks[rank] = (code, message, agreed)

    def noticed(self, attempt: int) -> None:
        """A rank was told that its node, or another's, will leave."""
        if attempt == self._attempt:
            self._notice = True


def describe(failures: Sequence[tuple[int, str]]) -> str:
    """One line of what befell which ranks, (rank, kind) each; who died stands before who only lost the others."""
    died = sorted({rank for rank, kind in failures if kind == "died"})
    if died:
        return f"rank {', '.join(map(str, died))} died"
    others = sorted({(rank, kind) for rank, kind in failures})
    return "; ".join(f"rank {rank}: {kind}" for rank, kind in others[:4])
