"""pack.py forget: void slots at once, bytes gone after --rewrite, the order as it was; nobody is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import webdataset

from launchers import pack
from shards import forget
from shards.chunk_cache import ChunkCache
from shards.dataset import DataSet
from shards.errors import ConfigError
from shards.ingest import hashed_key
from shards.loader import Loader
from shards.manifest import Manifest
from shards.reader import read_members
from shards.store import open_store
from tests.shards.sources import encoded

SECRET = b"0123456789abcdef0123456789abcdef"
PATIENTS, STUDIES_EACH = 12, 2
GONE = ("Jane 3", "Jane 7")
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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of twelve patients with two studies each, its key and a file that names two of them."""
    tmp_path = tmp_path_factory.mktemp("packed")
    folder = tmp_path / "input"
    folder.mkdir()
    rows = [f"{i}.jpg,Jane {i // STUDIES_EACH},Nodule" for i in range(PATIENTS * STUDIES_EACH)]
    (folder / "t.csv").write_text("\n".join(["file,patient,labels", *rows]) + "\n")
    for i in range(len(rows)):
        (folder / f"{i}.jpg").write_bytes(encoded(i))
    (folder / "mapping.toml").write_text(MAPPING)
    key = tmp_path / "site.key"
    key.write_bytes(SECRET)
    key.chmod(0o600)
    (tmp_path / "ids.txt").write_text("\ufeff" + "\n\n".join(GONE) + "\nNobody 1\n", "utf-8")
    options = ["--source", "table", "--input", folder, "--key-file", key, "--workers", 1, "--shard-samples", 8]
    words = [*options, "--chunk-bytes", 4096, "--fractions", "train=1.0", "--output", tmp_path / "set"]
    assert pack.main([str(word) for word in words]) == 0
    return tmp_path


@pytest.fixture
def site(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "site"))


def forgetting(site: Path, url: object, *more: str) -> int:
    names = ("--patient-file", str(site / "ids.txt"), "--key-file", str(site / "site.key"))
    return pack.main(["forget", "--manifest", str(url), *names, *more])


def studies_of(*patients: str) -> set[str]:
    return {
        hashed_key(SECRET, "study", f"{i}.jpg")
        for i in range(PATIENTS * STUDIES_EACH)
        if f"Jane {i // STUDIES_EACH}" in patients
    }


def batches(url: object, steps: int = 6, **changes: Any) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """(keys of the valid rows of each batch, events)."""
    events: list[dict[str, Any]] = []
    config = Loader.Config(train=str(url), lanes=2, window_chunks=2, **changes)
    loader = Loader(config, global_batch_size=8, seed=3, fields=("pixel_values", "labels"), on_event=events.append)
    found = []
    with loader.start(0) as run:
        for step in range(steps):
            valid = next(run)["valid"].tolist()
            rows = loader.describe(step)
            found.append([row.key if is_valid else "" for row, is_valid in zip(rows, valid, strict=True)])
    for data in loader.sets:
        data.close()
    return found, events


def test_forgotten_studies_reach_no_batch_and_move_nothing(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = studies_of(*GONE)
    before, _ = batches(site / "set")
    assert gone < {key for batch in before for key in batch}
    assert forgetting(site, site / "set") == 0
    shown = capsys.readouterr()
    assert "2 of 3 patients have studies in this set: 4 studies are void from now on" in shown.out
    assert "(4): never packed, or erased" in shown.out
    after, events = batches(site / "set")
    assert after == [["" if key in gone else key for key in batch] for batch in before]
    assert {event["key"] for event in events} == gone and {event["cause"] for event in events} == {"forgotten"}
    manifest = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes())
    assert manifest.patients == {"train": PATIENTS - len(GONE)} and manifest.forgotten == len(gone)
    for name in (*GONE, "Nobody", *(hashed_key(SECRET, "patient", name) for name in GONE)):
        assert name not in shown.out + shown.err and name not in (site / "set" / "manifest.json").read_text()


def test_a_run_goes_on_with_the_new_version(site: Path) -> None:
    old = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes())
    assert forgetting(site, site / "set", "--rewrite") == 0
    new = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes())
    loader = Loader(
        Loader.Config(train=str(site / "set"), lanes=2), global_batch_size=8, seed=0, fields=("pixel_values",)
    )
    assert loader.forgotten_share == pytest.approx(4 / 24)  # no fault of the data: data.max_skip_rate allows it besides
    assert new.sha256 != old.sha256 and new.origin == old.sha256 == old.origin


@pytest.mark.parametrize("in_bucket", [False, True])
def test_rewritten_shards_hold_no_byte_of_them(site: Path, bucket: str, in_bucket: bool) -> None:
    before, _ = batches(site / "set")
    url = str(site / "set")
    if in_bucket:
        url = f"{bucket}/set"
        with open_store(url) as store:
            for path in (site / "set").iterdir():
                store.put(path.name, path)
    assert forgetting(site, url, "--rewrite") == 0
    with open_store(url) as store:
        held = {name: store.get(name) for name in store.list("")}
    secrets = [encoded(i)[-200:] for i in range(24) if f"Jane {i // 2}" in GONE] + [
        name.encode() for name in (*studies_of(*GONE), *(hashed_key(SECRET, "patient", one) for one in GONE))
    ]
    assert not [name for name, body in held.items() for secret in secrets if secret in body]
    assert any(encoded(0)[-200:] in body for body in held.values())  # the search finds what is there
    after, _ = batches(url)
    kept = [["" if key in studies_of(*GONE) else key for key in batch] for batch in before]
    assert [[key if not key.startswith("forgotten") else "" for key in batch] for batch in after] == kept
    assert pack.main(["--verify", url]) == 0
    # Once more changes nothing, whether patients are named again or not.
    assert forgetting(site, url, "--rewrite") == 0
    with open_store(url) as store:
        assert {name: store.get(name) for name in store.list("")} == held


def test_other_readers_see_the_studies_that_are_left(site: Path) -> None:
    assert forgetting(site, site / "set", "--rewrite") == 0
    tars = sorted(str(path) for path in (site / "set").glob("*.tar"))
    keys = {sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}
    assert len(keys) == PATIENTS * STUDIES_EACH - 4 and not keys & studies_of(*GONE)
    lines = [path.read_text().splitlines()[0] for path in (site / "set").glob("*.idx")]
    assert sum(int(line.split()[1]) for line in lines) == len(keys)


def test_an_interrupted_rewrite_goes_on_to_the_same_bytes(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forgetting(site, site / "set") == 0
    put, delete, calls = forget._put_manifest, forget.Store.delete, []

    def stop(*arguments: Any) -> None:
        calls.append(1)
        raise ConfigError("stopped")

    monkeypatch.setattr(forget, "_put_manifest", stop)  # new shards are there, the manifest still names the old ones
    assert forgetting(site, site / "set", "--rewrite") == 2
    assert batches(site / "set")[0]
    monkeypatch.setattr(forget, "_put_manifest", put)
    monkeypatch.setattr(forget.Store, "delete", stop)  # the manifest names the new ones, the old ones are still there
    assert forgetting(site, site / "set", "--rewrite") == 2
    assert len(list((site / "set").glob("train-000000*.tar"))) == 2
    monkeypatch.setattr(forget.Store, "delete", delete)
    assert forgetting(site, site / "set", "--rewrite") == 0 and len(calls) == 2
    manifest = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes())
    assert sorted(path.stem for path in (site / "set").glob("*.tar")) == sorted(one.name for one in manifest.shards)
    for shard in manifest.shards:
        assert hashlib.sha256((site / "set" / shard.tar).read_bytes()).hexdigest() == shard.sha256


def test_a_cache_keeps_nothing_of_them(site: Path) -> None:
    cache = site / "cache"
    secrets = [encoded(i)[-200:] for i in range(24) if f"Jane {i // 2}" in GONE]

    def cached() -> list[bytes]:
        return [secret for path in cache.rglob("*.range") for secret in secrets if secret in path.read_bytes()]

    changes = {"cache_dir": str(cache)}
    batches(site / "set", **changes)
    assert len(set(cached())) == len(secrets)
    assert forgetting(site, site / "set") == 0
    after, _ = batches(site / "set", **changes)
    assert not cached() and not studies_of(*GONE) & {key for batch in after for key in batch}
    # What a run before had cached of shards that are rewritten goes, too.
    stale = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes()).shards[0]
    chunks = DataSet(str(site / "set"), "train").manifest.shards[0].chunks
    store = ChunkCache(cache, 1 << 30)
    assert forgetting(site, site / "set", "--rewrite") == 0
    new = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes()).shards[0]
    for identity, offset, length in new.erased:
        assert identity == stale.sha256 and offset in chunks.offset
        store.put(identity, offset, length, bytes(length))
    batches(site / "set", **changes)
    assert new.erased and all(store.get(*one) is None for one in new.erased)


def test_what_cannot_be_done_is_said(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = site / "other.key"
    other.write_bytes(b"f" * 32)
    other.chmod(0o600)
    ids, url = str(site / "ids.txt"), str(site / "set")
    for words, message in (
        (["--patient-file", ids, "--key-file", str(other)], "not the key that"),
        (["--patient-file", ids, "--public"], "not the key that"),
        (["--patient-file", ids], "forget needs --key-file"),
        ([], "neither --patient-file nor --rewrite"),
        (["--patient-file", str(site / "none.txt"), "--key-file", str(site / "site.key")], "No such file"),
    ):
        assert pack.main(["forget", "--manifest", url, *words]) == 2
        assert message in capsys.readouterr().err
    (site / "empty.txt").write_text("\n \n")
    assert pack.main(["forget", "--manifest", url, "--patient-file", str(site / "empty.txt"), "--public"]) == 2
    # A record that nobody can read is no reason to stop, and none to be silent.
    manifest = Manifest.from_bytes((site / "set" / "manifest.json").read_bytes())
    with open_store(url) as store:
        table = read_members(store, manifest.shards[0])
    tar = site / "set" / manifest.shards[0].tar
    body = bytearray(tar.read_bytes())
    body[int(table.offset[0]) + 3] ^= 1
    tar.write_bytes(body)
    capsys.readouterr()
    assert forgetting(site, url) == 3
    assert "1 records cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("--rewrite",), ("--patient-file", "ids.txt", "--key-file", "site.key")])
def test_tars_from_elsewhere_are_left_alone(
    site: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site)
    path = site / "set" / "manifest.json"
    body = json.loads(path.read_text())
    body["adopted"] = True
    body["shards"][0]["name"] = "scan-r2"  # a name of theirs, which ours could be, too
    path.write_text(json.dumps(body))
    for name in ("scan.tar", "scan-r1.tar"):
        (site / "set" / name).write_bytes(b"theirs")
    before = sorted(path.name for path in (site / "set").iterdir())
    assert pack.main(["forget", "--manifest", str(path), *words]) == 2
    assert "adopt the tars anew" in capsys.readouterr().err
    assert sorted(path.name for path in (site / "set").iterdir()) == before


def test_two_programs_do_not_undo_each_other(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = site / "set" / "manifest.json"
    look = forget._look

    def meanwhile(*arguments: Any) -> Any:
        body = json.loads(path.read_text())
        body["shards"][0]["void"] = [0]
        path.write_text(json.dumps(body))
        return look(*arguments)

    monkeypatch.setattr(forget, "_look", meanwhile)
    assert forgetting(site, site / "set", "--workers", "1") == 2  # one, since `meanwhile` reads what it writes
    assert json.loads(path.read_text())["shards"][0]["void"] == [0]
