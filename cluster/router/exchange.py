"""The exchange: rows to the workers that hold their experts, and what comes back as one sum per row.

Legend: T token rows, K experts a token, P pairs, D hidden size, L layers, E experts.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.placement.load import Load, LoadMeter
from cluster.placement.placement import Placement
from cluster.placement.routes import Routes
from cluster.router.split import rows_of, split
from cluster.router.worker_pool import Reply, WorkerPool
from workers.errors import WorkerLost
from workers.kernels.dispatch import Plan
from workers.kernels.ops import Ops
from workers.kernels.select import ops_for
from workers.model.experts import Experts
from workers.transport.base import Rows, StepReport, Tag, Transport

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0
_ROWS_PER_EXPERT = 128


class View(NamedTuple):
    """A placement, and where its workers are. A worker without an address is known to be away."""

    placement: Placement
    addresses: Mapping[str, str]


class Part(NamedTuple):
    """One worker's share of a dispatch: the rows sent, and which rows of the result the reply is."""

    rows: Rows
    at: slice | Tensor
    reply: Reply


class Dispatched(NamedTuple):
    """A dispatch in flight: what `combine` needs. Combined best in the order of dispatch."""

    epoch: int
    rows_PD: Tensor  # every pair's row, as the workers give it
    parts: tuple[Part, ...]
    plan: Plan | None  # where the rows belong; None: no rows


@dataclass(slots=True)
class Counters:
    """Sums since start, for observability. Written by the step loop alone."""

    rows_LE: NDArray[np.int64]  # rows dispatched to each expert
    worker_rows: dict[str, int] = field(default_factory=dict)  # rows sent to each worker, one for each of their experts
    captured_steps: int = 0
    void_steps: int = 0  # captured steps that a worker did not answer in time, and that were computed again
    repairs: int = 0  # parts sent again after a loss
    sent_bytes: int = 0
    received_bytes: int = 0
    waited_seconds: float = 0.0  # for replies
    repair_seconds: float = 0.0  # from a loss to the reply of another replica or of the worker that came back
    compute_seconds: defaultdict[str, float] = field(
        default_factory=lambda: defaultdict(float)
    )  # by worker, as it says


class StepWay(Protocol):
    """A way on which whole steps can be captured: `transport.device.way.DeviceWay`, `transport.shm.steps.RingSteps`."""

    @property
    def experts(self) -> Experts: ...
    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool: ...
    def begin_step(self, n_rows: int, tag: Tag) -> bool: ...
    def end_step(self) -> StepReport | None: ...


class Exchange:
    """The `Experts` of a router: `dispatch` sends rows to expert workers, `combine` waits for them and adds them up.

    The step loop owns it; only `publish`, `epoch` and `close` are for other threads. A lost or late reply is repaired
    within `combine`: the same rows go to another replica, or wait until there is one.
    """

    only_launches = False

    def __init__(
        self,
        placement: Placement,
        addresses: Mapping[str, str],
        transport: Transport,
        *,
        reply_timeout_s: float,
        rejoin_timeout_s: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        step_way: StepWay | None = None,
    ) -> None:
        """`device`, `dtype`: of the rows. `step_way`: how captured steps reach the workers."""
        self._step_way = step_way
        self._step_owners: tuple[int, tuple[str, ...], NDArray[np.int64]] = (0, (), np.zeros((0, 0), np.int64))
        self._pool = WorkerPool(transport, reply_timeout_s)
        self._rejoin_timeout_s = rejoin_timeout_s
        self._router = secrets.randbits(64)
        self._step = 0
        self._part = 0
        self._is_captured = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._outstanding: Counter[int] = Counter()  # dispatches not yet combined, by epoch
        self._view = self._published = View(placement, dict(addresses))
        self._may_have_left = False  # whether the pool may have workers that are not in the view any more
        self._n_experts = placement.n_experts
        self.counters = Counters(np.zeros((len(placement.replicas), self._n_experts), np.int64))
        self._meter = LoadMeter(self.counters.rows_LE, self.counters.worker_rows)
        self._connect()
        self._ops = ops_for(device, dtype)  # loads the kernels too, so that no step waits for it

    @property
    def epoch(self) -> int:
        """The acknowledgement: no rows are, or will be, routed under an older epoch than this one."""
        with self._lock:
            return min((epoch for epoch, n in self._outstanding.items() if n), default=self._published.placement.epoch)

    def load(self) -> Load:
        """The rows of experts and workers. From any thread, but always the same one."""
        return self._meter.read()

    def numbers(self) -> dict[str, Any]:
        """How the exchange is doing, under the names of the generation service's DescribeReply. From any thread."""
        ejected = set(self._pool.ejected)
        return {
            "epoch": self.epoch,
            "connected": [worker for worker in self._published.placement.workers if worker not in ejected],
            "repairs": self.counters.repairs,
            "dropped_replies": self._pool.transport.dropped_replies,  # came when nobody awaited them any more
        }

    def publish(self, placement: Placement, addresses: Mapping[str, str]) -> None:
        """Put a placement and addresses in force from the next dispatch on. Called by any thread."""
        with self._changed:
            self._published = View(placement, dict(addresses))
            self._changed.notify_all()

    def begin_step(self, step: int) -> None:
        """Number the dispatches that follow. What the step before dispatched and did not combine is given up."""
        with self._lock:
            self._outstanding.clear()
        self._pool.abandon()
        self._step = step
        self._part = 0
        self._is_captured = False

    def close(self) -> None:
        """Let a step that waits for a worker fail at once. The transport is the owner's to close."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def steps(self) -> Experts | None:
        """What decoding steps are captured with; None: they are not."""
        return None if self._step_way is None else self._step_way.experts

    def begin_steps(self, n_rows: int) -> bool:
        """Before a captured step of `n_rows` rows: whether the workers take part; else it goes layer by layer."""
        if self._step_way is None:
            return False
        epoch = self._enter()
        owner_LE = self._routes.fixed_owners()
        used = np.unique(owner_LE)  # a worker that owns nothing is not waited for
        workers = tuple(self._routes.workers[index] for index in used.tolist())
        placed_LE = np.searchsorted(used, owner_LE)
        if self._step_way.ready(workers, placed_LE.astype(np.int32)) and self._step_way.begin_step(
            n_rows, self._tag(0, 0)
        ):
            self._step_owners = (epoch, workers, placed_LE)
            self._is_captured = True
            return True
        self._leave(epoch)
        return False

    def end_steps(self) -> bool:
        """After a captured step, which it waits for: False when it is void, since a worker did not answer in time."""
        assert self._step_way is not None
        report, counters = self._step_way.end_step(), self.counters
        self._is_captured = False
        epoch, workers, placed_LE = self._step_owners
        self._leave(epoch)
        if report is None:
            counters.void_steps += 1
            return False
        counters.captured_steps += 1
        counters.rows_LE += report.rows_LE
        counters.sent_bytes += report.sent_bytes
        counters.received_bytes += report.received_bytes
        counters.waited_seconds += report.waited_seconds
        for worker, seconds in zip(workers, report.compute_seconds, strict=False):
            counters.compute_seconds[worker] += seconds
        rows_W = np.bincount(placed_LE.ravel(), report.rows_LE.ravel(), len(workers))
        for worker, rows in zip(workers, rows_W.tolist(), strict=True):
            counters.worker_rows[worker] = counters.worker_rows.get(worker, 0) + int(rows)
        return True

    def _leave(self, epoch: int) -> None:
        with self._lock:
            self._outstanding[epoch] -= 1

    def by(self, ops: Ops) -> Experts | None:
        """Those of a captured step while there is one: between `begin_steps` and `end_steps`."""
        return self._step_way.experts.by(ops) if self._is_captured and self._step_way is not None else None

    def micro_batches(self, n_rows: int) -> int:
        """Two for large prefills, else one.

        Each of two micro-batches reads the weights of nearly every expert once more. That is hidden only when an
        expert has so many rows that it computes rather than reads.
        """
        return 2 if n_rows >= _ROWS_PER_EXPERT * self._n_experts else 1

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Send the rows to the workers of their experts and return at once; see `workers.model.experts.Experts`."""
        epoch = self._enter()
        if not len(x_TD):
            return Dispatched(epoch, torch.empty_like(x_TD), (), None)
        ids_TK = expert_ids_TK.cpu()
        routes = self._routes
        rows_E = np.bincount(ids_TK.numpy().ravel(), minlength=self._n_experts) if routes.has_choice(layer) else None
        owner_E, counter_E = routes.owners(layer, rows_E), self.counters.rows_LE[layer]
        new_tag = partial(self._tag, layer, 0)
        split_W, plan = split(
            self._ops, x_TD, ids_TK, weights_TK.cpu(), owner_E, len(routes.workers), counter_E, new_tag, self._room
        )
        rows_PD = x_TD.new_empty(plan.n_pairs, x_TD.shape[1])
        parts = []
        first = 0
        for worker, rows in split_W:
            at = slice(first, first := first + rows.n_pairs)
            out_PD = rows_PD if rows.n_pairs == plan.n_pairs else rows_PD[at]
            parts.append(self._send(worker, rows, at, out_PD))
        return Dispatched(epoch, rows_PD, tuple(parts), plan)

    def combine(self, handle: Dispatched) -> Tensor:
        """y_TD, in the dtype of the rows; see `workers.model.experts.Experts`.

        Raises WorkerLost when experts stay without a live replica for longer than the rejoin timeout.
        """
        y_TD = handle.rows_PD
        if handle.plan is not None:
            parts, rows_PD = handle.parts, handle.rows_PD
            if lost := self._receive(parts, rows_PD):
                for part in parts:  # what the transport has of them does not outlive the replies to come
                    if part.reply.loss is None:
                        rows_PD[part.at] = part.reply.out_PD
                self._repair(lost, rows_PD)
                y_TD = self._ops.weighted_sum((rows_PD,), handle.plan)
            else:
                y_TD = self._ops.weighted_sum([part.reply.out_PD for part in parts], handle.plan)
        self._leave(handle.epoch)
        return y_TD

    def _enter(self) -> int:
        """Put the newest view in force; a dispatch under its epoch is outstanding from now on."""
        with self._lock:
            changed = self._published is not self._view
            self._view = self._published
            epoch = self._view.placement.epoch
            self._outstanding[epoch] += 1
        if changed:
            self._connect()
        elif self._pool.ejected and self._pool.probe():
            self._routes = Routes(self._view.placement, self._pool.ejected)
        if self._may_have_left and self._outstanding.total() == 1:
            self._pool.forget(self._view.placement.workers)
            self._may_have_left = False
        return epoch

    def _connect(self) -> None:
        """Follow the view in force. Workers that left it are forgotten by the next dispatch that is alone in flight."""
        self._pool.update(self._view.addresses)
        self._may_have_left = True
        self._routes = Routes(self._view.placement, self._pool.ejected)

    def _tag(self, layer: int, attempt: int) -> Tag:
        tag = Tag(self._router, self._view.placement.epoch, self._step, layer, self._part, attempt)
        self._part += 1
        return tag

    def _room(self, worker: int, n_bytes: int) -> memoryview | None:
        return self._pool.transport.room(self._routes.workers[worker], n_bytes)

    def _send(self, worker: int, rows: Rows, at: slice | Tensor, out_PD: Tensor) -> Part:
        name, counters = self._routes.workers[worker], self.counters
        counters.sent_bytes += rows.n_bytes
        counters.worker_rows[name] = counters.worker_rows.get(name, 0) + rows.n_pairs
        return Part(rows, at, self._pool.send(name, rows, out_PD))

    def _receive(self, parts: Iterable[Part], rows_PD: Tensor) -> list[Part]:
        """Wait for the replies and put them in their places; returns the parts that were lost."""
        counters = self.counters
        lost = []
        began = time.perf_counter()
        for part in parts:
            reply = part.reply
            self._pool.wait(reply)
            if reply.loss is not None:
                lost.append(part)
                continue
            if not isinstance(part.at, slice):
                rows_PD.index_copy_(0, part.at.to(rows_PD.device), reply.out_PD.to(rows_PD.device))
            counters.received_bytes += reply.out_PD.nbytes
            counters.compute_seconds[reply.worker] += reply.compute_ns / 1e9
        counters.waited_seconds += time.perf_counter() - began
        return lost

    def _repair(self, lost: list[Part], rows_PD: Tensor) -> None:
        """Send lost parts to other replicas, or to the same worker when it is back, until nothing is missing."""
        began = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        while lost:
            self.counters.repairs += len(lost)
            self._follow(lost)
            lost = self._receive([again for part in lost for again in self._resend(part)], rows_PD)
            if not lost:
                break
            left = began + self._rejoin_timeout_s - time.monotonic()
            if left <= 0 or self._closed:
                raise self._given_up(lost[0])
            with self._changed:
                if not self._changed.wait_for(self._has_news, min(pause_s, left)):
                    pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        self.counters.repair_seconds += time.monotonic() - began

    def _given_up(self, part: Part) -> WorkerLost:
        assert part.reply.loss is not None
        where = f"layer {part.rows.tag.layer}, experts {np.unique(part.rows.request.expert_P.numpy()).tolist()}"
        reason = f"{where}: no replica within {self._rejoin_timeout_s:g} s; {part.reply.loss.reason}"
        return WorkerLost(part.reply.worker, reason)

    def _has_news(self) -> bool:
        return self._published is not self._view or self._closed

    def _follow(self, lost: Iterable[Part]) -> None:
        """Put the newest view in force and try the ways that failed once more."""
        if self._published is not self._view:
            self._view = self._published
            self._connect()
        for worker in {part.reply.worker for part in lost} & set(self._pool.ejected):
            self._pool.reopen(worker)
        self._routes = Routes(self._view.placement, self._pool.ejected)

    def _resend(self, part: Part) -> list[Part]:
        """The rows of `part` on the way to whoever holds their experts now, one part for each."""
        x_TD, token_P, expert_P = part.rows.request
        layer, attempt = part.rows.tag.layer, part.rows.tag.attempt + 1
        rows_E = np.bincount(expert_P.numpy(), minlength=self._n_experts)
        owner_P = torch.from_numpy(self._routes.owners(layer, rows_E))[expert_P]
        at_P = torch.arange(part.at.start, part.at.stop) if isinstance(part.at, slice) else part.at
        parts = []
        for worker in np.unique(owner_P.numpy()).tolist():
            chosen_P = owner_P == worker
            rows = rows_of(self._tag(layer, attempt), x_TD, token_P[chosen_P], expert_P[chosen_P])
            parts.append(self._send(worker, rows, at_P[chosen_P], x_TD.new_empty(rows.n_pairs, x_TD.shape[1])))
        return parts
