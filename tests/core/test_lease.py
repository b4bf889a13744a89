"""Two runs on one run directory: the second is refused, unless the first is dead."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.lease import LEASE, Holder, Lease
from shards.errors import ConfigError
from shards.store import open_store

FAST: dict[str, Any] = {"beat_every_s": 0.02, "stale_after_s": 0.6, "patience_s": 0.1}
# Where a holder must be seen to live, on a machine however busy.
PATIENT: dict[str, Any] = FAST | {"stale_after_s": 3600.0}
HOLD = """
import sys, time
from core.lease import Lease
Lease(sys.argv[1], beat_every_s=0.02)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["folder", "bucket"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/run"


def held(run_dir: str) -> dict[str, Any]:
    with open_store(run_dir) as store:
        return dict(json.loads(store.get(LEASE)))


def rewrite(run_dir: str, **changes: Any) -> None:
    content = held(run_dir) | changes
    with open_store(run_dir) as store:
        store.put(LEASE, json.dumps(content).encode())


def test_a_second_run_is_refused_by_name_until_the_first_ends(run_dir: str) -> None:
    first = Lease(run_dir, **FAST)
    holder = held(run_dir)
    with pytest.raises(ConfigError, match=f"process {holder['pid']} on {holder['host']}, since {holder['since'][:10]}"):
        Lease(run_dir, **PATIENT)
    first.release()
    first.release()
    seen: list[Any] = []
    Lease(run_dir, on_event=seen.append, **FAST).release()
    assert seen == []


def test_a_killed_holder_of_this_machine_holds_nobody_up(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    child.send_signal(signal.SIGKILL)  # not waited for: a zombie holds nothing either
    seen: list[Any] = []
    second = Lease(tmp_path, on_event=seen.append, beat_every_s=0.02, stale_after_s=3600, patience_s=3600)
    assert [(event["event"], event["from_pid"]) for event in seen] == [("lease_taken_over", child.pid)]
    second.release()
    child.stdout.close()
    child.wait()


def test_a_clock_that_is_set_does_not_make_a_living_holder_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(tmp_path, **PATIENT)
    holder = Holder(**held(str(tmp_path)))
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 7.0)  # which psutil tells by the time of day
    assert not holder.is_gone()
    assert replace(holder, started=holder.started - 1).is_gone()  # another process had this number
    lease.release()


def test_a_holder_elsewhere_is_dead_when_its_beats_stop_whatever_the_clocks_say(run_dir: str) -> None:
    lease = Lease(run_dir, **FAST)
    content = held(run_dir)
    lease.release()
    with open_store(run_dir) as store:
        far_future = {"machine": "another", "host": "node7", "since": "2999-01-01 00:00:00 +0000", "started": 1e12}
        store.put(LEASE, json.dumps(content | far_future).encode())
    seen: list[Any] = []
    second = Lease(run_dir, on_event=seen.append, **FAST)
    assert [event["from_host"] for event in seen] == ["node7"]
    second.release()


def test_a_holder_elsewhere_that_beats_is_refused(tmp_path: Path) -> None:
    lease = Lease(tmp_path, **FAST)
    content = held(str(tmp_path)) | {"machine": "another", "host": "node7"}
    lease.release()
    with open_store(tmp_path) as store:
        store.put(LEASE, json.dumps(content).encode())
    done = threading.Event()

    def beat() -> None:
        with open_store(tmp_path) as store:
            for beats in itertools.count():
                store.put(LEASE, json.dumps(content | {"beats": beats}).encode())
                if done.wait(0.02):
                    return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on node7"):
            Lease(tmp_path, **PATIENT)
    finally:
        done.set()
        thread.join()


def test_a_run_whose_lease_was_taken_ends(tmp_path: Path) -> None:
    lost: list[str] = []
    lease = Lease(tmp_path, on_lost=lost.append, **FAST)
    rewrite(str(tmp_path), token="other", host="node7", pid=7)
    for _ in range(6000):
        if lost:
            break
        time.sleep(0.01)
        if held(str(tmp_path))["token"] != "other":  # a beat was on its way
            rewrite(str(tmp_path), token="other", host="node7", pid=7)
    assert lost
    assert "process 7 on node7 took this run directory over" in lost[0]
    lease.release()
    assert held(str(tmp_path))["token"] == "other"  # not ours to remove


def test_a_damaged_lease_is_none(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text('{"token": "half')
    Lease(tmp_path, **FAST).release()
    assert not (tmp_path / LEASE).exists()
