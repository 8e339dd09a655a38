"""What a histogram series counts, in plain numbers: one thread adds, any other reads, and nobody waits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Distribution:
    """Values by bucket. A reader may see a value's count before its sum; the next scrape has both."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: the buckets' upper bounds, ascending, each part of its bucket; what is above all has one more."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, n: int = 1) -> None:
        """`n` values of `value`."""
        self.counts[bisect_left(self.bounds, value)] += n
        self.total += value * n

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last one `+Inf`: as the exposition format has it."""
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(tuple(self.counts))), strict=True))
