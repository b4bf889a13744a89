"""Two nodes under the DeepSpeed launcher, each started by hand as launchers/README.md says; both are this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ci.bench.ray_cluster import end_all, environment, family, free_port
from core.checkpoint_files import steps_in
from tests.launchers.past_runs import pack

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 280


@pytest.mark.slow
def test_each_node_is_started_without_ssh(tmp_path: Path) -> None:
    manifest = pack(tmp_path / "set")
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    run_dir = tmp_path / "run"
    settings = [f"data.train={manifest}", 'data.sections=["findings"]', "data.max_skip_rate=0.5", "trainer.steps=2"]
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [
                str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts), "--no_ssh",
                "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port,
                "launchers/pretrain.py", "--recipe", "tiny:clip", "--run-dir", str(run_dir), "--set", *settings,
            ],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        shown = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            end_all(family(node.pid))
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(shown)[-3000:]
    assert "step 2/2" in shown[0] and "step 2/2" not in shown[1]
    assert steps_in(run_dir)[-1] == 2
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["ranks"] for event in events if event["event"] == "start"] == [2]
