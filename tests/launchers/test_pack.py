"""pack.py as a person meets it: exit codes, one-line errors, tables, --verify."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from launchers import pack
from shards.manifest import Manifest
from tests.shards.sources import encoded

ROOT = Path(__file__).parents[2]
MAPPING = """
table = "t.csv"
[columns]
file = "file"
patient = "patient"
[labels]
column = "labels"
names = ["Nodule"]
normal = ["none"]
[template]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of a table, one of them missing and one broken, with its mapping."""
    result = tmp_path / "input"
    result.mkdir()
    rows = ["file,patient,labels"] + [f"{i}.jpg,Jane {i // 2},{'Nodule' if i % 3 else 'none'}" for i in range(14)]
    (result / "t.csv").write_text("\n".join(rows) + "\n")
    for i in range(13):
        (result / f"{i}.jpg").write_bytes(encoded(i))
    (result / "5.jpg").write_bytes(b"broken")
    (result / "mapping.toml").write_text(MAPPING)
    return result


def run(*arguments: object) -> int:
    return pack.main([str(argument) for argument in arguments])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def pack_table(folder: Path, output: Path, *more: object) -> int:
    common = ("--source", "table", "--input", folder, "--output", output, "--workers", 1, "--shard-samples", 4)
    return run(*common, "--fractions", "train=0.5,test=0.5", *more)


def test_table_to_shards(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_table(folder, tmp_path / "out", "--public") == 0
    shown = capsys.readouterr().out
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.samples == 12
    assert manifest.refused == {"image does not decode: no image header": 1, "image missing": 1}
    for words in ("train", "test", "patients", "image missing", "12 samples", "manifest.json"):
        assert words in shown
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {line["input"] for line in refused} == {"5.jpg", "13.jpg"}
    assert run("--verify", tmp_path / "out" / "manifest.json") == 0
    assert "0 faults" in capsys.readouterr().out


def test_clinical_names_show_nowhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "site.key"
    key.write_bytes(b"0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    assert pack_table(folder, tmp_path / "out", "--key-file", key) == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    shown = capsys.readouterr()
    for name in (b"Jane", b'5.jpg"', b"13.jpg", key.read_bytes()):
        assert name not in written and name.decode() not in shown.out + shown.err
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest.key_fingerprint is not None and len(manifest.key_fingerprint) == 16


def test_verify_names_shard_and_key(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_table(folder, tmp_path / "out", "--public")
    tar = tmp_path / "out" / "train-000000.tar"
    body = bytearray(tar.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(body)) as file:
        member = file.getmembers()[1]
    body[member.offset_data + 40] ^= 1
    tar.write_bytes(body)
    capsys.readouterr()
    assert run("--verify", tmp_path / "out" / "manifest.json", "--workers", 2) == 3
    shown = capsys.readouterr().out
    key = member.name.partition(".")[0]
    assert f"shard train-000000, sample {key}: member .0.jpg does not match its crc32c" in shown
    assert "shard train-000000: train-000000.tar does not match the manifest's sha256" in shown
    assert "2 faults in 1 shards" in shown


def test_verify_of_a_newer_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "roentgen-manifest", "version": 99}')
    assert run("--verify", tmp_path / "manifest.json") == 3
    assert "manifest version 99" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "table", "--output", "o", "--public"], "takes one --input folder, 0 given"),
        (["--source", "table", "--input", "nowhere", "--output", "o", "--public"], "--input nowhere: no such folder"),
        (["--source", "table", "--input", ".", "--output", "o"], "--source table needs --key-file"),
        (["--source", "dicom", "--input", ".", "--output", "o"], "--source dicom needs --key-file"),
        (["--source", "table", "--input", ".", "--output", "o", "--public", "--key-file", "k"], "exclude each other"),
        (["--source", "table", "--input", ".", "--output", "o", "--key-file", "k"], "--key-file k: No such file"),
        (["--source", "table", "--input", ".", "--output", "o", "--public"], "--mapping mapping.toml: No such file"),
        (["--source", "phantom"], "--output is missing"),
        (["--output", "o"], "--source is missing"),
        (["--source", "phantom", "--output", "o", "--samples", "many"], "--samples many: write one count"),
        (["--source", "phantom", "--output", "o", "--difficulty", "hard"], "this phantom has easy"),
        (["--source", "phantom", "--output", "o", "--degraded", "2"], "degraded=2.0 is no share"),
        (["--source", "phantom", "--output", "o", "--fractions", "train"], "--fractions train: write e.g."),
        (["--source", "phantom", "--output", "o", "--workers", "0"], "--workers 0: needs at least 1"),
        (["--source", "phantom", "--output", "ftp://x", "--samples", "1"], "unknown kind of store"),
        (["--source", "phantom_bone", "--output", "o", "--size", "8"], "size=8 is too small for a joint"),
        (["--source", "phantom_ct", "--output", "o", "--normal", "2"], "normal=2.0 is no share of organs"),
        (["--source", "phantom_ct", "--output", "o", "--shape", "4", "64", "64"], "is too coarse for a trunk"),
        (["--source", "ct_rate", "--input", ".", "--output", "o"], "--source ct_rate needs --key-file"),
        (["--source", "ct_rate", "--input", ".", "--output", "o", "--public"], "no *.nii.gz below it"),
        (["--source", "nifti", "--input", ".", "--output", "o", "--public"], "--mapping mapping.toml: No such file"),
        (["--source", "adopt", "--output", "o"], "--source adopt needs --input"),
        (["--source", "adopt", "--output", "o", "--input", "*.tar"], "--input *.tar: matches no object"),
        (["--source", "adopt", "--output", "o", "--input", "pipe:cat x"], "pipe: URLs run a shell"),
        (["--verify", "nowhere/manifest.json"], "nowhere: no such folder"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in one_line(capsys)


def test_unknown_option_exits_2() -> None:
    with pytest.raises(SystemExit) as stop:
        run("--sauce", "table")
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (("phantom", "--samples", "4,2,2"), ("--normal", "0.5", "--own-spacing"), "--normal, --own-spacing"),
        (("phantom", "--samples", "4,2,2"), ("--input", "."), "--input"),
        (("adopt", "--input", "a.tar"), ("--shard-samples", "5"), "--shard-samples"),
    ],
)
def test_options_without_effect_are_refused(
    source: tuple[str, ...], options: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--source", *source, "--output", tmp_path / "out", *options) == 2
    said = one_line(capsys)
    assert f"without effect on --source {source[0]}" in said
    assert all(option in said for option in named.split(", "))
    assert not (tmp_path / "out").exists()


def test_output_without_permission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_table(folder, Path("/proc/nowhere"), "--public") == 2
    assert "/proc/nowhere" in one_line(capsys)


def test_everything_refused_exits_3(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("*.jpg"):
        path.unlink()
    assert pack_table(folder, tmp_path / "out", "--public") == 3
    assert "no input of source table gave a sample: image missing (14)" in one_line(capsys)


def test_adopt_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for member, data in (("x.jpg", encoded(1)), ("x.txt", b"Report.")):
                header = tarfile.TarInfo(member)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    inputs = ("--input", f"train={tmp_path}/a.tar", "--input", f"test={tmp_path}/b.tar")
    assert run("--source", "adopt", *inputs, "--output", tmp_path / "out") == 0
    manifest = Manifest.from_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert [(shard.name, shard.split) for shard in manifest.shards] == [("a", "train"), ("b", "test")]
    assert run("--verify", tmp_path / "out" / "manifest.json") == 0
    capsys.readouterr()
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    assert run("--verify", tmp_path / "out" / "manifest.json") == 3
    assert run("--source", "adopt", *inputs, "--output", tmp_path / "other") == 3
    assert "a.tar: truncated at byte 600" in capsys.readouterr().err


@pytest.mark.slow
def test_phantoms_in_worker_processes(tmp_path: Path) -> None:
    options = ["--source", "phantom", "--samples", "6,2,2", "--size", "32", "--degraded", "0.5", "--structured"]
    command = [sys.executable, str(ROOT / "launchers" / "pack.py"), *options]
    command += ["--workers", "2", "--output", str(tmp_path / "a")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert run(*options, "--workers", 1, "--output", tmp_path / "b") == 0
    assert Manifest.from_bytes((tmp_path / "b" / "manifest.json").read_bytes()).fields["structured_report"] == 10
    names = sorted(path.name for path in (tmp_path / "a").iterdir() if path.is_file())
    assert {name.partition("-")[0] for name in names if name.endswith(".tar")} == {"train", "validation", "test"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sigterm_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launchers" / "pack.py"), "--source", "phantom", "--samples", "5000"]
    command += ["--workers", "1", "--shard-samples", "2", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("*.tar")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on behind the finished shards" in error and "Traceback" not in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for words in ("--source table", "openssl rand", "--verify shards/nih/manifest.json", "exit codes: 0 done"):
        assert words in shown
