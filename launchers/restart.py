"""Start a command again until it ends by itself: for a laptop, a SLURM job or a node without Ray.

    python launchers/restart.py --restarts 20 -- deepspeed launchers/pretrain.py --recipe ... --run-dir runs/a
    python launchers/restart.py --restarts 20 --ranks 2 -- python launchers/pretrain.py ...   ranks of this machine

It ends with the command's code where starting again would not help (0 done, 2 bad configuration, 3 bad data or store,
4 loss not finite, 143 and 130 stopped on request) and starts it again after any other, such as that of a rank that was
killed (137, 247), lost another (1) or saw no progress (5). Pretraining goes on from its newest checkpoint by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FINAL_CODES = (0, 2, 3, 4, 128 + signal.SIGTERM, 128 + signal.SIGINT)
LAST_WORDS_S = 45.0  # for ranks to end that agreed to, and to save after a signal
POLL_S = 0.05
RAY_DRIVERS = ("ray_pretrain.py", "launchers.ray_pretrain")  # as a file, and after python -m
# A command that fails as soon as it starts is left alone for longer and longer.
SOON_S, PAUSE_S, MOST_PAUSE_S = 10.0, 1.0, 60.0
# By the code of the first rank that ended, for the others to end: 1, it lost one that may be about to say why; 5, it
# saw no progress, and the others write their stacks, too.
OTHERS_S = {1: 3.0, 5: 10.0}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="restart.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--restarts", type=int, default=10, metavar="N", help="at most; default 10")
    result.add_argument(
        "--ranks", type=int, metavar="N", help="start the command N times, as ranks of one group on this machine"
    )
    result.add_argument("--log", type=Path, metavar="FILE", help="append a JSON line for every start and end")
    result.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to start")
    return result


class Group:
    """The processes of one start, each at the head of its own process group, so that nothing of it stays behind."""

    def __init__(self, command: Sequence[str], ranks: int | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._is_ray = any(Path(word).name in RAY_DRIVERS for word in command)
        try:
            self._start(command, ranks, port)
        except OSError:  # such as no room for one more process: those that came before must not stay alone
            self.kill()
            raise

    def _start(self, command: Sequence[str], ranks: int | None, port: int) -> None:
        for rank in range(ranks or 1):
            environment = dict(os.environ)
            if ranks is not None:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def stop(self, number: int) -> None:
        """Pass a signal on to all processes of the group and what they started, since the `deepspeed` runner and shells
        hand none on. Ray's driver does, and needs the cluster that it started until its ranks have saved."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                (os.kill if self._is_ray else os.killpg)(process.pid, number)

    def wait(self, limit_s: float | None = None) -> bool:
        """Until all have ended, or the first has ended badly; False at the limit."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while True:
            codes = [process.poll() for process in self.processes]
            if None not in codes or (limit_s is None and any(codes)):
                return True
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)

    @property
    def code(self) -> int:
        """Of the first rank that says why, as a shell gives it: 128 and the number of a signal."""
        codes = [process.returncode for process in self.processes if process.returncode]
        codes = [128 - code if code < 0 else code for code in codes]
        return next((code for code in codes if code in FINAL_CODES), codes[0] if codes else 0)

    def end(self) -> None:
        """Whatever still runs is given time where it says goodbye by itself, then killed."""
        code = self.code
        self.wait(LAST_WORDS_S if code in FINAL_CODES else OTHERS_S.get(code, 0.0))
        self.kill()

    def kill(self) -> None:
        """All of it, at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the code of the last start."""
    options = parser().parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.restarts < 0 or (options.ranks is not None and options.ranks < 1):
        print("error: name a command after --, restarts of 0 or more and 1 rank or more; see --help", file=sys.stderr)
        return 2
    stopped = 0
    group: Group | None = None

    def forward(number: int, _frame: object) -> None:
        nonlocal stopped
        # A terminal that closes reaches this process only: what it started has sessions of its own and would go on.
        stopped = signal.SIGTERM if number == signal.SIGHUP else number
        if group is not None:
            group.stop(stopped)

    heard = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        heard.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in heard}

    def note(**event: Any) -> None:
        if options.log is not None:
            with open(options.log, "a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    pause_s = PAUSE_S
    try:
        for start in range(options.restarts + 1):
            began = time.monotonic()
            try:
                group = Group(command, options.ranks)
            except OSError as error:
                print(f"error: {command[0]}: cannot be started ({error.strerror})", file=sys.stderr)
                return 2
            note(event="start", number=start)
            if stopped:  # it came in between
                group.stop(stopped)
            group.wait()
            note(event="ended", code=group.code)
            if stopped and not group.wait(LAST_WORDS_S):
                print(f"restart.py: not all ended within {LAST_WORDS_S:.0f} s of the first; killed", file=sys.stderr)
            group.end()
            code = group.code
            if code in FINAL_CODES or stopped:
                return code
            if start == options.restarts:
                break
            soon = time.monotonic() - began < SOON_S
            pause_s = min(2 * pause_s, MOST_PAUSE_S) if soon else PAUSE_S
            print(
                f"restart.py: {shlex.join(command[:3])} ... ended with code {code}; start {start + 2} of "
                f"{options.restarts + 1}" + (f" in {pause_s:.0f} s" if soon else ""),
                file=sys.stderr,
                flush=True,
            )
            until = time.monotonic() + (pause_s if soon else 0.0)
            while not stopped and time.monotonic() < until:
                time.sleep(POLL_S)
            if stopped:
                return 128 + stopped
        print(f"error: gave up after {options.restarts} restarts, code {code}", file=sys.stderr)
        return code
    finally:
        for number, action in before.items():
            signal.signal(number, action)


if __name__ == "__main__":
    sys.exit(main())
