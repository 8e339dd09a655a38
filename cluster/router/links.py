"""The exchange's ways to the expert workers: which are up, which failed, and when to try those again."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from torch import Tensor

from workers.errors import WorkerLost
from workers.transport.base import Rows, Tag, Transport

_FIRST_ABSENCE_S, _LAST_ABSENCE_S = 5.0, 60.0


class Links:
    """A transport with a memory. A link is one life of the way to a worker: what was sent on it comes back on it.

    Owned by the step loop, like the transport.
    """

    def __init__(self, transport: Transport, reply_timeout_s: float) -> None:
        self.transport = transport
        self._reply_timeout_s = reply_timeout_s
        self._addresses: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._last_number = 0
        self._absent_until: dict[str, float] = {}
        self._absence_s: dict[str, float] = {}  # of workers that failed and have not answered since

    @property
    def absent(self) -> Collection[str]:
        """Workers to pass over where another replica can take their rows."""
        return self._absent_until.keys()

    def update(self, addresses: Mapping[str, str]) -> None:
        """Connect to workers that are new or moved. A worker without an address keeps the way it has, as long as it
        lasts: it may be draining."""
        for worker, address in addresses.items():
            if self._addresses.get(worker) != address:
                self._addresses[worker] = address
                self._is_back(worker)
                self._open(worker)

    def forget(self, kept: Collection[str]) -> None:
        """Disconnect from every worker that is not in `kept`."""
        for worker in [worker for worker in self._addresses if worker not in kept]:
            self.transport.disconnect(worker)
            del self._addresses[worker], self._numbers[worker]
            self._is_back(worker)

    def reopen(self, worker: str) -> None:
        """Try a worker that failed once more; what is in flight to it counts as lost."""
        if worker in self._addresses:
            self._open(worker)

    def probe(self) -> bool:
        """Count workers as present again whose absence is over; true when there was one."""
        now = time.monotonic()
        due = [worker for worker, until in self._absent_until.items() if now >= until]
        for worker in due:
            del self._absent_until[worker]
            self.reopen(worker)
        return bool(due)

    def send(self, worker: str, rows: Rows) -> int:
        """The number of the link that took `rows`; 0 when there is none. The loss is dealt with at `receive`."""
        try:
            self.transport.send(worker, rows)
        except WorkerLost:
            return 0
        return self._numbers[worker]

    def receive(self, worker: str, link: int, tag: Tag, out_PD: Tensor) -> int:
        """As `Transport.receive`. Raises WorkerLost also for what was sent on a link that is no more."""
        if link and link != self._numbers.get(worker):
            raise WorkerLost(worker, "its stream was opened anew")
        try:
            if not link:
                raise WorkerLost(worker, "no stream to send the rows on")
            spent = self.transport.receive(worker, tag, self._reply_timeout_s, out_PD)
        except WorkerLost:
            # Longer after every failure: a worker that hangs should cost a deadline ever more rarely.
            self._absence_s[worker] = min(2 * self._absence_s.get(worker, _FIRST_ABSENCE_S / 2), _LAST_ABSENCE_S)
            self._absent_until[worker] = time.monotonic() + self._absence_s[worker]
            raise
        if self._absence_s:
            self._is_back(worker)
        return spent

    def _is_back(self, worker: str) -> None:
        self._absence_s.pop(worker, None)
        self._absent_until.pop(worker, None)

    def _open(self, worker: str) -> None:
        self.transport.connect(worker, self._addresses[worker])
        self._last_number += 1
        self._numbers[worker] = self._last_number
