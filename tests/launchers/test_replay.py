from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.tasks.clip import CLIP
from launchers import past_run, replay
from launchers.past_run import open_run
from shards.batch import Batch, batch_hash
from shards.loader import Loader
from shards.manifest import Manifest
from tests.launchers.past_runs import make_run, pack


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("set"))


@pytest.fixture
def run_dir(manifest: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", manifest)


def trained_on(run_dir: Path, step: int, world_size: int = 1) -> list[Batch]:
    """What the ranks of the run were given at `step`, reached from step 0."""
    with open_run(str(run_dir)) as run:
        config, tokenizer = run.config, run.tokenizer
    parts = []
    for rank in range(world_size):
        loader = Loader(
            config.data, global_batch_size=config.global_batch_size, seed=config.seed, rank=rank,
            world_size=world_size, tokenizer=tokenizer,
        )  # fmt: skip
        with loader.start(0) as batches:
            parts.append([next(batches) for _ in range(step + 1)][-1])
    return parts


def record(run_dir: Path, step: int, parts: list[Batch], **start: object) -> None:
    """As the trainer writes it: each rank adds its rows, rank 0 writes the sum."""
    total = sum(batch_hash(part, rank * len(part["valid"])) for rank, part in enumerate(parts))
    events = [{"event": "start", "step": 0, **start}, {"event": "batch", "step": step, "batch_hash": total}]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "ba')


@pytest.mark.parametrize("world_size", [1, 3])
def test_replay_is_the_batch_that_the_ranks_trained_on(
    run_dir: Path, tmp_path: Path, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = trained_on(run_dir, 7, world_size)
    record(run_dir, 7, parts, versions=past_run.versions())
    saved = tmp_path / "batch.safetensors"
    assert replay.main(["--run-dir", str(run_dir), "--step", "7", "--save", str(saved)]) == 0
    batch = load_file(saved)
    for name in ("pixel_values", "labels", "sample_id", "epoch", "report_key", "valid"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts])), name
    shown = capsys.readouterr().out
    assert "samples are those that the run trained on" in shown
    assert "nothing that decides tokens or pixels is known to differ" in shown
    assert "effusion" not in shown  # no report text, no label of a patient


def test_other_samples_are_said_and_exit_3(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run_dir, 7, trained_on(run_dir, 6))
    assert replay.main(["--run-dir", str(run_dir), "--step", "7"]) == 3
    assert "samples DIFFER" in capsys.readouterr().out
    assert replay.main(["--run-dir", str(run_dir), "--step", "6"]) == 0
    assert "recorded no batch hash for this step; it recorded 7" in capsys.readouterr().out


def test_what_differs_here_is_listed(
    run_dir: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(run_dir, 2, trained_on(run_dir, 2), versions=past_run.versions() | {"torch": "1.0", "gone": "2.0"})
    moved = tmp_path / "set"
    shutil.copytree(manifest.parent, moved)
    changed = json.loads((moved / "manifest.json").read_text()) | {"creator": "someone else"}
    (moved / "manifest.json").write_text(json.dumps(changed))
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["train"] = str(moved / "manifest.json")
    config["data"]["decode"]["device"] = "mixed"
    (run_dir / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = replay.replay(str(run_dir), 2)
    assert result.matches
    said = "\n".join(result.differences)
    now = Manifest.from_bytes((moved / "manifest.json").read_bytes()).sha256
    for part in (
        "on a GPU (mixed), here on the CPU",
        f"sha256 {now[:12]} here",
        "torch: version",
        "gone: version none",
    ):
        assert part in said


def test_contact_sheet_json_and_determinism(run_dir: Path, tmp_path: Path) -> None:
    sheet, first, second = tmp_path / "sheet.png", tmp_path / "a.json", tmp_path / "b.json"
    assert replay.main(["--run-dir", str(run_dir), "--step", "11", "--save", str(sheet), "--json", str(first)]) == 0
    assert replay.main(["--run-dir", str(run_dir), "--step", "11", "--json", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    with Image.open(sheet) as picture:
        assert picture.mode == "L" and picture.width % 32 == 0 and picture.height % 32 == 0
    assert len(json.loads(first.read_text())["rows"]) == 12


def test_void_slots_are_shown_with_their_cause(
    run_dir: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = replay.replay(str(run_dir), 0).rows[4]
    moved = tmp_path / "set"
    shutil.copytree(manifest.parent, moved)
    tar = moved / f"{row.shard}.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(f"{row.key}.0.png".encode()) + 512 + 60
    data[start : start + 8] = b"\x00" * 8
    tar.write_bytes(data)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["train"] = str(moved / "manifest.json")
    (run_dir / "config.json").write_text(json.dumps(config))
    assert replay.main(["--run-dir", str(run_dir), "--step", "0"]) == 0
    shown = capsys.readouterr().out
    assert "void slots: 1" in shown
    (line,) = (line for line in shown.splitlines() if row.key in line)
    assert "void: " in line and "see events" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "-1"], "--step -1: steps are counted from 0"),
        (["--step", "0", "--save", "batch.pt"], "unknown kind .pt; use .png or .safetensors"),
        (["--step", "0", "--run-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert replay.main(["--run-dir", str(run_dir), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_masks_of_an_objective_are_replayed_too(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = ("section_ids", "text_mask", "patch_mask", "finding_key", "draw_key")
    config = json.loads((run_dir / "config.json").read_text("utf-8"))
    config["data"]["masking"]["patch_size"] = config["task"]["vision"]["patch_size"]
    (run_dir / "config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(CLIP, "fields", (*CLIP.fields, *masks))
    sheet, tensors = tmp_path / "sheet.png", tmp_path / "batch.safetensors"
    assert replay.main(["--run-dir", str(run_dir), "--step", "3", "--save", str(sheet)]) == 0
    first = capsys.readouterr().out
    assert replay.main(["--run-dir", str(run_dir), "--step", "3", "--save", str(tensors)]) == 0
    assert sheet.stat().st_size > 0
    assert set(masks) <= set(load_file(tensors))
    hashes = [line for line in first.splitlines() if line.startswith(("text mask", "patch mask"))]
    assert len(hashes) == 2
    assert set(hashes) <= set(capsys.readouterr().out.splitlines())
