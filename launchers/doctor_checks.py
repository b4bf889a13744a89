"""What `doctor.py` looks at. Each check yields findings and raises for nothing that a machine can have wrong."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import queue
import resource
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch

from configs.schema import TrainConfig
from core import self_proof
from core.metrics import PEAK_FLOPS, peak_flops
from launchers import past_run, plan, submit
from shards.dataset import open_manifest
from shards.decode import Decoder
from shards.decode_check import levels_apart
from shards.errors import ConfigError
from shards.store import StoreConfig, open_store

State = Literal["good", "note", "trouble"]

LOCK = Path(__file__).resolve().parents[1] / "ci" / "requirements.lock"
# Without these nothing runs; another version of any other package is a note.
NEEDED = (*past_run.DECISIVE_PACKAGES, "transformers", "webdataset", "boto3", "tensorboard", "pyarrow")
PACKAGES_SHOWN = 6
ALL_REDUCE_LIMIT_S = 90.0
DISK_ROOM_GB = 20.0
SHARED_MEMORY_GB = 1.0
OPEN_FILES = 4096
CLOCK_APART_S = 2.0
OBJECT_BYTES, OBJECTS = 8 << 20, 4  # of the test of bandwidth
READ_BYTES = 64 << 20  # of a data set, at most
GREY_LEVELS = 2.0  # two decoders may be apart by
_CLOCK_UNSYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)


class Finding(NamedTuple):
    """One line of the table. `advice`: what to do, empty where nothing is."""

    what: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is looked at beside this machine; None is left out."""

    run_dir: str | None = None
    data: str | None = None
    cache_dir: str | None = None
    ray: str | None = None
    gpus: int | None = None  # that this machine must have
    recipe: TrainConfig | None = None
    store: StoreConfig = field(default_factory=StoreConfig)


def environment(_asked: Asked) -> Iterator[Finding]:
    """Python and the packages of the lock."""
    ours = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("python", "good" if good else "trouble", ours, "" if good else "install Python 3.11 or newer")
    locked = dict(line.split("==") for line in LOCK.read_text().split() if line.count("==") == 1)
    missing, other = [], []
    for name, version in locked.items():
        try:
            installed = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != version.partition("+")[0]:
            other.append(f"{name} {installed} (lock: {version})")
    lacking = [name for name in missing if name in NEEDED]
    same = len(locked) - len(missing) - len(other)
    found = f"{same} of {len(locked)} are as in the lock"
    for title, names in (("others", other), ("missing", missing)):
        if names:
            found += f"; {title}: {', '.join(names[:PACKAGES_SHOWN])}{', ...' if len(names) > PACKAGES_SHOWN else ''}"
    state: State = "trouble" if lacking else "note" if other or missing else "good"
    yield Finding("packages", state, found, "" if state == "good" else "bash ci/setup.sh installs what the lock says")


def graphics(asked: Asked) -> Iterator[Finding]:
    """GPUs as torch sees them."""
    count = torch.cuda.device_count()
    if asked.gpus is not None and count != asked.gpus:
        yield Finding(
            "GPUs", "trouble", f"{count}, {asked.gpus} are wanted", "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if not count:
        on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        advice = "" if on_cpu else "export DS_ACCELERATOR=cpu, so that `deepspeed` starts ranks without a GPU"
        yield Finding("GPUs", "note", f"none: {psutil.cpu_count(logical=True)} CPU threads train", advice)
    for number in range(count):
        known = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        busy = free < 0.9 * total
        yield Finding(
            f"GPU {number}", "note" if busy else "good",
            f"{known.name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, CUDA {torch.version.cuda}",
            "another program holds its memory: see nvidia-smi" if busy else "",
        )  # fmt: skip


def collectives(_asked: Asked) -> Iterator[Finding]:
    """An all-reduce of two processes on loopback, by gloo and, with two GPUs, by NCCL."""
    backends = ["gloo"] + ["nccl"] * (torch.cuda.device_count() > 1)
    for backend in backends:
        seconds, problem = _all_reduce(backend)
        advice = "" if problem is None else (
            "allow connections to 127.0.0.1" + ("; try NCCL_DEBUG=INFO, NCCL_P2P_DISABLE=1" * (backend == "nccl"))
        )  # fmt: skip
        found = problem or f"2 processes, 1 MB, {1000 * seconds:.1f} ms"
        yield Finding(f"all-reduce, {backend}", "good" if problem is None else "trouble", found, advice)
    if torch.cuda.device_count() == 1:
        yield Finding("all-reduce, nccl", "note", "one GPU: two ranks are needed to try it")


def _all_reduce(backend: str) -> tuple[float, str | None]:
    """(seconds of the second one, None), or what went wrong."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, backend, answers), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        found = [answers.get(timeout=ALL_REDUCE_LIMIT_S) for _ in ranks]
    except queue.Empty:
        return 0.0, f"no answer within {ALL_REDUCE_LIMIT_S:.0f} s"
    finally:
        for rank in ranks:
            rank.join(timeout=5)
            if rank.is_alive():
                rank.kill()
    problem = next((text for text, _ in found if text is not None), None)
    return max(seconds for _, seconds in found), problem


def _rank(rank: int, port: int, backend: str, answers: Any) -> None:
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        torch.distributed.init_process_group(
            backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        seconds = 0.0
        for _ in range(2):
            values = torch.full((1 << 18,), float(rank + 1), device=device)
            started = time.perf_counter()
            torch.distributed.all_reduce(values)
            total = float(values.sum())  # waits
            seconds = time.perf_counter() - started
        problem = None if total == 3.0 * (1 << 18) else f"the sum is wrong: {total}"
        torch.distributed.destroy_process_group()
        answers.put((problem, seconds))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        answers.put((f"{type(error).__name__}: {first}", 0.0))


def run_directory(asked: Asked) -> Iterator[Finding]:
    """Rights and bandwidth where checkpoints and curves go, with objects of our own that are deleted again."""
    if asked.run_dir is None:
        return
    with open_store(asked.run_dir, asked.store, create=True) as store:
        folder = f".doctor-{uuid.uuid4().hex[:12]}"
        body = np.random.default_rng(0).bytes(OBJECT_BYTES)
        names = [f"{folder}/{number}" for number in range(OBJECTS)]
        try:
            with ThreadPoolExecutor(OBJECTS) as pool:
                started = time.perf_counter()
                list(pool.map(lambda name: store.put(name, body), names))
                put_s = time.perf_counter() - started
                listed = store.list(f"{folder}/")
                started = time.perf_counter()
                same = all(pool.map(lambda name: store.get(name) == body, names))
                get_s = time.perf_counter() - started
        finally:
            for name in names:
                store.delete(name)
        left = store.list(f"{folder}/")
    size = OBJECT_BYTES * OBJECTS / 1e6
    rates = f"put {size / put_s:.0f} MB/s, get {size / get_s:.0f} MB/s, {store.stats.retries} retries"
    if not same or sorted(listed) != sorted(names) or left:
        fault = (
            "other bytes came back" if not same else "deleted objects are still listed" if left else "a wrong listing"
        )
        yield Finding("run directory", "trouble", fault, "this store cannot be trusted: look at what lies between")
        return
    yield Finding("run directory", "note" if store.stats.retries else "good", f"put, list, get, delete work; {rates}")


def data(asked: Asked) -> Iterator[Finding]:
    """That a data set can be read, and how fast."""
    if asked.data is None:
        return
    store, manifest = open_manifest(asked.data, asked.store)
    with store:
        left, ranges = READ_BYTES, []
        for shard in manifest.shards:
            if shard.url is None and left > 0:
                offsets = range(0, min(left, shard.bytes), OBJECT_BYTES)
                ranges += [(shard.tar, start, min(OBJECT_BYTES, shard.bytes - start)) for start in offsets]
                left -= shard.bytes
        started = time.perf_counter()
        size = sum(len(part.result()) for part in store.get_ranges(ranges))
        rate = size / 1e6 / (time.perf_counter() - started)
    found = f"{manifest.samples} samples in {len(manifest.shards)} shards"
    found += f"; {size / 1e6:.0f} MB at {rate:.0f} MB/s, {store.stats.retries} retries"
    void = f"; {manifest.forgotten} of them void" if manifest.forgotten else ""
    yield Finding("data", "note" if store.stats.retries else "good", found + void)


def decoding(_asked: Asked) -> Iterator[Finding]:
    """DALI's graph against our plain path: on a GPU, where there is one, else on the CPU."""
    device: Literal["cpu", "mixed"] = "mixed" if torch.cuda.is_available() else "cpu"
    config = Decoder.Config(device=device)
    apart = levels_apart(Decoder(config, whole_graph=True), Decoder(Decoder.Config()))
    worst = max(apart, key=lambda kind: apart[kind])
    good = apart[worst] <= GREY_LEVELS
    yield Finding(
        f"DALI, {device}", "good" if good else "trouble",
        f"{len(apart)} kinds of images, at most {apart[worst]:.2f} grey levels apart ({worst})",
        "" if good else "set data.decode.device=cpu, and reinstall nvidia-dali for this driver",
    )  # fmt: skip


def kernels(_asked: Asked) -> Iterator[Finding]:
    """The kernel of similarities and attention: compiled and compared on a GPU, the CPU's paths compared without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contrasts: list[Any] = [("cosine", "bf16"), ("wasserstein", "split")]
    parts = [
        self_proof.kernel_part(device, 64, contrasts),
        self_proof.attention_part(device, half_precision=device.type == "cuda"),
    ]
    if device.type == "cpu":
        yield _compiled_ahead()
    for part in parts:
        try:
            compared = list(part.compare())
        except Exception as error:  # whatever a compiler or a driver raises
            yield Finding(part.name, "trouble", f"fails: {type(error).__name__}", f"train with {part.switch}")
            continue
        wrong = [one for one in compared if not one.error <= one.bound]
        found = f"{len(compared)} comparisons with the plain path on this {device.type}"
        if wrong:
            yield Finding(
                part.name, "trouble", f"{wrong[0].what} is off by {wrong[0].error:.1e}", f"train with {part.switch}"
            )
        else:
            yield Finding(part.name, "good", found)


def _compiled_ahead() -> Finding:
    """Without a GPU: whether Triton compiles a contrast for one."""
    what = "kernel, compiled for H100"
    try:
        from kernels.gaussian_similarity.ahead import compile_contrast
    except ImportError:
        return Finding(what, "note", "Triton is not installed", "a CUDA build of torch brings it, where there is a GPU")
    try:
        names = compile_contrast(90)
    except Exception as error:  # whatever a compiler raises
        advice = "install the triton of the lock; a GPU would train with --set engine.kernel=pytorch"
        return Finding(what, "trouble", f"does not compile: {type(error).__name__}", advice)
    return Finding(what, "good", f"{len(names)} kernels, forward and backward")


def room(asked: Asked) -> Iterator[Finding]:
    """Disks, memory that processes share, open files."""
    places = {"disk": Path.cwd(), "disk of the cache": asked.cache_dir}
    if asked.run_dir is not None and "://" not in asked.run_dir:
        places["disk of the run"] = asked.run_dir
    for what, place in places.items():
        if place is not None:
            there = next(path for path in (Path(place).absolute(), *Path(place).absolute().parents) if path.exists())
            free_gb = shutil.disk_usage(there).free / 1e9
            low = free_gb < DISK_ROOM_GB
            advice = f"free some: checkpoints and packages want {DISK_ROOM_GB:.0f} GB and more" if low else ""
            yield Finding(what, "note" if low else "good", f"{free_gb:.0f} GB free", advice)
    if Path("/dev/shm").is_dir():
        free_gb = shutil.disk_usage("/dev/shm").free / 1e9
        low = free_gb < SHARED_MEMORY_GB
        advice = "start the container with --shm-size=8g, or mount a larger /dev/shm" if low else ""
        yield Finding("shared memory", "trouble" if low else "good", f"{free_gb:.1f} GB free in /dev/shm", advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    advice = f"ulimit -n {OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 65536)}" if low else ""
    yield Finding("open files", "note" if low else "good", f"{soft} a process", advice)
    memory = psutil.virtual_memory()
    yield Finding("memory", "good", f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free")


def clock(asked: Asked) -> Iterator[Finding]:
    """Whether the clock is kept, and agrees with the disk of the run directory. S3 refuses one that is wrong."""
    kept = False
    with contextlib.suppress(OSError, AttributeError):
        # struct timex with modes 0 asks and sets nothing; no field of it is read, so its size is all that matters.
        kept = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) not in (-1, _CLOCK_UNSYNCHRONISED)
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    unsure = "" if kept else "switch on chrony, ntpd or systemd-timesyncd: S3 refuses a clock that is minutes wrong"
    yield Finding(
        "clock", "good" if kept else "note", shown + (", kept in time" if kept else ", not known to be kept"), unsure
    )
    if asked.run_dir is not None and "://" not in asked.run_dir:
        probe = Path(asked.run_dir) / f".doctor-{uuid.uuid4().hex[:12]}"
        try:
            probe.write_bytes(b"")
            apart = probe.stat().st_mtime - time.time()
        finally:
            probe.unlink(missing_ok=True)
        good = abs(apart) <= CLOCK_APART_S
        advice = "" if good else "set both machines' clocks: events of nodes would stand in a wrong order"
        yield Finding("clock of the disk", "good" if good else "note", f"{apart:+.1f} s from this machine's", advice)


def ray(asked: Asked) -> Iterator[Finding]:
    """That Ray is there, and the cluster's version if one is named."""
    try:
        ours = metadata.version("ray")
    except metadata.PackageNotFoundError:
        state: State = "trouble" if asked.ray else "note"
        yield Finding("ray", state, "not installed", "pip install 'ray[default,data,train]', for submit.py and --ray")
        return
    yield Finding("ray", "good", ours)
    if asked.ray is None:
        return
    request = urllib.request.Request(f"{asked.ray.rstrip('/')}/api/version")
    with contextlib.suppress(ConfigError):  # without a token: the cluster will say that it wants one
        # Meant for this host: a redirect does not take it along.
        request.add_unredirected_header("Authorization", f"Bearer {submit.find_token()}")
    try:
        if not asked.ray.startswith(("http://", "https://")):
            raise ValueError
        with urllib.request.urlopen(request, timeout=10) as response:
            theirs = str(json.load(response).get("ray_version"))
    except urllib.error.HTTPError as error:
        refused = error.code in (401, 403)
        advice = (
            "name a file with the cluster's token in RAY_AUTH_TOKEN_PATH" if refused else "is this a Ray dashboard?"
        )
        yield Finding("ray cluster", "trouble", f"answers {error.code}", advice)
    except (OSError, ValueError) as error:
        reason = type(getattr(error, "reason", error)).__name__
        yield Finding("ray cluster", "trouble", f"no answer ({reason})", "start it, or correct --ray http://HEAD:8265")
    else:
        same = theirs == ours
        advice = "" if same else f"install ray=={theirs} here, or {ours} there: they must be the same"
        yield Finding("ray cluster", "good" if same else "trouble", f"ray {theirs}", advice)


def throughput(asked: Asked) -> Iterator[Finding]:
    """What plan.py expects of the recipe on this machine, where a recipe is named."""
    config = asked.recipe
    if config is None:
        return
    of = plan.counted(config)
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if count else ""
    gpu = next((gpu for gpu in sorted(plan.GPU_GB) if name and gpu.partition("-")[0] in name), None)
    if gpu is None:
        device = torch.device("cuda" if count else "cpu")
        peak = peak_flops(device, half_precision=config.engine.precision != "fp32")
        rate = peak * max(1, count) / (3 * of.flop)
        yield Finding(
            "throughput", "note", f"at most {rate:.3g} studies/s: 3 x {of.flop / 1e9:.3g} GFLOP a study at the "
            f"{peak / 1e9:.0f} GFLOP/s of a large matrix product here", f"plan.py knows {', '.join(PEAK_FLOPS)}",
        )  # fmt: skip
        return
    cores = float(psutil.cpu_count(logical=True) or 1)
    site = plan.Site(
        nodes=1, gpus=count, gpu=gpu, network_gbit=400.0, utilisation=0.35, study_bytes=0.0, studies=None, epochs=None,
        price=None, cores=cores,
    )  # fmt: skip
    lines = {line.name: line for line in plan.plan(config, site, of)}
    memory, rate_line = lines["memory/total"], lines["step/studies_per_s"]
    fits = "does NOT" not in memory.formula
    yield Finding("memory of the recipe", "good" if fits else "trouble", f"{memory.value:.3g} GB {memory.formula}")
    fed = lines["loader/cores_per_gpu"]
    slow = "does NOT" in fed.formula
    yield Finding("loader of the recipe", "note" if slow else "good", f"{fed.value:.3g} cores a GPU, {fed.formula}")
    yield Finding("throughput", "good", f"about {rate_line.value:.3g} studies/s on {count} {gpu} at 0.35 of the peak")


CHECKS = (
    environment, graphics, collectives, run_directory, data, decoding, kernels, room, clock, ray, throughput,
)  # fmt: skip
