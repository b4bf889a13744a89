"""Random numbers as a pure function of their key: (seed, purpose, ids, counter) -> value, on any machine and NumPy.

A counter-based generator in the sense of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), built on
the SplitMix64 finaliser (Steele et al. 2014). NumPy's own generators are not used, since their streams may change
between versions and cost microseconds per key; this one is vectorised over the ids and defined by the lines below.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on uint64 in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=256)
def _purpose_word(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def hash_u64(seed: int, purpose: str, *ids: ArrayLike) -> np.ndarray:
    """Hash of (seed, purpose, ids) as uint64; the ids are non-negative integers and broadcast against each other."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        state = _mix(np.asarray(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + _GOLDEN))
        state = _mix((state ^ np.uint64(_purpose_word(purpose))) + _GOLDEN)
        for part in ids:
            state = _mix((state ^ np.asarray(part).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(seed: int, purpose: str, *ids: ArrayLike, draws: int = 1) -> np.ndarray:
    """float64 in [0, 1), shape [*broadcast(ids), draws]."""
    key = hash_u64(seed, purpose, *ids)[..., None]
    with np.errstate(over="ignore"):
        word = _mix(key + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, purpose: str, *ids: ArrayLike, draws: int = 1) -> np.ndarray:
    """Standard normal float64, shape [*broadcast(ids), draws] (Box-Muller)."""
    u = uniform(seed, purpose, *ids, draws=2 * draws)
    radius = np.sqrt(-2.0 * np.log1p(-u[..., :draws]))
    return radius * np.cos(2.0 * np.pi * u[..., draws:])


def integers(low: int, high: int, seed: int, purpose: str, *ids: ArrayLike, draws: int = 1) -> np.ndarray:
    """int64 in [low, high), shape [*broadcast(ids), draws]."""
    return low + np.floor(uniform(seed, purpose, *ids, draws=draws) * (high - low)).astype(np.int64)


def permutation(count: int, seed: int, purpose: str, *ids: int) -> np.ndarray:
    """A permutation of range(count) as int64 [count], by sorting hashes (ties, if ever, keep their order)."""
    return np.argsort(hash_u64(seed, purpose, *ids, np.arange(count)), kind="stable")


def text_key(text: str) -> int:
    """Non-negative 63-bit integer, equal for equal texts up to case and white space."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
