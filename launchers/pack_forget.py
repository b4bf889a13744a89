"""`pack.py forget`: the right to erasure, for a packed set. Patient ids come in clear and are shown nowhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launchers import command
from shards import forget
from shards.dataset import open_manifest
from shards.errors import ConfigError, DataError
from shards.ingest import hashed_key, key_fingerprint

DESCRIPTION = """\
Forget patients of a packed set: their studies become void slots at once, and training never reads them again.

    python launchers/pack.py forget --patient-file ids.txt --key-file site.key --manifest shards/site/manifest.json
  and, once no run reads the set any more, take their bytes out of the shards:
    python launchers/pack.py forget --rewrite --manifest shards/site/manifest.json

Ids stand in the file as the source had them, one a line. The order of training stays, and a run goes on with the same
command. Not reached are models that were trained before, pictures in their TensorBoard files, prepared reports, copies
of the set, old versions that a bucket keeps, and the source: a set that is packed anew has what its source has."""

LINES_SHOWN = 20


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "pack.py forget", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 bad arguments, 3 records that cannot be read, 130/143 interrupted",
    )  # fmt: skip
    result.add_argument("--manifest", required=True, metavar="URL", help="of the set, or its folder; s3:// too")
    result.add_argument("--patient-file", metavar="FILE", help="ids of patients as the source has them, one a line")
    result.add_argument("--key-file", metavar="FILE", help="the secret that the set was packed with")
    result.add_argument("--public", action="store_true", help="the set was packed with --public")
    result.add_argument("--rewrite", action="store_true", help="write shards without what is forgotten, delete the old")
    result.add_argument("--workers", type=int, default=8, help="shards that are read at a time (%(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    return command.run(lambda console: _run(arguments, console), "shards")


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.patient_file is None and not arguments.rewrite:
        raise ConfigError("neither --patient-file nor --rewrite is given; name the patients, or rewrite the shards")
    unreadable = 0
    if arguments.patient_file is not None:
        unreadable = _forget(arguments, console)
    if arguments.rewrite:
        done = forget.rewrite(
            arguments.manifest, on_shard=lambda name: console.print(f"rewriting {name}", highlight=False)
        )
        console.print(
            f"{done.shards} shards rewritten, {done.bytes_removed / 1e6:.1f} MB less; nothing forgotten is left in "
            "this set's shards",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return DataError.exit_code if unreadable else 0


def _forget(arguments: argparse.Namespace, console: Console) -> int:
    """Returns the number of records that could not be read."""
    secret = command.secret(arguments, "forget needs")
    store, manifest = open_manifest(arguments.manifest)
    store.close()
    if manifest.key_fingerprint != key_fingerprint(secret):
        raise ConfigError(
            f"--key-file: not the key that {arguments.manifest} was packed with (its fingerprint is "
            f"{manifest.key_fingerprint or 'none: a public set, give --public'})"
        )
    lines = _hashes(Path(arguments.patient_file), secret)
    done = forget.forget(arguments.manifest, set(lines.values()), workers=arguments.workers)
    missing = [number for number, patient in lines.items() if patient not in done.found]

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(
        f"{len(done.found)} of {len(set(lines.values()))} patients have studies in this set: {done.samples} studies "
        f"are void from now on, {done.before} were already; now {done.manifest.forgotten} of {done.manifest.samples} "
        "slots are void"
    )
    if missing:
        shown = ", ".join(map(str, missing[:LINES_SHOWN])) + (", ..." if len(missing) > LINES_SHOWN else "")
        say(f"no study of the patients of {len(missing)} lines of --patient-file ({shown}): never packed, or erased")
    if done.unreadable:
        say(
            f"{done.unreadable} records cannot be read, and nobody can tell whose they are: pack.py --verify names them"
        )
    return done.unreadable


def _hashes(path: Path, secret: bytes | None) -> dict[int, str]:
    """Line number -> keyed hash of the patient that it names."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--patient-file {path}: not UTF-8; save it as such, one id a line") from None
    except OSError as error:
        raise ConfigError(f"--patient-file {path}: {error.strerror}; give a file of ids, one a line") from None
    found = {
        number: hashed_key(secret, "patient", line.strip()) for number, line in enumerate(lines, 1) if line.strip()
    }
    if not found:
        raise ConfigError(f"--patient-file {path}: names no patient; write one id a line")
    return found
