"""pack.py --ray: the same bytes as the local run, also after an interruption; errors in one line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from launchers import pack
from shards import writer
from shards.errors import ConfigError

ROOT = Path(__file__).parents[2]
WORDS = ("--source", "phantom", "--samples", "14,2,3", "--size", "32", "--shard-samples", "4", "--workers", "2")


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(1200)
@pytest.mark.slow  # a cluster takes its time, on a busy machine minutes
def test_a_cluster_gives_the_same_bytes_also_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    assert pack.main([*WORDS, "--output", str(tmp_path / "local")]) == 0
    before = set(psutil.Process().children(recursive=True))  # the fork server of local workers stays
    put, count = writer._put_shard, 0

    def stopping(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 3:
            raise ConfigError("stopped")
        return put(*arguments)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # sockets lie there, whose paths must be short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_put_shard", stopping)
            assert pack.main([*WORDS, "--output", str(tmp_path / "ray"), "--ray", "local"]) == 2
        kept = {name: digest for name, digest in files(tmp_path / "ray").items() if name.endswith(".tar")}
        assert len(kept) == 2 and not (tmp_path / "ray" / "manifest.json").exists()
        # Of its own, as a person repeats the command.
        again = [sys.executable, "launchers/pack.py", *WORDS, "--output", str(tmp_path / "ray"), "--ray", "local"]
        done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert count == 3  # those that were finished were not written again by the stopped run
    assert files(tmp_path / "ray") == files(tmp_path / "local") and kept.items() <= files(tmp_path / "ray").items()
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
    assert not alive


def test_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main([*WORDS, "--output", str(tmp_path), "--ray", "ftp://nowhere"]) == 2
    error = capsys.readouterr().err
    assert "error: --ray ftp://nowhere: no cluster there" in error and error.count("\n") == 1
