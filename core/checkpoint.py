"""What survives a restart: checkpoints written whole or not at all, found again newest first, mirrored to a store.

A run directory is laid out as in the README:

    config.json  latest  best  events.jsonl  tb/  eval/
    checkpoints/step-N/    engine/ (DeepSpeed's, one part a rank)  weights.safetensors  state.json  SHA256SUMS

The order of resuming: latest of the run directory, the recipe's checkpoint, initial weights, scratch. Only checkpoints
of this run directory are loaded with their optimizer: DeepSpeed pickles them, so their checksums are compared first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import save_file

from core.checkpoint_files import (
    BEST,
    ENGINE,
    EVALUATED,
    LATEST,
    STATE,
    SUMS,
    WEIGHTS,
    checksums,
    defect,
    steps_in,
    sync_folder,
    write_atomically,
)
from core.collectives import any_rank, broadcast_json, raise_together, sum_over_ranks
from core.engine import Engine, to_universal
from core.first_weights import InitConfig, load_checkpoint_weights, load_towers
from core.mirror import Mirror
from core.settings import differences
from core.tasks import Task
from core.world import World
from shards.errors import ConfigError, DataError, RoentgenError, StoreFullError, StoreUnreachableError
from shards.store import open_store

log = logging.getLogger(__name__)

Event = dict[str, Any]
ROOM_FACTOR = 3  # copies of the state that conversion to another number of ranks may need
ABANDON_LIMIT_S = 300.0  # for uploads under way when a run ends with an error
MOST_FAILED_SAVES = 3  # in a row; then the run stops rather than compute what it cannot keep


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that must survive a restart besides the engine.

    `evaluation_due`: saved before the evaluation of this step; unless `mark_evaluated` came, the next start begins with
    it.
    """

    step: int
    samples_seen: int
    seed: int
    recipe_hash: str
    evaluation_due: bool = False

    def advance(self, *, samples: int) -> TrainState:
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`keep_last` newest checkpoints stay, and every one whose step is a multiple of `keep_every`, and the best.

    `local_dir`: where an s3:// run writes before it mirrors; None: a folder of the user's cache. Such a run stops with
    code 3 when for `mirror_limit_s` no checkpoint has reached its store: a store that is away for less costs nothing.
    """

    keep_last: int = 2
    keep_every: int | None = None
    local_dir: str | None = None
    mirror_limit_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last={self.keep_last} must be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ConfigError(f"checkpoint.keep_every={self.keep_every} must be at least 1; None keeps no extra ones")
        if not self.mirror_limit_s > 0:
            raise ConfigError(f"checkpoint.mirror_limit_s={self.mirror_limit_s} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the first weights come from. `folder` is a whole checkpoint of this run, or None."""

    folder: str | None = None
    state: TrainState | None = None
    universal: bool = False
    description: str = "scratch"


# ---- the run's checkpoints ----


class Checkpoints:
    """The checkpoints of one run directory. All ranks make the same calls.

    `recipe` is everything that decides what is learned, as JSON; a checkpoint of another recipe is refused, except for
    the dotted keys in `allow_changed`. `on_event` receives what happened, for `events.jsonl`.
    """

    def __init__(
        self,
        run_dir: str,
        config: CheckpointConfig,
        world: World,
        *,
        recipe: Mapping[str, Any],
        seed: int,
        init: InitConfig | None = None,
        allow_changed: Sequence[str] = (),
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.config, self.world, self._recipe, self._seed = config, world, dict(recipe), seed
        self._init = init or InitConfig()
        self._allow_changed = tuple(allow_changed)
        self._on_event = on_event
        self._failed_saves = 0
        self._durable_at = time.monotonic()
        self.recipe_hash = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        self._mirror: Mirror | None = None
        self.folder = local_folder(run_dir, config)
        # A folder is shared by all ranks; what lies behind s3:// is written node by node.
        self._shared = not run_dir.startswith("s3://")
        self._leads_node = world.is_first if self._shared else world.local_rank == 0
        self._nodes = nodes = int(sum_over_ranks(torch.tensor(int(self._leads_node), device=world.device)))
        problem: RoentgenError | None = None
        if self._leads_node:
            try:
                (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                if not self._shared:
                    self._mirror = Mirror(open_store(run_dir), self.folder, world, nodes, on_event, self._settled)
            except OSError as error:
                problem = ConfigError(f"{self.folder}: cannot be written ({error.strerror}); choose another --run-dir")
            except RoentgenError as error:
                problem = error
        stand_in = ConfigError(f"{run_dir}: another rank cannot use the run directory")
        raise_together(problem, stand_in, device=world.device)
        if nodes > 1:
            self._refuse_folder_of_two_nodes()

    def _refuse_folder_of_two_nodes(self) -> None:
        """What an s3:// run writes before it mirrors must lie on each node's own disk: the parts would mix."""
        token = broadcast_json(os.urandom(8).hex() if self.world.is_first else None, self.world.device)
        mark = self.folder / f".seen-{token}"
        if self.world.is_first:
            mark.touch()
        self._barrier()
        seen = any_rank(self._leads_node and not self.world.is_first and mark.exists(), self.world.device)
        if self.world.is_first:
            mark.unlink()
        if seen:
            raise ConfigError(
                f"{self.folder}: several nodes share this folder; give each its own disk with --set "
                "checkpoint.local_dir=FOLDER"
            )

    # ---- resuming ----

    def prepare(self, task: Task) -> Source:
        """Find the newest whole checkpoint, or load the first weights into `task`. Before the engine is built.

        Raises:
            ConfigError: the checkpoint is of another recipe, or needs more room to be converted than there is.
        """
        if self._leads_node:
            for leftover in (self.folder / "checkpoints").glob("*.tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        found = self._ask_first(self._find)
        if found is not None:
            state = TrainState(**found["state"])
            universal = found["world_size"] != self.world.world_size and found["zero_stage"] > 0
            folder = self.folder / "checkpoints" / found["name"]
            self._fetch_on_other_nodes(found["name"])
            if universal:
                folder = self._convert(folder, found["bytes"])
            description = f"step {state.step} of {self.folder}"
            return Source(folder=str(folder), state=state, universal=universal, description=description)
        if self._init.checkpoint:
            return Source(description=load_checkpoint_weights(task, self._init.checkpoint))
        description = load_towers(task, self._init)
        return Source(description=description or "scratch")

    def resume(self, engine: Engine, source: Source) -> TrainState:
        """The state to go on from; the engine holds its weights and optimizer afterwards."""
        self._forget_evaluation_after(source.state.step if source.state is not None else 0)
        if source.folder is None or source.state is None:
            return TrainState(step=0, samples_seen=0, seed=self._seed, recipe_hash=self.recipe_hash)
        engine.load(Path(source.folder) / ENGINE)
        if source.universal:
            self._barrier()
            if self._leads_node:
                shutil.rmtree(source.folder, ignore_errors=True)
        self._durable_at = time.monotonic()
        return replace(source.state, recipe_hash=self.recipe_hash)

    def _ask_first(self, question: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Rank 0's answer, or its error, on all ranks."""
        answer: dict[str, Any] = {}
        if self.world.is_first:
            try:
                answer = {"found": question()}
            except RoentgenError as error:
                answer = {"error": str(error), "of_config": isinstance(error, ConfigError)}
            except OSError as error:  # said by all ranks, or the others would wait for an answer
                said = f"{self.folder}: cannot be read or fetched ({error}); mend its rights, or make room"
                answer = {"error": said, "of_config": True}
        answer = broadcast_json(answer, self.world.device)
        if "error" in answer:
            raise (ConfigError if answer["of_config"] else DataError)(answer["error"])
        found: dict[str, Any] | None = answer["found"]
        return found

    def _find(self) -> dict[str, Any] | None:
        """Newest whole checkpoint of this run: name, state and size. Rank 0 decides for all."""
        names = {f"step-{step}" for step in steps_in(self.folder)}
        pointer = self.folder / LATEST
        first = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        remote: set[str] = set()
        there = ""
        if self._mirror is not None:
            remote, there = self._mirror.names(), self._mirror.latest()
            # Of several nodes' checkpoints each holds a part: they are whole in the store only.
            names = remote if self._nodes > 1 else names | remote
            # Otherwise another node, or a person, has moved the store's pointer since: that counts.
            if self._nodes > 1 or not self._mirror.follows(there):
                first = there or first
        if first and first not in names:
            known = ", ".join(sorted(names)) or "none"
            self._on_event({"event": "latest_points_nowhere", "checkpoint": first[:100], "at_hand": known})
            log.warning("%s: points to %r, which is not there; at hand: %s", pointer, first[:100], known)
        order = sorted(names, key=lambda name: (name == first, int(name.removeprefix("step-"))), reverse=True)
        for name in order:
            folder = self.folder / "checkpoints" / name
            problem = self._bring(name)
            if problem is not None:
                self._on_event({"event": "checkpoint_passed_over", "checkpoint": name, "cause": problem})
                log.warning("%s: %s; taking the one before", folder, problem)
                continue
            try:
                kept = json.loads((folder / STATE).read_text())
                state = TrainState(**kept["state"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{folder / STATE}: not written by this version ({error})") from None
            self._refuse_other_recipe(folder, kept["recipe"])
            if self._mirror is not None:
                self._mirror.follow(there, here=name)
                if name not in remote:  # saved here while the store was away, or just before a kill
                    self._mirror.push(name)
            return {
                "name": name,
                "state": asdict(state),
                "world_size": kept["world_size"],
                "zero_stage": kept["zero_stage"],
                "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            }
        return None

    def _bring(self, name: str) -> str | None:
        """What is wrong with a checkpoint, or None: whole here, or after fetching it from the run's store."""
        folder = self.folder / "checkpoints" / name
        problem = defect(folder)
        if problem is not None and self._mirror is not None:
            self._mirror.fetch(name)
            problem = defect(folder)
        return problem

    def _fetch_on_other_nodes(self, name: str) -> None:
        """Every node leader has the checkpoint that rank 0 chose, whole, before anything of it is read."""
        cause = None
        if self._leads_node and not self.world.is_first:
            try:
                cause = self._bring(name)
            except RoentgenError as error:
                cause = str(error)
        problem = None if cause is None else DataError(f"{self.folder}: {name}: {cause}")
        stand_in = DataError(f"{self.folder}: {name}: could not be brought whole to another node")
        raise_together(problem, stand_in, device=self.world.device)

    def _refuse_other_recipe(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        changed = differences(recipe, self._recipe)
        refused = {
            key: values
            for key, values in changed.items()
            if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in self._allow_changed)
        }
        if refused:
            listed = ", ".join(f"{key} was {then!r}, is {now!r}" for key, (then, now) in list(refused.items())[:5])
            more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
            raise ConfigError(
                f"{folder}: checkpoint of another recipe ({listed}{more}); choose another --run-dir, or accept with "
                f"--allow-changed {' '.join(sorted(refused)[:5])}"
            )
        for key, (then, now) in changed.items():
            self._on_event({"event": "recipe_changed", "key": key, "was": then, "is": now})

    def _convert(self, folder: Path, size_bytes: int) -> Path:
        """The checkpoint for this number of ranks, converted once per node, in a folder that `resume` removes."""
        target = folder.with_name(f"{folder.name}.tmp-universal")
        problem: RoentgenError | None = None
        if self._leads_node:
            free = shutil.disk_usage(folder).free
            if free < ROOM_FACTOR * size_bytes:
                problem = ConfigError(
                    f"{folder}: to resume on {self.world.world_size} ranks it must be converted, which may take "
                    f"{ROOM_FACTOR * size_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
                )
            else:
                shutil.rmtree(target, ignore_errors=True)
                to_universal(folder / ENGINE, target / ENGINE)
        stand_in = ConfigError(f"{folder}: another node has no room to convert it")
        raise_together(problem, stand_in, device=self.world.device)
        return target

    # ---- saving ----

    def save(self, engine: Engine, state: TrainState, *, final: bool = False) -> bool:
        """Write, verify and publish a checkpoint; returns whether it exists now. The previous one stays until then.

        Raises:
            StoreFullError: the disk was full several times in a row, or at the last save of the run.
        """
        started = time.monotonic()
        name = f"step-{state.step}"
        root = self.folder / "checkpoints"
        temporary = root / f"{name}.tmp"
        failures: list[OSError] = []

        def attempt(action: Callable[[], None]) -> bool:
            try:
                if not failures:
                    action()
            except (OSError, SafetensorError, RoentgenError) as error:
                failures.append(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
            return not any_rank(bool(failures), self.world.device)

        def begin() -> None:
            if self._leads_node:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / ENGINE).mkdir(parents=True)

        def publish() -> None:
            if self._leads_node:
                target = root / name
                if target.exists():  # left by a run that was rolled back to an older `latest`
                    shutil.rmtree(target)
                os.rename(temporary, target)
                sync_folder(root)
                write_atomically(self.folder / LATEST, f"{name}\n".encode())

        whole = attempt(begin)
        if whole:
            failures += engine.save(temporary / ENGINE)
            weights = engine.full_weights()
            whole = attempt(lambda: self._write_rank0(temporary, state, engine, weights))
        if whole:
            whole = self._write_sums(temporary, attempt)
        if whole:
            whole = attempt(publish)
        if not whole:
            return self._save_failed(temporary, failures, state, final)
        self._failed_saves = 0
        if self._mirror is None:
            self._settled()
        else:
            self._mirror.push(name)
        if self.world.is_first:
            seconds = round(time.monotonic() - started, 3)
            self._on_event({"event": "save", "step": state.step, "checkpoint": name, "seconds": seconds})
        self._prune()
        if not self._shared:
            self._stop_far_behind()
        return True

    def _stop_far_behind(self) -> None:
        """A run whose store has been silent for long stops while its disk, the only copy, still lives. Collective."""
        behind_s = self._mirror.behind_s if self._mirror is not None else 0.0
        limit_s = self.config.mirror_limit_s
        problem = None
        if behind_s > limit_s:
            problem = StoreUnreachableError(
                f"no checkpoint has reached the run's store for {behind_s:.0f} s, checkpoint.mirror_limit_s allows "
                f"{limit_s:g}; mend the store and start again on this node: {self.folder} holds step {self._newest()}"
            )
        stand_in = StoreUnreachableError("no checkpoint of another node has reached the run's store for too long")
        raise_together(problem, stand_in, device=self.world.device)

    def _newest(self) -> int:
        return max(steps_in(self.folder), default=0)

    def _write_rank0(self, folder: Path, state: TrainState, engine: Engine, weights: dict[str, torch.Tensor]) -> None:
        if not self.world.is_first:
            return
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        content = {
            "format": 1,
            "state": asdict(state),
            "world_size": self.world.world_size,
            "zero_stage": engine.config.zero_stage,
            "recipe": self._recipe,
        }
        (folder / STATE).write_text(json.dumps(content, indent=1))

    def _write_sums(self, folder: Path, attempt: Callable[[Callable[[], None]], bool]) -> bool:
        """One list of all files, whichever node holds them; also on nodes that hold only some."""
        lines = ""

        def compute() -> None:
            nonlocal lines
            if self._leads_node:
                lines = checksums(folder)

        if not attempt(compute):
            return False
        if not self._shared and self.world.world_size > 1:
            lines = "".join(sorted(set(self._gather_text(lines).splitlines(keepends=True))))

        def write() -> None:
            if self._leads_node:
                with open(folder / SUMS, "w") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(folder)

        return attempt(write)

    def _gather_text(self, text: str) -> str:
        parts = []
        for rank in range(self.world.world_size):
            mine = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(self.world.device)
            size = torch.tensor([len(mine)], device=self.world.device)
            torch.distributed.broadcast(size, rank)
            buffer = mine if rank == self.world.rank else torch.empty(int(size), dtype=torch.uint8, device=mine.device)
            torch.distributed.broadcast(buffer, rank)
            parts.append(bytes(buffer.cpu().tolist()).decode().strip(" "))
        return "".join(parts)

    def _save_failed(self, temporary: Path, failures: list[OSError], state: TrainState, final: bool) -> bool:
        self._barrier()  # nobody writes any more
        if self._leads_node:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = (failures[0].strerror or str(failures[0])) if failures else "another rank could not write"
        self._failed_saves += 1
        if failures or self.world.is_first:
            self._on_event({"event": "save_failed", "step": state.step, "cause": cause})
        message = f"{self.folder}: step {state.step} could not be saved ({cause})"
        if final or self._failed_saves >= MOST_FAILED_SAVES:
            times = f", {self._failed_saves} times in a row" if self._failed_saves > 1 else ""
            raise StoreFullError(f"{message}{times}; make room and start again: earlier checkpoints are whole")
        log.warning("%s; going on, the checkpoint before it is whole", message)
        return False

    def mark_best(self, state: TrainState, metric: str, value: float) -> None:
        """Point `best` at the checkpoint of this step."""
        self._mark(BEST, {"checkpoint": f"step-{state.step}", "step": state.step, "metric": metric, "value": value})

    def best(self) -> dict[str, Any] | None:
        """What `mark_best` wrote last, also before a restart. Collective: all ranks see what rank 0 does."""
        return self._ask_first(lambda: self._marked(BEST))

    def mark_evaluated(self, state: TrainState) -> None:
        """The evaluation that the checkpoint of this step calls due is done."""
        self._mark(EVALUATED, {"step": state.step})

    def is_evaluated(self, state: TrainState) -> bool:
        """Whether `mark_evaluated` was last called for this step, also before a restart. Collective."""
        return (self._ask_first(lambda: self._marked(EVALUATED)) or {}).get("step") == state.step

    def _forget_evaluation_after(self, step: int) -> None:
        """A run that goes back to `step` evaluates what it trains from there anew. Collective."""
        evaluated = (self._ask_first(lambda: self._marked(EVALUATED)) or {}).get("step")
        if evaluated is not None and evaluated > step:
            self._mark(EVALUATED, {"step": None})

    def _mark(self, name: str, content: dict[str, Any]) -> None:
        if self.world.is_first:
            write_atomically(self.folder / name, json.dumps(content).encode() + b"\n")
            if self._mirror is not None:
                self._mirror.push_file(name)

    def _marked(self, name: str) -> dict[str, Any] | None:
        if self._mirror is not None and not (self.folder / name).is_file():
            self._mirror.fetch_file(name)
        return self._marked_here(name)

    def _marked_here(self, name: str) -> dict[str, Any] | None:
        try:
            content = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    @property
    def lag_s(self) -> float:
        """Seconds of work that a kill would cost now: since the newest checkpoint that is where it shall survive."""
        return time.monotonic() - self._durable_at

    def close(self) -> None:
        """Wait until everything is mirrored. Collective.

        Raises:
            StoreUnreachableError: the newest checkpoint did not reach the store.
        """
        problem = None
        if self._mirror is not None and not self._mirror.close():
            problem = StoreUnreachableError(
                f"step {self._newest()} did not reach the run's store; mend the store and start again on this node: "
                f"{self.folder} holds it"
            )
        stand_in = StoreUnreachableError("a checkpoint of another node did not reach the run's store")
        raise_together(problem, stand_in, device=self.world.device)

    def abandon(self) -> None:
        """After an error of this rank alone or of all: let what is on its way arrive, for a while, with no barrier."""
        if self._mirror is not None:
            self._mirror.close(limit_s=ABANDON_LIMIT_S)

    def _settled(self) -> None:
        self._durable_at = time.monotonic()

    def _prune(self) -> None:
        if not self._leads_node:
            return
        steps = set(steps_in(self.folder))
        for step in sorted(steps - self._kept(steps)):
            name = f"step-{step}"
            if self._mirror is not None and self._mirror.is_busy(name):
                continue  # still on its way; the next save comes back to it
            # The name goes first: a kill in between leaves no half checkpoint under a good name.
            doomed = self.folder / "checkpoints" / f"{name}.tmp-old"
            os.rename(self.folder / "checkpoints" / name, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        if self._mirror is not None and self.world.is_first:
            self._mirror.prune(self._kept)

    def _kept(self, steps: set[int]) -> set[int]:
        """Those of `steps` that stay."""
        kept = set(sorted(steps)[-self.config.keep_last :])
        if self.config.keep_every:
            kept |= {step for step in steps if step % self.config.keep_every == 0}
        best = self._marked_here(BEST)
        if best is not None:
            kept.add(int(best["step"]))
        # After going back to an older `latest`, newer steps of the abandoned branch may still lie here.
        kept.add(int((self.folder / LATEST).read_text().strip().removeprefix("step-")))
        return kept

    def _barrier(self) -> None:
        if self.world.world_size > 1:
            torch.distributed.barrier()


def local_folder(run_dir: str, config: CheckpointConfig) -> Path:
    """The run directory itself, or the folder where an s3:// run writes before it mirrors."""
    if not run_dir.startswith("s3://"):
        return Path(run_dir.removeprefix("file://")).absolute()
    if config.local_dir is not None:
        return Path(config.local_dir).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    return cache / "roentgen" / "runs" / hashlib.sha256(run_dir.rstrip("/").encode()).hexdigest()[:16]
