"""Blocks of bytes by size class, kept for reuse."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_SMALLEST, _LARGEST_KEPT, _KEPT = 1 << 10, 1 << 24, 4


class Buffers:
    """Not thread-safe. A block that is not given back is freed when nobody refers to it any more."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, n_bytes: int) -> Tensor:
        """A uint8 block of at least `n_bytes`: the next power of two."""
        size = max(_SMALLEST, 1 << (n_bytes - 1).bit_length())
        free = self._free[size]
        return free.pop() if free else torch.empty(size, dtype=torch.uint8)

    def give(self, block: Tensor) -> None:
        """Keep `block`, which `take` gave, for the next taker; a few of a size, and none that is very large."""
        free = self._free[len(block)]
        if len(free) < _KEPT and len(block) <= _LARGEST_KEPT:
            free.append(block)
