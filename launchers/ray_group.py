"""One attempt at a run: a group of workers that Ray Train places and watches, each of them a rank of pretrain.py.

`TorchTrainer` does the placing, the ranks' addresses and the watching. Its elastic `ScalingConfig` and `FailureConfig`
are not used, the driver restarts instead, since they take any number of workers (ours must divide the lanes), end a
healthy group without letting it save, and start again after any error, also one that would come again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launchers.elastic import FINAL, OUTDATED, describe

ANSWER_S = 120.0  # of the board
ASK_S = 1.0  # between two questions of a rank to the board
NODE_LEAVES_S = 2.0  # between two questions to Ray whether a node is about to leave
PLACE_TIMEOUT_S = 60  # for workers of which the driver knows that they have room

_sigterm = threading.Event()  # came to this worker


def _listen_for_sigterm() -> None:
    """On the main thread of a worker, where alone signals are heard; the rank runs in another."""
    signal.signal(signal.SIGTERM, lambda number, frame: _sigterm.set())


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Torch's process group, and workers that save when they are terminated."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_listen_for_sigterm)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: ranks leave their process group themselves, or hang in it and are about to be killed."""


class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        return _Backend


class RankEndedError(Exception):
    """One rank's own trouble: raised in its worker so that Ray ends the group, which would wait for it."""


class Group(threading.Thread):
    """The group of `workers` with resources `need` each, from `start` until every rank has ended. Restarts nothing."""

    def __init__(self, settings: Mapping[str, Any], workers: int, need: Mapping[str, float]) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._settings, self._workers, self._need = dict(settings), workers, dict(need)
        self._error: BaseException | None = None

    def run(self) -> None:
        # Ray Train wants a place for checkpoints; ours go to the run directory.
        unused = tempfile.mkdtemp(prefix="roentgen-ray-")
        on_gpu = "GPU" in self._need
        try:
            TorchTrainer(
                train_rank,
                train_loop_config=self._settings,
                torch_config=_Torch(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self._workers,
                    use_gpu=on_gpu,
                    resources_per_worker=self._need,
                    placement_strategy="PACK",
                ),
                # Type checkers are shown the classes of Ray Train's first version.
                run_config=RunConfig(  # type: ignore[call-arg]
                    name=f"attempt-{self._settings['attempt']}",
                    storage_path=unused,
                    failure_config=FailureConfig(  # type: ignore[call-arg]
                        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                    ),
                    logging_config=LoggingConfig(log_level="CRITICAL"),
                ),
            ).fit()
        except BaseException as error:
            self._error = error
        finally:
            shutil.rmtree(unused, ignore_errors=True)

    @property
    def lacks_code(self) -> bool:
        """Whether the workers' nodes do not have this repository where they look for it."""
        return "No module named 'launchers" in str(self._error)

    def cause(self) -> str | None:
        """Why the group ended, in a line without any text of an exception; None: every rank came to its end."""
        if self._error is None:
            return None
        failures: dict[int, BaseException] = getattr(self._error, "worker_failures", {})
        if failures:
            return describe([(rank, _kind(error)) for rank, error in failures.items()])
        inner = getattr(self._error, "controller_failure", self._error)
        return f"the group could not be started or watched: {type(inner).__name__}"


def _kind(error: BaseException) -> str:
    """`died`, or the class of what a rank raised. Ray wraps both; the names of its wrappers are its own affair."""
    if isinstance(getattr(error, "health_check_failure", error), RayActorError):
        return "died"
    return type(getattr(error, "_base_exc", error)).__name__


# ---- inside a worker ----


def train_rank(settings: dict[str, Any]) -> None:
    """This worker's rank. Returns where all ranks end alike, on request or with an error that all agree on.

    Raises:
        RankEndedError: this rank alone has ended; the group cannot go on.
    """
    rank = ray.train.get_context().get_world_rank()
    board, attempt = ray.get_actor(settings["board"]), settings["attempt"]

    def end(code: int, message: str, agreed: bool) -> None:
        ray.get(board.ended.remote(attempt, rank, code, message, agreed), timeout=ANSWER_S)

    with contextlib.suppress(OSError):  # where the driver's folder is not on this node, relative paths name nothing
        os.chdir(settings["folder"])
    try:
        from core.trainer import StopRequest
        from launchers import pretrain
    except ImportError as error:
        end(2, f"worker on {socket.gethostname()}: {error}; its Python lacks what the driver's has", False)
        raise RankEndedError(f"rank {rank}: {error}") from None
    stop = StopRequest()
    over = threading.Event()
    for watch in (_heed_board, _heed_nodes):
        threading.Thread(target=watch, args=(board, attempt, stop, over), name=watch.__name__, daemon=True).start()

    def on_start(step: int) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = ray.get(board.started.remote(attempt, step), timeout=ANSWER_S)
        return events

    try:
        ending = pretrain.run_rank(Namespace(**settings["arguments"]), stop, on_start=on_start)
    finally:
        over.set()
    where = f"worker on {socket.gethostname()}: " if ending.code == FINAL[0] and not ending.agreed else ""
    end(ending.code, where + ending.message, ending.agreed)
    if ending.code and not ending.agreed:
        raise RankEndedError(f"rank {rank} ended with code {ending.code}")


def _heed_board(board: Any, attempt: int, stop: Any, over: threading.Event) -> None:
    """Stop when the driver asks for it, or when this worker was terminated."""
    while not over.wait(ASK_S):
        if _sigterm.is_set():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(board.noticed.remote(attempt), timeout=10)
            stop.request(signal.SIGTERM)
        try:
            asked = ray.get(board.asked.remote(attempt), timeout=30)
        except ray.exceptions.RayError:
            continue  # a busy or lost head; Ray ends workers whose driver is gone
        if asked == OUTDATED:
            os._exit(1)
        if asked:
            stop.request(asked)


def _heed_nodes(board: Any, attempt: int, stop: Any, over: threading.Event) -> None:
    """Stop when Ray says that a node of the group is about to leave. The question is collective."""
    while not over.wait(NODE_LEAVES_S):
        try:
            leaving = ray.train.get_preemption_info()
        except Exception:
            return  # the group is ending
        if leaving is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(board.noticed.remote(attempt), timeout=10)
            stop.request(signal.SIGTERM)
            return
