"""Whether a router takes one more request, decided when it comes and not between two steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from cluster.config import Config
from cluster.errors import RequestError
from cluster.router.queue import Queue

_REMEMBERED = 128  # ends of requests that the pace is measured by
_FORGOTTEN_S = 60.0


class Admission:
    """The requests that a router has, by tenant, and the pace in which they end.

    Belongs to the service's asyncio loop.
    """

    def __init__(self, seats: int, places: int, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = Queue(seats, places, wait_s)
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)
        self._tenants: dict[str, str] = {}  # of open requests, by id

    @classmethod
    def of(cls, config: Config) -> Admission:
        """As a router of this configuration computes."""
        seats = min(config.max_sequences, config.max_batch_tokens)
        return cls(seats, config.max_queue, config.max_queue_wait_s)

    @property
    def queue(self) -> Queue:
        """As it is now."""
        now = self._clock()
        while self._ends and now - self._ends[0] > _FORGOTTEN_S:
            self._ends.popleft()
        n = len(self._ends)
        self._queue.pace_s = (now - self._ends[0]) / n if n > 1 else 0.0
        return self._queue

    def taken(self, request_id: str, tenant: str) -> None:
        """A request is open."""
        self._tenants[request_id] = tenant
        self._queue.add(tenant)

    def ended(self, request_id: str) -> None:
        """A request has ended, and its seat is free."""
        self._queue.remove(self._tenants.pop(request_id))
        self._ends.append(self._clock())

    def refuse(self, tenant: str) -> RequestError | None:
        """Why one more request of `tenant` is not taken, with when to come again; None: it is."""
        return self.queue.refuse(tenant)
