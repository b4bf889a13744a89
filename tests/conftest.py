"""Fixtures shared by all tests: the optional data folder and S3 servers on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from ci.bench.fault_proxy import FaultProxy, Plan
from ci.bench.s3_server import S3Server

ROOT = Path(__file__).parents[1]
# A busy machine is no failure: no test of this project measures time.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sets beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real sets: {folder} is missing")
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """nanio, which checks signatures; `data` is its folder."""
    with S3Server("nanio", tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[S3Server]:
    with S3Server("moto") as server:
        yield server


@pytest.fixture(scope="session")
def _fault_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(_fault_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """A proxy in front of `s3_server` that passes everything on until a plan is set."""
    _fault_proxy.plan(Plan())
    yield _fault_proxy
    _fault_proxy.plan(Plan())


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of an empty bucket of this test at `s3_server`, which the environment points to."""
    name = "t-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[:40].strip("-")
    s3_server.create_bucket(name)
    set_environment(monkeypatch, s3_server.environment())
    return f"s3://{name}"


@pytest.fixture
def faulty_bucket(bucket: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same bucket, reached through `fault_proxy`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint)
    return bucket


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
