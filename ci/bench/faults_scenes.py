"""What is done to runs, one function a fault: bring it about at a drawn moment, and say what came of it.

Only processes and files that the scene itself made are hurt. `unbroken` is the hash of the weights that the same run
has when nothing happens to it.
"""

from __future__ import annotations

import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from ci.bench.fault_proxy import FaultProxy, Plan
from ci.bench.faults_run import LIMIT_S, Broken, Outcome, family, ranks_of, with_suppressed
from ci.bench.figure import REPOSITORY
from ci.bench.ray_cluster import RayCluster
from ci.bench.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from core.checkpoint_files import defect, steps_in
from shards.errors import RoentgenError

SAVED_WITHIN_S = 25.0
BUCKETS = ("set", "runs")
VICTIMS = {
    "one": "one rank",
    "all": "all ranks",
    "head": "the head, submitted again",
    "node": "a node with its ranks",
}


# ---- kills ----


def kill(run: Broken, who: str, dice: random.Random, *, unbroken: str) -> Outcome:
    """SIGKILL in the middle of a random step; the run must end by itself with the weights of the `unbroken` one.

    `who`: one rank, all ranks, or `head`: the driver with its whole cluster, which is then submitted again.
    """
    with run.running() as process:
        _wait_for_moment(run, dice, process)
        at = time.time()
        ranks = ranks_of(process)
        victims = [dice.choice(ranks)] if who == "one" else ranks if who == "all" else family(process)[1:]
        for victim in victims:
            with_suppressed(lambda victim=victim: victim.send_signal(signal.SIGKILL))  # type: ignore[misc]
        code = int(process.wait(LIMIT_S))
    return _of_kill(run, who, code, at, unbroken)


def kill_node(run: Broken, dice: random.Random, *, unbroken: str) -> Outcome:
    """A Ray cluster of two nodes; the one that holds the ranks goes, as if its machine lost its power."""
    with RayCluster() as cluster:
        nodes = [cluster.add_node(cpus=run.ranks) for _ in range(2)]
        run = replace(run, address=cluster.address, environment=cluster.environment())
        with run.running() as process:
            _wait_for_moment(run, dice, process)
            at = time.time()
            cluster.end_node(next(node for node in nodes if ranks_of(psutil.Process(node.pid))))
            code = int(process.wait(LIMIT_S))
    return _of_kill(run, "node", code, at, unbroken)


def _wait_for_moment(run: Broken, dice: random.Random, process: psutil.Process) -> None:
    run.wait_for_step(dice.randrange(1, run.steps - 1), process)
    time.sleep(dice.random() * 0.2)


def _of_kill(run: Broken, who: str, code: int, at: float, unbroken: str) -> Outcome:
    identical = bool(run.weights()) and run.weights() == unbroken
    return Outcome(
        fault=f"SIGKILL of {VICTIMS[who]}" + (" (Ray)" if run.by == "ray" else ""),
        survived=code == 0,
        identical=identical,
        lost_steps=run.lost_steps(),
        text=f"ended with {code}, weights {'identical' if identical else 'DIFFER'}, {run.lost_steps()} steps again",
        **run.seconds_after(at),  # type: ignore[arg-type]
    )


# ---- ranks that stand, are stopped, or become fewer and more ----


def hang(run: Broken, unbroken: str) -> Outcome:
    """SIGSTOP: nothing ends, nothing moves. The others notice, and are started again with it."""
    limit_s = 8.0
    run = replace(run, overrides=(*run.overrides, f"trainer.hang_after_s={limit_s}"))
    with run.running() as process:
        run.wait_for_step(run.steps // 2, process)
        at = time.time()
        ranks_of(process)[-1].send_signal(signal.SIGSTOP)
        code = int(process.wait(LIMIT_S))
    event, *_ = run.events("hang") or [{"missing": "no event"}]
    same = run.weights() == unbroken
    return Outcome(
        fault=f"a rank that is stopped (limit {limit_s:g} s)",
        survived=code == 0 and same and isinstance(event["missing"], list),
        identical=same,
        lost_steps=run.lost_steps(),
        text=f"ended with {code}, named {event['missing']}",
        **run.seconds_after(at),  # type: ignore[arg-type]
    )


def stop(run: Broken, who: str, unbroken: str) -> Outcome:
    """SIGTERM to `who`; the run is saved, everybody gone, and the same command goes on from there.

    `starter`: restart.py, the Ray driver below it, or the deepspeed runner; `one`: the last rank; `group`: all ranks,
    or of the deepspeed runner its whole process group. The deepspeed runner has a code of its own where it is hit.
    """
    with run.running() as process:
        run.wait_for_step(run.steps // 3, process)
        began, everybody = time.monotonic(), family(process)
        if who == "group" and run.by == "deepspeed":
            targets = everybody
        else:
            targets = [process] if who == "starter" else ranks_of(process)[-1 if who == "one" else 0 :]
        for target in targets:
            with_suppressed(lambda target=target: target.send_signal(signal.SIGTERM))  # type: ignore[misc]
        code = int(process.wait(LIMIT_S))
        _, orphans = psutil.wait_procs(everybody[1:], timeout=SAVED_WITHIN_S)
        seconds = time.monotonic() - began
    saved = [event["step"] for event in run.events("save")]
    own_code = run.by == "deepspeed" and who != "one"
    resumed = run.finish()
    same = run.weights() == unbroken
    right = code != 0 if own_code else code == 143
    name = {"starter": {"deepspeed": "the deepspeed runner", "ray": "the Ray driver"}.get(run.by, run.by)}
    name |= {"one": "one rank", "group": "the group"}
    below = f" ({run.by})" if who != "starter" else ""
    return Outcome(
        fault=f"SIGTERM to {name[who]}{below}",
        survived=right and seconds < SAVED_WITHIN_S and not orphans and resumed == 0 and same and bool(saved),
        identical=same,
        lost_steps=run.lost_steps(),
        text=f"code {code} after {seconds:.1f} s, {len(orphans)} processes left, resumed with {resumed}",
        detected_s=seconds,
    )


def resize(run: Broken, fixed: Broken) -> Outcome:
    """4, 2, 3, 4 workers as nodes of a Ray cluster die and come; the same batches, and the losses of one rank."""
    # Sums in another order differ in their last bits, which training at the recipe's rate would magnify.
    calm = ("optim.schedule=constant", "optim.learning_rate=1e-5")
    seen: list[int] = []
    with RayCluster() as cluster:
        nodes = [cluster.add_node() for _ in range(4)]
        run = replace(
            run, by="ray", workers="2:4", address=cluster.address, environment=cluster.environment(), steps=100_000,
            options=("--grow-every-s", "5"), overrides=calm,
        )  # fmt: skip
        with run.running() as process:

            def trains_on(ranks: int) -> None:
                """Until the last start was on so many ranks and has saved since."""
                deadline = time.monotonic() + LIMIT_S
                while True:
                    said = [event for event in run.events() if event["event"] in ("start", "save")]
                    starts = [event["ranks"] for event in said if event["event"] == "start"]
                    if said and said[-1]["event"] == "save" and starts[-1] == ranks:
                        break
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RoentgenError(f"did not come to {ranks} ranks after {seen}; see {run.folder}.log")
                    time.sleep(0.2)
                seen.append(ranks)

            trains_on(4)
            for node in nodes[:2]:
                cluster.end_node(node)
            trains_on(2)
            for ranks in (3, 4):
                cluster.add_node()
                trains_on(ranks)
            process.send_signal(signal.SIGTERM)
            code = int(process.wait(LIMIT_S))
    last_step = steps_in(run.folder)[-1]
    beside = run.folder.with_name(run.folder.name + "-fixed")
    fixed = replace(fixed, folder=beside, ranks=1, steps=last_step, overrides=calm)
    if fixed.finish() != 0:
        raise RoentgenError("the run on one rank did not end well")
    ours, theirs = run.samples(), fixed.samples()
    same = all(ours[step] == theirs[step] and len(ours[step]) == 1 for step in range(last_step))
    a, b = run.losses(), fixed.losses()
    apart = max(abs(a[step] - b[step]) / abs(b[step]) for step in range(1, last_step + 1))
    return Outcome(
        fault="4, 2, 3, 4 workers (Ray)",
        survived=code == 143 and same and apart <= 1e-4,
        lost_steps=run.lost_steps(),
        text=f"code {code}; batches of {last_step} steps {'the same' if same else 'DIFFER'}, losses {apart:.1e} apart",
    )


# ---- checkpoints, samples and numbers that cannot be used ----


def bad_checkpoint(run: Broken, base: Broken, unbroken: str) -> Outcome:
    """The newest checkpoint ends early, and `latest` names one that never was."""
    shutil.copytree(base.folder, run.folder)
    newest = run.folder / "checkpoints" / f"step-{run.steps}" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (run.folder / "latest").write_text("step-999999\n")
    code = run.finish()
    said = {event["event"] for event in run.events()} & {"checkpoint_passed_over", "latest_points_nowhere"}
    same = run.weights() == unbroken
    return Outcome(
        fault="newest checkpoint cut short, `latest` nowhere",
        survived=code == 0 and same and len(said) == 2,
        identical=same,
        lost_steps=run.save_every,
        text=f"ended with {code}; events {', '.join(sorted(said)) or 'none'}",
    )


def full_disk(run: Broken, base: Broken, unbroken: str) -> Outcome:
    """A limit on the size of files stands for a full disk: no checkpoint fits, smaller files do."""
    shutil.copytree(base.folder, run.folder)
    shutil.rmtree(run.folder / "checkpoints" / f"step-{run.steps}")
    before = run.steps - run.save_every
    (run.folder / "latest").write_text(f"step-{before}\n")
    size = (run.folder / "checkpoints" / f"step-{before}" / "weights.safetensors").stat().st_size
    code = replace(run, file_bytes=size // 2).finish()
    whole = defect(run.folder / "checkpoints" / f"step-{before}") is None
    failed, resumed = len(run.events("save_failed")), run.finish()
    same = run.weights() == unbroken
    return Outcome(
        fault="disk full at every save",
        survived=code == 3 and whole and failed > 0 and resumed == 0 and same,
        identical=same,
        text=f"code {code}, {failed} events, checkpoint before {'whole' if whole else 'DAMAGED'}, then {resumed}",
    )


def poison(run: Broken, *, what: str, part: tuple[float, float], limit: float, code: int) -> Outcome:
    """A part of one shard changed behind the manifest's back: counted below the limit, code 3 above it."""
    clean = Path(run.manifest).parent
    poisoned = run.folder.with_name(run.folder.name + "-set")
    shutil.copytree(clean, poisoned)
    tars = sorted(poisoned.glob("train*.tar"))
    body = bytearray(tars[0].read_bytes())
    for place in range(int(len(body) * part[0]), int(len(body) * part[1]), 512):
        body[place] ^= 0xFF
    tars[0].write_bytes(body)
    run = replace(run, manifest=str(poisoned / "manifest.json"), overrides=(f"data.max_skip_rate={limit}",))
    seen = run.finish()
    skipped = len(run.events("skip"))
    return Outcome(
        fault=f"{what} {'above' if code else 'below'} the limit",
        survived=seen == code and skipped > 0,
        text=f"code {seen}, {skipped} skips counted, one shard of {len(tars)}, limit {limit:g}",
    )


def not_finite(run: Broken) -> Outcome:
    """A rate of learning that no loss survives. It comes again at the same step; the named command shows its batch."""
    run = replace(run, overrides=("optim.learning_rate=1e30", "optim.warmup_steps=0"))
    codes = [run.finish(), run.finish()]
    messages = [event["message"] for event in run.events("error")]
    command = re.search(r"launchers/replay\.py --step \d+ --run-dir .*", messages[0]) if messages else None
    replayed = None
    if command is not None:
        words = [sys.executable, *shlex.split(command[0])]
        replayed = subprocess.run(
            words, cwd=REPOSITORY, env=run.variables(), capture_output=True, check=False
        ).returncode
    again = len(messages) == 2 and len(set(messages)) == 1
    return Outcome(
        fault="loss not finite",
        survived=codes == [4, 4] and again and replayed == 0,
        text=f"codes {codes}, {'the same step' if again else 'ANOTHER step'} both times; "
        + ("no replay command is NAMED" if replayed is None else f"the replay command ends with {replayed}"),
    )


# ---- stores ----


@contextmanager
def _store(run: Broken) -> Iterator[tuple[Broken, FaultProxy, Path]]:
    """The run with its data and its run directory in buckets behind a proxy; the proxy; where the buckets lie."""
    buckets = run.folder.with_name(run.folder.name + "-buckets")
    buckets.mkdir()
    with S3Server("nanio", buckets) as server, FaultProxy(server.endpoint) as proxy:
        for name in BUCKETS:
            server.create_bucket(name)
        for path in Path(run.manifest).parent.iterdir():
            if path.is_file():
                shutil.copy(path, buckets / "set" / path.name)
        yield (
            replace(
                run, manifest="s3://set/manifest.json", run_dir="s3://runs/a",
                environment=server.environment(proxy.endpoint),
                overrides=(*run.overrides, f"checkpoint.local_dir={run.folder}"),
            ),
            proxy,
            buckets,
        )  # fmt: skip


def _nothing_lost(run: Broken, base: Broken, buckets: Path) -> tuple[bool, str]:
    """Whether every step had the samples it has from the folder, none was skipped and the last checkpoint arrived."""
    same, skipped = run.samples() == base.samples(), len(run.events("skip"))
    arrived = (buckets / "runs" / "a" / "latest").read_text().strip() == f"step-{run.steps}"
    return same and not skipped and arrived, (
        f"samples of all steps {'the same' if same else 'DIFFER'}, {skipped} skipped, "
        f"last checkpoint {'in the store' if arrived else 'NOT in the store'}"
    )


def bad_store(run: Broken, base: Broken, plan: Plan, fault: str) -> Outcome:
    """Requests fail as `plan` says from the first to the last; every step's samples must be those of the folder."""
    with _store(run) as (run, proxy, buckets):
        proxy.plan(plan)
        code = run.finish()
        faults = sum(proxy.report()["faults"].values())
        whole, text = _nothing_lost(run, base, buckets)
    return Outcome(
        fault=fault,
        survived=code == 0 and faults > 0 and whole,
        text=f"code {code}, {faults} requests failed, {text}",
    )


def renewed_credentials(run: Broken, base: Broken) -> Outcome:
    """The session token ends in the middle of the run, after its file was given another, as roles' agents do."""
    file = run.folder.with_name(run.folder.name + "-credentials")

    def renew(token: str) -> None:
        rows = (f"aws_access_key_id={ACCESS_KEY}", f"aws_secret_access_key={SECRET_KEY}", f"aws_session_token={token}")
        file.write_text("\n".join(["[default]", *rows, ""]))

    renew("first")
    with _store(run) as (run, proxy, buckets):
        from_file = {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
        run = replace(
            run, environment={**run.environment, **from_file}, without=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        )
        with run.running(restarts=0) as process:
            run.wait_for_step(run.steps // 8, process)
            renew("second")
            proxy.plan(Plan(expired_token="first"))
            code = int(process.wait(LIMIT_S))
        refused = proxy.report()["faults"].get("expired", 0)
        whole, text = _nothing_lost(run, base, buckets)
    return Outcome(
        fault="S3: credentials end and are renewed",
        survived=code == 0 and refused > 0 and whole,
        text=f"code {code}, {refused} requests refused, {text}",
    )


def outage(run: Broken, base: Broken, seconds: float, *, limit_s: float) -> Outcome:
    """The store is away in the middle of the run for `seconds`; the run waits for its data up to `limit_s`.

    Where it is away for longer, it must stop with code 3; started again when the store is back, it comes to its end.
    """
    run = replace(run, overrides=(*run.overrides, f"data.store.retry_limit_s={limit_s}"))
    within = seconds < limit_s
    with _store(run) as (run, proxy, buckets):
        with run.running(restarts=0) as process:  # it waits, or stops: nobody starts it again
            run.wait_for_step(run.steps // 8, process)
            proxy.plan(Plan(outage=True))
            if within:
                time.sleep(seconds)
                failed = sum(proxy.report()["faults"].values())
                proxy.plan(Plan())
                waited = process.poll() is None
                code = int(process.wait(LIMIT_S))
            else:
                waited, code = True, int(process.wait(LIMIT_S))
                failed = sum(proxy.report()["faults"].values())
                proxy.plan(Plan())
        resumed = code if within else run.finish()
        whole, text = _nothing_lost(run, base, buckets)
    good = code == (0 if within else 3) and resumed == 0 and whole and waited
    return Outcome(
        fault=f"S3: away for {seconds:g} s" if within else f"S3: away for longer than the limit of {limit_s:g} s",
        survived=good and failed > 0,
        lost_steps=run.lost_steps(),
        text=f"code {code}, then {resumed}; {failed} requests failed, {text}",
    )


# ---- over a long time ----


def long_run(run: Broken, seconds: float, every_s: float, dice: random.Random) -> Broken:
    """A run of `seconds`, a rank killed every `every_s` on average, then stopped."""
    with run.running(restarts=1000) as process:
        run.wait_for_step(1, process)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, dice.expovariate(1 / every_s)))
            if time.monotonic() < until and (ranks := ranks_of(process)):
                victim = dice.choice(ranks)
                with_suppressed(lambda victim=victim: victim.send_signal(signal.SIGKILL))  # type: ignore[misc]
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
    return run


def step_seconds(base: Broken, root: Path, ways: Sequence[str], turns: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step by who starts the ranks, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        for way in ways:
            run = replace(base, folder=root / f"step-{turn}-{way}", by=way, steps=steps, save_every=steps)
            if run.finish() != 0:
                raise RoentgenError(f"a run of {steps} steps by {way} did not end well; see {run.folder}.log")
            seconds[way].append(run.step_s())
    return seconds
