"""Server-side encryption of objects in S3: which kind, and the headers and arguments that ask for it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from shards.errors import ConfigError

Kind = Literal["AES256", "aws:kms", "SSE-C"]

KEY_BYTES = 32
_KIND, _KMS_KEY, _KEY_FILE = "ROENTGEN_SSE", "ROENTGEN_SSE_KMS_KEY_ID", "ROENTGEN_SSE_CUSTOMER_KEY_FILE"


@dataclass(frozen=True)
class Encryption:
    """How the server encrypts what is written. `AES256`: with a key of its own; `aws:kms`: with the key `kms_key_id`,
    or the bucket's; `SSE-C`: with the key in `customer_key_file`, which every reader needs, too. None: as the bucket
    has it.

    Raises ConfigError for settings that do not fit together, or a key file that cannot be used.
    """

    kind: Kind | None = None
    kms_key_id: str | None = None
    customer_key_file: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ConfigError(f"store encryption {self.kind!r}: use {', '.join(get_args(Kind))}")
        if self.kms_key_id is not None and self.kind != "aws:kms":
            raise ConfigError(f"store encryption {self.kind}: a KMS key is for aws:kms; set {_KIND}=aws:kms, or no key")
        if (self.customer_key_file is not None) != (self.kind == "SSE-C"):
            raise ConfigError(f"store encryption {self.kind}: SSE-C, and nothing else, takes a key file ({_KEY_FILE})")

    @classmethod
    def of_environment(cls) -> Encryption:
        """From ROENTGEN_SSE, ROENTGEN_SSE_KMS_KEY_ID and ROENTGEN_SSE_CUSTOMER_KEY_FILE, beside AWS's own variables."""
        kind = os.environ.get(_KIND) or None
        return cls(kind, os.environ.get(_KMS_KEY) or None, os.environ.get(_KEY_FILE) or None)  # type: ignore[arg-type]

    @cached_property
    def _key(self) -> bytes:
        path = Path(self.customer_key_file or "")
        try:
            mode, body = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: the key of SSE-C cannot be read ({error.strerror}); make one with "
                f"`(umask 077; openssl rand -hex {KEY_BYTES} > {path})`"
            ) from None
        if mode & 0o077:
            raise ConfigError(f"{path}: mode {mode:04o} lets others read the key of SSE-C; run `chmod 600 {path}`")
        if len(body) != KEY_BYTES:
            try:
                body = binascii.unhexlify(body.strip())
            except binascii.Error:
                body = b""
        if len(body) != KEY_BYTES:
            raise ConfigError(f"{path}: the key of SSE-C has {KEY_BYTES} bytes, or twice as many hex digits")
        return body

    def of_read(self) -> dict[str, str | bytes]:
        """Arguments of boto3 for reading, asking about an object, and for parts of an upload."""
        return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": self._key} if self.kind == "SSE-C" else {}

    def of_write(self) -> dict[str, str | bytes]:
        """Arguments of boto3 for making an object."""
        if self.kind is None or self.kind == "SSE-C":
            return self.of_read()
        key = {"SSEKMSKeyId": self.kms_key_id} if self.kms_key_id else {}
        return {"ServerSideEncryption": self.kind, **key}

    def headers_of_read(self) -> dict[str, str]:
        """Headers of a GET that is signed by hand."""
        if self.kind != "SSE-C":
            return {}
        prefix = "x-amz-server-side-encryption-customer-"
        digest = hashlib.md5(self._key, usedforsecurity=False).digest()
        return {
            f"{prefix}algorithm": "AES256",
            f"{prefix}key": base64.b64encode(self._key).decode(),
            f"{prefix}key-MD5": base64.b64encode(digest).decode(),
        }
