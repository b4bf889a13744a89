"""An HTTP proxy between an S3 client and its server that fails on purpose: server errors, resets, stalls, cut and
changed bodies.

Whether an attempt fails depends on (seed, request, how often this request was tried), never on timing or on the order
of threads, so a run can be repeated. The plan is changed while it runs (`FaultProxy.plan`); every request is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import socket
import struct
import urllib.request
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from urllib.parse import parse_qs, urlsplit

from ci.bench.s3_server import Server, die_with_parent

CONTROL_PATH = "/__fault_proxy__"
KINDS = (
    "error",  # 500 InternalError
    "throttle",  # 503 SlowDown
    "reset",  # the connection is reset before an answer
    "reset_midway",  # and in the middle of the body
    "truncate",  # the connection ends in the middle of the body
    "short",  # a well-formed answer with half of the range asked for; without a range the same as `truncate`
    "stall",  # half of the body, then silence for `stall_s`
    "silence",  # no answer for `stall_s`
    "drip",  # the body one byte at a time, ten a second
    "flip",  # a whole answer, one byte of its body changed
    "lost_answer",  # the server did it, its answer is lost
)
_LOGGED_REQUESTS = 100_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fails. `rate` in [0, 1] is the share of attempts; `kinds` are drawn from evenly."""

    rate: float = 0.0
    kinds: Sequence[str] = ("error", "throttle", "reset", "reset_midway", "truncate", "stall")
    seed: int = 0
    methods: Sequence[str] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    match: str = ""  # only requests whose path contains this
    attempts: int = 1_000_000  # a request fails at most in its first `attempts` attempts
    stall_s: float = 30.0
    latency_s: float = 0.0  # added to every request
    outage: bool = False  # reset everything
    # Answer everything with this S3 error: [status, code, message, headers].
    answer: Sequence[object] | None = None
    expired_token: str = ""  # refuse what is signed with this session token

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown fault kinds {sorted(unknown)}; there are {', '.join(KINDS)}")


class FaultProxy(Server):
    """The proxy in its own process, in front of the server at `upstream` (http://host:port)."""

    def __init__(self, upstream: str, plan: Plan | None = None) -> None:
        super().__init__("ci.bench.fault_proxy", ["--upstream", upstream])
        self.plan(plan or Plan())

    def plan(self, plan: Plan) -> None:
        """Change what fails from the next request on, and start counting anew."""
        self._control("PUT", json.dumps(asdict(plan)).encode())

    def report(self) -> dict:
        """`requests`, `connections`, `most_at_once`, `faults` by kind, `log`: [method, path, range] in order."""
        return json.loads(self._control("GET", None))

    def _control(self, method: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self.endpoint + CONTROL_PATH, data=body, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return response.read()


@dataclass
class _Head:
    """First line and headers of a request or an answer, as received."""

    line: str
    headers: list[tuple[str, str]]
    by_name: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.by_name = {name.lower(): value for name, value in self.headers}

    def encode(self, without: str = "") -> bytes:
        rows = [self.line, *(f"{name}: {value}" for name, value in self.headers if name.lower() != without)]
        return ("\r\n".join(rows) + "\r\n\r\n").encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> _Head | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    line, *rows = text[:-4].split("\r\n")
    return _Head(line, [(name, value.strip()) for name, _, value in (row.partition(":") for row in rows)])


async def _read_body(reader: asyncio.StreamReader, head: _Head) -> bytes:
    if "chunked" in head.by_name.get("transfer-encoding", ""):
        body = b""
        while True:
            line = await reader.readline()
            chunk = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
            body += line + chunk
            if int(line.split(b";")[0], 16) == 0:
                return body
    return await reader.readexactly(int(head.by_name.get("content-length", "0")))


def _fraction(*parts: object) -> float:
    """In [0, 1), from the words alone."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2.0**64


class _Proxy:
    def __init__(self, upstream: str) -> None:
        self._host, self._port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._apply(Plan())

    def _apply(self, plan: Plan) -> None:
        self._plan = plan
        self._attempts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._log: deque[tuple[str, str, str]] = deque(maxlen=_LOGGED_REQUESTS)
        self._requests = self._connections = self._now = self._most_at_once = 0

    def _fault(self, method: str, path: str, head: _Head) -> str | None:
        plan = self._plan
        parts = urlsplit(path)
        # Upload ids are random, so of the query only the part number tells requests apart.
        number = parse_qs(parts.query).get("partNumber", [""])[0]
        request = f"{method} {parts.path} {number} {head.by_name.get('range', '')}"
        attempt = self._attempts[request]
        self._attempts[request] += 1
        if plan.outage:
            return "reset"
        if method not in plan.methods or plan.match not in path or attempt >= plan.attempts:
            return None
        if _fraction(plan.seed, "fails", request, attempt) >= plan.rate:
            return None
        return plan.kinds[int(_fraction(plan.seed, "kind", request, attempt) * len(plan.kinds))]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            while (head := await _read_head(reader)) is not None:
                if not await self._request(head, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client gave up, as it should on a stall
        finally:
            writer.close()

    async def _request(self, head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may be used again."""
        method, path, _ = head.line.split(" ", 2)
        if "expect" in head.by_name:  # not part of the signature; answered here so that a fault can follow
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, head)
        if path == CONTROL_PATH:
            self._control(method, body, writer)
            await writer.drain()
            return True
        self._requests += 1
        self._now += 1
        self._most_at_once = max(self._most_at_once, self._now)
        self._log.append((method, path, head.by_name.get("range", "")))
        try:
            return await self._answer(method, path, head, body, writer)
        finally:
            self._now -= 1

    def _control(self, method: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if method == "PUT":
            self._apply(Plan(**json.loads(body)))
        report = {
            "requests": self._requests, "connections": self._connections, "most_at_once": self._most_at_once,
            "faults": self._faults, "log": list(self._log),
        }  # fmt: skip
        text = json.dumps(report).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))

    async def _answer(self, method: str, path: str, head: _Head, body: bytes, writer: asyncio.StreamWriter) -> bool:
        plan = self._plan
        if plan.latency_s:
            await asyncio.sleep(plan.latency_s)
        fault = self._fault(method, path, head)
        if fault is not None:
            self._faults[fault] += 1
        if plan.expired_token and head.by_name.get("x-amz-security-token") == plan.expired_token:
            self._faults["expired"] += 1
            return await self._refuse(writer, method, 400, "ExpiredToken", "The provided token has expired.")
        if plan.answer is not None and not plan.outage:
            return await self._refuse(writer, method, *plan.answer)
        if fault == "error":
            return await self._refuse(writer, method, 500, "InternalError", "made on purpose")
        if fault == "throttle":
            return await self._refuse(writer, method, 503, "SlowDown", "made on purpose")
        if fault == "reset":
            return _reset(writer)
        if fault == "silence":
            await asyncio.sleep(plan.stall_s)
            return _reset(writer)
        answer, content = await self._forward(method, head, body)
        if fault == "lost_answer":
            return _reset(writer)
        if fault == "short" and "content-range" in answer.by_name:
            return await _send_short(writer, answer, content)
        writer.write(answer.encode())
        if fault == "flip" and content:
            place = len(content) // 2
            content = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        if fault in (None, "flip"):
            writer.write(content)
            await writer.drain()
            return "close" not in answer.by_name.get("connection", "")
        if fault == "drip":
            for byte in content:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
            return True
        writer.write(content[: len(content) // 2])
        await writer.drain()
        if fault == "stall":
            await asyncio.sleep(plan.stall_s)
        if fault in ("stall", "reset_midway"):
            await asyncio.sleep(0.01)  # what was sent should arrive before the reset
            return _reset(writer)
        return False

    async def _forward(self, method: str, head: _Head, body: bytes) -> tuple[_Head, bytes]:
        for fresh in (False, True):  # a kept connection may have been closed by the server meanwhile
            if self._idle and not fresh:
                reader, writer = self._idle.pop()
            else:
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 24)
            writer.write(head.encode(without="expect") + body)
            answer = await _read_head(reader)
            if answer is not None or fresh:
                break
            writer.close()
        if answer is None:
            raise ConnectionResetError("the server closed the connection")
        bodiless = method == "HEAD" or answer.line.split(" ")[1] in ("204", "304")
        content = b"" if bodiless else await _read_body(reader, answer)
        if "close" in answer.by_name.get("connection", ""):
            writer.close()
        else:
            self._idle.append((reader, writer))
        return answer, content

    async def _refuse(
        self, writer: asyncio.StreamWriter, method: str, status: object, code: object, message: object,
        headers: object = None,
    ) -> bool:  # fmt: skip
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        rows = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        if isinstance(headers, dict):
            rows += headers.items()
        writer.write(_Head(f"HTTP/1.1 {status} Fault", rows).encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        return True


async def _send_short(writer: asyncio.StreamWriter, answer: _Head, content: bytes) -> bool:
    half = content[: len(content) // 2]
    rows = []
    for name, value in answer.headers:
        if name.lower() == "content-length":
            value = str(len(half))
        if name.lower() == "content-range":
            first, _, rest = value.removeprefix("bytes ").partition("-")
            value = f"bytes {first}-{int(first) + len(half) - 1}/{rest.rpartition('/')[2]}"
        rows.append((name, value))
    writer.write(_Head(answer.line, rows).encode() + half)
    await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> bool:
    """Close with RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def _serve(upstream: str, port: int) -> None:
    proxy = _Proxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=1 << 24, backlog=256)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve until the parent ends; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True, help="http://host:port of the real server")
    parser.add_argument("--port", type=int, default=0, help="0: the kernel chooses")
    parser.add_argument("--parent", type=int, help="process to die with")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    asyncio.run(_serve(arguments.upstream, arguments.port))


if __name__ == "__main__":
    main()
