"""What operations people see of a run: pages, timelines, alerts; and that no credential is among it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from core import run_page
from core.metrics import NAMES
from tests.core.webhook import webhook
from tests.launchers.past_runs import pack

ROOT = Path(__file__).parents[2]
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0123456789",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789",
    "OPENAI_API_KEY": "planted-openai-key-0123456789",
}
WEBHOOK_SECRET = "T0planted/B0webhook/0123456789"


def train(run_dir: Path, manifest: Path, *changes: str, **variables: str) -> str:
    """Everything that the program printed."""
    words = ["--recipe", "tiny:clip", "--run-dir", str(run_dir), "--set", f"data.train={manifest}"]
    settings = ['data.sections=["findings"]', "data.max_skip_rate=0.5", "trainer.log_every=1", *changes]
    done = subprocess.run(
        [sys.executable, "launchers/pretrain.py", *words, *settings],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **PLANTED, **variables},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[bytes]]:
    """A run that is stopped, whose checkpoint is damaged and that goes on: its folder, its words, what it told."""
    manifest = pack(tmp_path_factory.mktemp("set"))
    run_dir = tmp_path_factory.mktemp("run")
    with webhook() as (url, told):
        secret = f"{url}/{WEBHOOK_SECRET}?token=planted-query-0123456789"
        shown = train(run_dir, manifest, "trainer.steps=2", f"alerts.webhook_url={secret}", "trainer.profile_steps=0:2")
        weights = run_dir / "checkpoints" / "step-2" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        hook = ("alerts.webhook_url=env:SITE_HOOK",)
        shown += train(run_dir, manifest, "trainer.steps=3", *hook, SITE_HOOK=secret)
    return run_dir, shown, told


def curves(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tb"), size_guidance={"tensors": 0})
    found.Reload()
    return found


def test_no_credential_is_written_or_shown(run: tuple[Path, str, list[bytes]]) -> None:
    run_dir, shown, told = run
    secrets = [*PLANTED.values(), WEBHOOK_SECRET, "planted-query"]
    written = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    written = {path: gzip.decompress(body) if path.suffix == ".gz" else body for path, body in written.items()}
    assert {"config.json", "events.jsonl"} <= {path.name for path in written} and any("tb" in str(p) for p in written)
    assert not [(path, one) for path, body in written.items() for one in secrets if one.encode() in body]
    assert not [one for one in secrets if one in shown or one.encode() in b"".join(told)]
    assert json.loads((run_dir / "config.json").read_text())["alerts"]["webhook_url"] == "(hidden)"


def test_a_damaged_checkpoint_is_told_to_the_webhook(run: tuple[Path, str, list[bytes]]) -> None:
    run_dir, _, told = run
    (body,) = [json.loads(one) for one in told]
    assert body["event"] == "checkpoint_passed_over" and body["level"] == "alert" and str(run_dir) in body["text"]
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [one["event"] for one in lines if one.get("level") == "alert"] == ["checkpoint_passed_over"]


def test_pages_and_layout_of_the_dashboards(run: tuple[Path, str, list[bytes]]) -> None:
    found = curves(run[0])
    text = {tag: found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
            for tag in ("config", "environment", "events")}  # fmt: skip
    assert "global_batch_size" in text["config"] and "deepspeed" in text["environment"]
    assert "checkpoint_passed_over" in text["events"] and "**alert**" in text["events"]
    tag = next(tag for tag in found.Tags()["tensors"] if tag.startswith("custom_scalars__config__"))
    layout = layout_pb2.Layout()
    layout.ParseFromString(found.Tensors(tag)[-1].tensor_proto.string_val[0])
    assert [one.title for one in layout.category] == list(run_page.LAYOUT)
    hparams = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(hparams).session_start_info
    # As the run began: TensorBoard keeps what it was told first.
    assert start.hparams["trainer.steps"].number_value == 2 and start.hparams["recipe"].string_value == "tiny:clip"


def test_events_stay_on_their_page_when_batches_fill_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    batches = '{"time": 1, "event": "batch"}\n' * 10_000
    path.write_text('{"time": 1, "rank": 0, "event": "start"}\n' + batches)
    assert run_page.events(path) == ""  # no new page: the one that was drawn before has more
    path.write_text(batches + '{"time": 1, "rank": 0, "event": "save"}\n')
    assert run_page.events(path).splitlines()[2:] == ["| 1970-01-01 00:00:01 | 0 | save |  |"]


def test_every_interface_name_is_in_the_layout() -> None:
    import re

    patterns = [pattern for group in run_page.LAYOUT.values() for _, names in group.values() for pattern in names]
    names = (
        *NAMES,
        "ranks/compute_slowest_s",
        "ranks/data_median_s",
        "loss/image_to_text",
        "uncertainty/image_logvar",
        "eval/zero_shot/macro",
        "eval/validation/loss",
    )
    assert not [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)]


def test_timeline_of_the_steps_that_were_asked_for(run: tuple[Path, str, list[bytes]]) -> None:
    (path,) = (run[0] / "profile").iterdir()
    assert path.name == "steps-0-2-rank-0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"step 0", "step 1"} <= names and "step 2" not in names and any("aten::" in str(name) for name in names)
