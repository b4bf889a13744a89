"""What is started again, what is not, and that nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from launchers import restart

ROOT = Path(__file__).parents[2]

# Ends with the next of the codes given, each start taking one; negative: a signal to itself.
CODES = """
import os, sys
path, codes = sys.argv[1], [int(code) for code in sys.argv[2].split(",")]
with open(path, "a") as file:
    file.write("x")
code = codes[os.path.getsize(path) - 1]
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "PAUSE_S", 0.005)
    monkeypatch.setattr(restart, "MOST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    ("codes", "restarts", "ended", "starts"),
    [
        ("0", 5, 0, 1),
        ("1,-9,5,247,0", 5, 0, 5),
        ("1,4,0", 5, 4, 2),
        ("2", 5, 2, 1),
        ("3", 5, 3, 1),
        ("143", 5, 143, 1),
        ("1,1,1,0", 2, 1, 3),
        ("-9,0", 0, 137, 1),
    ],
)
def test_only_what_may_help_is_started_again(
    tmp_path: Path, codes: str, restarts: int, ended: int, starts: int
) -> None:
    seen, log = tmp_path / "seen", tmp_path / "log"
    command = [sys.executable, "-c", CODES, str(seen), codes]
    assert restart.main(["--restarts", str(restarts), "--log", str(log), "--", *command]) == ended
    assert seen.stat().st_size == starts
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "ended"] * starts
    assert lines[-1]["code"] == ended


# Rank 1 kills itself at the first start, rank 0 and what it started would sleep for ever.
RANKS = """
import os, pathlib, signal, subprocess, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == rank and os.environ["MASTER_PORT"]
if not (folder / "second").exists():
    if rank == "0":
        child = subprocess.Popen(["sleep", "600"])
        (folder / "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
        (folder / "pids.tmp").rename(folder / "pids")
        time.sleep(600)
    while not (folder / "pids").exists():
        time.sleep(0.01)
    (folder / "second").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_takes_the_group_with_it_and_all_start_again(tmp_path: Path) -> None:
    assert restart.main(["--ranks", "2", "--", sys.executable, "-c", RANKS, str(tmp_path)]) == 0
    for pid in (tmp_path / "pids").read_text().split():
        assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


LOST = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(1)
time.sleep(0.3)
sys.exit(3)
"""


def test_a_rank_that_lost_another_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setitem(restart.OTHERS_S, 1, 120.0)  # a busy machine may be slow to start a process
    assert restart.main(["--ranks", "2", "--log", str(log), "--", sys.executable, "-c", LOST]) == 3
    assert len(log.read_text().splitlines()) == 2


PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), open(sys.argv[1], "w").write("saved"), sys.exit(143)))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_ends_all_after_saving(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "launchers/restart.py", "--", sys.executable, "-c", PATIENT, str(tmp_path / "saved")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which children inherit; nohup would have it ignored
    try:
        running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    running.send_signal(number)
    assert running.wait(timeout=60) == 143
    assert (tmp_path / "saved").read_text() == "saved"
    running.stdout.close()


# A driver that saves, and below it what must live until then; it says whether it did.
DRIVER = """
import signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def end(*_):
    time.sleep(0.5)
    sys.exit(143 if helper.poll() is None else 1)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("name", "code"), [("ray_pretrain.py", 143), ("launchers.ray_pretrain", 143), ("pretrain.py", 1)]
)
def test_rays_driver_keeps_its_cluster_while_it_stops(tmp_path: Path, name: str, code: int) -> None:
    program = tmp_path / name
    program.write_text(DRIVER)
    command = [sys.executable, "launchers/restart.py", "--restarts", "0", "--", sys.executable, str(program)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    below = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == code
    assert not psutil.wait_procs(below, timeout=30)[1]
    running.stdout.close()


def test_a_signal_between_two_starts_ends_the_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"

    def sleep(seconds: float) -> None:
        if log.is_file() and "ended" in log.read_text():
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)

    monkeypatch.setattr(restart, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time=time.time))
    monkeypatch.setattr(restart, "PAUSE_S", 3600.0)
    monkeypatch.setattr(restart, "MOST_PAUSE_S", 3600.0)
    monkeypatch.setattr(restart, "SOON_S", 3600.0)
    assert restart.main(["--log", str(log), "--", sys.executable, "-c", "raise SystemExit(7)"]) == 143
    assert len(log.read_text().splitlines()) == 2


def test_a_group_that_cannot_be_started_whole_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def one_only(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(restart.subprocess, "Popen", one_only)
    assert restart.main(["--ranks", "2", "--", "sleep", "600"]) == 2
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("arguments", [[], ["--restarts", "-1", "--", "true"], ["--ranks", "0", "--", "true"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert restart.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert restart.main(["--", "/no/such/program"]) == 2
    assert "No such file" in capsys.readouterr().err
