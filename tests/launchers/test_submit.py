"""submit.py against a stub of Ray's job client and of the head's dashboard: no cluster needed."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientPayloadError

from ci.bench.ray_cluster import free_port
from launchers import submit
from shards.errors import ConfigError

TOKEN = "0123456789abcdef" * 4
RUN = ["--recipe", "tiny:clip", "--workers", "2", "--run-dir", "/shared/runs/a", "--set", "data.train=/shared/m.json"]


@dataclass
class Head:
    """The dashboard's answer to /api/version, as Ray gives it."""

    token: str | None = TOKEN
    version: str = field(default_factory=lambda: metadata.version("ray"))
    address: str = ""
    body: bytes | None = None  # in its place
    sent_on: str | None = None  # where its answers send those who ask
    asked: list[str | None] = field(default_factory=list)  # with which Authorization


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    state = Head()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.headers.get("Authorization")
            code = 200 if state.token is None or state.body is not None else 401 if sent is None else 200
            if state.token is not None and sent is not None and sent != f"Bearer {state.token}":
                code = 403
            state.asked.append(sent)
            if state.sent_on is not None and code == 200:
                code = 302
            self.send_response(code)
            if code == 302:
                self.send_header("Location", str(state.sent_on))
            self.end_headers()
            answer = json.dumps({"ray_version": state.version}).encode() if state.body is None else state.body
            self.wfile.write(answer if code == 200 else b"no")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


@dataclass
class Client:
    """A cluster with one job, which prints `lines` and ends as told."""

    status: str = "SUCCEEDED"
    code: int | None = 0
    lines: tuple[str, ...] = ("step 1\n", "step 2\n")
    breaks: bool = False
    error: Exception = field(default_factory=RuntimeError)
    submitted: dict[str, Any] = field(default_factory=dict)
    shipped: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        folder = Path(job["runtime_env"]["working_dir"])
        self.shipped = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return "raysubmit_1"

    def get_job_info(self, job: str) -> Any:
        if job != "raysubmit_1":
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return SimpleNamespace(
            status=self.status, driver_exit_code=self.code, message="because", start_time=0, entrypoint="python -m x",
            submission_id=job,
        )  # fmt: skip

    def list_jobs(self) -> list[Any]:
        return [self.get_job_info("raysubmit_1"), SimpleNamespace(submission_id=None)]

    def get_job_logs(self, job: str) -> str:
        return "".join(self.lines)

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        self.status = "STOPPED"
        return True

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for line in self.lines:
            await asyncio.sleep(0)
            yield line
            if self.breaks:
                self.breaks = False
                self.status, after = "RUNNING", self.status
                self._after = after
                raise self.error
        self.status = getattr(self, "_after", self.status)


def run(client: Client, head: Head, *words: str) -> int:
    action, *rest = words
    return submit.main([action, "--address", head.address, *rest], connect=lambda address, token: client)


def test_a_run_is_sent_with_its_code_and_nothing_secret(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    client = Client()
    assert run(client, head, "submit", *RUN) == 0
    assert capsys.readouterr().out == "raysubmit_1\n"
    words = shlex.split(client.submitted["entrypoint"])
    assert words == ["python", "-m", "launchers.ray_pretrain", *RUN]
    assert {"launchers/ray_pretrain.py", "core/trainer.py", "ci/requirements.lock", "pyproject.toml"} <= set(
        client.shipped
    )
    assert "shards/reports/identity/lists" in {str(Path(name).parent) for name in client.shipped}
    assert not [name for name in client.shipped if name.startswith((".git", ".venv", "runs", "tests"))]
    assert client.submitted["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert "pip" not in client.submitted["runtime_env"]
    assert TOKEN not in json.dumps(client.submitted)


def test_packed_data_and_runs_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*submit.CODE, "ci"):
        (tmp_path / "here" / name).mkdir(parents=True)
    for name in ("shards/reader.py", "shards/mine/manifest.json", "shards/mine/a.tar", "core/x.tar", "ci/secret.key"):
        (tmp_path / "here" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_text("x")
    for name in ("pyproject.toml", "ci/requirements.lock"):
        (tmp_path / "here" / name).write_text("x")
    monkeypatch.setattr(submit, "ROOT", tmp_path / "here")
    monkeypatch.setattr(submit, "LOCK", tmp_path / "here" / "ci" / "requirements.lock")
    (tmp_path / "there").mkdir()
    submit.ship(tmp_path / "there")
    shipped = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.*")}
    assert shipped == {"shards/reader.py", "pyproject.toml", "ci/requirements.lock"}


def test_the_lock_pins_every_package_of_a_job() -> None:
    packages = submit.job_environment("x", "lock")["pip"]["packages"]
    assert f"ray=={metadata.version('ray')}" in packages
    assert all("==" in package for package in packages)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 4, 4), ("STOPPED", None, 143), ("FAILED", -9, 137)],
)
def test_following_ends_with_the_jobs_code(
    head: Head, status: str, code: int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client(status=status, code=code)
    assert run(client, head, "submit", "--follow", *RUN) == expected
    assert capsys.readouterr().out == "raysubmit_1\nstep 1\nstep 2\n"


@pytest.mark.parametrize("error", [RuntimeError("closed"), ClientPayloadError("cut"), ConnectionResetError()])
def test_a_broken_connection_is_taken_up_where_it_broke(
    head: Head, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Client(breaks=True, error=error), head, "logs", "raysubmit_1", "--follow") == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_a_job_that_never_started_says_why(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Client(status="FAILED", code=None), head, "logs", "raysubmit_1", "--follow") == 1
    assert "did not start: because" in capsys.readouterr().err


def test_a_job_that_is_not_there_cannot_be_followed(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such job" in refused(Client(), head, capsys, "logs", "raysubmit_2", "--follow")


def test_status_list_logs_and_stop(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    client = Client(status="RUNNING", code=None)
    assert run(client, head, "status", "raysubmit_1") == run(client, head, "list") == 0
    assert capsys.readouterr().out.count("raysubmit_1  RUNNING") == 2
    assert run(client, head, "logs", "raysubmit_1") == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert run(client, head, "stop", "raysubmit_1") == 0
    assert client.stopped == ["raysubmit_1"]
    assert capsys.readouterr().out == "raysubmit_1  STOPPED\n"
    assert run(client, head, "status", "raysubmit_2") == 2
    assert "no such job" in capsys.readouterr().err


def refused(client: Client, head: Head, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(client, head, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert client.submitted == {} and TOKEN not in said
    return said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: setattr(head, "token", "another"), "wrong token"),
        (lambda head: setattr(head, "token", None), "obeys anyone"),
        (lambda head: setattr(head, "version", "2.1.0"), "Ray 2.1.0 runs there"),
        (lambda head: setattr(head, "address", f"http://127.0.0.1:{free_port()}"), "cannot be reached"),
        (lambda head: setattr(head, "address", "head:8265"), "name the dashboard"),
        (lambda head: setattr(head, "address", "http://head:port"), "name the dashboard"),
        (lambda head: setattr(head, "address", "http://[head"), "name the dashboard"),
        (lambda head: setattr(head, "body", b"<html>"), "is no dashboard of Ray"),
    ],
)
def test_a_head_that_will_not_do_is_named_before_anything_is_sent(
    head: Head, change: Callable[[Head], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(head)
    assert message in refused(Client(), head, capsys, "submit", *RUN)


def test_the_token_goes_to_no_other_server(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:  # answers as Ray's own port does, which speaks no HTTP
        address = f"http://127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            for _ in range(2):
                connection, _ = other.accept()
                with connection:
                    asked.append(connection.recv(65536).decode())
                    connection.sendall(b"\0\0\x18\x04\0\0\0\0\0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        head.sent_on = address
        assert "is no dashboard of Ray (not HTTP)" in refused(Client(), head, capsys, "submit", *RUN)
        head.address = address
        assert "is no dashboard of Ray (not HTTP)" in refused(Client(), head, capsys, "submit", *RUN)
        thread.join(60)
    assert head.asked == [None, f"Bearer {TOKEN}"]
    assert len(asked) == 2 and TOKEN not in "".join(asked)


def test_without_a_token_nothing_is_sent(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no token" in refused(Client(), head, capsys, "submit", *RUN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    assert "cannot be read" in refused(Client(), head, capsys, "list")
    (tmp_path / "missing").write_bytes(b"\xff\xfe no token")
    assert "not one word" in refused(Client(), head, capsys, "list")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert submit.find_token() == TOKEN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "tiny:clap", "--run-dir", "/a"], "did you mean"),
        (["--recipe", "tiny:clip"], "--run-dir is missing"),
        (["--recipe", "tiny:clip", "--run-dir", "runs/a", "--set", "data.train=/m"], "--run-dir runs/a: a job works"),
        (["--recipe", "tiny:clip", "--run-dir", "/a", "--set", "data.train=m.json"], "data.train m.json: a job works"),
        (["--recipe", "tiny:clip", "--run-dir", "/a", "--workers", "5", "--set", "data.train=/m"], "use 4 or 6"),
        (["--recipe", "tiny:clip", "--run-dir", "s3://me:pass@bucket/a", "--set", "data.train=/m"], "credentials"),
        ([*RUN, "alerts.webhook_url=https://hooks.example/password"], "write env:NAME"),
    ],
)
def test_a_run_that_cannot_work_is_refused_here(
    head: Head, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(Client(), head, capsys, "submit", *words)
    assert message in said and "pass" not in said


def test_options_of_a_run_are_refused_elsewhere(head: Head) -> None:
    with pytest.raises(SystemExit) as ended:
        run(Client(), head, "list", "--recipe", "tiny:clip")
    assert ended.value.code == 2


def test_errors_of_the_head_do_not_show_what_was_sent(head: Head, capsys: pytest.CaptureFixture[str]) -> None:
    client = Client()
    client.submit_job = lambda **job: (_ for _ in ()).throw(RuntimeError("Request failed: too large\nBearer x"))  # type: ignore[method-assign]
    said = refused(client, head, capsys, "submit", *RUN)
    assert "too large" in said and "Bearer" not in said
    with pytest.raises(ConfigError, match="no longer takes"):
        submit._answered(lambda: client_error("status code 403"), "x")


def client_error(text: str) -> None:
    raise RuntimeError(text)
