"""Whole decoding steps, captured: whether the workers take part, and what is counted of them.

Legend: L layers, E experts, W workers that take part.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.placement.routes import Routes
from cluster.router.exchange.sender import Sender
from cluster.router.spans import RouterSpans
from workers.model.experts import Experts
from workers.transport.base import StepReport, StepTraffic, Tag


class StepWay(Protocol):
    """A way on which whole steps can be captured: `transport.device.way.DeviceWay`, `transport.shm.steps.RingSteps`,
    `transport.collective.steps.CollectiveSteps`."""

    name: str

    @property
    def experts(self) -> Experts | None:
        """What steps are captured with; None: nothing yet."""

    @property
    def key(self) -> Hashable:
        """What a step that is captured now is of use for. While a step is under way."""

    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool: ...
    def begin_step(self, n_rows: int, tag: Tag, limit_s: float) -> bool: ...
    def end_step(self) -> StepReport | None: ...


class _Step(NamedTuple):
    """A step under way."""

    began: float  # time.perf_counter()
    epoch: int
    routes: Routes
    owner_LE: NDArray[np.int64]
    workers: tuple[str, ...]
    placed_LE: NDArray[np.int64]  # which of `workers` each expert is computed by


class CapturedSteps:
    """Steps over a `StepWay`. The step loop's alone."""

    def __init__(self, sender: Sender, way: StepWay, spans: RouterSpans) -> None:
        self._sender = sender
        self._way = way
        self._spans = spans
        self._step: _Step | None = None

    @property
    def experts(self) -> Experts | None:
        """What the steps are captured with; None: nothing yet."""
        return self._way.experts

    @property
    def key(self) -> Hashable:
        """What the step under way may be captured for."""
        return self._way.key

    @property
    def is_under_way(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._step is not None

    def abandon(self) -> None:
        """The step that has begun, if there is one, failed; what the way lent to it is taken back."""
        if self._step is not None:
            self._step = None
            self._way.end_step()

    def begin(self, n_rows: int) -> bool:
        """Before a captured step of `n_rows` rows: whether the workers take part."""
        sender, way, began = self._sender, self._way, time.perf_counter()
        epoch = sender.enter()
        routes = sender.routes
        owner_LE = routes.step_owners()
        used = np.unique(owner_LE)  # a worker that owns nothing is not waited for
        workers = tuple(routes.workers[index] for index in used.tolist())
        placed_LE = np.searchsorted(used, owner_LE)
        limit_s = sender.pool.limit(n_rows, routes.all_have_others)
        if way.ready(workers, placed_LE.astype(np.int32)) and way.begin_step(n_rows, sender.tag(0, 0), limit_s):
            self._step = _Step(began, epoch, routes, owner_LE, workers, placed_LE)
            return True
        sender.views.leave(epoch)
        return False

    def end(self) -> bool:
        """After a captured step, which it waits for: False when it is void, since a worker did not answer in time."""
        assert self._step is not None
        step, self._step = self._step, None
        report, counters = self._way.end_step(), self._sender.counters
        self._sender.views.leave(step.epoch)
        if report is None:
            counters.void_steps += 1
            return False
        counters.captured_steps += 1
        counters.rows_LE += report.rows_LE
        step.routes.took(step.owner_LE, report.rows_LE)
        rows_LW = _by_worker(report.rows_LE, step.placed_LE, len(step.workers))
        for index, worker in enumerate(step.workers):
            counters.add_layers(worker, rows_LW[:, index])
            if report.traffic:
                self._count(step.routes, worker, rows_LW[:, index], report.traffic[index])
        if self._spans.is_tracing and report.traffic:
            seconds = [said.compute_seconds for said in report.traffic]
            work = zip(step.workers, seconds, rows_LW.sum(0).tolist(), strict=True)
            self._spans.captured(step.began, sum(said.waited_seconds for said in report.traffic), work)
        return True

    def _count(self, routes: Routes, worker: str, rows_L: NDArray[np.int64], said: StepTraffic) -> None:
        traffic, n_requests = self._sender.counters.of(worker, self._way.name), int(np.count_nonzero(rows_L))
        traffic.requests += n_requests
        traffic.sent_bytes += said.sent_bytes
        traffic.received_bytes += said.received_bytes
        traffic.wait_seconds += said.waited_seconds
        traffic.compute_seconds += said.compute_seconds
        if n_requests and routes.all_have_others:
            self._sender.pool.came(int(rows_L.sum()) // n_requests, said.waited_seconds / n_requests)


def _by_worker(rows_LE: NDArray[np.int64], placed_LE: NDArray[np.int64], n_workers: int) -> NDArray[np.int64]:
    """The rows of each worker [L, W]."""
    n_layers = len(rows_LE)
    flat = placed_LE + n_workers * np.arange(n_layers)[:, None]
    rows_LW = np.bincount(flat.ravel(), rows_LE.ravel(), n_layers * n_workers).astype(np.int64)
    return rows_LW.reshape(n_layers, n_workers)
