"""The exchange's ways to the expert workers: what is in flight on each, which failed, and when to try those again."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from workers.errors import GroupLost, WorkerLost
from workers.transport.base import Rows, Tag, Transport

_FIRST_ABSENCE_S, _LAST_ABSENCE_S = 5.0, 60.0


@dataclass(slots=True, eq=False)
class Reply:
    """What a worker owes: once `settled`, either `out_PD` is filled or `loss` says why it never will be."""

    worker: str
    tag: Tag
    out_PD: Tensor
    settled: bool = False
    loss: WorkerLost | None = None
    compute_ns: int = 0


class Links:
    """A transport with a memory. Owned by the step loop, like the transport.

    A worker answers in the order it was asked, so whoever waits for a reply first takes in those before it.
    """

    def __init__(self, transport: Transport, reply_timeout_s: float) -> None:
        self.transport = transport
        self._reply_timeout_s = reply_timeout_s
        self._addresses: dict[str, str] = {}
        self._owed: defaultdict[str, deque[Reply]] = defaultdict(deque)
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
                self.reopen(worker)

    def forget(self, kept: Collection[str]) -> None:
        """Disconnect from every worker that is not in `kept`."""
        for worker in [worker for worker in self._addresses if worker not in kept]:
            self.transport.disconnect(worker)
            del self._addresses[worker]
            self._is_back(worker)

    def reopen(self, worker: str) -> None:
        """Try a worker that failed once more; what it owes counts as lost."""
        owed = self._owed[worker]
        while owed:
            _lose(owed.popleft(), WorkerLost(worker, "its stream was opened anew"))
        if worker in self._addresses:
            self.transport.connect(worker, self._addresses[worker])

    def probe(self) -> bool:
        """Count workers as present again whose absence is over; true when there was one."""
        now = time.monotonic()
        due = [worker for worker, until in self._absent_until.items() if now >= until]
        for worker in due:
            del self._absent_until[worker]
            self.reopen(worker)
        return bool(due)

    def abandon(self) -> None:
        """Nothing that is owed is wanted any more."""
        self._owed.clear()

    def send(self, worker: str, rows: Rows, out_PD: Tensor) -> Reply:
        """Send `rows`; the reply will be in `out_PD`. A worker that cannot be reached shows in the reply."""
        reply = Reply(worker, rows.tag, out_PD)
        try:
            self.transport.send(worker, rows)
        except WorkerLost as loss:
            self._failed(reply, loss)
        else:
            self._owed[worker].append(reply)
        return reply

    def wait(self, reply: Reply) -> None:
        """Return once `reply` is settled, one way or the other."""
        owed = self._owed[reply.worker]
        while not reply.settled:
            first = owed.popleft()
            try:
                first.compute_ns = self.transport.receive(first.worker, first.tag, self._reply_timeout_s, first.out_PD)
            except WorkerLost as loss:
                self._failed(first, loss)
            else:
                first.settled = True
                if self._absence_s:
                    self._is_back(first.worker)

    def _failed(self, reply: Reply, loss: WorkerLost) -> None:
        _lose(reply, loss)
        worker = reply.worker
        if isinstance(loss, GroupLost):
            return  # or all would be absent, and the one to blame asked as often as the others
        if worker in self._absent_until:
            return  # what else it owed, or a try for want of another replica: the same failure
        # Longer after every failure: a worker that hangs should cost a deadline ever more rarely.
        self._absence_s[worker] = min(2 * self._absence_s.get(worker, _FIRST_ABSENCE_S / 2), _LAST_ABSENCE_S)
        self._absent_until[worker] = time.monotonic() + self._absence_s[worker]

    def _is_back(self, worker: str) -> None:
        self._absence_s.pop(worker, None)
        self._absent_until.pop(worker, None)


def _lose(reply: Reply, loss: WorkerLost) -> None:
    reply.settled, reply.loss = True, loss
