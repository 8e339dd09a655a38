"""Whether a router takes one more request, decided when it comes and not between two steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from cluster.config import Config
from cluster.errors import RequestError

_REMEMBERED = 128  # ends of requests that the pace is measured by
_FORGOTTEN_S = 60.0


class Admission:
    """At most `seats` requests are computed at once and `queue` wait; none that would wait longer than `wait_s`.

    Belongs to the service's asyncio loop.
    """

    def __init__(self, seats: int, queue: int, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seats = seats
        self._queue = queue
        self._wait_s = wait_s
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    @classmethod
    def of(cls, config: Config) -> Admission:
        """As a router of this configuration computes."""
        seats = min(config.max_sequences, config.max_batch_tokens)
        return cls(seats, config.max_queue, config.max_queue_wait_s)

    def ended(self) -> None:
        """A request has ended, and its seat is free."""
        self._ends.append(self._clock())

    def expected_wait_s(self, n_open: int) -> float:
        """How long one that comes to `n_open` others waits for a seat, by the pace of late; 0 while none is known."""
        ahead = n_open - self._seats + 1
        now = self._clock()
        while self._ends and now - self._ends[0] > _FORGOTTEN_S:
            self._ends.popleft()
        if ahead <= 0 or len(self._ends) < 2:
            return 0.0
        return ahead * (now - self._ends[0]) / len(self._ends)

    def refuse(self, n_open: int) -> RequestError | None:
        """Why one more is not taken beside `n_open` others, with when to come again; None: it is."""
        expected = self.expected_wait_s(n_open)
        n_waiting = max(n_open - self._seats, 0)
        if n_open < self._seats + self._queue and expected <= self._wait_s:
            return None
        over = expected - self._wait_s
        retry = max(1, math.ceil(min(over if over > 0 else expected / max(n_waiting, 1), 600)))
        message = f"{n_waiting} requests are waiting already; try again later"
        return RequestError(message, code="queue_full", status=429, retry_after_s=retry)
