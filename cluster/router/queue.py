"""How full a router is, and whom it would refuse for that: known to the router, and told to the gateways."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.router.shares import fair_seats

_MOST_RETRY_S = 600.0
# Of the longest wait that is promised: whoever is taken should not be turned away after all because the pace changed.
_CAUTION = 0.75


@dataclass(slots=True)
class Queue:
    """`seats` requests are computed at once and `places` wait; none is taken that would wait longer than `max_wait_s`.

    A tenant that is alone may have all of it. Beside others its share of the seats is its own at any time, and so many
    of its requests may wait as there are places left: whoever comes later finds some (dynamic queue thresholds,
    Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
    """

    seats: int
    places: int
    max_wait_s: float
    pace_s: float = 0.0  # between two requests that end, of late; 0: not known
    open: MutableMapping[str, int] = field(default_factory=dict)  # requests by tenant

    @property
    def n_open(self) -> int:
        """Requests that are computed or wait."""
        return sum(self.open.values())

    def add(self, tenant: str) -> None:
        """One more is open."""
        self.open[tenant] = self.open.get(tenant, 0) + 1

    def remove(self, tenant: str) -> None:
        """One less."""
        self.open[tenant] -= 1
        if not self.open[tenant]:
            del self.open[tenant]

    def expected_wait_s(self, tenant: str) -> float:
        """How long one more request of `tenant` waits for a seat, by the pace of late; 0 while none is known."""
        mine, share = self._share(tenant)
        return max(mine - share, 0) * self.pace_s * self.seats / share

    def refuse(self, tenant: str) -> RequestError | None:
        """Why one more request of `tenant` is not taken, with when to come again; None: it is."""
        mine, share = self._share(tenant)
        if mine <= share:  # a seat is its own
            return None
        waiting, left = mine - 1 - share, self.places - max(self.n_open - self.seats, 0)
        is_full = left <= (waiting if len(self.open.keys() | {tenant}) > 1 else 0)
        over = self.expected_wait_s(tenant) - _CAUTION * self.max_wait_s
        if not is_full and over <= 0:
            return None
        next_place_s = self.pace_s * self.seats / share
        retry = max(1, math.ceil(min(max(over, next_place_s), _MOST_RETRY_S)))
        message = f"{max(self.n_open - self.seats, 0)} requests are waiting already; try again later"
        return RequestError(message, code="queue_full", status=429, retry_after_s=retry)

    def _share(self, tenant: str) -> tuple[int, float]:
        """Open requests of `tenant` with one more, and how many seats are then its own."""
        demands = {**self.open, tenant: self.open.get(tenant, 0) + 1}
        return demands[tenant], fair_seats(demands, tenant, self.seats)
