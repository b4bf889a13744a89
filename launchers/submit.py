"""Send a run to a Ray cluster as a job, and look after it: status, logs, stop, list.

    python launchers/submit.py --address http://head:8265 --workers 16 --recipe ct:fvlm_b --run-dir s3://bucket/runs/a
    python launchers/submit.py logs JOB --follow          ends with the job's exit code
    python launchers/submit.py status JOB                 stop JOB and list likewise

What ray_pretrain.py takes may stand beside these options. The code of this checkout is sent along, no data and no run.
Only a cluster that asks for a token is given work; the token is read from RAY_AUTH_TOKEN, the file that
RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token, and goes nowhere but into the header of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from shards.errors import ConfigError, RoentgenError

ROOT = Path(__file__).resolve().parents[1]
CODE = ("configs", "core", "kernels", "launchers", "shards")  # what a run imports
LOCK = ROOT / "ci" / "requirements.lock"
ACTIONS = ("submit", "status", "logs", "stop", "list")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ANSWER_S = 20.0
STOP_WAIT_S = 120  # Ray kills a job so long after it was asked to stop; saving must be faster
STOPPED, INTERRUPTED = 143, 130

# Opens a client of the cluster at an address with a token; tests put another in its place.
Connect = Callable[[str, str], Any]


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know belongs to ray_pretrain.py."""
    result = argparse.ArgumentParser(
        prog="submit.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="`submit`, which may be left out, also takes the options of ray_pretrain.py, except its --address",
        allow_abbrev=False,
    )
    actions = result.add_subparsers(dest="action", required=True)
    for action in ACTIONS:
        actions.add_parser(action, parents=[options_of(action)], allow_abbrev=False)
    return result


def options_of(action: str) -> argparse.ArgumentParser:
    """What one of `ACTIONS` takes."""
    result = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    result.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
        metavar="http://HEAD:8265",
        help="the dashboard of the cluster's head",
    )
    if action in ("status", "logs", "stop"):
        result.add_argument("job", help="as `submit` and `list` print it")
    if action in ("submit", "logs"):
        result.add_argument("--follow", action="store_true", help="show the logs to the end, and end as the job does")
    if action == "submit":
        result.add_argument(
            "--environment",
            choices=("installed", "lock"),
            default="installed",
            help="packages of the job: those that the cluster has, or, by pip, those of ci/requirements.lock",
        )
    return result


def main(argv: Sequence[str] | None = None, *, connect: Connect | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in (*ACTIONS, "-h", "--help"):
        words.insert(0, "submit")
    arguments, of_run = parser().parse_known_args(words)
    if of_run and arguments.action != "submit":
        parser().error(f"{arguments.action} does not take {' '.join(of_run)}")
    try:
        if arguments.action == "submit":
            check_run(of_run)
        token = find_token()
        check_head(arguments.address, token)
        client = (connect or _connect)(arguments.address, token)
        if arguments.action == "submit":
            return _submit(client, arguments, of_run)
        if arguments.action == "list":
            return _list(client)
        return {"status": _status, "logs": _logs, "stop": _stop}[arguments.action](client, arguments)
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


# ---- before anything is sent ----


def check_run(of_run: Sequence[str]) -> None:
    """What would fail on every cluster fails here. Raises ConfigError."""
    from launchers import elastic, pretrain, ray_pretrain

    for word in of_run:
        for url in re.findall(r"[a-z0-9]+://[^\s\"',\]]+", word):
            if "@" in urllib.parse.urlsplit(url).netloc:
                raise ConfigError(
                    f"credentials in {url.split('://')[0]}://... would be kept in the job's record; give them to the "
                    "cluster's nodes by ~/.aws, instance roles or their environment"
                )
    arguments = ray_pretrain.parser().parse_args(list(of_run))
    _, config = pretrain.recipe_of(arguments)
    if (config.alerts.webhook_url or "").startswith("http"):
        raise ConfigError(
            "alerts.webhook_url would be kept in the job's record; write env:NAME and set that variable on the nodes"
        )
    if arguments.print:
        raise ConfigError("--print starts nothing; run ray_pretrain.py --print here")
    if arguments.run_dir is None:
        raise ConfigError("--run-dir is missing; name s3://bucket/prefix, or a folder that all nodes share")
    elastic.fitting(elastic.Workers.parse(arguments.workers), config.data.lanes)
    train = config.data.train
    manifests = [train] if isinstance(train, str) else [part.manifest for part in train]
    for name, path in (
        ("--run-dir", arguments.run_dir),
        *(("data.train", each) for each in manifests),
        ("data.validation", config.data.validation or ""),
    ):
        if path and "://" not in path and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} {path}: a job works in a temporary folder; name s3://bucket/prefix, or the whole path of a "
                "folder that all nodes share"
            )


def find_token() -> str:
    """The token that requests carry. Raises ConfigError where there is none."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not token and (named or path.is_file()):
        try:
            token = path.read_text(errors="replace").strip()
        except OSError as error:
            raise ConfigError(f"{path}: the token cannot be read ({error.strerror})") from None
    if not token:
        raise ConfigError(
            "no token: copy the head's (there: `ray get-auth-token`) to a file of mode 0600 and name it in "
            "RAY_AUTH_TOKEN_PATH; nothing is sent without one"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            "the token is not one word of plain characters; copy the head's (there: `ray get-auth-token`)"
        )
    return token


def check_head(address: str, token: str) -> None:
    """The cluster answers, refuses strangers, takes our token and runs our version of Ray. Raises ConfigError."""
    try:
        parts = urllib.parse.urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        usable = False
    if not usable:
        raise ConfigError(f"--address {address}: name the dashboard of the head, such as {DEFAULT_ADDRESS}")
    status, answer = _ask(address, None)
    if status == 200 and "ray_version" in answer:
        raise ConfigError(
            f"--address {address}: this cluster obeys anyone who reaches it; start it with RAY_AUTH_MODE=token "
            "(and `ray get-auth-token --generate` once)"
        )
    if status in (401, 403):
        status, answer = _ask(address, token)
        if status in (401, 403):
            raise ConfigError(
                f"--address {address}: wrong token ({status}); copy the head's (there: `ray get-auth-token`)"
            )
    theirs = answer.get("ray_version")
    if status != 200 or theirs is None:
        raise ConfigError(
            f"--address {address}: what answers there is no dashboard of Ray ({status or 'not HTTP'}); the head's "
            "listens on port 8265 unless it was given another"
        )
    ours = metadata.version("ray")
    if theirs != ours:
        raise ConfigError(f"--address {address}: Ray {theirs} runs there, {ours} here; install the cluster's here")


def _ask(address: str, token: str | None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{address.rstrip('/')}/api/version")
    if token is not None:  # meant for this host: a redirect does not take it along
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            status, body = response.status, response.read(65536)
    except urllib.error.HTTPError as error:
        return error.code, {}
    except (http.client.HTTPException, ValueError):  # such as Ray's own port, or a token that is no header
        return 0, {}
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"--address {address}: the head cannot be reached ({reason}); its dashboard listens on loopback by "
            "default: run this there, or through ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from None
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    return status, answer if isinstance(answer, dict) else {}


def _connect(address: str, token: str) -> Any:
    # The client prefers these to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})


# ---- actions ----


def _submit(client: Any, arguments: argparse.Namespace, of_run: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="roentgen-code-") as folder:
        ship(Path(folder))
        environment = job_environment(folder, arguments.environment)
        words = ["python", "-m", "launchers.ray_pretrain", *of_run]
        job = _answered(
            lambda: client.submit_job(
                entrypoint=shlex.join(words), runtime_env=environment, metadata={"program": "roentgen"}
            ),
            "the job",
        )
    print(job, flush=True)
    if not arguments.follow:
        print(f"follow it with: submit.py logs {job} --follow --address {arguments.address}", file=sys.stderr)
        return 0
    return _follow(client, job)


def ship(target: Path) -> None:
    """Copy what a run needs of this checkout: its modules, their tables and the lock; no data, no runs, no history."""

    def unwanted(folder: str, names: list[str]) -> list[str]:
        packed = {name for name in names if (Path(folder) / name / "manifest.json").is_file()}
        return [name for name in names if name in packed or name.endswith((".tar", ".pyc")) or name == "__pycache__"]

    for name in CODE:
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    (target / "ci").mkdir()
    for path in (ROOT / "pyproject.toml", LOCK):
        shutil.copy2(path, target / path.relative_to(ROOT))


def job_environment(folder: str, packages: str) -> dict[str, Any]:
    """Ray's runtime environment of a job; it is kept in the job's record, so nothing secret may be in it."""
    environment: dict[str, Any] = {
        "working_dir": folder,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
    }
    if packages == "lock":
        lines = [line.strip() for line in LOCK.read_text().splitlines()]
        environment["pip"] = {"packages": [line for line in lines if line and not line.startswith("#")]}
    return environment


def _status(client: Any, arguments: argparse.Namespace) -> int:
    info = _answered(lambda: client.get_job_info(arguments.job), arguments.job)
    print(_row(arguments.job, info))
    return 0


def _list(client: Any) -> int:
    jobs = [job for job in _answered(client.list_jobs, "the list of jobs") if job.submission_id]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        print(_row(job.submission_id, job))
    return 0


def _row(name: str, info: Any) -> str:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime((info.start_time or 0) / 1000))
    code = "" if info.driver_exit_code is None else f"  code {info.driver_exit_code}"
    return f"{name}  {_state(info)}  {started}{code}  {info.entrypoint}"


def _logs(client: Any, arguments: argparse.Namespace) -> int:
    if arguments.follow:
        return _follow(client, arguments.job)
    print(_answered(lambda: client.get_job_logs(arguments.job), arguments.job), end="", flush=True)
    return 0


def _stop(client: Any, arguments: argparse.Namespace) -> int:
    """Ask and wait: the ranks save first."""
    _answered(lambda: client.stop_job(arguments.job), arguments.job)
    deadline = time.monotonic() + STOP_WAIT_S + ANSWER_S
    while _state(info := _answered(lambda: client.get_job_info(arguments.job), arguments.job)) in (
        "PENDING",
        "RUNNING",
    ):
        if time.monotonic() > deadline:
            raise ConfigError(f"{arguments.job}: still {_state(info)} after {STOP_WAIT_S} s; ask again")
        time.sleep(0.5)
    print(f"{arguments.job}  {_state(info)}")
    return 0


def _follow(client: Any, job: str) -> int:
    """Print the logs until the job has ended; its exit code. Ctrl-C leaves the job running."""
    from aiohttp import ClientError

    _answered(lambda: client.get_job_info(job), job)  # or there is nothing to follow
    shown = 0

    async def tail() -> None:
        nonlocal shown
        seen = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, shown - seen) :]  # a new connection begins with the first line again
            seen += len(text)
            if new:
                print(new, end="", flush=True)
                shown += len(new)

    try:
        while True:
            try:
                asyncio.run(tail())
            except (OSError, RuntimeError, ClientError):
                time.sleep(1.0)  # the connection broke; what the head answers next says why
            info = _answered(lambda: client.get_job_info(job), job)
            if _state(info) not in ("PENDING", "RUNNING"):
                return exit_code(info)
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; stop it with: submit.py stop {job}", file=sys.stderr)
        return INTERRUPTED


def exit_code(info: Any) -> int:
    """The code of a job that has ended: its driver's; 143 where it was stopped; 1 where it never came to run."""
    if _state(info) == "SUCCEEDED":
        return 0
    if _state(info) == "STOPPED":
        return STOPPED
    code = info.driver_exit_code
    if code is None:
        print(f"error: the job did not start: {info.message}", file=sys.stderr, flush=True)
        return 1
    return 128 - int(code) if code < 0 else int(code)


def _state(info: Any) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    return str(getattr(info.status, "value", info.status))


def _answered(question: Callable[[], Any], what: str) -> Any:
    """What the head answers; its errors in our words, which name neither token nor environment."""
    try:
        return question()
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error)
        if "404" in text or "does not exist" in text:
            raise ConfigError(f"{what}: no such job there; `submit.py list` names them") from None
        if "401" in text or "403" in text:
            raise ConfigError(f"{what}: the head no longer takes this token") from None
        raise ConfigError(f"{what}: the head does not do it ({text.splitlines()[0][:200]})") from None


if __name__ == "__main__":
    sys.exit(main())
