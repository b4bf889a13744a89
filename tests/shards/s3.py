"""Helpers of tests that talk to an S3 server on loopback."""

from __future__ import annotations

import hashlib
import urllib.parse
import urllib.request

from shards.store import Store

# Fails fast: tests wait for nothing that they do not test.
QUICK = Store.Config(
    connections=6,
    part_bytes=1 << 20,
    connect_timeout_s=2.0,
    stall_timeout_s=0.6,
    read_timeout_s=1.2,
    retry_limit_s=30.0,
)


def random_bytes(size: int, *key: object) -> bytes:
    """The same bytes for the same key."""
    return hashlib.shake_256(repr(key).encode()).digest(size)


def iam_user_without_rights(endpoint: str, name: str) -> tuple[str, str]:
    """(access key, secret key) of a new user of a moto server, which may do nothing at all."""

    def ask(**query: str) -> str:
        body = urllib.parse.urlencode({"Version": "2010-05-08", **query}).encode()
        request = urllib.request.Request(endpoint, data=body, method="POST")
        scope = "Credential=any/20250101/us-east-1/iam/aws4_request"  # moto finds the service by it
        request.add_header("Authorization", f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=none")
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.read().decode()

    ask(Action="CreateUser", UserName=name)
    answer = ask(Action="CreateAccessKey", UserName=name)
    return answer.split("<AccessKeyId>")[1].split("<")[0], answer.split("<SecretAccessKey>")[1].split("<")[0]


def moto_checks_rights(endpoint: str, on: bool) -> None:
    """Whether a moto server verifies signatures and policies from now on."""
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=b"0" if on else b"inf", method="POST")
    request.add_header("Content-Type", "text/plain")  # a form would be parsed away
    urllib.request.urlopen(request, timeout=30).close()
