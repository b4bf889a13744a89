"""Copies of checkpoints in a store that is away for a while, or for too long."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from ci.bench.fault_proxy import FaultProxy, Plan
from core.checkpoint import CheckpointConfig, Checkpoints, TrainState
from core.checkpoint_files import LATEST, STATE, SUMS, checksums
from core.mirror import Mirror
from core.world import World
from shards.errors import StoreUnreachableError
from shards.store import Store, StoreConfig, open_store

IMPATIENT = StoreConfig(retry_limit_s=0.2, connect_timeout_s=1.0)


def save(folder: Path, step: int) -> str:
    name = f"step-{step}"
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / name / "weights").write_text(f"weights of {step}")
    (folder / "checkpoints" / name / SUMS).write_text("sums")
    return name


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def mirror_of(url: str, folder: Path, events: list[Any]) -> Mirror:
    return Mirror(open_store(url, IMPATIENT), folder, World(), 1, events.append, lambda: None, again_s=2.0)


def test_after_an_outage_the_newest_checkpoint_arrives_and_older_ones_are_left_out(
    tmp_path: Path, faulty_bucket: str, fault_proxy: FaultProxy
) -> None:
    events: list[dict[str, Any]] = []
    mirror = mirror_of(faulty_bucket, tmp_path, events)
    assert mirror.behind_s == 0.0
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    fault_proxy.plan(Plan(outage=True))
    mirror.push(first)
    wait_for(lambda: any(event["event"] == "mirror_failed" for event in events))
    # Nothing is tried before `again_s`; when it is, the store is back.
    mirror.push(second)
    mirror.push(third)
    assert mirror.behind_s > 0.0
    fault_proxy.plan(Plan())
    wait_for(lambda: mirror.behind_s == 0.0 and not mirror.is_busy("step-2"))
    assert mirror.close()
    with open_store(faulty_bucket) as store:
        assert store.get("latest") == b"step-3\n"
        assert store.get("checkpoints/step-3/weights") == b"weights of 3"
        assert not store.exists(f"checkpoints/step-1/{SUMS}")
    assert {event["checkpoint"] for event in events if event["event"] == "mirror_left_out"} == {"step-1", "step-2"}
    assert [event["checkpoint"] for event in events if event["event"] == "mirrored"] == ["step-3"]


def test_a_run_does_not_end_as_done_when_its_last_checkpoint_did_not_arrive(
    tmp_path: Path, faulty_bucket: str, fault_proxy: FaultProxy
) -> None:
    mirror = mirror_of(faulty_bucket, tmp_path, [])
    fault_proxy.plan(Plan(outage=True))
    mirror.push(save(tmp_path, 1))
    assert not mirror.close()


class BackTooLate:
    """A store that is away until the second checkpoint was tried for the last time, while the mirror closes."""

    def __init__(self) -> None:
        self.away, self.tried, self.second_tried = True, threading.Event(), threading.Event()
        self.closing = threading.Event()

    def put(self, name: str, content: Any) -> None:
        if not self.away:
            return
        self.tried.set()
        if "step-2/" in name:
            self.second_tried.set()
            assert self.closing.wait(60)
            self.away = False
        raise StoreUnreachableError("away")

    def list(self, prefix: str) -> list[str]:
        return []

    def close(self) -> None:
        return


def test_what_did_not_arrive_is_gone_on_from_and_sent_unless_another_node_went_on(tmp_path: Path, bucket: str) -> None:
    def opened(node: str) -> Checkpoints:
        return Checkpoints(
            f"{bucket}/run", CheckpointConfig(local_dir=str(tmp_path / node)), World(), recipe={}, seed=0
        )

    def write(node: str, step: int) -> str:
        """A whole checkpoint on the disk of `node` alone."""
        name = f"step-{step}"
        folder = tmp_path / node / "checkpoints" / name
        folder.mkdir(parents=True)
        state = asdict(TrainState(step=step, samples_seen=0, seed=0, recipe_hash=""))
        content = {"state": state, "recipe": {}, "world_size": 1, "zero_stage": 1}
        (folder / STATE).write_text(json.dumps(content))
        (folder / SUMS).write_text(checksums(folder))
        (tmp_path / node / LATEST).write_text(f"{name}\n")
        return name

    def goes_on_from(checkpoints: Checkpoints) -> str:
        description = checkpoints.prepare(MagicMock()).description
        checkpoints.close()
        return description.split(" of ")[0]

    def there() -> bytes:
        with open_store(f"{bucket}/run") as store:
            return store.get(LATEST).strip()

    write("a", 2)  # before anything ever arrived
    assert goes_on_from(opened("a")) == "step 2" and there() == b"step-2"
    write("a", 4)
    assert goes_on_from(opened("a")) == "step 4" and there() == b"step-4"
    write("a", 8)
    b = opened("b")
    assert b._mirror is not None and b.prepare(MagicMock()).description.startswith("step 4 ")
    b._mirror.push(write("b", 6))
    b.close()
    for _ in range(2):  # also after a kill before anything was saved there
        assert goes_on_from(opened("a")) == "step 6" and there() == b"step-6"


def test_an_older_checkpoint_that_arrives_last_does_not_stand_for_the_newest(tmp_path: Path) -> None:
    store = BackTooLate()
    events: list[dict[str, Any]] = []
    mirror = Mirror(cast(Store, store), tmp_path, World(), 1, events.append, lambda: None, again_s=1.0)
    store.closing = mirror._closing
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    mirror.push(first)
    assert store.tried.wait(60)
    mirror.push(second)
    assert store.second_tried.wait(60)
    assert not mirror.close()
    assert [event["checkpoint"] for event in events if event["event"] == "mirrored"] == ["step-1"]


@pytest.mark.parametrize(("behind_s", "stops"), [(0.0, False), (99.0, False), (101.0, True)])
def test_a_store_that_is_away_for_too_long_stops_the_run(tmp_path: Path, behind_s: float, stops: bool) -> None:
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(mirror_limit_s=100.0), World(), recipe={}, seed=0)
    save(tmp_path, 7)
    checkpoints._mirror = cast(Mirror, SimpleNamespace(behind_s=behind_s))
    if not stops:
        checkpoints._stop_far_behind()
        return
    with pytest.raises(StoreUnreachableError, match="holds step 7") as error:
        checkpoints._stop_far_behind()
    assert error.value.exit_code == 3
