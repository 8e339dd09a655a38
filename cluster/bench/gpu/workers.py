"""Expert worker processes without Ray, reached over gRPC, on a GPU through its memory too."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from cluster.placement.placement import Placement
from cluster.router.exchange.captured_steps import StepWay
from cluster.router.exchange.exchange import Exchange
from workers.shard import ExpertShard
from workers.transport.base import FastWay
from workers.transport.device.acceptor import DeviceAcceptor
from workers.transport.device.server import DeviceServer
from workers.transport.device.stream_rows import StreamRows
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer

#: Makes a shard with these (layer, expert) pairs in the worker's process, to which it is pickled.
MakeShard = Callable[[Sequence[tuple[int, int]]], ExpertShard]

LIMIT_S = 1.0  # that a GPU waits for another process
_TIMEOUT_S = 60  # a worker's first reply compiles kernels


class Workers:
    """The processes, by the names of the placement; a context that ends them."""

    def __init__(self, placement: Placement, make_shard: MakeShard, model: str) -> None:
        """model: what both ends call the checkpoint."""
        self.placement = placement
        self.addresses: dict[str, str] = {}
        self._make_shard, self._model = make_shard, model
        self._credentials = Credentials.generate()
        self._processes: dict[str, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> Workers:
        for name in self.placement.workers:
            self.start(name)
        for name in self.placement.workers:
            self.wait(name)
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._processes):
            self.kill(name)

    def start(self, name: str) -> None:
        """Returns before it has loaded."""
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        experts = [*self.placement.shard(name)]
        arguments = (other, self._make_shard, experts, name, self._model, self._credentials)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        other.close()  # so that a worker that ends is noticed
        self._processes[name] = process, pipe

    def wait(self, name: str) -> None:
        """Until it serves."""
        self.addresses[name] = self._processes[name][1].recv()

    def kill(self, name: str) -> None:
        """kill -9, and gone when this returns."""
        process, pipe = self._processes.pop(name)
        process.kill()
        process.join()
        pipe.close()

    @contextmanager
    def reached(
        self,
        router: str,
        device: torch.device,
        dtype: torch.dtype,
        ways: Sequence[FastWay] = (),
        step_way: StepWay | None = None,
    ) -> Iterator[Exchange]:
        """An exchange with them, of rows of `dtype` on `device`, over gRPC but for what `ways` take."""
        transport = GrpcTransport(router, self._model, self._credentials, ways=ways)
        try:
            yield Exchange(
                self.placement, dict(self.addresses), transport, reply_timeout_s=_TIMEOUT_S,
                rejoin_timeout_s=_TIMEOUT_S, device=device, dtype=dtype, step_way=step_way,
            )  # fmt: skip
        finally:
            transport.close()


def serve(
    pipe: Connection,
    make_shard: MakeShard,
    experts: Sequence[tuple[int, int]],
    name: str,
    model: str,
    credentials: Credentials,
) -> None:
    """The life of a worker process: says its address, and ends when it is killed, or with its pipe."""
    shard = make_shard(experts)
    ways = []
    if shard.device.type == "cuda":
        torch.cuda.set_device(shard.device)
        ways.append(lambda batcher: DeviceAcceptor(DeviceServer(shard, LIMIT_S, batcher.stepped), StreamRows()))
    server = ExpertServer(shard, name, "127.0.0.1", model=model, credentials=credentials, ways=ways)
    server.start()
    pipe.send(server.address)
    with suppress(EOFError):
        pipe.recv()
