"""The transport without a wire, against which the others are compared: expert workers in the router's own process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from workers.errors import ExpertMeshError, WorkerLost
from workers.shard import ExpertShard
from workers.transport.base import Received, Rows, Tag


class LocalTransport:
    """A `Transport` over shards of this process, by worker name. Addresses mean nothing to it.

    Rows are computed when their reply is asked for, by the thread that asks. A worker is lost while `shards` lacks it.
    """

    def __init__(self, shards: Mapping[str, ExpertShard]) -> None:
        self.dropped_replies = 0
        self._shards = shards
        self._queues: dict[str, deque[Rows]] = {}

    def connect(self, worker: str, address: str) -> None:
        """Open the way to `worker`."""
        self._queues.setdefault(worker, deque())

    def disconnect(self, worker: str) -> None:
        """Forget `worker`. What is in flight is lost."""
        self._queues.pop(worker, None)

    def way(self, worker: str) -> str:
        """Calls within this process."""
        return "local"

    def answers(self, worker: str) -> bool:
        """Whether `worker` is there."""
        return worker in self._shards

    @property
    def unreachable(self) -> Mapping[str, str]:
        """None: a worker that is connected and away is lost to everybody."""
        return {}

    def room(self, worker: str, n_bytes: int) -> None:
        """Anywhere."""

    def send(self, worker: str, rows: Rows) -> None:
        """Keep `rows` until their reply is asked for. Raises WorkerLost when `worker` is not connected."""
        self._queue(worker).append(rows)

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        """Compute the rows sent with `tag` into `out_PD`; see `Transport.receive`."""
        queue = self._queue(worker)
        while queue:
            rows = queue.popleft()
            if rows.tag == tag:
                return Received(out_PD, self._compute(worker, rows, out_PD))
            self.dropped_replies += 1
        raise WorkerLost(worker, f"nothing was sent with {tag}")

    def close(self) -> None:
        """Forget every worker."""
        self._queues.clear()

    def _queue(self, worker: str) -> deque[Rows]:
        queue = self._queues.get(worker)
        if queue is None or worker not in self._shards:
            raise WorkerLost(worker, "not connected")
        return queue

    def _compute(self, worker: str, rows: Rows, out_PD: Tensor) -> int:
        began = time.perf_counter_ns()
        try:
            out_PD.copy_(self._shards[worker].forward(rows.tag.layer, *rows.request))
        except ExpertMeshError as error:
            raise WorkerLost(worker, f"refused the rows: {error}") from error
        return time.perf_counter_ns() - began
