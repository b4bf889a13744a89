"""doctor.py: what is good, what is not, what to do; no credential, nothing left behind."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers import doctor, doctor_checks
from shards.store import Store, open_store
from tests.shards.s3 import QUICK

SECRET = "wJalrXUtnFEMI-planted-secret"


def look(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    """(exit code, finding by name, all that was shown)."""
    code = doctor.main([*map(str, words), "--json", "-"])
    shown = capsys.readouterr()
    return code, {one["what"]: one for one in json.loads(shown.out)}, shown.out + shown.err


@contextmanager
def dashboard(status: int, version: str, elsewhere: str = "") -> Iterator[tuple[str, list[str]]]:
    """A Ray dashboard's `/api/version` on loopback, and the tokens that it was asked with."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_response(status)
            if elsewhere:
                self.send_header("Location", f"{elsewhere}/")
            self.end_headers()
            self.wfile.write(json.dumps({"ray_version": version}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_this_machine_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_checks, "SHARED_MEMORY_GB", 0.0)  # a container may have 64 MB, which tests can live with
    words = ("--run-dir", tmp_path, "--only", "environment", "graphics", "room", "clock", "run_directory", "ray")
    code, found, _ = look(capsys, *words)
    assert code == 0, found
    assert found["python"]["state"] == "good" and "are as in the lock" in found["packages"]["found"]
    assert "put, list, get, delete work" in found["run directory"]["found"]
    assert {"disk", "disk of the run", "shared memory", "open files", "clock", "clock of the disk"} <= set(found)
    assert not list(tmp_path.iterdir())
    assert doctor.main(["--only", "clock", "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "what to do" in shown and "ready" in shown and json.loads((tmp_path / "found.json").read_text())


def test_two_processes_meet_and_what_they_say_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = [one for one in doctor_checks.collectives(doctor_checks.Asked()) if "gloo" in one.what]
    assert found.state == "good" and "2 processes" in found.found
    monkeypatch.setattr(doctor_checks, "_all_reduce", lambda backend: (0.0, "the sum is wrong: 4.0"))
    (found,) = [one for one in doctor_checks.collectives(doctor_checks.Asked()) if "gloo" in one.what]
    assert found.state == "trouble" and found.advice


def test_decoding_and_kernels_agree_with_their_twins(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = look(capsys, "--only", "decoding", "kernels")
    assert code == 0 and {one["state"] for one in found.values()} == {"good"}
    assert len(found) == 3 + (not torch.cuda.is_available())  # without a GPU the kernel is compiled for one, too


def test_a_bucket_is_tried_and_left_as_it_was(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = look(capsys, "--run-dir", f"{bucket}/runs/a", "--only", "run_directory")
    assert code == 0 and "MB/s" in found["run directory"]["found"]
    with open_store(bucket, QUICK) as store:
        assert store.list("") == []


def test_a_store_that_lies_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, name: get(self, name)[:-1] + b"?")
    code, found, _ = look(capsys, "--run-dir", tmp_path, "--only", "run_directory")
    assert code == 3 and "other bytes came back" in found["run directory"]["found"]


def test_trouble_is_named_with_a_way_out_and_no_credential(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = probe.getsockname()[1]
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{nobody}")
    impatient = partial(doctor_checks.Asked, store=replace(QUICK, first_contact_limit_s=0.5))
    monkeypatch.setattr(doctor, "Asked", impatient)
    words = ("--run-dir", "s3://bucket/a", "--data", tmp_path / "none", "--only", "run_directory", "data", "ray")
    code, found, shown = look(capsys, *words, "--ray", f"http://127.0.0.1:{nobody}")
    assert code == 3
    assert found["run directory"]["state"] == "trouble" and "no S3 server" in found["run directory"]["found"]
    assert found["data"]["state"] == "trouble" and found["ray cluster"]["state"] == "trouble"
    assert SECRET not in shown


def test_the_cluster_is_asked_for_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    for status, version, state, words in (
        (200, metadata.version("ray"), "good", "ray "),
        (200, "1.0.0", "trouble", "ray 1.0.0"),
        (401, "", "trouble", "answers 401"),
    ):
        with dashboard(status, version) as (url, asked):
            code, found, shown = look(capsys, "--ray", url, "--only", "ray")
        assert found["ray cluster"]["state"] == state and words in found["ray cluster"]["found"]
        assert (code == 3) == (state == "trouble") and SECRET not in shown
        assert asked == [f"/api/version Bearer {SECRET}"]


def test_the_token_follows_no_redirect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    with dashboard(200, metadata.version("ray")) as (elsewhere, asked), dashboard(302, "", elsewhere) as (url, first):
        look(capsys, "--ray", url, "--only", "ray")
    assert first == [f"/api/version Bearer {SECRET}"] and asked == ["/ None"]


def test_what_is_asked_wrongly_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--set", "seed=1"]) == 2
    assert "--recipe" in capsys.readouterr().err
    assert look(capsys, "--gpus", "4096", "--only", "graphics")[0] == 3


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_too_little_shared_memory_is_trouble(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_checks, "SHARED_MEMORY_GB", 1e9)
    code, found, _ = look(capsys, "--only", "room")
    assert code == 3 and "--shm-size" in found["shared memory"]["advice"]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def clock(_asked: object) -> Iterator[doctor_checks.Finding]:
        raise RuntimeError(f"token={SECRET}\nmore")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (clock,))
    code, found, shown = look(capsys)
    assert code == 3 and found["clock"]["found"] == "RuntimeError: token=(hidden)" and SECRET not in shown
