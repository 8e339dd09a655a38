"""The exchange: rows to the workers that hold their experts, and what comes back as one sum per row.

Legend: T token rows, K experts a token, P pairs, D hidden size, L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster.placement.load import Load, LoadMeter
from cluster.placement.placement import Placement
from cluster.router.exchange.captured_steps import CapturedSteps, StepWay
from cluster.router.exchange.counters import Counters
from cluster.router.exchange.repair import repair
from cluster.router.exchange.sender import Part, Sender
from cluster.router.exchange.split import split
from cluster.router.exchange.views import View, Views
from cluster.router.exchange.worker_pool import WorkerPool
from cluster.router.spans import RouterSpans
from workers.device import host_rows, on_host, to_device
from workers.kernels.dispatch import Plan
from workers.kernels.ops import Ops
from workers.kernels.select import ops_for
from workers.model.experts import Experts
from workers.transport.base import Transport

_ROWS_PER_EXPERT = 128


class Dispatched(NamedTuple):
    """A dispatch in flight: what `combine` needs. Combined best in the order of dispatch."""

    epoch: int
    began: float  # time.perf_counter()
    rows_PD: Tensor  # every pair's row, as the workers give it
    parts: tuple[Part, ...]
    plan: Plan | None  # where the rows belong; None: no rows


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
        rows_on: str = "cpu",
        step_way: StepWay | None = None,
        spans: RouterSpans | None = None,
    ) -> None:
        """`device`, `dtype`: of the rows. `rows_on`: "cuda" where the transport takes them from a GPU. `step_way`: how
        captured steps reach the workers. `spans`: of the router."""
        self.spans = spans or RouterSpans()
        self._rejoin_timeout_s = rejoin_timeout_s
        self._n_experts = placement.n_experts
        self._rows_on = rows_on
        self.counters = Counters(np.zeros((len(placement.replicas), self._n_experts), np.int64))
        self._meter = LoadMeter(self.counters.rows_LE.copy, self.counters.worker_rows)
        self._views = Views(View(placement, dict(addresses)))
        self._pool = WorkerPool(transport, reply_timeout_s)
        self._sender = Sender(self._views, self._pool, self.counters)
        self._captured = None if step_way is None else CapturedSteps(self._sender, step_way, self.spans)
        self._ops = ops_for(device, dtype)  # loads the kernels too, so that no step waits for it

    @property
    def epoch(self) -> int:
        """The acknowledgement: no rows are, or will be, routed under an older epoch than this one."""
        return self._views.epoch

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers of the newest placement."""
        return self._views.published.placement.workers

    @property
    def ejected(self) -> frozenset[str]:
        """Workers that are passed over where another replica can take their rows."""
        return frozenset(self._pool.ejected)

    @property
    def dense_layers(self) -> frozenset[int]:
        """Layers without experts."""
        replicas = self._views.published.placement.replicas
        return frozenset(layer for layer, experts in enumerate(replicas) if not experts)

    @property
    def dropped_replies(self) -> int:
        """Replies that came when nobody awaited them any more."""
        return self._pool.transport.dropped_replies

    @property
    def unreachable(self) -> frozenset[str]:
        """Expert workers that do not answer this router where the newest view has them. From any thread."""
        addresses = self._views.published.addresses
        silent = self._pool.transport.unreachable.items()
        return frozenset(worker for worker, address in silent if addresses.get(worker) == address)

    def load(self) -> Load:
        """The rows of experts and workers. From any thread, but always the same one."""
        return self._meter.read()

    def numbers(self) -> dict[str, Any]:
        """How the exchange is doing, under the names of the generation service's DescribeReply. From any thread."""
        ejected = self.ejected
        return {
            "epoch": self.epoch,
            "connected": [worker for worker in self.workers if worker not in ejected],
            "repairs": self.counters.repairs,
            "dropped_replies": self.dropped_replies,
        }

    def publish(self, placement: Placement, addresses: Mapping[str, str]) -> None:
        """Put a placement and addresses in force from the next dispatch on. Called by any thread."""
        self._views.publish(View(placement, dict(addresses)))

    def begin_step(self, step: int) -> None:
        """Number the dispatches that follow. What the step before dispatched and did not combine is given up."""
        self._sender.begin_step(step)
        if self._captured is not None:
            self._captured.abandon()

    def close(self) -> None:
        """Let a step that waits for a worker fail at once. The transport is the owner's to close."""
        self._views.close()

    @property
    def captures_steps(self) -> bool:
        """Whether decoding steps are captured whole, the exchange included."""
        return self._captured is not None

    @property
    def steps(self) -> Experts | None:
        """What decoding steps are captured with; None: nothing yet, or they are not."""
        return None if self._captured is None else self._captured.experts

    @property
    def steps_key(self) -> Hashable:
        """What the captured step under way is of use for; another key needs another capture."""
        return None if self._captured is None else self._captured.key

    def begin_steps(self, n_rows: int) -> bool:
        """Before a captured step of `n_rows` rows: whether the workers take part; else it goes layer by layer."""
        return self._captured is not None and self._captured.begin(n_rows)

    def end_steps(self) -> bool:
        """After a captured step, which it waits for: False when it is void, since a worker did not answer in time."""
        assert self._captured is not None
        return self._captured.end()

    def by(self, ops: Ops) -> Experts | None:
        """Those of a captured step while one is under way: between `begin_steps` and `end_steps`."""
        captured = self._captured
        experts = None if captured is None or not captured.is_under_way else captured.experts
        return None if experts is None else experts.by(ops)

    def micro_batches(self, n_rows: int) -> int:
        """Two for large prefills, else one.

        Each of two micro-batches reads the weights of nearly every expert once more. That is hidden only when an
        expert has so many rows that it computes rather than reads.
        """
        return 2 if n_rows >= _ROWS_PER_EXPERT * self._n_experts else 1

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Send the rows to the workers of their experts and return at once; see `workers.model.experts.Experts`."""
        sender, began = self._sender, time.perf_counter()
        epoch = sender.enter()
        if not len(x_TD):
            return Dispatched(epoch, began, torch.empty_like(x_TD), (), None)
        if self._rows_on == "cpu":  # one wait for all; what comes back goes to the device without any
            x_TD, ids_TK, weights_TK = on_host(x_TD, expert_ids_TK, weights_TK)
        else:
            ids_TK, weights_TK = on_host(expert_ids_TK, weights_TK)
        routes = sender.routes
        rows_E = np.bincount(ids_TK.numpy().ravel(), minlength=self._n_experts) if routes.has_choice(layer) else None
        owner_E, counter_E = routes.owners(layer, rows_E), self.counters.rows_LE[layer]
        new_tag = partial(sender.tag, layer, 0)
        split_W, plan = split(
            self._ops, x_TD, ids_TK, weights_TK, owner_E, len(routes.workers), counter_E, new_tag, sender.room
        )
        width, dtype = x_TD.shape[1], x_TD.dtype
        if self._rows_on == "cpu":
            rows_PD = host_rows(plan.n_pairs, width, dtype, self._ops.device)
        else:
            rows_PD = x_TD.new_empty(plan.n_pairs, width)
        self.counters.split_seconds += time.perf_counter() - began
        parts = []
        first = 0
        for worker, rows in split_W:
            at = slice(first, first := first + rows.n_pairs)
            out_PD = rows_PD if rows.n_pairs == plan.n_pairs else rows_PD[at]
            parts.append(sender.send(worker, rows, at, out_PD))
        return Dispatched(epoch, began, rows_PD, tuple(parts), plan)

    def combine(self, handle: Dispatched) -> Tensor:
        """y_TD, in the dtype of the rows; see `workers.model.experts.Experts`.

        Raises WorkerLost when experts stay without a live replica for longer than the rejoin timeout.
        """
        y_TD = handle.rows_PD
        if handle.plan is not None:
            parts, rows_PD, counters = handle.parts, handle.rows_PD, self.counters
            if lost := self._sender.receive(parts, rows_PD):
                for part in parts:  # what the transport has of them does not outlive the replies to come
                    if part.reply.loss is None:
                        rows_PD[part.at] = part.reply.out_PD
                repair(self._sender, lost, rows_PD, self._rejoin_timeout_s)
                given: list[Tensor] = [rows_PD]
            else:
                given = [part.reply.out_PD for part in parts]
            received = time.perf_counter()
            y_TD = self._ops.weighted_sum([to_device(rows, self._ops.device) for rows in given], handle.plan)
            now = time.perf_counter()
            counters.combine_seconds += now - received
            counters.exchanges.add(now - handle.began)
            if self.spans.is_tracing:
                self.spans.exchange(parts, handle.began, now)
        self._views.leave(handle.epoch)
        return y_TD
