"""Kill anything: what resumes equals what was never stopped; what is not whole is never loaded."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from ci.bench.s3_server import S3Server
from core.checkpoint import CheckpointConfig, Checkpoints, Source, TrainState, differences
from core.checkpoint_files import checksums, defect, find_weights, steps_in
from core.metrics import Events, Uploader
from core.mirror import FOLLOWED
from core.world import World
from shards.errors import ConfigError, DataError
from shards.store import open_store
from tests.core.runs import Options, run


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step}" / "weights.safetensors")


def events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def assert_resumes_bit_identical(folder: Path, ranks: int, options: Options) -> dict[str, torch.Tensor]:
    """Weights after five steps, those of a run that was killed at the third and started again."""
    whole = replace(options, run_dir=str(folder / "unbroken"), steps=5)
    assert run(ranks, whole) == [0] * ranks
    broken = replace(whole, run_dir=str(folder / "broken"))
    assert set(run(ranks, replace(broken, kill_at=3))) == {-signal.SIGKILL}
    assert steps_in(folder / "broken") == [2]
    assert run(ranks, broken) == [0] * ranks
    resumed = weights(folder / "broken", 5)
    assert_same_bits(weights(folder / "unbroken", 5), resumed)
    return resumed


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "precision"),
    [(1, 0, "bf16"), (2, 1, "fp32"), (2, 2, "bf16"), pytest.param(2, 3, "fp32", marks=pytest.mark.slow)],
)
def test_killed_run_resumes_bit_identical(tmp_path: Path, ranks: int, zero_stage: int, precision: str) -> None:
    assert_resumes_bit_identical(tmp_path, ranks, Options(run_dir="", zero_stage=zero_stage, precision=precision))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_resumes_bit_identical_everywhere(
    tmp_path: Path, ranks: int, zero_stage: int, precision: str
) -> None:
    if precision == "bf16_master" and zero_stage == 0:
        pytest.skip("refused: without ZeRO nothing holds the fp32 weights")
    test_killed_run_resumes_bit_identical(tmp_path, ranks, zero_stage, precision)


@pytest.mark.parametrize(
    ("zero_stage", "before", "after"), [(0, 1, 2), pytest.param(2, 2, 1, marks=pytest.mark.slow), (3, 2, 1)]
)
def test_resume_on_another_number_of_ranks(tmp_path: Path, zero_stage: int, before: int, after: int) -> None:
    options = Options(run_dir=str(tmp_path / "unbroken"), zero_stage=zero_stage, steps=4)
    assert run(before, options) == [0] * before
    broken = replace(options, run_dir=str(tmp_path / "broken"))
    assert set(run(before, replace(broken, kill_at=2))) == {-signal.SIGKILL}
    assert run(after, broken) == [0] * after
    a, b = weights(tmp_path / "unbroken", 4), weights(tmp_path / "broken", 4)
    # As a whole: single weights whose gradient is all rounding (key biases) take Adam's full step in any direction.
    moved = sum((a[name] - b[name]).square().sum() for name in a)
    assert moved < 1e-8 * sum(value.square().sum() for value in a.values())
    assert not list((tmp_path / "broken" / "checkpoints").glob("*.tmp*"))
    # And the converted run saves and resumes like any other.
    assert run(after, replace(broken, steps=5, allow_changed=("trainer.steps",))) == [0] * after


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=6, zero_stage=1)
    assert run(1, options) == [0]
    whole = weights(tmp_path, 6)
    assert steps_in(tmp_path) == [4, 6]
    part = next((tmp_path / "checkpoints" / "step-6" / "engine").glob("*optim*"))
    part.write_bytes(part.read_bytes()[:-100])
    half = tmp_path / "checkpoints" / "step-8.tmp"
    shutil.copytree(tmp_path / "checkpoints" / "step-4", half)
    assert run(1, options) == [0]
    passed = [event for event in events(tmp_path) if event["event"] == "checkpoint_passed_over"]
    assert [event["checkpoint"] for event in passed] == ["step-6"]
    assert "differs from its checksum" in str(passed[0]["cause"])
    assert not half.exists()
    assert_same_bits(whole, weights(tmp_path, 6))


def test_latest_that_points_nowhere_is_said_and_the_newest_whole_checkpoint_taken(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=4)
    assert run(1, options) == [0]
    whole = weights(tmp_path, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    (tmp_path / "latest").write_bytes(b"step-4\xff\n")
    assert run(1, options) == [0]
    (said,) = [event for event in events(tmp_path) if event["event"] == "latest_points_nowhere"]
    assert said["at_hand"] == "step-2"
    assert_same_bits(whole, weights(tmp_path, 4))


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=2)
    assert run(1, options) == [0]
    other = replace(options, steps=4, learning_rate=3e-3)
    assert run(1, other) == [2]
    message = (tmp_path / "error-0.txt").read_text()
    assert "optim.learning_rate was 0.01, is 0.003" in message
    assert "--allow-changed optim.learning_rate trainer.steps" in message
    assert run(1, replace(other, allow_changed=("optim.learning_rate", "trainer.steps"))) == [0]
    changed = {event["key"] for event in events(tmp_path) if event["event"] == "recipe_changed"}
    assert changed == {"optim.learning_rate", "trainer.steps"}


def test_full_disk_keeps_the_previous_checkpoint_and_goes_on(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=6, full_disk_at=4)
    assert run(2, options) == [3, 3]  # the last save of the run must succeed
    failed = [event["step"] for event in events(tmp_path) if event["event"] == "save_failed"]
    assert set(failed) == {4, 6}
    assert steps_in(tmp_path) == [2]
    assert defect(tmp_path / "checkpoints" / "step-2") is None
    assert (tmp_path / "latest").read_text().strip() == "step-2"
    message = (tmp_path / "error-0.txt").read_text()
    assert "No space left on device" in message
    assert "\n" not in message
    assert run(2, replace(options, full_disk_at=None)) == [0, 0]


def test_keep_last_keep_every_and_best(tmp_path: Path) -> None:
    options = Options(run_dir=str(tmp_path), steps=8, save_every=1, keep_last=2, keep_every=3, validate=True)
    assert run(1, options) == [0]
    best = json.loads((tmp_path / "best").read_text())
    assert set(steps_in(tmp_path)) == {3, 6, 7, 8, best["step"]}
    assert best["metric"] == "eval/validation/loss"
    assert find_weights(tmp_path, "best").parent.name == f"step-{best['step']}"
    assert find_weights(tmp_path).parent.name == "step-8"
    assert find_weights(tmp_path, "3").parent.name == "step-3"
    with pytest.raises(ConfigError, match="steps at hand"):
        find_weights(tmp_path, "5")


def test_weights_of_another_run_start_a_run(tmp_path: Path) -> None:
    assert run(1, Options(run_dir=str(tmp_path / "first"), steps=2)) == [0]
    second = Options(
        run_dir=str(tmp_path / "second"), steps=1, seed=5, learning_rate=1e-9, init=str(tmp_path / "first")
    )
    assert run(1, second) == [0]
    a, b = weights(tmp_path / "first", 2), weights(tmp_path / "second", 1)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)
    # What the run directory holds comes before the recipe's checkpoint.
    assert run(1, replace(second, init="/nowhere/at/all")) == [0]
    assert run(1, replace(second, run_dir=str(tmp_path / "third"), init="/nowhere/at/all")) == [2]


def test_run_in_a_bucket_survives_the_loss_of_its_node(tmp_path: Path, bucket: str, s3_server: S3Server) -> None:
    unbroken = Options(run_dir=str(tmp_path / "unbroken"), zero_stage=2, steps=6)
    assert run(2, unbroken) == [0, 0]
    url = f"{bucket}/runs/a"
    node = tmp_path / "node"
    there = replace(unbroken, run_dir=url, local_dir=str(node), environment=s3_server.environment())
    # Stopped at step 3, as a spot instance is: it saves, mirrors, and its disk is gone.
    assert run(2, replace(there, stop_at=2)) == [143, 143]
    shutil.rmtree(node)
    with open_store(url) as store:
        assert store.get("latest").decode().strip() == "step-3"
        assert any(name.startswith("events-000001-") for name in store.list("events-"))
        assert store.list("tb/")
        # A newer checkpoint whose last part never arrived has no checksum list, and is none.
        store.put("checkpoints/step-5/weights.safetensors", b"half")
    assert run(2, there) == [0, 0]
    assert_same_bits(weights(tmp_path / "unbroken", 6), weights(node, 6))
    with open_store(url) as store:
        assert store.get("latest").decode().strip() == "step-6"
        sums = [name for name in store.list("checkpoints/") if name.endswith("SHA256SUMS")]
        assert {name.split("/")[1] for name in sums} == {"step-4", "step-6"}  # pruned there too
        assert any(name.startswith("events-000002-") for name in store.list("events-"))
        # As if the last had been saved while the store was away: it is on the node's disk alone.
        for name in store.list("checkpoints/step-6/"):
            store.delete(name)
        store.put("latest", b"step-4\n")
    (node / FOLLOWED).write_text("step-4\n")
    assert run(2, replace(there, steps=7, allow_changed=("trainer.steps",))) == [0, 0]
    assert [event["step"] for event in events(node) if event["event"] == "batch"] == [3, 4, 5, 6]


@pytest.mark.slow
def test_two_nodes_in_a_bucket_survive_the_loss_of_one(tmp_path: Path, bucket: str, s3_server: S3Server) -> None:
    unbroken = Options(run_dir=str(tmp_path / "unbroken"), zero_stage=2, steps=5, validate=True)
    assert run(2, unbroken) == [0, 0]
    there = replace(
        unbroken, run_dir=f"{bucket}/runs/nodes", local_dir=str(tmp_path / "node"), rank_is_node=True,
        environment=s3_server.environment(),
    )  # fmt: skip
    assert run(2, replace(there, stop_at=2)) == [143, 143]
    shutil.rmtree(tmp_path / "node" / "1")
    assert run(2, there) == [0, 0]
    for node in ("0", "1"):
        assert (tmp_path / "node" / node / "latest").read_text().strip() == "step-5"
        assert steps_in(tmp_path / "node" / node)[-1] == 5
    assert_same_bits(weights(tmp_path / "unbroken", 5), weights(tmp_path / "node" / "0", 5))
    with open_store(there.run_dir) as store:
        assert {name.rsplit("-", 1)[0] for name in store.list("events-")} >= {"events-000001", "events-000002"}
    # Both nodes writing into one folder would mix their parts.
    shared = replace(there, run_dir=f"{bucket}/runs/mixed", local_dir=str(tmp_path / "shared"), nodes_share_disk=True)
    assert run(2, shared) == [2, 2]
    assert "several nodes share this folder" in (tmp_path / "shared" / "error-0.txt").read_text()


def test_events_written_after_the_last_upload_of_a_killed_run_are_sent(
    tmp_path: Path, bucket: str, s3_server: S3Server
) -> None:
    url, log = f"{bucket}/runs/events", Events(tmp_path, World())
    log.write({"event": "start"})
    Uploader(url, tmp_path, World(), log.write).close()
    log.write({"event": "skip"})  # and killed before the next upload
    second = Uploader(url, tmp_path, World(), log.write)
    log.write({"event": "end"})
    second.close()
    with open_store(url) as store:
        names = sorted(store.list("events-"))
        kinds = [[json.loads(line)["event"] for line in store.get(name).splitlines()] for name in names]
    assert kinds == [["start"], ["skip", "end"]]


def test_bucket_that_is_not_there_is_a_configuration_error(tmp_path: Path, s3_server: S3Server) -> None:
    options = Options(
        run_dir="s3://no-such-bucket/a", local_dir=str(tmp_path), environment=s3_server.environment(), steps=1
    )
    assert run(1, options) == [2]
    assert "no-such-bucket" in (tmp_path / "error-0.txt").read_text()


def test_a_run_that_goes_back_forgets_the_later_evaluation(tmp_path: Path, bucket: str) -> None:
    def opened(disk: str) -> Checkpoints:
        config = CheckpointConfig(local_dir=str(tmp_path / disk))
        return Checkpoints(f"{bucket}/run", config, World(), recipe={}, seed=0)

    before, then = (TrainState(step=step, samples_seen=0, seed=0, recipe_hash="") for step in (4, 6))
    checkpoints = opened("a")
    checkpoints.mark_evaluated(then)
    checkpoints.resume(MagicMock(), Source(folder="step-6", state=then))
    assert checkpoints.is_evaluated(then)
    checkpoints.resume(MagicMock(), Source(folder="step-4", state=before))
    assert not checkpoints.is_evaluated(then)
    checkpoints.close()
    checkpoints = opened("another")
    assert not checkpoints.is_evaluated(then)  # nor in the store
    checkpoints.mark_evaluated(before)
    checkpoints.resume(MagicMock(), Source(folder="step-4", state=before))
    assert checkpoints.is_evaluated(before)
    checkpoints.close()


def test_a_run_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").write_text("step-1\n")
    checkpoints = Checkpoints(str(tmp_path), CheckpointConfig(), World(), recipe={}, seed=0)

    def closed(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(ConfigError, match=r"cannot be read .*Permission denied.*latest.*; mend its rights"):
        checkpoints.prepare(MagicMock())


def test_defects_are_named(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "part.pt").write_bytes(b"one")
    assert defect(tmp_path) == "SHA256SUMS is missing or unreadable"
    (tmp_path / "SHA256SUMS").write_text(checksums(tmp_path))
    assert defect(tmp_path) is None
    (tmp_path / "engine" / "part.pt").write_bytes(b"two")
    assert defect(tmp_path) == "engine/part.pt differs from its checksum"
    (tmp_path / "engine" / "part.pt").unlink()
    assert defect(tmp_path) == "engine/part.pt is missing or unreadable"
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    assert defect(tmp_path) == "SHA256SUMS is damaged"


def test_damaged_weights_are_not_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"x")
    (folder / "SHA256SUMS").write_text(checksums(folder))
    (tmp_path / "latest").write_text("step-1\n")
    assert find_weights(tmp_path) == folder / "weights.safetensors"
    (folder / "weights.safetensors").write_bytes(b"y")
    with pytest.raises(DataError, match="differs from its checksum"):
        find_weights(tmp_path)
    with pytest.raises(ConfigError, match="names no checkpoint"):
        find_weights(tmp_path, "../../elsewhere")


def test_differences_name_dotted_keys() -> None:
    then = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(then, {"a": {"b": 1, "c": [1, 2]}, "d": None}) == {}
    now = {"a": {"b": 2, "c": [1, 2]}, "e": {}}
    assert differences(then, now) == {"a.b": (1, 2), "d": (None, "(absent)"), "e": ("(absent)", {})}
