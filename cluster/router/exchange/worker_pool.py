"""The expert workers as the exchange sees them: what is in flight at each, which are ejected, and until when."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from cluster.router.exchange.patience import Patience
from workers.errors import GroupLost, WorkerLost
from workers.transport.base import Rows, Tag, Transport

_FIRST_EJECTION_S, _LAST_EJECTION_S = 5.0, 60.0
_REOPEN_S = 0.25  # between two tries to reach a worker whose ejection is over


@dataclass(slots=True, eq=False)
class Reply:
    """A reply in flight: once `settled`, either `out_PD` is it or `loss` says why there never will be one.

    `out_PD` may then lie in the transport's memory, until the next reply of the worker.
    """

    worker: str
    tag: Tag
    out_PD: Tensor
    n_rows: int
    has_other: bool  # whether another replica could give it
    settled: bool = False
    loss: WorkerLost | None = None
    is_late: bool = False  # it was lost because it did not come in time
    compute_ns: int = 0


class WorkerPool:
    """A transport, and how each worker has been doing. Owned by the step loop, like the transport.

    A worker answers in the order it was asked, so whoever waits for a reply first takes in those before it. A reply
    that another replica could give as well is not waited for longer than such replies take (`Patience`); the worker is
    then passed over for a while, longer each time it is slow or lost again.
    """

    def __init__(self, transport: Transport, reply_timeout_s: float) -> None:
        self.transport = transport
        self._reply_timeout_s = reply_timeout_s
        self._patience = Patience(reply_timeout_s)
        self._addresses: dict[str, str] = {}
        self._in_flight: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self._ejected_until: dict[str, float] = {}
        self._ejection_s: dict[str, float] = {}  # of workers that failed and have not answered since

    @property
    def ejected(self) -> Collection[str]:
        """Workers to pass over where another replica can take their rows."""
        return self._ejected_until.keys()

    @property
    def silent(self) -> Collection[str]:
        """Those of them that would not answer if they were asked, as far as is known."""
        return [worker for worker in self._ejected_until if not self.transport.answers(worker)]

    def update(self, addresses: Mapping[str, str]) -> None:
        """Connect to workers that are new or moved. A worker without an address keeps the way it has, as long as it
        lasts: it may be draining. One that comes back is passed over until it answers."""
        for worker, address in addresses.items():
            if (known := self._addresses.get(worker)) != address:
                self._addresses[worker] = address
                self._readmit(worker)
                self.reopen(worker)
                if known is not None:
                    self._ejected_until[worker] = time.monotonic()

    def forget(self, kept: Collection[str]) -> None:
        """Disconnect from every worker that is not in `kept`."""
        for worker in [worker for worker in self._addresses if worker not in kept]:
            self.transport.disconnect(worker)
            del self._addresses[worker]
            self._readmit(worker)

    def reopen(self, worker: str) -> None:
        """Try a worker that failed once more; what is in flight counts as lost."""
        in_flight = self._in_flight[worker]
        while in_flight:
            _lose(in_flight.popleft(), WorkerLost(worker, "its stream was opened anew"))
        if worker in self._addresses:
            self.transport.connect(worker, self._addresses[worker])

    def probe(self) -> bool:
        """Take back workers whose ejection is over and that answer; true when there was one."""
        now = time.monotonic()
        due = [worker for worker, until in self._ejected_until.items() if now >= until]
        back = [worker for worker in due if self._is_back(worker)]
        for worker in due:
            if worker in back:
                del self._ejected_until[worker]
            else:
                self._ejected_until[worker] = now + _REOPEN_S
        return bool(back)

    def _is_back(self, worker: str) -> bool:
        if not self.transport.answers(worker):
            self.reopen(worker)
        return self.transport.answers(worker)

    def limit(self, n_rows: int, has_other: bool) -> float:
        """Seconds that a reply of `n_rows` is waited for, which another replica could give as well or not."""
        return self._patience.limit(n_rows) if has_other else self._reply_timeout_s

    def came(self, n_rows: int, seconds: float) -> None:
        """Replies of `n_rows` were awaited for so long."""
        self._patience.came(n_rows, seconds)

    def abandon(self) -> None:
        """Nothing that is in flight is wanted any more."""
        self._in_flight.clear()

    def send(self, worker: str, rows: Rows, out_PD: Tensor, has_other: bool = False) -> Reply:
        """Send `rows`; the reply will be in `out_PD`. A worker that cannot be reached shows in the reply.

        has_other: whether another replica could give the reply.
        """
        reply = Reply(worker, rows.tag, out_PD, rows.n_pairs, has_other)
        if worker in self._ejected_until and not self.transport.answers(worker):
            _lose(reply, WorkerLost(worker, "does not answer"))  # whoever wrote to it would wait
            return reply
        try:
            self.transport.send(worker, rows)
        except WorkerLost as loss:
            self._failed(reply, loss)
        else:
            self._in_flight[worker].append(reply)
        return reply

    def wait(self, reply: Reply) -> None:
        """Return once `reply` is settled, one way or the other."""
        in_flight = self._in_flight[reply.worker]
        while not reply.settled:
            first = in_flight.popleft()
            began = time.monotonic()
            timeout_s = self.limit(first.n_rows, first.has_other)
            try:
                rows_PD, first.compute_ns = self.transport.receive(first.worker, first.tag, timeout_s, first.out_PD)
            except WorkerLost as loss:
                first.is_late = time.monotonic() - began >= timeout_s
                self._failed(first, loss)
            else:
                if first.has_other:
                    self.came(first.n_rows, time.monotonic() - began)
                first.settled = True
                if first is reply:
                    first.out_PD = rows_PD
                elif rows_PD is not first.out_PD:
                    first.out_PD.copy_(rows_PD)  # the next reply takes its place
                if self._ejection_s:
                    self._readmit(first.worker)

    def _failed(self, reply: Reply, loss: WorkerLost) -> None:
        _lose(reply, loss)
        worker = reply.worker
        if isinstance(loss, GroupLost):
            return  # or all would be ejected, and the one to blame asked as often as the others
        if worker in self._ejected_until:
            return  # what else was in flight, or a try for want of another replica: the same failure
        # Longer after every failure: a worker that hangs should cost a deadline ever more rarely.
        self._ejection_s[worker] = min(2 * self._ejection_s.get(worker, _FIRST_EJECTION_S / 2), _LAST_EJECTION_S)
        self._ejected_until[worker] = time.monotonic() + self._ejection_s[worker]

    def _readmit(self, worker: str) -> None:
        self._ejection_s.pop(worker, None)
        self._ejected_until.pop(worker, None)


def _lose(reply: Reply, loss: WorkerLost) -> None:
    reply.settled, reply.loss = True, loss
