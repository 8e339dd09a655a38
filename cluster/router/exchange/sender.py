"""Rows on their way: tagged and sent under the view in force, and their replies taken in.

Legend: P pairs, D hidden size.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from cluster.placement.routes import Routes
from cluster.router.exchange.counters import Counters, Traffic
from cluster.router.exchange.views import Views
from cluster.router.exchange.worker_pool import Reply, WorkerPool
from workers.transport.base import Rows, Tag


class Part(NamedTuple):
    """One worker's share of a dispatch: the rows sent, and which rows of the result the reply is."""

    rows: Rows
    at: slice | Tensor
    reply: Reply
    traffic: Traffic


class Sender:
    """The step loop's way to the workers: the routes of the view in force, the pool, and what is counted of both."""

    def __init__(self, views: Views, pool: WorkerPool, counters: Counters) -> None:
        self.views = views
        self.pool = pool
        self.counters = counters
        self._router = secrets.randbits(64)
        self._step = 0
        self._part = 0
        self._may_have_left = False  # whether the pool may have workers that are not in the view any more
        self._connect()

    def begin_step(self, step: int) -> None:
        """Number what follows. What the step before sent and did not take in is given up."""
        self.views.abandon()
        self.pool.abandon()
        if step != self._step:  # else it is computed again: no late reply of the first time is taken for another's
            self._step, self._part = step, 0

    def enter(self) -> int:
        """Put the newest view in force; a dispatch under its epoch is outstanding until `Views.leave`."""
        epoch, changed = self.views.enter()
        if changed:
            self._connect()
        elif self.pool.ejected and self.pool.probe():
            self._reroute()
        if self._may_have_left and self.views.is_alone:
            self.pool.forget(self.views.current.placement.workers)
            self._may_have_left = False
        return epoch

    def follow(self, lost: Iterable[Part]) -> None:
        """Put the newest view in force within a dispatch, and try the ways that failed once more."""
        if self.views.take():
            self._connect()
        for worker in {part.reply.worker for part in lost} & set(self.pool.ejected):
            self.pool.reopen(worker)
        self._reroute()

    def tag(self, layer: int, attempt: int) -> Tag:
        """The name of the next message."""
        tag = Tag(self._router, self.views.current.placement.epoch, self._step, layer, self._part, attempt)
        self._part += 1
        return tag

    def room(self, worker: int, n_bytes: int) -> memoryview | None:
        """Where the next request to a worker of `routes` may be laid out; see `Transport.room`."""
        return self.pool.transport.room(self.routes.workers[worker], n_bytes)

    def send(self, worker: int, rows: Rows, at: slice | Tensor, out_PD: Tensor) -> Part:
        """Send `rows` to a worker of `routes`; a loss shows in the reply."""
        name, pool = self.routes.workers[worker], self.pool
        began = time.perf_counter()
        reply = pool.send(name, rows, out_PD, self.routes.has_others(rows.tag.layer, worker))
        traffic = self.counters.of(name, pool.transport.way(name))
        traffic.requests += 1
        traffic.sent_bytes += rows.n_bytes
        traffic.dispatch_seconds += time.perf_counter() - began
        return Part(rows, at, reply, traffic)

    def receive(self, parts: Iterable[Part], rows_PD: Tensor) -> list[Part]:
        """Wait for the replies and put them in their places; returns the parts that were lost."""
        counters = self.counters
        lost = []
        now = time.perf_counter()
        for part in parts:
            reply, traffic, began = part.reply, part.traffic, now
            self.pool.wait(reply)
            now = time.perf_counter()
            traffic.wait_seconds += now - began
            if reply.loss is not None:
                if reply.is_late:
                    (counters.hedged if reply.has_other else counters.late)[reply.worker] += 1
                lost.append(part)
                continue
            if not isinstance(part.at, slice):
                rows_PD.index_copy_(0, part.at.to(rows_PD.device), reply.out_PD.to(rows_PD.device))
            traffic.received_bytes += reply.out_PD.nbytes
            traffic.compute_seconds += reply.compute_ns / 1e9
            counters.add_rows(reply.worker, part.rows.tag.layer, part.rows.n_pairs)
        return lost

    def _connect(self) -> None:
        """Follow the view in force. Workers that left it are forgotten by the next dispatch that is alone in flight."""
        self.pool.update(self.views.current.addresses)
        self._may_have_left = True
        self._reroute()

    def _reroute(self) -> None:
        self.routes = Routes(self.views.current.placement, self.pool.ejected, self.pool.silent)
