"""`python -m ci.bench [NAME [--quick] [--json FILE]]`: list the benchmarks, or run one and print its table.

Exit code 0 when every bar holds, 1 when one does not, 2 for bad arguments, otherwise that of the error met.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from rich.console import Console

from ci.bench.figure import print_table, write_json
from shards.errors import ConfigError, RoentgenError


def descriptions(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Benchmark name -> its DESCRIPTION, read without importing, since peers need not be installed to be listed."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "DESCRIPTION":
                found[path.stem] = str(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ci.bench", description="Run one benchmark; without NAME, list them."
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes, to test the harness; no bar is judged"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures, and a plot beside it")
    options = parser.parse_args(arguments)
    console = Console()
    known = descriptions()
    if options.name is None:
        width = max((len(name) for name in known), default=0)
        for name, description in known.items():
            console.print(f"{name:<{width}}  {description}", highlight=False, soft_wrap=True)
        return 0
    try:
        if options.name not in known:
            near = get_close_matches(options.name, known) or sorted(known)
            raise ConfigError(f"no benchmark is called {options.name!r}; there is {', '.join(near)}")
        benchmark = importlib.import_module(f"ci.bench.{options.name}")
        figures = benchmark.run(options.quick)
        if options.quick:
            figures = [replace(one, holds=None, note=f"quick; {one.note}".rstrip("; ")) for one in figures]
        print_table(figures, f"{options.name}: {known[options.name]}", console)
        if options.json is not None:
            write_json(figures, options.json)
            if hasattr(benchmark, "plot"):
                benchmark.plot(figures, options.json.with_suffix(".png"))
    except RoentgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    missed = [one.id for one in figures if one.holds is False]
    if missed:
        console.print(f"[bold red]bar missed:[/bold red] {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
