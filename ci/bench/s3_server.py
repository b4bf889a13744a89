"""S3 servers on loopback for tests and benches: `nanio` (on disk, checks signatures) and `moto` (in memory).

Each runs in a process of its own, on a port the kernel chose, and dies with the process that started it, however that
one ends. Nothing but the data folder given to it remains.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

ACCESS_KEY = "roentgen-test"
SECRET_KEY = "only-for-loopback"
REGION = "us-east-1"

_START_LIMIT_S = 60


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when process `parent` ends. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


class Server:
    """A child process that prints its port when it listens. A context manager; `stop` is idempotent."""

    def __init__(self, module: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--parent", str(os.getpid()), *arguments],
            cwd=root,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.process_id = self._process.pid
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("port "):
            self.stop()
            raise RuntimeError(f"{module} {' '.join(arguments)} did not start; run it by hand to see why")
        self.port = int(line.split()[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """SIGKILL, as in a failure; the port refuses connections from then on."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class S3Server(Server):
    """`kind` is "nanio", which serves the folders of `data` as buckets, or "moto"."""

    def __init__(self, kind: str, data: Path | None = None, port: int = 0) -> None:
        arguments = ["--kind", kind, "--port", str(port)]
        if data is not None:
            arguments += ["--data", str(data)]
        self.data = data
        super().__init__(
            "ci.bench.s3_server", arguments, {"NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY}
        )

    def create_bucket(self, name: str) -> None:
        if self.data is not None:
            (self.data / name).mkdir(exist_ok=True)
            return
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT", data=b"")
        urllib.request.urlopen(request, timeout=_START_LIMIT_S).close()

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """What boto3's standard chain needs to reach this server, directly or through the proxy at `endpoint`."""
        return client_environment(endpoint or self.endpoint)


def client_environment(endpoint: str, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> dict[str, str]:
    """Variables for boto3 that name one endpoint and shut out the files and roles of the machine."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _serve_nanio(listener: socket.socket, data: Path) -> None:
    import uvicorn
    from nanio.app import build_app
    from nanio.auth.credentials import StaticCredentialResolver
    from nanio.config import Settings

    keys = {os.environ["NANIO_ACCESS_KEY"]: os.environ["NANIO_SECRET_KEY"]}
    app = build_app(Settings(data_dir=data, access_log=False, credentials=StaticCredentialResolver(keys)))
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_keep_alive=300)
    uvicorn.Server(config).run(sockets=[listener])


def _serve_moto(listener: socket.socket) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)
    port = listener.getsockname()[1]
    make_server("127.0.0.1", port, application, threaded=True, fd=listener.fileno()).serve_forever()


def main() -> None:
    """Serve until the parent ends; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("nanio", "moto"), default="nanio")
    parser.add_argument("--data", type=Path, help="folder whose sub-folders nanio serves as buckets")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--parent", type=int, help="process to die with")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=256)
    print(f"port {listener.getsockname()[1]}", flush=True)
    if arguments.kind == "nanio":
        if arguments.data is None:
            parser.error("nanio needs --data FOLDER")
        _serve_nanio(listener, arguments.data)
    else:
        _serve_moto(listener)


if __name__ == "__main__":
    main()
