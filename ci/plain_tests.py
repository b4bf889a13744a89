"""`python -m ci.plain_tests FILE [WORD]`: run a test file where pytest is not installed, such as on a borrowed GPU.

Knows the few words of pytest that the kernels' tests use: marks (parametrize is followed, others are ignored), param,
raises, approx of numbers, skip, importorskip. Any fixture fails the test that asks for it. WORD: only tests whose name
holds it. Exit code 0 when all passed, 1 when one failed or none ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import math
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "pytest"


class SkippedError(Exception):
    """What `skip` raises."""


class Approx:
    """A number, or a sequence of them, equal within tolerances; those of pytest where none are given."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self.expected, self.rel = expected, rel if rel is not None else 0.0 if abs is not None else 1e-6
        self.abs = abs if abs is not None else 1e-12

    def __eq__(self, other: Any) -> bool:
        pairs = (
            zip(other, self.expected, strict=True) if isinstance(self.expected, Sequence) else [(other, self.expected)]
        )
        return all(math.isclose(a, b, rel_tol=self.rel, abs_tol=self.abs) for a, b in pairs)

    def __repr__(self) -> str:
        return f"{self.expected} within {self.rel} of itself or {self.abs}"


class _Param(NamedTuple):
    values: tuple[Any, ...]


class _Marks:
    """`mark.anything(...)` leaves a test as it is; `mark.parametrize` notes its cases."""

    def __getattr__(self, name: str) -> Any:
        if name == "parametrize":
            return _parametrize
        return lambda *arguments, **_: arguments[0] if arguments and callable(arguments[0]) else lambda test: test


def _parametrize(names: str | Sequence[str], values: Sequence[Any], **_: Any) -> Callable[[Any], Any]:
    words = [word.strip() for word in names.split(",")] if isinstance(names, str) else list(names)

    def note(test: Any) -> Any:
        rows = [value.values if isinstance(value, _Param) else value for value in values]
        cases = [
            dict(zip(words, row if len(words) > 1 or isinstance(value, _Param) else (row,), strict=True))
            for row, value in zip(rows, values, strict=True)
        ]
        test.plain_cases = [cases, *getattr(test, "plain_cases", [])]
        return test

    return note


@contextmanager
def raises(expected: Any, match: str | None = None) -> Iterator[types.SimpleNamespace]:
    """The block must raise `expected`, with a message in which `match` is found."""
    caught = types.SimpleNamespace(value=None)
    try:
        yield caught
    except expected as error:
        caught.value = error
    if caught.value is None:
        raise AssertionError(f"{expected} was not raised")
    if match is not None and not re.search(match, str(caught.value)):
        raise AssertionError(f"{caught.value} does not match {match!r}")


def skip(reason: str = "", **_: Any) -> None:
    """Leave the running test."""
    raise SkippedError(reason)


def importorskip(name: str, **_: Any) -> types.ModuleType:
    """The module, or skip."""
    if importlib.util.find_spec(name) is None:
        raise SkippedError(f"{name} is not installed")
    return importlib.import_module(name)


def stand_in() -> types.ModuleType:
    """A module with the words above."""
    module = types.ModuleType(NAME)
    words = {"mark": _Marks(), "param": lambda *values, **_: _Param(values), "raises": raises, "approx": Approx}
    vars(module).update(words, skip=skip, importorskip=importorskip, MonkeyPatch=None)
    vars(module)["fixture"] = lambda *arguments, **_: arguments[0] if arguments else lambda function: function
    return module


def cases_of(test: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the arguments that the test was parametrized with."""
    for chosen in itertools.product(*getattr(test, "plain_cases", [])):
        yield {name: value for case in chosen for name, value in case.items()}


def run_file(path: Path, word: str = "") -> int:
    """Run all tests of a file; prints one line for each and returns the exit code."""
    sys.modules[NAME] = stand_in()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except SkippedError as reason:
        print(f"{path}: skipped whole: {reason}")
        return 1
    counts = {"passed": 0, "FAILED": 0, "skipped": 0}
    tests = {name: value for name, value in vars(module).items() if name.startswith("test_") and callable(value)}
    for name, test in tests.items():
        for case in cases_of(test) if word in name else ():
            shown = f"{name}[{'-'.join(str(getattr(value, '__name__', value)) for value in case.values())}]"
            started = time.perf_counter()
            verdict, detail = "passed", ""
            try:
                missing = inspect.signature(test).parameters.keys() - case.keys()
                assert not missing, f"asks for fixtures {sorted(missing)}, which need pytest"
                test(**case)
            except SkippedError as reason:
                verdict, detail = "skipped", f": {reason}"
            except Exception:
                verdict, detail = "FAILED", "\n" + traceback.format_exc()
            counts[verdict] += 1
            print(f"{verdict:7} {time.perf_counter() - started:7.2f} s  {shown}{detail}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 0 if counts["passed"] and not counts["FAILED"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ci.plain_tests", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("word", nargs="?", default="")
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(run_file(options.file, options.word))
