"""How a run looks in TensorBoard beside its curves: their layout by question, and its pages of text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.credentials import hidden
from core.settings import flatten

# Patterns of names, which are regular expressions, by the question that they answer.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "does it learn": {
        "loss": ["Multiline", [r"loss/total", r"eval/validation/loss"]],
        "parts of the loss": ["Multiline", [r"loss/(?!total).*"]],
        "evaluation": ["Multiline", [r"eval/(zero_shot|retrieval|anatomy|supervised)/.*"]],
        "uncertainty": ["Multiline", [r"uncertainty/.*_logvar"]],
        "gradient": ["Multiline", [r"optim/grad_norm"]],
        "learning rate": ["Multiline", [r"optim/lr"]],
    },
    "is it fast": {
        "samples/s": ["Multiline", [r"throughput/samples_per_s"]],
        "share of the peak": ["Multiline", [r"throughput/mfu", r"device/utilisation"]],
        "seconds a step": ["Multiline", [r"time/step_s.*"]],
        "wait for data": ["Multiline", [r"time/data_wait_fraction.*"]],
        "seconds of the slowest rank": ["Multiline", [r"ranks/(compute|data)_(slowest|median)_s"]],
    },
    "is it fed": {
        "batches that wait": ["Multiline", [r"data/queue_depth"]],
        "bytes read": ["Multiline", [r"data/bytes_read"]],
        "retries": ["Multiline", [r"data/store_retries"]],
        "skipped": ["Multiline", [r"data/skipped"]],
    },
    "is it safe": {
        "age of the newest checkpoint, s": ["Multiline", [r"checkpoint/.*"]],
        "memory, GB": ["Multiline", [r"memory/.*"]],
    },
}
EVENTS_SHOWN = 60
_TAIL_BYTES = 1 << 18  # of events.jsonl; every step has a line


def settings(tree: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """The settings of a run by dotted name, for the comparison of runs; those that are not set are left out."""
    return {name: _shown(value) for name, value in flatten(tree).items() if value is not None}


def _shown(value: Any) -> bool | float | str:
    if isinstance(value, bool | str):
        return value
    return float(value) if isinstance(value, int | float) else json.dumps(value)[:200]


def table(rows: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def events(path: Path) -> str:
    """The last events of a run but for its batches, newest first, as Markdown; empty where the tail has none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    rows = ["| time | rank | event | |", "|---|---|---|---|"]
    for line in reversed(lines):
        try:
            event = json.loads(line)
            what = event.pop("event")
        except (ValueError, KeyError, AttributeError):
            continue  # the tail begins inside a line
        if what in ("batch", "mirrored"):
            continue
        if len(rows) == EVENTS_SHOWN + 2:
            break
        when, rank = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.pop("time", 0))), event.pop("rank", "")
        alert = "**alert** " if event.pop("level", "") == "alert" else ""
        rows.append(f"| {when} | {rank} | {alert}{what} | {_cell(', '.join(f'{k}: {v}' for k, v in event.items()))} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _cell(value: Any) -> str:
    return hidden(str(value)).replace("|", "\\|").replace("\n", " ")
