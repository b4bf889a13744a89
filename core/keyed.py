"""Random numbers from integer keys, on the keys' own device: what `shards.keyed` is to arrays, this is to tensors.

A number depends on its key alone, so it is the same whatever the number of ranks, the micro-batch or the row it stands
in, and a pass that is computed twice draws the same numbers twice. Nothing here has a state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shards.keyed import hash_u64


def _signed(word: int) -> int:
    """An unsigned 64-bit constant as the int64 of equal bits: torch multiplies and adds int64 modulo 2^64."""
    return word - (1 << 64) if word >> 63 else word


# SplitMix64 (Steele et al. 2014), as in shards.keyed.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift(x, 27)) * _MULTIPLIER_2
    return x ^ _shift(x, 31)


def hash_keys(purpose: str, *ids: Tensor) -> Tensor:
    """int64 of the bits of `shards.keyed.hash_u64(0, purpose, *ids)`; the int64 ids broadcast against each other."""
    state: Tensor | int = _signed(int(hash_u64(0, purpose)))
    for part in ids:
        state = _mix((part ^ state) + _GOLDEN)
    assert isinstance(state, Tensor)
    return state


def _words(keys: Tensor, count: int) -> Tensor:
    """`keys [...]` -> `[..., count]` int64 of 64 random bits each."""
    return _mix(keys[..., None] + _GOLDEN * torch.arange(1, count + 1, device=keys.device))


def uniform(keys: Tensor) -> Tensor:
    """One fp32 a key, in the open interval (0, 1): 2^23 values, so that neither end is reached by rounding."""
    return (_shift(_words(keys, 1)[..., 0], 41).float() + 0.5) * 2.0**-23


def normal(keys: Tensor, draws: int) -> Tensor:
    """`keys [...]` -> `[..., draws]` standard normal fp32, by Box and Muller: a word of 64 bits gives two."""
    words = _words(keys, (draws + 1) // 2)
    radius = ((_shift(words, 32).float() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (words & 0xFFFFFFFF).float().mul_(2.0 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :draws]
