"""What a run says about itself: TensorBoard curves under fixed names, and events.jsonl. Never report text.

The names in `NAMES` and the pattern `loss/<part>`, `uncertainty/<modality>_logvar`, `eval/<protocol>/<name>` are an
interface: dashboards are built on them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from core import run_page
from core.alerts import ALERTS
from core.credentials import hidden
from core.profiling import FOLDER as PROFILE
from core.world import World
from shards.errors import RoentgenError
from shards.store import open_store

log = logging.getLogger(__name__)

NAMES = (
    "loss/total",
    "optim/lr",
    "optim/grad_norm",
    "throughput/samples_per_s",
    "throughput/mfu",
    "time/step_s",
    "time/data_wait_fraction",
    "data/skipped",
    "data/store_retries",
    "data/bytes_read",
    "data/queue_depth",
    "checkpoint/lag_s",
    "memory/device_gb",
    "memory/host_gb",
    "device/utilisation",
)
UPLOAD_EVERY_S = 60.0

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}


class Events:
    """events.jsonl: one JSON object a line, appended in one write by any rank, never rewritten.

    Events that a person should look at have `"level": "alert"` and go to `on_alert`, too. No line shows a credential.
    """

    def __init__(
        self, folder: Path, world: World, *, on_alert: Callable[[Mapping[str, Any]], None] = lambda event: None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "events.jsonl"
        self._rank = world.rank
        self._warned = False
        self._on_alert = on_alert

    def write(self, event: Mapping[str, Any]) -> None:
        """Append `event` with the time and the rank. A full disk must not end the run: it is said once in the log."""
        whole = {"time": round(time.time(), 3), "rank": self._rank, **event}
        if event.get("event") in ALERTS:
            whole.setdefault("level", "alert")
        if whole.get("level") == "alert":
            self._on_alert(whole)
        line = hidden(json.dumps(whole)) + "\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())  # one write: lines of several ranks do not mix
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._warned:
                log.warning("%s: cannot be appended to (%s)", self.path, error.strerror)
            self._warned = True


class Metrics:
    """Scalars and pictures of rank 0, for TensorBoard. On other ranks every call does nothing.

    `first_step`: the step a restart goes on from; what a killed run drew after it is dropped from the curves. `events`:
    the file whose last lines are a page of text.
    """

    def __init__(self, folder: Path, world: World, *, first_step: int, events: Path | None = None) -> None:
        self._writer: Any = None
        self._events, self._events_shown, self._step = events, "", first_step
        if world.is_first:
            # Imported here, since it takes a second that other ranks need not wait.
            from torch.utils.tensorboard import SummaryWriter

            purge = first_step + 1 if first_step else None
            self._writer = SummaryWriter(str(folder / "tb"), purge_step=purge, flush_secs=20)
            self._writer.add_custom_scalars(run_page.LAYOUT)

    def run(self, step: int, recipe: Mapping[str, Any], text: str, environment: Mapping[str, Any]) -> None:
        """What the run is: `recipe` for the comparison of runs, its `text` and the `environment` as pages."""
        if self._writer is not None:
            from torch.utils.tensorboard.summary import hparams

            figures = dict.fromkeys(("loss/total", "eval/validation/loss", "throughput/samples_per_s"), 0.0)
            for part in hparams(run_page.settings(recipe), figures):
                self._writer.file_writer.add_summary(part)
        self.text(step, "config", f"```\n{text}\n```")
        self.text(step, "environment", run_page.table(environment))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """image [C, H, W] in [0, 1]."""
        if self._writer is not None:
            self._writer.add_image(name, image.clamp(0, 1), step)

    def text(self, step: int, name: str, text: str) -> None:
        """The recipe and the like; never a report."""
        if self._writer is not None:
            self._writer.add_text(name, hidden(text), step)

    def flush(self) -> None:
        if self._writer is not None:
            self._show_events()
            self._writer.flush()

    def _show_events(self) -> None:
        page = run_page.events(self._events) if self._events is not None else ""
        if page and page != self._events_shown:
            self._events_shown = page
            self.text(self._step, "events", page)

    def close(self) -> None:
        if self._writer is not None:
            self._show_events()
            self._writer.close()


def contact_sheet(pixel_values: Tensor, *, columns: int = 8, most: int = 32) -> Tensor:
    """The first images of a batch side by side, each stretched to [0, 1]: [V, C, H, W] -> [C, rows H, columns W].

    Of volumes [V, C, D, H, W] the middle slice of the first channel, front up and the patient's right on the left.
    """
    if pixel_values.ndim == 5:
        pixel_values = pixel_values[:, :1, pixel_values.shape[2] // 2].flip(-2, -1)
    images = pixel_values[:most].detach().float().cpu()
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp_min(1e-6)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = torch.zeros(rows * columns, channels, height, width)
    sheet[:count] = images
    # [rows, columns, C, H, W] -> [C, rows, H, columns, W]
    sheet = sheet.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return sheet.reshape(channels, rows * height, columns * width)


def peak_flops(device: torch.device, *, half_precision: bool) -> float:
    """Peak FLOP/s that utilisation is measured against: known GPUs by name, else what a large product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak if half_precision else peak / 2
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if half_precision else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        started = time.perf_counter()
        product = a @ a
        product[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the device and present memory of this process, GB."""
    values = {"memory/host_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        values["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return values


def utilisation(device: torch.device, meter: CPUMeter) -> float:
    """Busy fraction of the device: as the GPU's driver reports it, or this process's share of its CPU threads."""
    if device.type == "cuda":
        try:
            return torch.cuda.utilization(device) / 100
        except (ModuleNotFoundError, RuntimeError):  # the driver's library is not installed
            return float("nan")
    return meter.fraction()


class CPUMeter:
    """CPU seconds used over wall seconds and torch threads since the last call."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def fraction(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        value = (cpu - self._cpu) / max(1e-9, (wall - self._wall) * torch.get_num_threads())
        self._wall, self._cpu = wall, cpu
        return min(1.0, value)


class Uploader:
    """Sends `tb/`, `events.jsonl`, `config.json`, `eval/`, `profile/` of an s3:// run to its store from time to time.

    One a node. Objects cannot grow, so what was appended since the last upload becomes the next numbered part:
    `events-000001-<time>.jsonl`, from the node of rank 8 `events-r8-000001-<time>.jsonl`. TensorBoard's own files are
    sent whole under their names when they have changed, since TensorBoard reads them from the store itself.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        world: World,
        on_event: Callable[[Mapping[str, Any]], None],
        *,
        every_s: float = UPLOAD_EVERY_S,
    ) -> None:
        self._store, self._folder, self._on_event, self._every_s = open_store(url), folder, on_event, every_s
        ours = ("config.json", "tokenizer/*", "tb/*", "eval/*.json") if world.is_first else ()
        self._patterns = (*ours, f"{PROFILE}/*.json.gz")
        self._prefix = "events-" if world.is_first else f"events-r{world.rank}-"
        numbers = [re.match(rf"{self._prefix}(\d+)-\d+\.jsonl", name) for name in self._store.list("events-")]
        self._number = max((int(match[1]) for match in numbers if match), default=0)
        self._sent: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics-upload", daemon=True)
        # How much of the file here was sent, also by a run that was killed: on a fresh node, nothing.
        self._offset_file = folder / ".events-sent"
        self._offset = int(self._offset_file.read_text()) if self._offset_file.is_file() else 0
        events = folder / "events.jsonl"
        if not events.is_file() or events.stat().st_size < self._offset:
            self._offset = 0
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._upload()
        self._store.close()

    def _work(self) -> None:
        while not self._stop.wait(self._every_s):
            self._upload()

    def _upload(self) -> None:
        try:
            self._upload_events()
            paths = [path for pattern in self._patterns for path in self._folder.glob(pattern)]
            for path in sorted(path for path in paths if path.is_file()):
                status = path.stat()
                name = path.relative_to(self._folder).as_posix()
                if self._sent.get(name) != (status.st_size, status.st_mtime_ns):
                    self._store.put(name, path.read_bytes())
                    self._sent[name] = (status.st_size, status.st_mtime_ns)
        except (OSError, RoentgenError) as error:
            self._on_event({"event": "upload_failed", "cause": str(error)})

    def _upload_events(self) -> None:
        path = self._folder / "events.jsonl"
        if not path.is_file():
            return
        with open(path, "rb") as file:
            file.seek(self._offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        if new:
            self._store.put(f"{self._prefix}{self._number + 1:06d}-{int(time.time())}.jsonl", new)
            self._number += 1
            self._offset += len(new)
            temporary = self._offset_file.with_suffix(".tmp")
            temporary.write_text(str(self._offset))
            os.replace(temporary, self._offset_file)
