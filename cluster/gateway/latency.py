"""How long clients wait for tokens just now: exact quantiles of the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
_KEPT = 4096  # of a busy gateway the newest ones


class Waits:
    """Waits of one kind. Belongs to one asyncio loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # (when it ended, seconds)

    def add(self, seconds: float) -> None:
        """One ended just now."""
        self._waits.append((self._clock(), seconds))

    def quantiles(self) -> tuple[float, float] | None:
        """Median and 95th percentile over the window, in seconds; None where nobody waited."""
        oldest = self._clock() - WINDOW_S
        while self._waits and self._waits[0][0] < oldest:
            self._waits.popleft()
        if not self._waits:
            return None
        ordered = sorted(seconds for _, seconds in self._waits)
        return ordered[(len(ordered) - 1) // 2], ordered[(len(ordered) - 1) * 95 // 100]
