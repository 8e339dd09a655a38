"""The contract over steps through shared memory: each request is a step of its own, in which one layer has rows.

What a GPU does with a captured step, by the same protocol in host memory: offers, agreement, flags, void steps.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from tests.contract.model import Model
from workers.errors import WorkerLost
from workers.shard import ExpertShard
from workers.transport.base import Received, Rows, Tag
from workers.transport.device.offer import Shape
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay

_LIMIT_S = 0.5
_MOST_PAIRS = 16384


class StepTransport:
    """A `Transport` whose every request is a step, of whoever asks."""

    def __init__(self, model: Model, servers: Mapping[str, DeviceServer]) -> None:
        self.dropped_replies = 0
        self._model = model
        self._servers = servers
        self._ways: dict[str, tuple[DeviceWay, DeviceServer]] = {}
        self._replies: dict[str, deque[tuple[Tag, Tensor | None]]] = {}

    def connect(self, worker: str, address: str) -> None:
        server = self._servers.get(worker)
        if server is None or (worker in self._ways and self._ways[worker][1] is server):
            return
        model = self._model
        shape = Shape(model.n_layers, model.n_experts, 1, model.hidden_size, model.dtype, _MOST_PAIRS)
        way = DeviceWay(shape, torch.device("cpu"), _LIMIT_S, StreamRows())
        offered = way.offer(worker)
        assert offered is not None
        joining = server.accept(json.loads(offered.text)["steps"], "router")
        joining.start()
        offered.accepted(json.dumps({"steps": joining.text, "other": ""}))
        self._ways[worker], self._replies[worker] = (way, server), deque()

    def disconnect(self, worker: str) -> None:
        self._ways.pop(worker, None)
        self._replies.pop(worker, None)

    def way(self, worker: str) -> str:
        return "local"

    def answers(self, worker: str) -> bool:
        return worker in self._ways

    @property
    def unreachable(self) -> Mapping[str, str]:
        return {}

    def room(self, worker: str, n_bytes: int) -> None:
        return None

    def send(self, worker: str, rows: Rows) -> None:
        if worker not in self._ways:
            raise WorkerLost(worker, "not connected")
        x_TD, token_P, expert_P = rows.request
        y_PD = self._step(worker, rows.tag.layer, x_TD.index_select(0, token_P), expert_P)
        self._replies[worker].append((rows.tag, y_PD))

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        replies = self._replies.get(worker, deque())
        while replies:
            sent, y_PD = replies.popleft()
            if sent != tag:
                self.dropped_replies += 1
            elif y_PD is None:
                break
            else:
                out_PD.copy_(y_PD)
                return Received(out_PD, 0)
        raise WorkerLost(worker, "its step was void")

    def close(self) -> None:
        self._ways.clear()

    def _step(self, worker: str, layer: int, x_PD: Tensor, expert_P: Tensor) -> Tensor | None:
        """The unweighted rows; None where the step is void."""
        way, model = self._ways[worker][0], self._model
        owners = np.zeros((model.n_layers, model.n_experts), np.int32)
        end = time.monotonic() + 4 * _LIMIT_S
        while not way.ready((worker,), owners):
            if time.monotonic() > end:
                return None
            time.sleep(0.002)
        if not way.begin_step(len(x_PD), Tag(0, 0, 0, 0, 0, 0), 1.0):
            return None
        y_PD = x_PD
        for each in range(model.n_layers):
            ids_P1 = (expert_P if each == layer else torch.full_like(expert_P, -1))[:, None]
            found = way.experts.combine(way.experts.dispatch(each, x_PD, ids_P1, torch.ones(len(x_PD), 1)))
            assert isinstance(found, Tensor)
            y_PD = found if each == layer else y_PD
        return None if way.end_step() is None else y_PD


class StepWorkers:
    """Servers of steps in this process; what they share with routers is opened as another process would."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.addresses: dict[str, str] = {}
        self._servers: dict[str, DeviceServer] = {}
        self._shards: dict[str, ExpertShard] = {}
        self._started = 0

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        self._shards[worker] = self.model.shard(experts)
        self._servers[worker] = DeviceServer(self._shards[worker], _LIMIT_S)
        self._started += 1
        self.addresses[worker] = f"steps-{self._started}"

    def kill(self, worker: str) -> None:
        self._servers.pop(worker).close()
        del self._shards[worker], self.addresses[worker]

    def shard(self, worker: str) -> ExpertShard:
        return self._shards[worker]

    def transport(self) -> StepTransport:
        return StepTransport(self.model, self._servers)

    def close(self) -> None:
        for worker in list(self._servers):
            self.kill(worker)
