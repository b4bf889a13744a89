"""Pre-train on a Ray cluster: the run of pretrain.py, placed, restarted and resized by Ray Train.

    python launchers/ray_pretrain.py --workers 2 --recipe tiny:clip --run-dir runs/a --set data.train=...   own cluster
    python launchers/ray_pretrain.py --workers 8 --address auto ...       the cluster that this machine belongs to
    python launchers/submit.py --address http://head:8265 --workers 4:16 ...                   as a job of a cluster

This is the driver: it decides on how many workers the ranks run, starts them (`ray_group.py`), and when they have ended
says whether to end with them or to start them again from the last checkpoint. It reads no data and no checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.alerts import ALERTS, Webhook
from core.checkpoint import local_folder
from core.metrics import Events
from core.trainer import StopRequest
from core.world import World
from launchers import pretrain
from launchers.command import knock
from launchers.elastic import Board, Ended, Restarts, Workers, fitting, shortage, verdict
from shards.errors import ConfigError, RoentgenError

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.5  # between two looks at the ranks
ANSWER_S = 120.0  # for the board, on a machine however busy
PROBE_S = 10.0  # for workers to be placed that should have room; nodes that died are believed in for a while
SETTLE_S = 5.0  # until what ended workers held is free
OBJECT_STORE_BYTES = 150 << 20  # of a cluster of our own; samples do not pass through it
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a job, which has its working directory already


def parser() -> argparse.ArgumentParser:
    """pretrain.py's command line, and where and on how many workers."""
    result = pretrain.parser()
    result.prog, result.description = "ray_pretrain.py", (__doc__ or "").split("\n\n")[0]
    ray = result.add_argument_group("Ray")
    ray.add_argument("--workers", default="1", metavar="N | MIN:MAX", help="ranks; a range lets them shrink and grow")
    ray.add_argument(
        "--address",
        default="auto" if os.environ.get("RAY_ADDRESS") else "local",
        metavar="auto | HOST:PORT | local",
        help="the cluster; local: one of its own, on this machine (default, but auto inside a job)",
    )
    ray.add_argument("--cpus-per-worker", type=int, default=1, metavar="N", help="beside one GPU where there are GPUs")
    ray.add_argument(
        "--max-restarts",
        type=int,
        default=5,
        metavar="N",
        help="give up after N restarts in a row that began at the same step; nodes that leave do not count",
    )
    ray.add_argument("--wait-s", type=float, default=300.0, metavar="S", help="for room for the fewest workers")
    ray.add_argument("--grow-every-s", type=float, default=60.0, metavar="S", help="between looks for room to grow")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    stop = StopRequest()
    before = stop.install()
    try:
        base, config = pretrain.recipe_of(arguments)
        if arguments.print:
            print(pretrain.schema.to_text(config, base=base))
            return 0
        if arguments.run_dir is None:
            raise ConfigError("--run-dir is missing; name a folder or s3://bucket/prefix")
        if "://" not in arguments.run_dir:
            arguments.run_dir = str(Path(arguments.run_dir).absolute())
        if arguments.cpus_per_worker < 1:
            raise ConfigError(f"--cpus-per-worker {arguments.cpus_per_worker} must be at least 1")
        if not arguments.wait_s >= 0 or not arguments.grow_every_s > 0:
            raise ConfigError(
                f"--wait-s {arguments.wait_s:g} must be at least 0, --grow-every-s {arguments.grow_every_s:g} above 0"
            )
        if arguments.max_restarts < 0:
            raise ConfigError(f"--max-restarts {arguments.max_restarts} must be at least 0")
        # Asked now: nodes that share a machine each unpack a job's folder under one path, and end the one that is here.
        arguments.started_in = os.getcwd()
        workers = Workers.parse(arguments.workers)
        counts = fitting(workers, config.data.lanes)
        with _connected(arguments, workers, stop):
            return Driver(arguments, counts, local_folder(arguments.run_dir, config.checkpoint), stop).run()
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit:  # Ray's answer to SIGTERM while it joins a cluster
        return 128 + signal.SIGTERM
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextlib.contextmanager
def _connected(arguments: argparse.Namespace, workers: Workers, stop: StopRequest) -> Iterator[None]:
    """Inside, this process is a driver of the cluster; a cluster of its own ends with it."""
    quiet = {
        "RAY_TRAIN_METRICS_ENABLED": "0",  # Prometheus gauges; ours are in TensorBoard
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the recipe mean the same as here
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"address": arguments.address, "logging_level": logging.ERROR}
    if arguments.address == "local":
        # Ray's processes listen on every network of the machine, so the token is what keeps others out. It lives in the
        # environment of these processes and ends with them.
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        os.environ.setdefault("RAY_worker_niceness", "0")  # to be added: ranks are no background work
        options.update(
            num_cpus=workers.maximum * arguments.cpus_per_worker,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    elif IN_JOB not in os.environ:
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed here; pip install 'ray[default,train]'") from None
    try:
        knock(arguments.address)
        ray.init(**options)
    except Exception as error:  # Ray raises many kinds, the plainest among them
        raise ConfigError(_why_not_joined(arguments.address, error)) from None
    stop.install()
    try:
        yield
    finally:
        ray.shutdown()


def _why_not_joined(address: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "uthenticat" in text or "token" in text.lower():
        return (
            f"--address {address}: the cluster does not take this token; point RAY_AUTH_TOKEN_PATH at the file that "
            "the head was started with"
        )
    if "ersion mismatch" in text:
        return f"--address {address}: another version runs there ({error})"
    if address == "local":
        return f"no cluster of its own could be started ({text.splitlines()[0]})"
    return (
        f"--address {address}: no cluster there ({type(error).__name__}); start one with `ray start --head`, or give "
        "--address local"
    )


class Driver:
    """One run, over all its attempts. `counts`: numbers of workers it may have, largest first."""

    def __init__(self, arguments: argparse.Namespace, counts: Sequence[int], folder: Path, stop: StopRequest) -> None:
        import ray

        from launchers import ray_group

        self._ray, self._group = ray, ray_group
        self._arguments, self._counts, self._folder, self._stop = arguments, counts, folder, stop
        self._need: dict[str, float] = {"CPU": float(arguments.cpus_per_worker)}
        if ray.cluster_resources().get("GPU", 0) >= 1:
            self._need["GPU"] = 1.0
        self._board_name = f"roentgen-{secrets.token_hex(8)}"
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._board = ray.remote(Board).options(name=self._board_name, num_cpus=0, label_selector=here).remote()
        self._restarts = Restarts(arguments.max_restarts)

    def run(self) -> int:
        """Attempts until the ranks have ended for good; the exit code. Raises ConfigError without room."""
        number, restart = 0, None
        while True:
            count = self._place(first=number == 0)
            if count is None:
                return self._stop.code
            if restart is not None:
                restart["workers_after"] = count
            ended = self._attempt(number, count, restart)
            decision = verdict(ended, stop=self._stop.code)
            if decision.code is not None:
                if decision.message:
                    print(f"error: {decision.message}", file=sys.stderr, flush=True)
                return decision.code
            barren = self._restarts.count(ended, counts=decision.is_failure)
            if barren is not None:
                self._write({"event": "gave_up", "restarts": self._restarts.total, "cause": decision.cause})
                print(f"error: {barren}; the last cause: {decision.cause}", file=sys.stderr, flush=True)
                return 1
            print(f"restarting: {decision.cause}", file=sys.stderr, flush=True)
            restart = {
                "event": "restart",
                "cause": decision.cause,
                "workers_before": count,
                "ended_at": ended.at,
                "number": self._restarts.total,
            }
            number += 1

    def _attempt(self, number: int, count: int, restart: Mapping[str, Any] | None) -> Ended:
        """The ranks from their start to their end. A stop that is requested meanwhile is handed to them."""
        self._remote("open", number, dict(restart) if restart else None)
        settings = {
            "board": self._board_name,
            "attempt": number,
            "folder": self._arguments.started_in,
            "arguments": {
                name: getattr(self._arguments, name) for name in ("recipe", "run_dir", "overrides", "allow_changed")
            },
        }
        group = self._group.Group(settings, count, self._need)
        group.start()
        asked, resizing, look_at = 0, False, time.monotonic() + self._arguments.grow_every_s
        while group.is_alive():
            group.join(LOOK_S)
            code = self._stop.code
            if code and not asked:
                asked = code
                if self._remote("state")["start"] is None:
                    # Nothing was trained yet, so nothing is lost; the cluster ends the ranks with this process.
                    return Ended(workers=count, stopped_early=True)
                print("stopping: the ranks save first", file=sys.stderr, flush=True)
                self._remote("ask", code - 128)
            if not asked and not resizing and time.monotonic() >= look_at:
                look_at = time.monotonic() + self._arguments.grow_every_s
                resizing = self._room_to_grow(count) and self._remote("state")["start"] is not None
                if resizing:
                    self._remote("ask", signal.SIGTERM)
        if group.lacks_code:
            raise ConfigError(
                f"--address {self._arguments.address}: its nodes do not have this repository at {ROOT}; send the run "
                "with launchers/submit.py, which takes the code along"
            )
        state = self._remote("state")
        return Ended(
            workers=count,
            start=state["start"],
            ranks=state["ranks"],
            notice=state["notice"],
            resizing=resizing,
            failure=group.cause(),
        )

    # ---- room ----

    def _place(self, *, first: bool) -> int | None:
        """The largest number of workers that the cluster has room for now; None: asked to stop while waiting.

        Raises:
            ConfigError: no room for the fewest within `--wait-s`, or the nodes lack this code.
        """
        started = time.monotonic()
        said = False
        while True:
            self._settle(0.0 if first else SETTLE_S)
            bound = self._bound(self._free())
            for count in self._counts:
                if count <= bound and self._can_place(count, PROBE_S):
                    return count
            least = self._counts[-1]
            text = shortage(self._need, least, self._free(), self._total())
            waited = time.monotonic() - started
            if self._stop.code:
                return None
            if waited >= self._arguments.wait_s:
                raise ConfigError(f"--workers {self._arguments.workers}: no room in {waited:.0f} s; {text}")
            if not said:
                print(f"waiting up to {self._arguments.wait_s:.0f} s: {text}", file=sys.stderr, flush=True)
                said = True
            # Asked for in earnest, so that a cluster that can grow sees what is wanted.
            if self._can_place(least, min(PROBE_S, self._arguments.wait_s - waited)):
                return least

    def _settle(self, limit_s: float) -> None:
        """Wait, for a while, until the most workers that the nodes could hold have room."""
        deadline = time.monotonic() + limit_s
        wanted = next((count for count in self._counts if count <= self._bound(self._total())), 0)
        while time.monotonic() < deadline and self._bound(self._free()) < wanted and not self._stop.code:
            time.sleep(0.2)

    def _room_to_grow(self, count: int) -> bool:
        target = next((larger for larger in self._counts if larger <= count + self._bound(self._free())), count)
        return target > count and self._can_place(target - count, 2.0)

    def _bound(self, resources: Mapping[str, float]) -> int:
        return int(min(resources.get(name, 0.0) // amount for name, amount in self._need.items()))

    def _free(self) -> dict[str, float]:
        free: dict[str, float] = self._ray.available_resources()
        return free

    def _total(self) -> dict[str, float]:
        total: dict[str, float] = self._ray.cluster_resources()
        return total

    def _can_place(self, count: int, timeout_s: float) -> bool:
        """Whether Ray finds places for `count` workers; they are given back at once."""
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([dict(self._need)] * count, strategy="PACK")
        try:
            return bool(group.wait(timeout_s))
        finally:
            remove_placement_group(group)

    # ---- words ----

    def _remote(self, method: str, *values: Any) -> Any:
        return self._ray.get(getattr(self._board, method).remote(*values), timeout=ANSWER_S)

    def _write(self, event: dict[str, Any]) -> None:
        """From here, where no rank lives to write it; what an s3:// run keeps on nodes is out of reach."""
        webhook = None
        with contextlib.suppress(ConfigError):  # its variable may be set on the nodes only
            _, config = pretrain.recipe_of(self._arguments)
            webhook = Webhook(config.alerts, self._arguments.run_dir) if config.alerts.webhook_url else None
        tell = webhook.send if webhook is not None else lambda event: None
        if "://" not in self._arguments.run_dir and self._folder.is_dir():
            Events(self._folder, World(), on_alert=tell).write(event)
        elif event["event"] in ALERTS:
            tell(event)
        if webhook is not None:
            webhook.close()


if __name__ == "__main__":
    sys.exit(main())
