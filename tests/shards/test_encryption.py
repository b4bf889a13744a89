"""Server-side encryption: what a server on loopback is asked for, for small objects, uploads in parts, and reading."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from ci.bench.s3_server import S3Server
from shards.bucket import Bucket
from shards.encryption import Encryption
from shards.errors import ConfigError
from shards.store import SMALLEST_PART_BYTES, StoreConfig, open_store
from tests.conftest import set_environment
from tests.shards.s3 import QUICK, random_bytes

KEY = bytes(range(32))
LARGE = random_bytes(SMALLEST_PART_BYTES + 17, "sealed")


@pytest.fixture
def sealed(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    set_environment(monkeypatch, moto_server.environment())
    moto_server.create_bucket("sealed")
    return "s3://sealed/set"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "customer.key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Headers of every request that is signed, in lower case."""
    found: list[dict[str, str]] = []
    init, get = Bucket.__init__, Bucket._get

    def watched(self: Bucket, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self._client.meta.events.register(
            "before-send.s3",
            lambda request, **_: found.append(
                {k.lower(): _text(v) for k, v in request.headers.items()} | {"asked": f"{request.method} {request.url}"}
            ),
        )

    def watched_get(self: Bucket, name: str, headers: dict[str, str], attempt: int) -> object:
        found.append({key.lower(): value for key, value in headers.items()})
        return get(self, name, headers, attempt)

    monkeypatch.setattr(Bucket, "__init__", watched)
    monkeypatch.setattr(Bucket, "_get", watched_get)
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def write_and_read(url: str, encryption: Encryption, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    with open_store(url, replace(QUICK, encryption=encryption)) as store:
        store.put("small", b"a report")
        store.put("large", tmp_path / "large")
        assert store.get("small") == b"a report" and store.get_range("large", 7, 11) == LARGE[7:18]
        assert store.get("large") == LARGE and store.size("large") == len(LARGE)


@pytest.mark.parametrize(
    ("kind", "key_id"), [("AES256", None), ("aws:kms", "1234abcd-planted-key-id"), ("aws:kms", None)]
)
def test_the_server_keeps_the_key(sealed: str, tmp_path: Path, kind: str, key_id: str | None) -> None:
    write_and_read(sealed, Encryption(kind, key_id), tmp_path)  # type: ignore[arg-type]
    for name in ("small", "large"):
        head = boto3.client("s3").head_object(Bucket="sealed", Key=f"set/{name}")
        assert head["ServerSideEncryption"] == kind
        assert key_id is None or head["SSEKMSKeyId"] == key_id


def test_a_customers_key_goes_with_every_request_and_into_no_message(
    sealed: str, tmp_path: Path, key_file: Path, asked: list[dict[str, str]]
) -> None:
    write_and_read(sealed, Encryption("SSE-C", customer_key_file=str(key_file)), tmp_path)
    prefix = "x-amz-server-side-encryption-customer-"
    with_key = [one for one in asked if f"{prefix}key" in one]
    assert {one[f"{prefix}key"] for one in with_key} == {base64.b64encode(KEY).decode()}
    assert {one[f"{prefix}key-md5"] for one in with_key} == {base64.b64encode(hashlib.md5(KEY).digest()).decode()}
    # put, create, two parts, three or more GETs, HEAD; the listing at the start and the end of the upload have none.
    without = [one["asked"] for one in asked if one not in with_key]
    assert len(with_key) >= 8 and without
    assert all("list-type=2" in one or (one.startswith("POST") and "uploadId=" in one) for one in without), without
    assert KEY.hex() not in repr(Encryption("SSE-C", customer_key_file=str(key_file)))


def test_the_environment_says_it_for_every_program(monkeypatch: pytest.MonkeyPatch, key_file: Path) -> None:
    assert StoreConfig().encryption == Encryption()
    monkeypatch.setenv("ROENTGEN_SSE", "aws:kms")
    monkeypatch.setenv("ROENTGEN_SSE_KMS_KEY_ID", "alias/scans")
    assert StoreConfig().encryption == Encryption("aws:kms", "alias/scans")
    monkeypatch.setenv("ROENTGEN_SSE", "SSE-C")
    with pytest.raises(ConfigError, match="a KMS key is for aws:kms"):
        StoreConfig()
    monkeypatch.delenv("ROENTGEN_SSE_KMS_KEY_ID")
    monkeypatch.setenv("ROENTGEN_SSE_CUSTOMER_KEY_FILE", str(key_file))
    assert StoreConfig().encryption.of_write()["SSECustomerKey"] == KEY


def test_keys_that_cannot_be_used_are_refused(tmp_path: Path, key_file: Path) -> None:
    for settings, message in (
        (("rot13",), "use AES256, aws:kms, SSE-C"),
        (("SSE-C",), "takes a key file"),
        (("AES256", None, "a"), "takes a key file"),
    ):
        with pytest.raises(ConfigError, match=message):
            Encryption(*settings)  # type: ignore[arg-type]
    sealed = Encryption("SSE-C", customer_key_file=str(key_file))
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        sealed.of_read()
    key_file.chmod(0o600)
    key_file.write_text("planted but short")
    with pytest.raises(ConfigError, match="32 bytes") as refused:
        sealed.of_read()
    assert "planted" not in str(refused.value)
    with pytest.raises(ConfigError, match="openssl rand"):
        Encryption("SSE-C", customer_key_file=str(tmp_path / "none")).of_read()
