"""A Ray cluster of several nodes on this machine, with a token, that ends with its block: for benches and tests."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

from ci.bench.figure import REPOSITORY

OBJECT_STORE_BYTES = 100 << 20
START_S = 120.0


def free_port() -> int:
    """A port of loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(token: str | None = None) -> dict[str, str]:
    """Of a program of this repository that uses Ray, on the CPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    auth = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    here = {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    return {**own, **here, **quiet, **auth}


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, oldest first; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_all(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


class RayCluster:
    """A head and, later, nodes. `dashboard`: with the server that takes jobs. `cpus`: of the head.

    Its files lie in a folder of a short name: the path of a socket has at most 107 bytes.
    """

    def __init__(self, *, dashboard: bool = False, cpus: int = 0) -> None:
        self.token = secrets.token_hex(32)
        self.port, self.dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        self._folder, self._with_dashboard = Path(tempfile.mkdtemp(prefix="ray")), dashboard
        self._cpus = cpus
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RayCluster:
        shown = ["--include-dashboard", str(self._with_dashboard).lower(), "--dashboard-host", "127.0.0.1"]
        try:
            self._start(
                "--head", "--port", str(self.port), "--num-cpus", str(self._cpus), *shown,
                "--dashboard-port", str(self.dashboard_port), "--ray-client-server-port", str(free_port()),
                "--temp-dir", str(self._folder),
            )  # fmt: skip
        except BaseException:  # a head that is too slow, say: nothing of it stays
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self._nodes):
            end_all(family(node.pid))
            node.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        return environment(self.token)

    def add_node(self, cpus: int = 1) -> subprocess.Popen[bytes]:
        """One more node; `end_node` ends it."""
        return self._start("--address", self.address, "--num-cpus", str(cpus))

    def end_node(self, node: subprocess.Popen[bytes]) -> None:
        """As if its machine lost its power."""
        end_all(family(node.pid))
        node.wait()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        log = self._folder / f"node{len(self._nodes)}.log"
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address", "127.0.0.1",
            "--object-store-memory", str(OBJECT_STORE_BYTES), "--num-gpus", "0", "--disable-usage-stats", *options,
        ]  # fmt: skip
        with open(log, "wb") as file:
            node = subprocess.Popen(
                command, cwd=REPOSITORY, env=self.environment(), stdout=file, stderr=file, start_new_session=True
            )
        self._nodes.append(node)
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert node.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)
        return node


def terminate(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """SIGTERM; the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=timeout_s)
