"""Benchmarks and learning experiments: one module each, run by `python -m ci.bench NAME`.

A benchmark module has `DESCRIPTION: str`, one line, a literal, and `run(quick: bool) -> list[Figure]`, which may print
its progress. `quick` is for tests of the harness: seconds, and no bar is judged.
"""
