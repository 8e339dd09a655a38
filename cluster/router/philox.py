"""Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

A number depends on (seed, position) alone: not on what was drawn before, nor on who else is in the batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _WIDTH = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple[U64, U64, U64, U64], key: tuple[U64, U64]) -> tuple[U64, U64, U64, U64]:
    """Ten rounds. Every array [N] holds 32-bit words in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _WIDTH) ^ c1 ^ k0, p1 & _LOW, (p0 >> _WIDTH) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds_N: U64, positions_N: U64) -> NDArray[np.float64]:
    """One float64 in [0, 1), of 53 random bits, per (seed, position)."""
    zeros_N = np.zeros_like(positions_N)
    counter = positions_N & _LOW, positions_N >> _WIDTH, zeros_N, zeros_N
    high, low, _, _ = philox4x32(counter, (seeds_N & _LOW, seeds_N >> _WIDTH))
    bits_N = ((high << _WIDTH) | low) >> np.uint64(11)
    return bits_N.astype(np.float64) * 2.0**-53
