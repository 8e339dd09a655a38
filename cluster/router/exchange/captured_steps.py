"""Whole decoding steps, captured: whether the workers take part, and what is counted of them.

Legend: L layers, E experts, W workers that take part.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.router.exchange.sender import Sender
from workers.model.experts import Experts
from workers.transport.base import StepReport, Tag


class StepWay(Protocol):
    """A way on which whole steps can be captured: `transport.device.way.DeviceWay`, `transport.shm.steps.RingSteps`."""

    @property
    def experts(self) -> Experts: ...
    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool: ...
    def begin_step(self, n_rows: int, tag: Tag) -> bool: ...
    def end_step(self) -> StepReport | None: ...


class CapturedSteps:
    """Steps over a `StepWay`. The step loop's alone."""

    def __init__(self, sender: Sender, way: StepWay) -> None:
        self._sender = sender
        self._way = way
        self.is_under_way = False
        self._owners: tuple[int, tuple[str, ...], NDArray[np.int64]] = (0, (), np.zeros((0, 0), np.int64))

    @property
    def experts(self) -> Experts:
        """What the steps are captured with."""
        return self._way.experts

    def begin(self, n_rows: int) -> bool:
        """Before a captured step of `n_rows` rows: whether the workers take part."""
        epoch = self._sender.enter()
        routes = self._sender.routes
        owner_LE = routes.fixed_owners()
        used = np.unique(owner_LE)  # a worker that owns nothing is not waited for
        workers = tuple(routes.workers[index] for index in used.tolist())
        placed_LE = np.searchsorted(used, owner_LE)
        is_ready = self._way.ready(workers, placed_LE.astype(np.int32))
        if is_ready and self._way.begin_step(n_rows, self._sender.tag(0, 0)):
            self._owners = (epoch, workers, placed_LE)
            self.is_under_way = True
            return True
        self._sender.views.leave(epoch)
        return False

    def end(self) -> bool:
        """After a captured step, which it waits for: False when it is void, since a worker did not answer in time."""
        report = self._way.end_step()
        self.is_under_way = False
        epoch, workers, placed_LE = self._owners
        self._sender.views.leave(epoch)
        counters = self._sender.counters
        if report is None:
            counters.void_steps += 1
            return False
        counters.captured_steps += 1
        counters.rows_LE += report.rows_LE
        counters.sent_bytes += report.sent_bytes
        counters.received_bytes += report.received_bytes
        counters.waited_seconds += report.waited_seconds
        for worker, seconds in zip(workers, report.compute_seconds, strict=False):  # a way may not say
            counters.compute_seconds[worker] += seconds
        rows_W = np.bincount(placed_LE.ravel(), report.rows_LE.ravel(), len(workers))
        for worker, rows in zip(workers, rows_W.tolist(), strict=True):
            counters.worker_rows[worker] = counters.worker_rows.get(worker, 0) + int(rows)
        return True
