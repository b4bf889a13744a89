"""Stores on real servers: nanio (checks signatures) and moto on loopback, a proxy that fails on purpose between."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from ci.bench.fault_proxy import FaultProxy, Plan
from ci.bench.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, client_environment
from shards.chunk_cache import ChunkCache
from shards.errors import ConfigError, DataError, MissingObjectError, StoreFullError, StoreUnreachableError
from shards.store import Store, StoreRetry, open_store, split_url
from tests.conftest import set_environment
from tests.shards.s3 import QUICK, iam_user_without_rights, moto_checks_rights, random_bytes

MEBIBYTE = 1 << 20


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path)
    return request.getfixturevalue("bucket") + "/some/prefix"


class TestBothKinds:
    def test_round_trip(self, url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        data = random_bytes(3 * MEBIBYTE + 17, "round trip")
        local = tmp_path_factory.mktemp("local")
        (local / "source").write_bytes(data)
        with open_store(url, QUICK) as store:
            store.put("a/b c+%ü.tar", data)
            store.put("a/file", local / "source")
            store.put("empty", b"")
            assert store.size("a/file") == len(data)
            assert store.exists("empty")
            assert not store.exists("a")
            assert not store.exists("a/file/none")
            assert store.get("a/b c+%ü.tar") == data
            assert store.get("a/file") == data
            assert store.get("empty") == b""
            assert store.get_range("a/file", 5, 7) == data[5:12]
            assert store.get_range("a/file", 0, len(data)) == data
            assert store.get_range("a/file", len(data), 0) == b""
            assert store.get_to_file("a/file", local / "copy") == len(data)
            assert (local / "copy").read_bytes() == data
            assert sorted(os.listdir(local)) == ["copy", "source"]
            assert store.list() == ["a/b c+%ü.tar", "a/file", "empty"]
            assert store.list("a/f") == ["a/file"]
            assert store.list("a/") == ["a/b c+%ü.tar", "a/file"]
            assert store.list("nothing") == []
            store.put("empty", b"replaced")
            assert store.get("empty") == b"replaced"
            for name in store.list():
                store.delete(name)
                store.delete(name)
            assert store.list() == []
            assert store.stats.retries == 0

    def test_many_ranges(self, url: str) -> None:
        data = random_bytes(4 * MEBIBYTE, "many")
        requests = [("shard", offset, 70_001) for offset in range(0, len(data) - 70_001, 99_991)]
        requests.append(("shard", 10, 3 * MEBIBYTE))
        with open_store(url, QUICK) as store:
            store.put("shard", data)
            wanted = [data[offset : offset + length] for _, offset, length in requests]
            assert [future.result() for future in store.get_ranges(requests)] == wanted
            assert list(store.iterate_ranges(requests)) == wanted
            assert store.stats.bytes_read == 2 * sum(map(len, wanted))

    def test_short_and_missing_objects_are_named(self, url: str) -> None:
        with open_store(url, QUICK) as store:
            store.put("shard.tar", b"x" * 1000)
            for offset, length in ((0, 1001), (990, 20), (1000, 1), (5000, 10)):
                with pytest.raises(DataError) as error:
                    store.get_range("shard.tar", offset, length)
                assert "shard.tar: has 1000 bytes" in one_line(error)
                assert "truncated" in str(error.value)
            for call in (store.get, store.size, lambda name: store.get_range(name, 0, 1)):
                with pytest.raises(MissingObjectError, match=r"gone\.tar"):
                    call("gone.tar")
            assert store.stats.retries == 0

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a\0b", "."])
    def test_names_stay_below_the_store(self, url: str, name: str) -> None:
        with open_store(url, QUICK) as store, pytest.raises(DataError, match="not a name below"):
            store.get(name)

    def test_bytes_in_flight_are_bounded(self, url: str) -> None:
        config = Store.Config(connections=8, bytes_in_flight=300_000, part_bytes=MEBIBYTE)
        with open_store(url, config) as store:
            store.put("shard", random_bytes(2 * MEBIBYTE, "flight"))
            for future in store.get_ranges([("shard", 1000 * number, 100_000) for number in range(60)]):
                future.result()
            assert 100_000 <= store.stats.most_bytes_in_flight <= 300_000
            # One that is larger than the budget is admitted alone.
            assert len(store.get_ranges([("shard", 0, 400_000)])[0].result()) == 400_000
            assert store.stats.most_bytes_in_flight == 400_000

    def test_closed_store_cancels(self, url: str) -> None:
        store = open_store(url, QUICK)
        store.put("shard", b"x")
        store.close()
        store.close()
        with pytest.raises((RuntimeError, StoreUnreachableError)):
            store.get_ranges([("shard", 0, 1)])


class TestFolder:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder") as error:
            open_store(tmp_path / "none")
        assert str(tmp_path / "none") in one_line(error)
        assert error.value.exit_code == 2
        open_store(tmp_path / "made" / "deep", create=True).put("x", b"1")
        assert (tmp_path / "made" / "deep" / "x").read_bytes() == b"1"
        with pytest.raises(ConfigError, match="is a file"):
            open_store(tmp_path / "made" / "deep" / "x")

    def test_unreadable_folder_and_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"secret")
        with as_nobody(tmp_path):
            store = open_store(tmp_path)
            with pytest.raises(ConfigError, match=r"file: may not be read .*give this user") as error:
                store.get_range("file", 0, 1)
            one_line(error)
            with pytest.raises(ConfigError, match=r"may not be written"):
                store.put("new", b"")
        with as_nobody(tmp_path, mode=0o700), pytest.raises(ConfigError, match="folder cannot be read"):
            open_store(tmp_path)

    @pytest.mark.parametrize("url", ["http://x/y", "gs://bucket", "pipe:cat x", "", "file://host/x", "s3://"])
    def test_unknown_kinds_are_refused(self, url: str) -> None:
        with pytest.raises(ConfigError):
            open_store(url)

    def test_urls(self, tmp_path: Path) -> None:
        (tmp_path / "a b").write_bytes(b"1")
        assert open_store(f"file://{tmp_path}").get("a b") == b"1"
        assert split_url("s3://bucket/p/manifest.json") == ("s3://bucket/p", "manifest.json")
        assert split_url("s3://bucket/manifest.json") == ("s3://bucket", "manifest.json")
        assert split_url("/a/b/manifest.json") == ("/a/b", "manifest.json")
        assert split_url("file:///a/b%20c/m") == ("/a/b c", "m")
        assert split_url("manifest.json") == (".", "manifest.json")
        with pytest.raises(ConfigError, match="names no object"):
            split_url("s3://bucket")

    def test_full_disk_leaves_the_old_file(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        store.put("latest", b"old")
        (tmp_path / "big").write_bytes(b"x" * 300_000)
        with file_size_limit(100_000):
            for data in (b"x" * 200_000, tmp_path / "big"):
                with pytest.raises(StoreFullError, match="no room left") as error:
                    store.put("latest", data)
                assert str(tmp_path / "latest") in one_line(error)
                assert error.value.exit_code == 3
            with pytest.raises(StoreFullError):
                store.get_to_file("big", tmp_path / "copy")
        assert store.get("latest") == b"old"
        assert sorted(os.listdir(tmp_path)) == ["big", "latest"]

    def test_killed_writer_leaves_nothing_listed_and_the_next_one_cleans_up(self, tmp_path: Path) -> None:
        program = (
            "import sys, time\nfrom shards import folder\n"
            f"with folder.atomic_file(folder.Path({str(tmp_path / 'shard.tar')!r}), 'x') as descriptor:\n"
            "    folder.pwrite_all(descriptor, b'half', 0); print('written', flush=True); time.sleep(60)\n"
        )
        root = Path(__file__).parents[2]
        writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        alive = open_store(tmp_path)
        alive.put("other", b"")
        assert len(os.listdir(tmp_path)) == 2  # a living writer's file is not touched
        writer.kill()
        writer.communicate()
        store = open_store(tmp_path)
        assert store.list() == ["other"]
        store.put("shard.tar", b"whole")
        assert sorted(os.listdir(tmp_path)) == ["other", "shard.tar"]

    def test_replaced_file_is_read_anew(self, tmp_path: Path) -> None:
        reader, writer = open_store(tmp_path), open_store(tmp_path)
        writer.put("latest", b"1")
        assert reader.get("latest") == b"1"
        assert reader.get_range("latest", 0, 1) == b"1"
        writer.put("latest", b"longer")
        assert reader.get("latest") == b"longer"
        assert reader.get_range("latest", 0, 6) == b"longer"

    def test_descriptors_are_bounded(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        for number in range(300):
            (tmp_path / str(number)).write_bytes(b"%3d" % number)
        before = len(os.listdir("/proc/self/fd"))
        futures = store.get_ranges([(str(number % 300), 0, 3) for number in range(900)])
        assert [future.result() for future in futures] == [b"%3d" % (number % 300) for number in range(900)]
        assert len(os.listdir("/proc/self/fd")) <= before + 130
        store.close()
        assert len(os.listdir("/proc/self/fd")) <= before


class TestS3Configuration:
    """Each mistake of a user is one line that names it, at once."""

    def refused(self, url: str, **changes: float) -> str:
        began = time.monotonic()
        config = Store.Config(**{"first_contact_limit_s": 0.5, "connect_timeout_s": 0.5, **changes})  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as error:
            open_store(url, config).get("manifest.json")
        assert error.value.exit_code == 2
        assert time.monotonic() - began < 60  # retried it would take `retry_limit_s`, 120
        return one_line(error)

    def test_wrong_secret(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "SignatureDoesNotMatch" in self.refused(bucket)

    def test_secret_that_turns_wrong_while_running(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(ConfigError, match="SignatureDoesNotMatch"):
            open_store(bucket, QUICK)

    def test_unknown_access_key(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        assert "AWS_ACCESS_KEY_ID" in self.refused(bucket)

    def test_no_credentials(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no usable AWS credentials" in self.refused(bucket)

    def test_unknown_profile(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "hospital")
        assert "hospital" in self.refused(bucket)

    def test_missing_bucket(self, bucket: str) -> None:
        assert "no bucket there-is-none" in self.refused("s3://there-is-none/x")

    def test_nobody_at_the_endpoint(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        message = self.refused(bucket)
        assert f"127.0.0.1:{port}" in message
        assert "AWS_ENDPOINT_URL" in message

    def test_endpoint_that_is_no_url(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "minio-9000")
        assert "AWS_ENDPOINT_URL" in self.refused(bucket)

    @pytest.mark.parametrize(
        ("answer", "words"),
        [
            ((400, "AuthorizationHeaderMalformed", "wrong"), "wrong region or endpoint"),
            ((301, "PermanentRedirect", "", {"x-amz-bucket-region": "eu-west-3"}), "AWS_REGION=eu-west-3"),
            ((403, "AccessDenied", "no"), "access denied to bucket"),
            ((403, "RequestTimeTooSkewed", "no"), "clock"),
            ((403, "ExpiredToken", "no"), "AWS_SESSION_TOKEN"),
            ((404, "404", "a web server"), "not like S3"),
            ((400, "Whatever", "no"), "400 Whatever"),
        ],
    )
    def test_refusals(
        self, faulty_bucket: str, fault_proxy: FaultProxy, answer: tuple[object, ...], words: str
    ) -> None:
        fault_proxy.plan(Plan(answer=answer))
        assert words in self.refused(faulty_bucket)

    def test_credentials_renewed_in_their_file_are_read_when_the_old_ones_are_refused(
        self, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        file = tmp_path / "credentials"

        def write(**changes: str) -> None:
            rows = [f"{name} = {value}" for name, value in (good | changes).items()]
            file.write_text("\n".join(["[default]", *rows]) + "\n")

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        write()
        with open_store(bucket, QUICK) as store:
            store.put("a", b"first")
            # The server forgets the user, as when a token ends; meanwhile the file has been rewritten.
            frozen = SimpleNamespace(access_key="expired", secret_key="expired", token=None)
            old = SimpleNamespace(get_frozen_credentials=lambda: frozen)
            monkeypatch.setattr(store._backend._session, "get_credentials", lambda: old)  # type: ignore[union-attr]
            assert store.get("a") == b"first"
            assert store.stats.retries_by_cause["credentials"] == 1
            store.put("b", b"second")
            assert store.get("b") == b"second"

    def test_a_clock_that_jumps_while_a_store_is_used_is_waited_for(
        self, faulty_bucket: str, fault_proxy: FaultProxy
    ) -> None:
        with open_store(faulty_bucket, QUICK, on_retry=lambda _: fault_proxy.plan(Plan())) as store:
            store.put("a", b"first")
            fault_proxy.plan(Plan(answer=(403, "RequestTimeTooSkewed", "no")))
            assert store.get("a") == b"first"
            assert store.stats.retries_by_cause["clock"] > 0

    def test_server_that_ignores_ranges(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        store = open_store(faulty_bucket, QUICK)
        fault_proxy.plan(Plan(answer=(200, "not", "an object" * 100)))
        with pytest.raises(ConfigError, match="ignores ranges"):
            store.get_range("x", 5, 5)

    def test_web_server_in_place_of_s3(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = b"<html><br>welcome"
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            assert "does not answer like S3" in self.refused(bucket)
            server.shutdown()

    def test_user_without_rights(self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        moto_server.create_bucket("closed")
        access_key, secret_key = iam_user_without_rights(moto_server.endpoint, "visitor")
        moto_checks_rights(moto_server.endpoint, on=True)
        try:
            set_environment(monkeypatch, client_environment(moto_server.endpoint, access_key, secret_key))
            message = self.refused("s3://closed")
            assert "access denied to bucket closed" in message
            assert "AccessDenied" in message
            with pytest.raises(ConfigError, match="access denied"):
                open_store("s3://closed").size("x")
            with pytest.raises(ConfigError, match="access denied"):
                open_store("s3://closed").put("x", b"")
        finally:
            moto_checks_rights(moto_server.endpoint, on=False)


class TestMoto:
    """The same code on a second server, whose answers are closer to those of AWS."""

    def test_round_trip(self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        moto_server.create_bucket("second")
        set_environment(monkeypatch, moto_server.environment())
        data = random_bytes(11 * MEBIBYTE, "moto")
        (tmp_path / "checkpoint").write_bytes(data)
        with open_store("s3://second/p", Store.Config(part_bytes=5 * MEBIBYTE)) as store:
            store.put("checkpoint", tmp_path / "checkpoint")  # three parts
            store.put("small", b"1")
            store.put("empty", b"")
            assert store.get("checkpoint") == data
            assert store.get("empty") == b""
            assert store.get_to_file("checkpoint", tmp_path / "copy") == len(data)
            assert (tmp_path / "copy").read_bytes() == data
            assert store.list() == ["checkpoint", "empty", "small"]
            with pytest.raises(DataError, match="truncated"):
                store.get_range("small", 0, 2)
            with pytest.raises(DataError, match="truncated"):
                store.get_range("small", 7, 2)
            with pytest.raises(MissingObjectError):
                store.get("none")
            store.delete("small")
            store.delete("small")
            assert not store.exists("small")

    def test_object_that_changes_while_it_is_read(self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        moto_server.create_bucket("moving")
        set_environment(monkeypatch, moto_server.environment())
        store, writer = open_store("s3://moving", QUICK), open_store("s3://moving", QUICK)
        writer.put("x", random_bytes(3 * MEBIBYTE, 1))
        first = store._read("x", 0, None, None)
        writer.put("x", random_bytes(3 * MEBIBYTE, 2))
        with pytest.raises(DataError, match="changed while it was read"):
            store._read("x", MEBIBYTE, MEBIBYTE, first.version)


class TestFaults:
    @pytest.mark.parametrize(
        ("kind", "cause"),
        [
            ("error", "server"),
            ("throttle", "throttled"),
            ("reset", "reset"),
            ("reset_midway", "reset"),
            ("truncate", "short"),
            ("short", "short"),
            ("stall", "stall"),
            ("silence", "stall"),
            ("drip", "stall"),
        ],
    )
    def test_each_kind_is_mended_and_counted(
        self, faulty_bucket: str, fault_proxy: FaultProxy, kind: str, cause: str
    ) -> None:
        data = random_bytes(300_000, kind)
        seen: list[StoreRetry] = []
        with open_store(faulty_bucket, QUICK, on_retry=seen.append) as store:
            store.put("shard", data)
            fault_proxy.plan(Plan(rate=1, kinds=[kind], attempts=2, methods=["GET"], match="shard", stall_s=5))
            assert store.get_range("shard", 1000, 200_000) == data[1000:201_000]
            assert store.stats.retries == len(seen) >= 2
            assert store.stats.retries_by_cause[cause] >= 1
            assert [retry.attempt for retry in seen] == list(range(1, len(seen) + 1))
            assert {retry.name for retry in seen} == {"shard"}
            assert cause in {retry.cause for retry in seen}

    def test_a_fifth_of_all_requests_fails_and_no_byte_is_wrong(
        self, faulty_bucket: str, fault_proxy: FaultProxy, tmp_path: Path
    ) -> None:
        data = random_bytes(6 * MEBIBYTE, "fifth")
        (tmp_path / "file").write_bytes(data)
        kinds = ("error", "throttle", "reset", "reset_midway", "truncate", "short", "stall", "lost_answer")
        with open_store(faulty_bucket, QUICK) as store:
            fault_proxy.plan(Plan(rate=0.2, kinds=kinds, stall_s=2))
            store.put("shard", tmp_path / "file")
            requests = [("shard", offset, 50_000) for offset in range(0, len(data) - 50_000, 49_999)]
            for future, (_, offset, length) in zip(store.get_ranges(requests), requests, strict=True):
                assert future.result() == data[offset : offset + length]
            report = fault_proxy.report()
            # A busy machine may add a stall of its own to those that were planned.
            assert store.stats.retries >= sum(report["faults"].values()) > 15
            assert store.stats.retries == sum(store.stats.retries_by_cause.values())
            assert store.get("shard") == data
            store.get_to_file("shard", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == data

    def test_connections_are_kept(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        with open_store(faulty_bucket, QUICK) as store:
            store.put("shard", b"x" * 1000)
            fault_proxy.plan(Plan())
            for _ in range(5):
                for future in store.get_ranges([("shard", number, 100) for number in range(20)]):
                    future.result()
            report = fault_proxy.report()
            assert report["requests"] >= 100
            assert 2 <= report["most_at_once"] <= QUICK.connections
            assert report["connections"] <= 2 * QUICK.connections  # far from one for each request

    def test_outage_beyond_the_limit(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        config = Store.Config(connections=2, retry_limit_s=1.0, stall_timeout_s=0.3)
        with open_store(faulty_bucket, config) as store:
            store.put("shard", b"x" * 1000)
            fault_proxy.plan(Plan(outage=True))
            began = time.monotonic()
            for call in (
                lambda: store.get_range("shard", 0, 10),
                lambda: store.size("shard"),
                lambda: store.put("y", b""),
            ):
                with pytest.raises(StoreUnreachableError) as error:
                    call()
                assert error.value.exit_code == 3
                assert "retry_limit_s" in one_line(error)
            assert time.monotonic() - began < 60  # not 120 s each, the default
            fault_proxy.plan(Plan())
            assert store.get_range("shard", 0, 10) == b"x" * 10

    def test_server_killed_and_started_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = random_bytes(2 * MEBIBYTE, "killed")
        requests = [("shard", offset, 10_000) for offset in range(0, MEBIBYTE, 10_000)]
        with S3Server("nanio", tmp_path) as server:
            server.create_bucket("bucket")
            set_environment(monkeypatch, server.environment())
            store = open_store("s3://bucket", QUICK)
            store.put("shard", data)
            futures = store.get_ranges(requests)
            futures[3].result()
            server.kill()
            with S3Server("nanio", tmp_path, port=server.port):
                for future, (_, offset, length) in zip(futures, requests, strict=True):
                    assert future.result() == data[offset : offset + length]
            store.close()

    def test_outage_at_the_start_is_not_taken_for_a_wrong_bucket(
        self, faulty_bucket: str, fault_proxy: FaultProxy
    ) -> None:
        fault_proxy.plan(Plan(rate=1, kinds=["throttle"]))
        with pytest.raises(StoreUnreachableError, match="SlowDown"):
            open_store(faulty_bucket, Store.Config(retry_limit_s=0.5))

    def test_failed_upload_leaves_no_parts(
        self, faulty_bucket: str, s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path
    ) -> None:
        assert s3_server.data is not None
        before = {path for path in s3_server.data.rglob("*") if path.is_file()}
        (tmp_path / "file").write_bytes(bytes(11 * MEBIBYTE))
        config = Store.Config(connections=2, part_bytes=5 * MEBIBYTE, retry_limit_s=0.5)
        with open_store(faulty_bucket, config) as store:
            fault_proxy.plan(Plan(rate=1, kinds=["error"], methods=["PUT"], match="partNumber=3"))
            with pytest.raises(StoreUnreachableError):
                store.put("checkpoint", tmp_path / "file")
            assert store.list() == []
        assert {path for path in s3_server.data.rglob("*") if path.is_file()} <= before

    def test_closing_ends_the_wait(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        store = open_store(faulty_bucket, Store.Config(connections=1, stall_timeout_s=0.3, retry_limit_s=600))
        store.put("shard", b"x" * 1000)
        fault_proxy.plan(Plan(outage=True))
        futures = store.get_ranges([("shard", 0, 10), ("shard", 10, 10)])
        timer = threading.Timer(0.5, store.close)
        timer.start()
        began = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="closed"):
            futures[0].result()
        assert time.monotonic() - began < 60  # not 600
        timer.join()

    def test_interpreter_ends_while_a_store_is_retrying(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        open_store(faulty_bucket, QUICK).put("shard", b"x" * 1000)
        program = (
            "import sys, urllib.request\nfrom shards.store import open_store\n"
            f"store = open_store({faulty_bucket!r})\n"
            f"from ci.bench.fault_proxy import Plan\n"
            "futures = store.get_ranges([('none-yet-' + str(n), 0, 10) for n in range(50)])\n"
        )
        fault_proxy.plan(Plan(rate=1, kinds=["throttle"], match="none-yet"))
        # Below the 120 s of `retry_limit_s`, for which it would wait.
        subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=100)


class TestFaultProxy:
    def test_the_same_requests_fail_again(self, faulty_bucket: str, fault_proxy: FaultProxy) -> None:
        counts = []
        # A machine that is slow for a moment must not add attempts of its own.
        with open_store(faulty_bucket, replace(QUICK, stall_timeout_s=60.0, read_timeout_s=60.0)) as store:
            store.put("shard", b"x" * 1000)
            for seed in (1, 1, 2):
                fault_proxy.plan(Plan(rate=0.3, kinds=["error", "throttle", "reset"], seed=seed))
                for future in store.get_ranges([("shard", number, 10) for number in range(40)]):
                    future.result()
                counts.append(fault_proxy.report()["faults"])
        assert counts[0] == counts[1]
        assert counts[0] != counts[2]

    def test_servers_die_with_their_parent(self, tmp_path: Path) -> None:
        program = (
            "import os, signal\nfrom pathlib import Path\nfrom ci.bench.s3_server import S3Server\n"
            "from ci.bench.fault_proxy import FaultProxy\n"
            f"server = S3Server('nanio', Path({str(tmp_path)!r}))\nproxy = FaultProxy(server.endpoint)\n"
            "print(server.process_id, proxy.process_id, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
        for process in done.stdout.split():
            deadline = time.monotonic() + 60
            while alive(int(process)):
                assert time.monotonic() < deadline
                time.sleep(0.05)


class TestChunkCache:
    def test_keeps_and_checks(self, tmp_path: Path) -> None:
        cache = ChunkCache(tmp_path, 1_000_000)
        data = random_bytes(10_000, "cache")
        assert cache.get("sha", 0, 10_000) is None
        assert cache.put("sha", 0, 10_000, data)
        assert cache.get("sha", 0, 10_000) == data
        assert cache.get("other", 0, 10_000) is None
        assert ChunkCache(tmp_path, 1_000_000).get("sha", 0, 10_000) == data
        (path,) = tmp_path.glob("*/*.range")
        damaged = bytearray(path.read_bytes())
        damaged[500] ^= 1
        path.write_bytes(damaged)
        assert cache.get("sha", 0, 10_000) is None
        assert not path.exists()
        assert cache.get_or_fetch("sha", 0, 10_000, lambda: data) == data
        path.write_bytes(path.read_bytes()[:-1])  # cut
        assert cache.get("sha", 0, 10_000) is None

    def test_a_disk_without_locks_costs_the_entry_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refused(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        cache = ChunkCache(tmp_path, 100_000)
        monkeypatch.setattr("fcntl.flock", refused)
        assert cache.get_or_fetch("sha", 0, 5, lambda: b"bytes") == b"bytes"
        assert "cannot cache" in caplog.text
        cache.close()
        assert not cache.put("sha", 0, 5, b"bytes")

    def test_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        cache = ChunkCache(tmp_path, 100_000)
        for number in range(9):
            cache.put("sha", number, 10_000, bytes(10_000))
            time.sleep(0.002)
        assert cache.get("sha", 0, 10_000) is not None  # used again: now the youngest
        cache.put("sha", 9, 10_000, bytes(10_000))
        assert cache.get("sha", 0, 10_000) is not None
        assert cache.get("sha", 9, 10_000) is not None
        assert cache.get("sha", 1, 10_000) is None
        assert not cache.put("sha", 0, 200_000, bytes(200_000))

    def test_two_processes_and_a_killed_one_stay_within_the_limit(self, tmp_path: Path) -> None:
        (tmp_path / "00").mkdir()
        (tmp_path / "00" / "dead.part").write_bytes(b"half")
        program = (
            "import sys\nfrom shards.chunk_cache import ChunkCache\n"
            f"cache = ChunkCache({str(tmp_path)!r}, 300_000)\n"
            "for n in range(150):\n    k = (n * 7 + int(sys.argv[1])) % 60\n"
            "    assert cache.get_or_fetch('s', k, 9_000, lambda: bytes([k]) * 9_000) == bytes([k]) * 9_000\n"
        )
        root = Path(__file__).parents[2]
        others = [subprocess.Popen([sys.executable, "-c", program, str(n)], cwd=root) for n in range(2)]
        while any(other.poll() is None for other in others):
            # A walk is not a snapshot: it can meet a file before and after its renaming. An excess would stay.
            assert min(folder_bytes(tmp_path) for _ in range(4)) <= 300_000 + 100
            time.sleep(0.01)
        assert [other.returncode for other in others] == [0, 0]
        assert not list(tmp_path.glob("*/*.part"))

    def test_a_full_disk_costs_the_entry_only(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = ChunkCache(tmp_path, 1_000_000)
        with file_size_limit(5_000):
            assert cache.get_or_fetch("sha", 0, 10_000, lambda: bytes(10_000)) == bytes(10_000)
            assert not cache.put("sha", 1, 10_000, bytes(10_000))
        assert len([record for record in caplog.records if "cannot cache" in record.message]) == 1
        assert not list(tmp_path.glob("*/*"))
        assert cache.put("sha", 0, 10_000, bytes(10_000))

    def test_unusable_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConfigError, match="cache folder cannot be used"):
            ChunkCache(tmp_path / "file", 1000)


@contextmanager
def as_nobody(folder: Path, mode: int = 0o755) -> Iterator[None]:
    """Without the rights of root, for whom nothing is unreadable; `folder` is reachable and its files are not."""
    if os.geteuid() == 0:
        for parent in (folder, *folder.parents):
            if parent.stat().st_mode & 0o001:
                break
            parent.chmod(parent.stat().st_mode | 0o011)  # pytest's folders are closed to others
    for file in folder.iterdir():
        file.chmod(0o600 if os.geteuid() == 0 else 0)
    folder.chmod(mode if os.geteuid() == 0 else mode & 0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o755)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail with EFBIG, which is as near to a full disk as an ordinary user gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*.range"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_large_bodies_lie_outside_of_the_heap_and_small_ones_do_not(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    (tmp_path / "shard").write_bytes(data)
    with open_store(tmp_path) as store:
        large, small = store.read_ranges([("shard", 100, 500_000), ("shard", 600_000, 1000)])
    assert large == data[100:500_100] and small == data[600_000:601_000]
    assert isinstance(large, memoryview) and isinstance(large.obj, mmap.mmap)
    assert isinstance(small, memoryview) and isinstance(small.obj, bytearray)
