"""Is this machine ready to train? Looks at everything that a run needs, and says what to do about each thing.

    python launchers/doctor.py
    python launchers/doctor.py --run-dir s3://bucket/runs/a --data s3://bucket/cxr --recipe chest:clip_b16 --gpus 8

Nothing is changed: objects that are written to try a store are deleted again. No credential is shown.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import schema
from core.credentials import hidden
from launchers.command import errors_in_one_line
from launchers.doctor_checks import CHECKS, Asked, Finding
from shards.errors import ConfigError, RoentgenError

EXIT_TROUBLE = 3
COLOURS = {"good": "green", "note": "yellow", "trouble": "red"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 ready (notes are no trouble), 2 bad arguments, 3 trouble",
    )  # fmt: skip
    names = [check.__name__ for check in CHECKS]
    add = result.add_argument
    add("--run-dir", metavar="URL", help="try rights and speed there: folder or s3://bucket/prefix")
    add("--data", metavar="MANIFEST", help="read some of this set")
    add("--cache-dir", metavar="DIR", help="as data.cache_dir of the run")
    add("--recipe", metavar="FIELD:RUN", help="expect this run's memory and throughput here")
    add(
        "--set", dest="overrides", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe"
    )
    add("--gpus", type=int, help="that this machine must have")
    add("--ray", metavar="URL", help="dashboard of the cluster, http://HEAD:8265; with the token that submit.py takes")
    add("--only", nargs="+", choices=names, metavar="CHECK", help=f"of {', '.join(names)}")
    add("--json", metavar="FILE", help="write the findings there, too; - for the screen, without the table")
    return result


def _findings(check: Callable[[Asked], Iterator[Finding]], asked: Asked) -> list[Finding]:
    found: list[Finding] = []
    try:
        for finding in check(asked):
            found.append(finding)
    except RoentgenError as error:  # says itself what to do
        found.append(Finding(check.__name__.replace("_", " "), "trouble", str(error)))
    except Exception as error:  # a machine has more ways to be broken than we know
        first = (str(error).splitlines() or [""])[0][:200]
        found.append(Finding(check.__name__.replace("_", " "), "trouble", f"{type(error).__name__}: {first}"))
    return [Finding(one.what, one.state, hidden(one.found), hidden(one.advice)) for one in found]


@errors_in_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    logging.getLogger("shards").setLevel(logging.ERROR)
    if arguments.overrides and not arguments.recipe:
        raise ConfigError("--set changes a recipe; name one with --recipe")
    recipe = None
    if arguments.recipe:
        recipe = schema.apply_overrides(schema.load_recipe(arguments.recipe), arguments.overrides)
    asked = Asked(
        run_dir=arguments.run_dir, data=arguments.data, cache_dir=arguments.cache_dir, ray=arguments.ray,
        gpus=arguments.gpus, recipe=recipe, **({} if recipe is None else {"store": recipe.data.store}),
    )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table("", "", "found", "what to do", title="doctor", title_justify="left")
    findings: list[Finding] = []
    for check in CHECKS:
        if arguments.only and check.__name__ not in arguments.only:
            continue
        with console.status(f"looking at {check.__name__.replace('_', ' ')}"):
            found = _findings(check, asked)
        findings += found
        for one in found:
            table.add_row(
                escape(one.what), f"[{COLOURS[one.state]}]{one.state}[/]", escape(one.found), escape(one.advice)
            )
        table.add_section()
    body = json.dumps([one._asdict() for one in findings], indent=1) + "\n"
    troubles = sum(one.state == "trouble" for one in findings)
    if arguments.json == "-":
        sys.stdout.write(body)
    else:
        console.print(table)
        console.print(f"{troubles} troubles" if troubles else "ready", style="red" if troubles else "green")
        if arguments.json:
            try:
                with open(arguments.json, "w") as file:
                    file.write(body)
            except OSError as error:
                raise ConfigError(f"--json {arguments.json}: {error.strerror}; name another file") from None
    return EXIT_TROUBLE if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
