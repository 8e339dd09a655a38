"""The same cluster of expert workers behind every transport: what a test of the contract needs of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from cluster.placement.placement import Placement
from tests.contract.local_transport import LocalTransport
from tests.contract.model import Model
from tests.credentials import CREDENTIALS, PATIENT_S
from workers.kernels.mutex import Mutex
from workers.shard import ExpertShard
from workers.spec import ModelSpec
from workers.transport.base import Acceptor, FastWay, Transport
from workers.transport.batcher import Batcher
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.router import ShmWay
from workers.transport.shm.worker import ShmAcceptor

MODEL_NAME = "tests"


class Workers(Protocol):
    """Running expert workers, by name."""

    addresses: dict[str, str]

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        """Start `worker` with a shard, at a new address."""

    def kill(self, worker: str) -> None:
        """End `worker` without a word."""

    def shard(self, worker: str) -> ExpertShard:
        """What `worker` holds."""

    def transport(self) -> Transport:
        """A new router's way to the workers."""

    def close(self) -> None:
        """End everything."""


class Gate(threading.Event):
    """Open when set. What kernels answer by themselves goes another way while it is shut: they need its lock."""

    def __init__(self, lock: Mutex) -> None:
        super().__init__()
        self._lock = lock
        self._held = False

    def clear(self) -> None:
        super().clear()
        self._held = self._held or self._lock.acquire()

    def set(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()
        super().set()


class GatedShard(ExpertShard):
    """A shard that can be held up, to make a reply late."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.open = Gate(self._lock)
        self.open.set()

    def answer(self, message: memoryview) -> memoryview | None:
        self.open.wait(20)
        return super().answer(message)

    def forward(
        self, layer: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor:
        self.open.wait(20)
        return super().forward(layer, x_TD, token_P, expert_P, out_PD)


def gated(model: Model, experts: Iterable[tuple[int, int]]) -> GatedShard:
    shard = GatedShard(model.spec())
    for layer, expert in experts:
        shard.load(layer, expert, model.weights(layer, expert))
    return shard


class LocalWorkers:
    """Shards of this process."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.addresses: dict[str, str] = {}
        self._shards: dict[str, ExpertShard] = {}
        self._transports: list[Transport] = []
        self._started = 0

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        self._shards[worker] = self.model.shard(experts)
        self._started += 1
        self.addresses[worker] = f"local-{self._started}"

    def kill(self, worker: str) -> None:
        del self._shards[worker], self.addresses[worker]

    def shard(self, worker: str) -> ExpertShard:
        return self._shards[worker]

    def transport(self) -> Transport:
        self._transports.append(LocalTransport(self._shards))
        return self._transports[-1]

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


class GrpcWorkers:
    """Servers on loopback, in this process; routers reach them through the network stack."""

    ways: Sequence[FastWay] = ()
    acceptors: Sequence[Callable[[Batcher], Acceptor]] = ()

    def __init__(self, model: Model, host: str = "127.0.0.1") -> None:
        self.model = model
        self.addresses: dict[str, str] = {}
        self.shards: dict[str, GatedShard] = {}
        self._host = host
        self.servers: dict[str, ExpertServer] = {}
        self._transports: list[Transport] = []

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        self.shards[worker] = gated(self.model, experts)
        self.servers[worker] = ExpertServer(
            self.shards[worker], worker, self._host, model=MODEL_NAME, credentials=CREDENTIALS, ways=self.acceptors
        )
        self.servers[worker].start()
        self.addresses[worker] = self.servers[worker].address

    def kill(self, worker: str) -> None:
        self.servers.pop(worker).stop(0)
        self.shards.pop(worker).open.set()
        del self.addresses[worker]

    def shard(self, worker: str) -> ExpertShard:
        return self.shards[worker]

    def transport(self) -> Transport:
        self._transports.append(
            GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, ways=self.ways, silent_after_s=PATIENT_S)
        )
        return self._transports[-1]

    def close(self) -> None:
        for shard in self.shards.values():  # a server that waits at its gate cannot be stopped
            shard.open.set()
        for transport in self._transports:
            transport.close()
        for worker in list(self.servers):
            self.kill(worker)


class ShmWorkers(GrpcWorkers):
    """The same, but rows go through shared memory."""

    ways = (ShmWay(),)
    acceptors = (ShmAcceptor,)


def start_all(workers: Workers, placement: Placement) -> None:
    """Start every worker of `placement` with its shard."""
    for worker in placement.workers:
        workers.start(worker, placement.shard(worker))
