"""The generator against the published known answers; a wrong constant or round would still look random."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.router.philox import philox4x32, uniforms

# From the test vectors of the authors' Random123 library: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert philox4x32(words(counter), words(key)) == words(result)  # type: ignore[arg-type]


def test_a_number_depends_on_seed_and_position_alone() -> None:
    seeds = np.array([0, 1, 2**32, 2**64 - 1, 1], np.uint64)
    positions = np.array([0, 5, 5, 2**40, 6], np.uint64)
    together = uniforms(seeds, positions)
    assert len(set(together)) == len(together)
    for i in range(len(seeds)):
        assert uniforms(seeds[i : i + 1], positions[i : i + 1])[0] == together[i]


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    n = np.arange(100_000, dtype=np.uint64)
    for numbers in (uniforms(np.full_like(n, 7), n), uniforms(n, np.full_like(n, 7))):
        counts = np.bincount((numbers * 100).astype(int), minlength=100)
        assert len(counts) == 100  # all below 1
        assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square, 99 degrees of freedom: p = 1e-4
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
