"""The batch of any step of a past run, built again: which samples, which tokens, which pixels, and what differs here.

Reads the run's config.json and events.jsonl, asks the loader for the whole global batch of the step, prints its rows
and hashes, and compares them with what the run recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from configs import schema
from configs.schema import TrainConfig
from core.metrics import contact_sheet
from launchers.command import errors_in_one_line
from launchers.past_run import read_config, read_tokenizer, versions
from shards.batch import Batch, batch_hash
from shards.errors import ConfigError, DataError
from shards.loader import Loader, Row, reads_text
from shards.store import Store, open_store

BATCH_EVENT = "batch"  # {"event": "batch", "step": N, "batch_hash": H} in events.jsonl
START_EVENT = "start"
ROWS_SHOWN = 24
SAVE_SUFFIXES = (".png", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the run wrote about itself; None and empty where it wrote nothing."""

    batch_hash: int | None = None
    steps_with_hash: tuple[int, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    manifests_sha256: tuple[str, ...] = ()
    tokenizer_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The batch of a step. `hashes`: what of it -> hash; `differences`: what is not as it was in the run, in words."""

    step: int
    rows: list[Row]
    batch: Batch
    void: dict[str, str]  # shard/key -> cause
    hashes: dict[str, str]
    recorded: Recorded
    differences: list[str]

    @property
    def matches(self) -> bool | None:
        """Whether these are the samples that the run recorded for this step; None if it recorded none."""
        if self.recorded.batch_hash is None:
            return None
        return self.recorded.batch_hash == int(self.hashes["samples"])

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "matches": self.matches,
            "hashes": self.hashes,
            "recorded_batch_hash": self.recorded.batch_hash,
            "differences": self.differences,
            "rows": [asdict(row) for row in self.rows],
            "void": self.void,
        }


def replay(run_dir: str, step: int) -> Replay:
    """Build the global batch that moved the weights from `step` to `step + 1`.

    Raises:
        ConfigError: no run directory, a negative step. DataError: the data are gone or damaged.
    """
    if step < 0:
        raise ConfigError(f"--step {step}: steps are counted from 0")
    with open_store(run_dir) as store:
        config = read_config(store)
        recorded = read_recorded(store, step)
        fields = schema.task_class(config.task).fields
        tokenizer = read_tokenizer(store, config) if reads_text(fields) else None
    differences = []
    decode = config.data.decode
    if decode.device == "mixed" and not torch.cuda.is_available():
        decode = replace(decode, device="cpu")
        differences.append("decoder: the run decoded on a GPU (mixed), here on the CPU: pixels differ slightly")
    events: list[Mapping[str, Any]] = []
    loader = Loader(
        replace(config.data, decode=decode, prefetch_batches=1),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        fields=fields,
        tokenizer=tokenizer,
        on_event=events.append,
    )
    rows = loader.describe(step, all_ranks=True)
    with loader.start(step) as run:
        batch = next(run)
    manifests = tuple(data.whole.origin for data in loader.sets)
    differences += [
        f"set {index}: {data.whole.forgotten} studies are void, their patients were forgotten"
        for index, data in enumerate(loader.sets)
        if data.whole.forgotten
    ]
    differences += _differences(config, recorded, manifests, tokenizer.sha256 if tokenizer is not None else None)
    names = "\n".join(f"{row.set_index} {row.epoch} {row.shard} {row.key}" for row in rows)
    hashes = {
        "samples": str(batch_hash(batch)),
        "keys": hashlib.sha256(names.encode()).hexdigest(),
        "pixels": _tensor_hash(batch["pixel_values"]),
    }
    if "input_ids" in batch:
        hashes["tokens"] = _tensor_hash(batch["input_ids"])
    for name in sorted(
        {"text_mask", "token_weight", "patch_mask", "attention_grid", "anatomy_input_ids", "anatomy_share"}
        & batch.keys()
    ):
        hashes[name.replace("_", " ")] = _tensor_hash(batch[name])
    void = {
        f"{event['shard']}/{event['key']}": str(event["cause"])
        for event in events
        if event.get("event") == "skip" and event.get("step") in (step, None)
    }
    return Replay(
        step=step, rows=rows, batch=batch, void=void, hashes=hashes, recorded=recorded, differences=differences
    )


def read_recorded(store: Store, step: int) -> Recorded:
    """From events.jsonl, or its numbered parts, and the state of the newest checkpoint."""
    names = ["events.jsonl"] if store.exists("events.jsonl") else []
    names += sorted(name for name in store.list("events-") if re.fullmatch(r"events-(r\d+-)?\d+-\d+\.jsonl", name))
    found: int | None = None
    steps: set[int] = set()
    last_versions: dict[str, str] = {}
    for name in names:
        for line in store.get(name).decode(errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # a line cut by a kill
                continue
            if not isinstance(event, dict):
                continue
            at = event.get("step")
            if event.get("event") == BATCH_EVENT and isinstance(at, int) and isinstance(event.get("batch_hash"), int):
                steps.add(at)
                found = event["batch_hash"] if at == step else found
            # The versions of the start that trained this step: the last one at or before it.
            if event.get("event") == START_EVENT and isinstance(event.get("versions"), dict) and (at or 0) <= step:
                last_versions = {str(key): str(value) for key, value in event["versions"].items()}
    manifests: tuple[str, ...] = ()
    tokenizer_sha256 = None
    if store.exists("latest"):
        state = f"checkpoints/{store.get('latest').decode(errors='replace').strip()}/state.json"
        if store.exists(state):
            recipe = json.loads(store.get(state)).get("recipe", {})
            manifests = tuple(recipe.get("manifests_sha256") or ())
            tokenizer_sha256 = recipe.get("tokenizer_sha256")
    return Recorded(
        batch_hash=found,
        steps_with_hash=tuple(sorted(steps)),
        versions=last_versions,
        manifests_sha256=manifests,
        tokenizer_sha256=tokenizer_sha256,
    )


def _differences(
    config: TrainConfig, recorded: Recorded, manifests: Sequence[str], tokenizer_sha256: str | None
) -> list[str]:
    found = []
    for index, (then, now) in enumerate(zip(recorded.manifests_sha256, manifests, strict=False)):
        if then != now:
            found.append(
                f"manifest of set {index}: sha256 {now[:12]} here, {then[:12]} in the run: other samples or order"
            )
    if recorded.tokenizer_sha256 and tokenizer_sha256 and recorded.tokenizer_sha256 != tokenizer_sha256:
        found.append(
            f"tokenizer: sha256 {tokenizer_sha256[:12]} here, {recorded.tokenizer_sha256[:12]} in the run: other tokens"
        )
    here = versions()
    for name, then in sorted(recorded.versions.items()):
        if here.get(name) != then:
            found.append(
                f"{name}: version {here.get(name, 'none')} here, {then} in the run: pixels or tokens may differ"
            )
    return found


def _tensor_hash(tensor: torch.Tensor) -> str:
    """sha256 over shape, type and bytes."""
    array = np.ascontiguousarray(tensor.cpu().numpy())
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def save(batch: Batch, path: Path) -> None:
    """A contact sheet (.png) or every tensor of the batch (.safetensors)."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.cpu().contiguous() for name, tensor in batch.items()}, path)
        return
    pixels = batch["pixel_values"]
    columns = max(1, round(len(pixels) ** 0.5))
    sheet = contact_sheet(pixels, columns=columns, most=len(pixels))  # [C, H, W]
    grey = (sheet.mean(dim=0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(grey).save(path)


def show(result: Replay, console: Console, *, every_row: bool) -> None:
    """Rows, hashes, then what the run recorded and what differs."""
    shown = result.rows if every_row else result.rows[:ROWS_SHOWN]
    valid = result.batch["valid"].tolist()
    width = max(len("shard"), *(len(row.shard) for row in shown))
    console.print(f"batch of step {result.step}: {len(result.rows)} slots")
    console.print(f"slot  set  epoch      unit  {'shard':{width}}  key", style="bold")
    for slot, row in enumerate(shown):
        cause = "" if valid[slot] else f"  void: {result.void.get(f'{row.shard}/{row.key}', 'see events.jsonl')}"
        place = f"{slot:4}  {row.set_index:3}  {row.epoch:5}  {row.unit:8}"
        console.print(f"{place}  {row.shard:{width}}  {row.key}{cause}", markup=False)
    if len(shown) < len(result.rows):
        console.print(f"... and {len(result.rows) - len(shown)} more; --all shows them")
    console.print(f"void slots: {len(valid) - sum(valid)}")
    for name, value in result.hashes.items():
        console.print(f"{name:10} {value}")
    if result.matches is None:
        steps = result.recorded.steps_with_hash
        known = f"; it recorded {', '.join(map(str, steps[:8]))}{', ...' if len(steps) > 8 else ''}" if steps else ""
        console.print(f"the run recorded no batch hash for this step{known}")
    else:
        console.print(
            "samples are those that the run trained on"
            if result.matches
            else f"samples DIFFER: the run recorded {result.recorded.batch_hash}"
        )
    for difference in result.differences:
        console.print(f"differs: {difference}")
    if not result.differences:
        console.print("nothing that decides tokens or pixels is known to differ from the run")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="replay.py",
        description="Build the batch of step N of a past run again and say what of it differs here.",
        epilog="exit codes: 0 done, 2 bad arguments or configuration, 3 data gone, or other samples than the run saw",
    )
    command.add_argument("--run-dir", required=True, metavar="DIR", help="run directory, folder or s3://")
    command.add_argument("--step", required=True, type=int, metavar="N", help="moved the weights from step N to N + 1")
    command.add_argument("--save", metavar="FILE", help="contact sheet (.png) or all tensors (.safetensors)")
    command.add_argument("--all", action="store_true", help=f"show every slot, not only the first {ROWS_SHOWN}")
    command.add_argument("--json", metavar="FILE", help="write rows, hashes and differences")
    return command


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    path = Path(arguments.save) if arguments.save else None
    if path is not None and path.suffix not in SAVE_SUFFIXES:
        raise ConfigError(f"--save {path}: unknown kind {path.suffix or '(none)'}; use {' or '.join(SAVE_SUFFIXES)}")
    result = replay(arguments.run_dir, arguments.step)
    show(result, console, every_row=arguments.all)
    if path is not None:
        save(result.batch, path)
        console.print(f"saved {path}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result.to_json(), indent=1) + "\n")
    return DataError.exit_code if result.matches is False else 0


if __name__ == "__main__":
    sys.exit(main())
