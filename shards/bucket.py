"""One attempt at reading or writing an object of S3: what `shards.store` repeats. The only module that knows boto3."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config as ClientConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from botocore.httpsession import URLLib3Session
from botocore.parsers import ResponseParserError
from botocore.utils import get_environ_proxies, percent_encode
from urllib3.exceptions import HTTPError as TransportError
from urllib3.exceptions import ReadTimeoutError as TransportTimeoutError

from shards.errors import ConfigError, DataError, MissingObjectError, StoreFullError
from shards.folder import Piece, TransientError, changed_object, room_for, source_file

if TYPE_CHECKING:
    from shards.store import StoreConfig

logger = logging.getLogger(__name__)

_RENEWAL_S = 20.0  # for which a refusal after new credentials may still be about the old ones
_PIECE_BYTES = 1 << 18  # a body is read in pieces of at most this, so that its progress can be watched

# Error codes of S3 and of servers that speak it; HEAD answers give the bare status instead.
_THROTTLED = frozenset(
    [
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
    ]
)
_TRANSIENT = frozenset(
    [
        "InternalError",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "OperationAborted",
        "BadDigest",
        "IncompleteBody",
    ]
)
_CREDENTIALS = frozenset(
    [
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "ExpiredToken",
        "TokenRefreshRequired",
        "NotSignedUp",
        "InvalidSecurity",
        "MissingAuthenticationToken",
        "MissingSecurityHeader",
        "CredentialsNotSupported",
        "InvalidClientTokenId",
    ]
)
_REGION = frozenset(
    ["AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"]
)


class Bucket:
    """An S3 prefix. botocore's own retries are off, so that the counts and the time limit are ours."""

    splits = True

    def __init__(self, url: str, bucket: str, prefix: str, config: StoreConfig) -> None:
        if not bucket:
            raise ConfigError(f"{url}: names no bucket; write s3://bucket/prefix")
        self._url, self._bucket, self._prefix, self._config = url, bucket, prefix + "/" * bool(prefix), config
        self._lock = threading.Lock()
        self._sealed, self._opened = config.encryption.of_write(), config.encryption.of_read()
        self._transports: dict[float, URLLib3Session] = {}
        self._renewed_at = -math.inf
        self._was_reached = False
        self.endpoint = "the endpoint"  # until it is known
        try:
            self._session, self._client = self._connect()
            self.endpoint = self._client.meta.endpoint_url
            # A signed URL tells how botocore addresses the bucket and which region it signs for.
            signed = urlsplit(self._client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "-"}))
            self._base_url = f"{signed.scheme}://{signed.netloc}{signed.path.removesuffix('-')}"
            self._region = parse_qs(signed.query)["X-Amz-Credential"][0].split("/")[-3]
        except (BotoCoreError, Boto3Error, ValueError) as error:
            raise self._error("", error) from None

    def _connect(self) -> tuple[Any, Any]:
        """A session that has read the user's configuration just now, and its client."""
        session = botocore.session.get_session()
        config = self._config
        client_config = ClientConfig(
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=config.connections,
            signature_version="s3v4",
            # Uploads carry an MD5; servers other than AWS often refuse the newer trailing checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return session, boto3.session.Session(botocore_session=session).client("s3", config=client_config)

    def _renew_credentials(self) -> bool:
        """Whether others than those just refused are at hand, and taken from now on: files rewritten, roles renewed."""
        with self._lock:
            if time.monotonic() - self._renewed_at < _RENEWAL_S:
                return True  # what was refused may have been signed before
            try:
                before = self._session.get_credentials().get_frozen_credentials()
                session, client = self._connect()
                after = session.get_credentials().get_frozen_credentials()
            except (AttributeError, BotoCoreError, Boto3Error, ValueError):
                return False
            if after == before:
                return False
            self._session, self._client, self._renewed_at = session, client, time.monotonic()
            return True

    def _transport(self, attempt: int) -> URLLib3Session:
        """What a client sends with, made the way a client makes it (certificates, proxies): one for each timeout."""
        timeout_s = min(self._config.read_timeout_s, self._config.stall_timeout_s * 2.0 ** min(attempt, 10))
        with self._lock:
            if timeout_s not in self._transports:
                bundle = self._session.get_config_variable("ca_bundle")
                self._transports[timeout_s] = URLLib3Session(
                    verify=bundle or os.environ.get("REQUESTS_CA_BUNDLE") or True,
                    proxies=get_environ_proxies(self._base_url),
                    timeout=(self._config.connect_timeout_s, timeout_s),
                    max_pool_connections=self._config.connections,
                )
            return self._transports[timeout_s]

    def _get(self, name: str, headers: dict[str, str], attempt: int) -> Any:
        """A GET signed and sent by botocore's parts but not by its client, which costs three times the CPU: 3.4 against
        1.2 ms for 100 kB on one busy core. The body is not yet read."""
        url = self._base_url + percent_encode(self._prefix + name, safe="/~")
        request = AWSRequest("GET", url, headers=headers, stream_output=True)
        try:
            credentials = self._session.get_credentials()
            if credentials is None:
                raise NoCredentialsError
            # Taken anew each time: temporary ones are renewed in the background.
            S3SigV4Auth(credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
            response = self._transport(attempt).send(request.prepare())
            if response.status_code < 300:
                return response
            text = response.content.decode("utf-8", "replace")
        except (BotoCoreError, TransportError, OSError) as error:
            raise self._error(name, error) from None
        found = dict(re.findall(r"<(Code|Region)>([^<]*)</", text))
        answer: Any = {
            "Error": {"Code": found.get("Code", str(response.status_code)), "Region": found.get("Region")},
            "ResponseMetadata": {"HTTPStatusCode": response.status_code, "HTTPHeaders": response.headers},
        }
        raise self._error(name, ClientError(answer, "GetObject")) from None

    def _call(self, name: str, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except (ClientError, BotoCoreError, ResponseParserError, TransportError, OSError) as error:
            raise self._error(name, error) from None

    def check(self, attempt: int) -> None:
        """First contact, by a listing of one key: unlike HEAD it answers with a reason."""
        try:
            self._call("", "list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except _PermissionError:
            # A policy may allow reading objects and not listing; then reading will tell.
            logger.debug("%s: listing is not allowed", self._url)
        self._was_reached = True

    def size(self, name: str, attempt: int) -> int:
        try:
            return int(self._head(name)["ContentLength"])
        except _PermissionError:
            # HEAD has no body to give the reason: a GET of one byte does, or finds a name that is not there.
            return self.read(name, 0, 1, None, attempt).object_bytes

    def _head(self, name: str) -> dict[str, Any]:
        return self._call(name, "head_object", Key=self._prefix + name, **self._opened)

    def read(self, name: str, offset: int, length: int | None, version: str | None, attempt: int) -> Piece:
        headers = {"Accept-Encoding": "identity", **self._config.encryption.headers_of_read()}
        if length is not None:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        if version is not None:
            headers["If-Match"] = version
        try:
            response = self._get(name, headers, attempt)
        except _RangeError:
            assert length is not None
            # The range lies beyond the end (AWS: 416; others: 400). Ask how long the object is.
            head = self._head(name)
            if head["ContentLength"] >= offset + length:
                raise TransientError("short", "range refused although the object is long enough") from None
            return Piece(b"", head["ContentLength"], head.get("ETag"))
        try:
            body_bytes = int(response.headers.get("Content-Length", -1))
            if length is None:
                object_bytes = body_bytes
                body_bytes = min(body_bytes, self._config.part_bytes)
            else:
                content_range = response.headers.get("Content-Range")
                object_bytes = self._check_range(name, content_range, body_bytes, offset, length)
            data = self._body(response.raw, body_bytes)
        finally:
            response.raw.close()  # keeps the connection when the body was read to its end
        return Piece(data, object_bytes, response.headers.get("ETag"))

    def _check_range(self, name: str, content_range: str | None, body_bytes: int, offset: int, length: int) -> int:
        """Bytes of the object, when the answer is the range that was asked for."""
        answered = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range or "")
        if answered is None:
            if offset == 0 and 0 <= body_bytes <= length:
                return body_bytes  # the whole object, which is no more than we asked for
            raise ConfigError(
                f"{self._url}/{name}: {self.endpoint} ignores ranges (answered {body_bytes} bytes for {length}); use a"
                " server that supports them"
            )
        first, last, object_bytes = (int(group) for group in answered.groups())
        wanted_last = min(offset + length, object_bytes) - 1
        if (first, last) != (offset, wanted_last) or body_bytes != last - first + 1:
            raise TransientError(
                "short", f"asked for bytes {offset}-{wanted_last}, answered {first}-{last} with {body_bytes} bytes"
            )
        return object_bytes

    def _body(self, raw: Any, length: int) -> memoryview:
        """Exactly `length` bytes of a body, given up when it stalls, is cut, or drips."""
        if length < 0:
            raise TransientError("short", "answer without a length")
        room = room_for(length)
        got = 0
        config = self._config
        window_began, window_got = time.monotonic(), 0
        try:
            while got < length:
                piece = raw.read1(min(_PIECE_BYTES, length - got))
                if not piece:
                    raise TransientError("short", f"body ended after {got} of {length} bytes")
                room[got : got + len(piece)] = piece
                got += len(piece)
                now = time.monotonic()
                if now - window_began > config.read_timeout_s:
                    if got - window_got < config.least_bytes_per_s * (now - window_began):
                        raise TransientError("stall", f"body slower than {config.least_bytes_per_s} bytes/s")
                    window_began, window_got = now, got
        except TransportTimeoutError:
            raise TransientError("stall", f"body stalled after {got} of {length} bytes") from None
        except (TransportError, OSError) as error:
            cause = "short" if "IncompleteRead" in repr(error) else "reset"
            raise TransientError(cause, f"connection lost after {got} of {length} bytes") from None
        return room

    def write(self, name: str, data: bytes | Path, attempt: int) -> int:
        if isinstance(data, Path):
            with source_file(data) as file:
                data = file.read()
        self._call(name, "put_object", Key=self._prefix + name, Body=data, ContentMD5=_md5(data), **self._sealed)
        return len(data)

    def start_upload(self, name: str, attempt: int) -> str:
        return str(self._call(name, "create_multipart_upload", Key=self._prefix + name, **self._sealed)["UploadId"])

    def send_part(self, name: str, upload: str, number: int, data: bytes, attempt: int) -> str:
        response = self._call(
            name, "upload_part", Key=self._prefix + name, UploadId=upload, PartNumber=number, Body=data,
            ContentMD5=_md5(data), **self._opened,
        )  # fmt: skip
        return str(response["ETag"])

    def finish_upload(self, name: str, upload: str, tags: list[str], size_bytes: int, attempt: int) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
        try:
            self._call(
                name, "complete_multipart_upload", Key=self._prefix + name, UploadId=upload,
                MultipartUpload={"Parts": parts},
            )  # fmt: skip
        except MissingObjectError:
            # The answer to an earlier attempt was lost: the upload is gone because the object is there.
            if attempt == 0 or self.size(name, attempt) != size_bytes:
                raise

    def abort_upload(self, name: str, upload: str) -> None:
        self._call(name, "abort_multipart_upload", Key=self._prefix + name, UploadId=upload)

    def list(self, prefix: str, attempt: int) -> list[str]:
        names: list[str] = []
        arguments: dict[str, Any] = {"Prefix": self._prefix + prefix}
        while True:
            page = self._call(prefix, "list_objects_v2", **arguments)
            names += [row["Key"].removeprefix(self._prefix) for row in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return names
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, name: str, attempt: int) -> None:
        with contextlib.suppress(MissingObjectError):
            self._call(name, "delete_object", Key=self._prefix + name)

    def close(self) -> None:
        with self._lock:
            for connections in (self._client, *self._transports.values()):
                connections.close()

    def _error(self, name: str, error: Exception) -> Exception:
        """What an exception of boto3 means: to be repeated, the user's to mend, or about this object."""
        what = f"{self._url}/{name}".rstrip("/")
        if isinstance(error, ClientError):
            return self._answer(what, error)
        if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
            return ConfigError(
                f"{what}: no usable AWS credentials ({_one_line(error)}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY"
            )
        if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return ConfigError(f"{what}: the certificate of {self.endpoint} is not trusted; set AWS_CA_BUNDLE")
        if isinstance(error, ResponseParserError):
            return ConfigError(f"{what}: {self.endpoint} does not answer like S3; check AWS_ENDPOINT_URL")
        if isinstance(error, (EndpointConnectionError, ConnectTimeoutError)):
            return TransientError("connect", f"cannot connect to {self.endpoint}")
        if isinstance(error, (ReadTimeoutError, TransportTimeoutError)):
            return TransientError("stall", f"no answer from {self.endpoint} in time")
        if isinstance(error, (HTTPClientError, ConnectionError, TransportError, OSError)):
            return TransientError("reset", f"connection lost ({type(error).__name__})")
        return ConfigError(f"{what}: {_one_line(error)}; check bucket name, AWS_REGION and AWS_ENDPOINT_URL")

    def _answer(self, what: str, error: ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        head = error.operation_name.startswith("Head")
        if code in _THROTTLED or status in (429, 503):
            return TransientError("throttled", f"{status} {code}")
        if status >= 500 and code == str(status) and not head and error.operation_name != "GetObject":
            # botocore says so too of a page that is no XML: a gateway in passing, a web server always.
            return TransientError("connect", f"{self.endpoint} does not answer like S3")
        if code in _TRANSIENT or (status >= 500 and status not in (501, 505)):
            return TransientError("server", f"{status} {code}")
        if code in ("RequestTimeTooSkewed", "RequestExpired") and self._was_reached:
            # It was right before: a clock that jumped is set again by whoever keeps it.
            return TransientError("clock", f"the clock of this machine is wrong ({code})")
        if code in ("RequestTimeTooSkewed", "RequestExpired"):
            return ConfigError(f"{what}: the clock of this machine is wrong ({code}); set it, then start again")
        if code in _CREDENTIALS and self._renew_credentials():
            return TransientError("credentials", f"credentials refused ({code}), others are tried")
        if code in _CREDENTIALS:
            return ConfigError(
                f"{what}: credentials refused by {self.endpoint} ({code}); check AWS_PROFILE, AWS_ACCESS_KEY_ID,"
                " AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
            )
        if status == 403:
            return _PermissionError(
                f"{what}: access denied to bucket {self._bucket} ({code}); ask its owner for the right of"
                f" {error.operation_name}, or choose other credentials with AWS_PROFILE"
            )
        if code in _REGION or status in (301, 307):
            region = error.response.get("Error", {}).get("Region") or error.response.get("ResponseMetadata", {}).get(
                "HTTPHeaders", {}
            ).get("x-amz-bucket-region")
            return ConfigError(
                f"{what}: wrong region or endpoint ({code} from {self.endpoint}); set AWS_REGION"
                + (f"={region}" if region else " to the bucket's region, or correct AWS_ENDPOINT_URL")
            )
        if code == "NoSuchBucket":
            return ConfigError(f"{what}: no bucket {self._bucket} at {self.endpoint}; create it or correct the URL")
        if code in ("NoSuchKey", "NoSuchUpload", "NotFound") or (head and status == 404):
            return MissingObjectError(f"{what}: no such object; restore it, or write the set anew")
        if (
            status == 416
            or code == "InvalidRange"
            or (code == "InvalidArgument" and error.operation_name == "GetObject")
        ):
            return _RangeError(what)
        if status == 412:
            return changed_object(what)
        if code == str(status):  # no S3 error document
            return ConfigError(f"{what}: {self.endpoint} answers {status}, not like S3; check AWS_ENDPOINT_URL")
        if code in ("QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"):
            return StoreFullError(f"{what}: the store is full ({code}); free space or choose another bucket")
        return ConfigError(f"{what}: refused ({status} {code}) by {self.endpoint}; check bucket, region and endpoint")


class _PermissionError(ConfigError):
    """403 without a reason that names the credentials."""


class _RangeError(DataError):
    """The server refused a range."""


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
