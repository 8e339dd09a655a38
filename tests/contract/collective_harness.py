"""Expert workers in process groups over gloo, and what the controller does for them: the next group when one is due."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.contract.harness import GatedShard, gated
from tests.contract.model import Model
from workers.errors import GroupLost, WorkerLost
from workers.shard import ExpertShard
from workers.transport.base import Received, Rows, Tag, Transport
from workers.transport.collective import ranks
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import Group, host_store
from workers.transport.collective.server import CollectiveServer
from workers.transport.collective.steps import CollectiveSteps

_HOST = "127.0.0.1"
_READY_S = 20
_DEADLINE_S = 1.0


class CollectiveWorkers:
    """Servers and routers of this process; their ranks reach each other through the network stack."""

    steps = False  # whether whole steps go over the groups too

    def __init__(self, model: Model) -> None:
        self.model = model
        self.addresses: dict[str, str] = {}
        self.shards: dict[str, GatedShard] = {}
        self.number = 0
        self._servers: dict[str, CollectiveServer] = {}
        self._transports: dict[str, CollectiveTransport] = {}
        self._store, self._store_address = host_store(_HOST)
        self._lock = threading.RLock()
        self._numbers = count()
        self._started = 0
        self._closed = False

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        self.shards[worker] = gated(self.model, experts)
        server = CollectiveServer(
            self.shards[worker], worker, _HOST, deadline_s=_DEADLINE_S, steps=self.steps, on_change=self._look
        )
        self._servers[worker] = server
        self._servers[worker].start()
        self._started += 1
        self.addresses[worker] = f"{self._servers[worker].address}/{self._started}"
        self.regroup()

    def kill(self, worker: str) -> None:
        self.shards.pop(worker).open.set()
        del self.addresses[worker]
        with self._lock:
            server = self._servers.pop(worker)
        server.stop(0)
        self.regroup()

    def shard(self, worker: str) -> ExpertShard:
        return self.shards[worker]

    def transport(self) -> Transport:
        name = f"router-{next(self._numbers)}"  # asked by threads at once
        transport = self._make(name)
        with self._lock:
            self._transports[name] = transport
        self.regroup()
        return transport

    def _make(self, router: str) -> CollectiveTransport:
        return CollectiveTransport(router, _HOST, deadline_s=_DEADLINE_S, steps=self.steps, on_change=self._look)

    @property
    def routers(self) -> list[CollectiveTransport]:
        return list(self._transports.values())

    @property
    def servers(self) -> list[CollectiveServer]:
        return list(self._servers.values())

    def regroup(self) -> None:
        """The next group, ready."""
        self._regroup()
        self._await_group()

    def close(self) -> None:
        self._closed = True
        for shard in self.shards.values():
            shard.open.set()
        for transport in self._transports.values():
            transport.close()
        for server in self._servers.values():
            server.stop(0)

    def _look(self) -> None:
        with self._lock:
            members = [*self._transports.values(), *self._servers.values()]
            if not self._closed and any(member.broken == self.number for member in members):
                self._regroup()

    def _regroup(self) -> None:
        with self._lock:
            if not self._servers or not self._transports:
                return
            self.number += 1
            routers, servers = tuple(self._transports), tuple(self._servers)
            pids = (os.getpid(),) * len(routers + servers)
            group = Group(self.number, self._store_address, routers, servers, pids)
            for member in (*self._transports.values(), *self._servers.values()):
                member.join(group)

    def _await_group(self) -> None:
        deadline = time.monotonic() + _READY_S
        while self._servers and any(transport.ready < self.number for transport in self._transports.values()):
            assert time.monotonic() < deadline, f"group {self.number} does not become ready"
            time.sleep(0.002)


class CollectiveStepWorkers(CollectiveWorkers):
    """Each request is a step of its own, as a GPU's are captured, in which one layer has rows."""

    steps = True

    def _make(self, router: str) -> CollectiveTransport:
        return _StepTransport(self.model, router, _HOST, deadline_s=_DEADLINE_S, steps=True, on_change=self._look)


class _StepTransport(CollectiveTransport):
    """A `Transport` whose every request is a step of all workers of the group."""

    def __init__(self, model: Model, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._model = model
        self._replies: defaultdict[str, deque[tuple[Tag, Tensor | None]]] = defaultdict(deque)
        self._steps = CollectiveSteps(
            self, model.n_layers, model.n_experts, 1, model.hidden_size, model.dtype, limit_s=4, is_fused=False
        )

    def send(self, worker: str, rows: Rows) -> None:
        x_TD, token_P, expert_P = rows.request
        owners = np.zeros((self._model.n_layers, self._model.n_experts), np.int32)
        self.end(self._way(worker)[0])  # raises where there is none
        if not self._steps.ready((worker,), owners):
            raise GroupLost(worker, "there is no group")
        y_PD = self._step(rows.tag, x_TD.index_select(0, token_P), expert_P)
        if y_PD is None:  # void for want of room: there is twice as much now
            again = self._steps.ready((worker,), owners)
            y_PD = self._step(rows.tag, x_TD.index_select(0, token_P), expert_P) if again else None
        self._replies[worker].append((rows.tag, y_PD))

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        replies = self._replies[worker]
        while replies:
            sent, y_PD = replies.popleft()
            if sent != tag:
                self.dropped_replies += 1
            elif y_PD is None:
                raise (WorkerLost if self.answers(worker) else GroupLost)(worker, "its step was void")
            else:
                out_PD.copy_(y_PD)
                return Received(out_PD, 0)
        raise WorkerLost(worker, "nothing was sent")

    def connect(self, worker: str, address: str) -> None:
        super().connect(worker, address)
        self._replies[worker].clear()

    def _step(self, tag: Tag, x_PD: Tensor, expert_P: Tensor) -> Tensor | None:
        """The unweighted rows; None where the step is void."""
        steps, y_PD = self._steps, x_PD
        if not steps.begin_step(len(x_PD), tag, 1.0):
            return None
        experts = steps.experts
        assert experts is not None
        for layer in range(self._model.n_layers):
            ids_P1 = (expert_P if layer == tag.layer else torch.full_like(expert_P, -1))[:, None]
            found = experts.combine(experts.dispatch(layer, x_PD, ids_P1, torch.ones(len(x_PD), 1)))
            assert isinstance(found, Tensor)
            y_PD = found if layer == tag.layer else y_PD
        return None if steps.end_step() is None else y_PD


class RowsApartWorkers(CollectiveWorkers):
    """As on GPUs: rows travel apart from their headers, in a group for each direction; gloo plays NCCL."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._row_groups = ranks.row_groups
        ranks.row_groups = _gloo_row_groups

    def close(self) -> None:
        super().close()
        ranks.row_groups = self._row_groups


def _gloo_row_groups(device: torch.device, group: Group, rank: int, store: Any) -> dict[ranks.Lane, Any]:
    lanes, size, interface = (ranks.Lane.REQUEST, ranks.Lane.REPLY), len(group.members), ranks.gloo_interface(_HOST)
    return {lane: ranks.gloo_group(store, f"{group.number}-{lane.name}", rank, size, interface, 20) for lane in lanes}
