"""prepare_reports.py as a person meets it: files, exit codes, kills, a language model, a cluster."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from launchers import prepare_reports, ray_data
from shards.errors import ConfigError
from shards.ingest import hashed_key
from shards.reports import llm, prepare
from shards.reports.prepared import PreparedFile, PreparedReport
from tests.shards.reports.model_server import ModelServer

ROOT = Path(__file__).parents[2]
SECRET = b"0123456789abcdef0123456789abcdef"
SURNAMES = ("Quintrell", "Zwingmann", "Côte")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "site.key"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    return path


def rows(count: int) -> Iterable[dict[str, str]]:
    for number in range(count):
        name = SURNAMES[number % 3]
        side = ("left", "right")[number % 2]
        text = (
            f"Patient {name}, MRN-77{number:04d}.\n\nFINDINGS: A {side} pleural effusion, {number + 5} mm. No nodule."
        )
        yield {"accession": f"A{number}", "mrn": f"MRN-77{number:04d}", "text": text, "surname": name}


def table(folder: Path, count: int = 12, extra: str = "") -> Path:
    path = folder / "reports.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)) + extra)
    return path


def arguments(path: Path, output: Path, *more: object) -> list[str]:
    columns = ["--study", "accession", "--patient", "mrn", "--text", "text", "--last-names", "surname"]
    return [str(word) for word in ("--input", path, "--output", output, "--workers", 1, *columns, *more)]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_table_to_prepared_reports(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = table(tmp_path, 12, '{"accession": "B", "mrn": "1"}\n'), tmp_path / "out" / "prepared.jsonl"
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--failed-max", "0.2")) == 0
    shown = capsys.readouterr()
    reports = [PreparedReport.from_line(line, SECRET) for line in output.read_bytes().splitlines()]
    assert [report.study for report in reports] == [hashed_key(SECRET, "study", f"A{n}") for n in range(12)]
    assert all(report.labels["Pleural Effusion"] == 1 for report in reports)
    audit = json.loads((output.parent / "prepared.jsonl.audit.json").read_text())
    assert audit["counts"]["reports"] == {"prepared": 12, "read": 13}
    assert audit["counts"]["failed"] == {"no text": 1} and len(audit["key_fingerprint"]) == 16
    (failed,) = (output.parent / "prepared.jsonl.failed.jsonl").read_text().splitlines()
    assert json.loads(failed) == {"study": hashed_key(SECRET, "study", "B"), "cause": "no text"}
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "prepared.jsonl", "prepared.jsonl.audit.json", "prepared.jsonl.failed.jsonl",
    ]  # fmt: skip
    written = b"".join(path.read_bytes() for path in output.parent.iterdir()).decode() + shown.out + shown.err
    assert not any(name in written for name in (*SURNAMES, "MRN-77", SECRET.decode()))
    assert "12 of 13 reports prepared, 1 failed" in shown.out


def test_any_workers_any_file_the_same_reports(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_REPORTS", 4)
    path = table(tmp_path)
    for name, workers in (("a.jsonl", 1), ("b.jsonl", 2), ("c.parquet", 1), ("d.parquet", 1)):
        assert prepare_reports.main(arguments(path, tmp_path / name, "--key-file", key, "--workers", workers)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "c.parquet").read_bytes() == (tmp_path / "d.parquet").read_bytes()
    lines, groups = (PreparedFile(tmp_path / name, SECRET) for name in ("a.jsonl", "c.parquet"))
    assert len(lines) == len(groups) == pq.read_table(tmp_path / "c.parquet").num_rows == 12
    study = hashed_key(SECRET, "study", "A7")
    first, second = (
        PreparedReport.from_line(PreparedFile.read(file.path, file.place(study) or b""), SECRET)
        for file in (lines, groups)
    )
    assert first == second and first.study == study


IN_SMALL_CHUNKS = """
import sys
from launchers import prepare_reports
from shards.reports import prepare
prepare.CHUNK_REPORTS = 4
sys.exit(prepare_reports.main(sys.argv[1:]))
"""


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_REPORTS", 4)
    path = table(tmp_path, 200)
    assert prepare_reports.main(arguments(path, tmp_path / "whole.jsonl", "--key-file", key)) == 0
    command = [sys.executable, "-c", IN_SMALL_CHUNKS]
    command += arguments(path, tmp_path / "killed.jsonl", "--key-file", key)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    parts = tmp_path / "killed.jsonl.parts"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(parts.glob("[0-9]*.jsonl"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts.is_dir() and not (tmp_path / "killed.jsonl").exists()
    assert stat.S_IMODE(parts.stat().st_mode) == 0o700
    newest = max(parts.glob("[0-9]*.jsonl"))
    newest.write_bytes(newest.read_bytes()[:-3])  # as if the disk had lost its end
    assert prepare_reports.main(arguments(path, tmp_path / "killed.jsonl", "--key-file", key)) == 0
    for ending in ("", ".audit.json", ".failed.jsonl"):
        assert (tmp_path / f"killed.jsonl{ending}").read_bytes() == (tmp_path / f"whole.jsonl{ending}").read_bytes()
    assert not parts.exists()


def test_interrupted_run_of_other_options_is_refused(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = table(tmp_path), tmp_path / "p.jsonl"
    with monkeypatch.context() as broken:
        broken.setattr(prepare, "_finish", lambda *rest: os.kill(os.getpid(), signal.SIGTERM))
        assert prepare_reports.main(arguments(path, output, "--key-file", key)) == 143
    assert "the same command goes on behind the finished parts" in capsys.readouterr().err
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--labels", "ct_rate18")) == 2
    assert "holds an interrupted run with other input or options" in one_line(capsys)
    assert prepare_reports.main(arguments(path, output, "--key-file", key)) == 0
    assert prepare_reports.main(arguments(path, output, "--key-file", key)) == 2
    assert "is there already" in capsys.readouterr().err
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--overwrite")) == 0


def test_mended_command_after_a_mistake_runs(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = table(tmp_path), tmp_path / "p.jsonl"
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--text", "rapport")) == 2
    assert "no column 'rapport'" in one_line(capsys) and not (tmp_path / "p.jsonl.parts").exists()
    assert prepare_reports.main(arguments(path, output, "--key-file", key)) == 0
    before = output.read_bytes()
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--overwrite", "--text", "rapport")) == 2
    assert output.read_bytes() == before


def test_files_that_changed_since_an_interrupted_run_are_read_again(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CHUNK_REPORTS", 2)
    folder = tmp_path / "notes" / "patient"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"s{number}.txt").write_text(f"FINDINGS: Nodule of {number} mm.")
    command = ["--input", str(tmp_path / "notes"), "--key-file", str(key), "--workers", "1", "--output"]
    output = tmp_path / "p.jsonl"
    with monkeypatch.context() as broken:
        broken.setattr(prepare, "_finish", lambda *rest: os.kill(os.getpid(), signal.SIGTERM))
        assert prepare_reports.main([*command, str(output)]) == 143
    (folder / "r.txt").write_text("FINDINGS: Effusion.")
    (folder / "s5.txt").write_text("FINDINGS: Fracture.")
    assert prepare_reports.main([*command, str(output)]) == 0
    assert prepare_reports.main([*command, str(tmp_path / "whole.jsonl")]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(PreparedFile(output, SECRET)) == 7


def test_study_that_stands_twice_keeps_its_first_report(tmp_path: Path, key: Path) -> None:
    again = json.dumps({"accession": "A3", "mrn": "x", "text": "FINDINGS: Normal."}) + "\n"
    path, output = table(tmp_path, 12, again), tmp_path / "p.jsonl"
    assert prepare_reports.main(arguments(path, output, "--key-file", key, "--failed-max", "0.1")) == 0
    assert len(PreparedFile(output, SECRET)) == 12
    assert json.loads((tmp_path / "p.jsonl.audit.json").read_text())["counts"]["failed"] == {"study stands twice": 1}


def test_too_many_failures_exit_3(tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, 3, "{}\n" * 3)
    assert prepare_reports.main(arguments(path, tmp_path / "p.jsonl", "--key-file", key)) == 3
    assert "3 of 6 reports failed, more than --failed-max 0.05" in one_line(capsys)
    assert len(PreparedFile(tmp_path / "p.jsonl", SECRET)) == 3
    path.write_text('{"accession": 1, "mrn": 2, "text": "", "surname": ""}\n')
    assert prepare_reports.main(arguments(path, tmp_path / "q.jsonl", "--key-file", key)) == 3
    assert "no report of" in one_line(capsys) and not (tmp_path / "q.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--key-file", "nowhere"], "--key-file nowhere: No such file"),
        ([], "prepare_reports.py needs --key-file"),
        (["--public", "--output", "p.csv"], "--output p.csv: end its name in .jsonl or .parquet"),
        (["--public", "--text", "a=b"], "no section is called 'a'"),
        (["--public", "--text", "findings=a", "findings=b"], "section findings stands twice"),
        (["--public", "--text", "rapport"], "no column 'rapport'"),
        (["--public", "--labels", "x"], "--labels x: there is chexpert14"),
        (["--public", "--workers", "0"], "--workers 0: needs at least 1"),
        (["--public", "--failed-max", "2"], "--failed-max 2.0: is no share"),
        (["--public", "--model", "m"], "--model m: needs --llm"),
        (["--public", "--llm", "http://127.0.0.1:1/v1"], "--model is missing"),
        (["--public", "--llm", "http://example.org/v1", "--model", "m"], "--allow-remote"),
        (["--public", "--input", "nowhere"], "--input nowhere: no such file or folder"),
        (["--public", "--output", "/proc/x/p.jsonl"], "--output /proc/x/p.jsonl: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_exit_2(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_reports.main(arguments(table(tmp_path, 1), Path("p.jsonl"), *more)) == 2
    assert message in one_line(capsys)


def test_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_reports.main(["--output", "x.jsonl"]) == 2
    assert "--input is missing" in one_line(capsys)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        prepare_reports.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for words in ("--last-names surname", "openssl rand", "--llm http://127.0.0.1:8000/v1", "exit codes: 0 done"):
        assert words in shown


class TestLanguageModel:
    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(llm, "BACKOFF_FIRST_S", 0.001)
        monkeypatch.setenv(llm.API_KEY_VARIABLE, "sk-secret")

    def run(self, server: ModelServer, path: Path, output: Path, key: Path, *more: object) -> int:
        model = ("--key-file", key, "--llm", server.url, "--model", "fake", *more)
        return prepare_reports.main(arguments(path, output, *model))

    def test_answers_are_kept_for_the_next_run(
        self, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, cache = table(tmp_path, 5), tmp_path / "answers"
        with ModelServer(lambda request: json.dumps({"entities": [], "anatomy": []})) as server:
            assert self.run(server, path, tmp_path / "a.jsonl", key, "--llm-cache", cache, "--llm-price", 1, 2) == 0
            asked = len(server.requests)
            assert asked == 1 + 5  # the first one is the probe
            assert self.run(server, path, tmp_path / "b.jsonl", key, "--llm-cache", cache) == 0
            assert len(server.requests) == asked + 1
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        counts = json.loads((tmp_path / "b.jsonl.audit.json").read_text())["counts"]["llm"]
        assert counts["answered"] == 5 and counts["prompt tokens"] == 500
        shown = capsys.readouterr()
        assert "cost at these prices" in shown.out
        written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file != path)
        assert b"sk-secret" not in written and not any(name.encode() in written for name in SURNAMES)

    def test_wrong_answers_are_left_to_rules(self, tmp_path: Path, key: Path) -> None:
        path = table(tmp_path, 3)
        assert prepare_reports.main(arguments(path, tmp_path / "rules.jsonl", "--key-file", key)) == 0
        with ModelServer(lambda request: "no") as server:
            assert self.run(server, path, tmp_path / "a.jsonl", key) == 0
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "rules.jsonl").read_bytes()

    def test_server_gone(self, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = table(tmp_path, 4)

        def dies_after(answers: int) -> ModelServer:
            left = [True] * answers
            return ModelServer(
                lambda request: json.dumps({"entities": [], "anatomy": []}) if left and left.pop() else 503
            )

        with dies_after(3) as server:
            assert self.run(server, path, tmp_path / "a.jsonl", key, "--llm-concurrency", 1) == 3
            assert "status 503, 5 times; start the server" in one_line(capsys)
        # A server of its own: the last one may still be at a request that was cancelled.
        with dies_after(1) as server:
            assert self.run(server, path, tmp_path / "b.jsonl", key, "--llm-gone", "rules") == 0
        assert len(PreparedFile(tmp_path / "b.jsonl", SECRET)) == 4

    def test_server_that_does_not_know_the_model(
        self, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with ModelServer(lambda request: 404) as server:
            assert self.run(server, table(tmp_path, 1), tmp_path / "a.jsonl", key) == 2
        assert "status 404" in one_line(capsys) and not (tmp_path / "a.jsonl.parts").exists()


class TestRay:
    def test_without_ray(self, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
        try:
            import ray  # noqa: F401
        except ImportError:
            assert (
                prepare_reports.main(arguments(table(tmp_path, 1), tmp_path / "a.jsonl", "--key-file", key, "--ray"))
                == 2
            )
            assert "Ray is not installed here; pip install 'ray[data]'" in one_line(capsys)
        else:
            pytest.skip("Ray is installed")

    def test_same_bytes(self, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Against a stand-in with the few functions of Ray Data that are used, which gives rows back in disorder."""
        monkeypatch.setattr(prepare, "CHUNK_REPORTS", 2)
        monkeypatch.setattr(ray_data, "WINDOW", 2)
        calls = install_fake_ray(monkeypatch)
        path = table(tmp_path, 13)
        assert prepare_reports.main(arguments(path, tmp_path / "a.jsonl", "--key-file", key)) == 0
        assert prepare_reports.main(arguments(path, tmp_path / "b.jsonl", "--key-file", key, "--ray", "auto")) == 0
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        assert calls == ["init auto", "map 2", "map 2", "map 2", "map 1", "shutdown"]

    @pytest.mark.slow
    def test_a_real_cluster_gives_the_same_bytes_and_leaves_nothing(
        self, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("ray")
        path = table(tmp_path, 1000)
        before = set(psutil.Process().children(recursive=True))
        with tempfile.TemporaryDirectory(prefix="ray") as folder:  # sockets lie there, whose paths must be short
            monkeypatch.setenv("RAY_TMPDIR", folder)
            assert prepare_reports.main(arguments(path, tmp_path / "a.jsonl", "--key-file", key)) == 0
            words = ("--key-file", key, "--workers", 2, "--ray", "local")
            assert prepare_reports.main(arguments(path, tmp_path / "b.jsonl", *words)) == 0
            kept = b"".join(file.read_bytes() for file in Path(folder).rglob("*") if file.is_file())
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        assert b"ray" in kept and not any(
            word in kept for word in (b"effusion", *(name.encode() for name in SURNAMES), SECRET)
        )
        _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
        assert not alive

    def test_no_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install_fake_ray(monkeypatch, fails=True)
        with pytest.raises(ConfigError, match="--ray h:1: no cluster there"):
            list(ray_data.in_order(str, [1], 1, address="h:1"))


def install_fake_ray(monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> list[str]:
    calls: list[str] = []

    class Mapped:
        def __init__(self, rows: list[dict[str, Any]], work: Any) -> None:
            self.rows, self.work = rows, work

        def iter_rows(self) -> Iterable[dict[str, Any]]:
            return [self.work(row) for row in reversed(self.rows)]

    class Items:
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            self.rows = rows

        def map(self, actor: Any, *, fn_constructor_args: tuple[Any, ...], compute: Any) -> Mapped:
            calls.append(f"map {len(self.rows)}")
            return Mapped(self.rows, actor(*fn_constructor_args))

    def init(address: str, **options: Any) -> None:
        if fails:
            raise ConnectionError
        calls.append(f"init {address}")

    data = ModuleType("ray.data")
    data.__dict__.update(
        DataContext=SimpleNamespace(get_current=SimpleNamespace), ActorPoolStrategy=SimpleNamespace,
        from_items=lambda rows, override_num_blocks: Items(rows),
    )  # fmt: skip
    ray = ModuleType("ray")
    ray.__dict__.update(
        data=data, init=init, shutdown=lambda: calls.append("shutdown"), exceptions=SimpleNamespace(RayError=KeyError)
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    return calls
