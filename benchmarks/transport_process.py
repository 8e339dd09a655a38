"""One router or expert worker of `benchmarks.exchange --transport`: rows over gRPC, a collective group, bare gloo.

`python -m benchmarks.transport_process RANK ROUTERS WORKERS` answers three requests, in this order:
{"do": "describe"}; {"do": "join", "members": what every rank described}; {"do": "run", "way": ..., "n_bytes": ...,
"trips": ...} with seconds a trip. `n_bytes` is what a router sends, in equal parts to all workers, and gets back.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from benchmarks.child import serve
from benchmarks.free_shard import FreeShard
from cluster.placement.placement import striped
from cluster.router.exchange.exchange import Exchange
from workers.transport.base import Transport
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import Group, host_store
from workers.transport.collective.server import CollectiveServer
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.server import ExpertServer

HIDDEN_SIZE = 128
ROW_BYTES = 4 * HIDDEN_SIZE  # float32
_HOST = "127.0.0.1"
_CREDENTIALS = Credentials("free experts have no secrets")
_TIMEOUT_S = 60.0
_POLL_S = 0.01

c10d: Any = import_module("torch._C._distributed_c10d")  # its stubs lack what is used here


class Rank(Protocol):
    """What a request is passed to."""

    def describe(self) -> dict[str, Any]:
        """What the others need to know."""

    def join(self, members: list[dict[str, Any]]) -> bool:
        """Connect to the others; true once everything is usable."""

    def run(self, way: str, n_bytes: int, trips: int) -> float:
        """Seconds a trip; a worker has something to do only where it takes part by itself."""


class Worker:
    """Serves free experts over both transports, and takes part in bare collectives."""

    def __init__(self, rank: int, n_routers: int, n_workers: int) -> None:
        name = f"worker-{rank - n_routers}"
        shard = FreeShard(HIDDEN_SIZE, n_workers)
        self._grpc = ExpertServer(shard, name, _HOST, model="free", credentials=_CREDENTIALS)
        self._grpc.start()
        self._collective = CollectiveServer(shard, name, _HOST)
        self._collective.start()
        self._bare = _Bare(rank, n_routers, n_workers)

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "grpc": self._grpc.address, "collective": self._collective.address}

    def join(self, members: list[dict[str, Any]]) -> bool:
        self._collective.join(_group(members))
        self._bare.join(members)
        return True

    def run(self, way: str, n_bytes: int, trips: int) -> float:
        return _timed(self._bare.trip(n_bytes), trips) if way == "bare" else 0.0


class Router:
    """An exchange over each transport, and a part in bare collectives."""

    def __init__(self, rank: int, n_routers: int, n_workers: int) -> None:
        self._n_workers = n_workers
        self._store, self._store_address = host_store(_HOST)
        self._collective = CollectiveTransport(f"router-{rank}", _HOST)
        self._exchanges: dict[str, Exchange] = {}
        self._bare = _Bare(rank, n_routers, n_workers)

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "store": self._store_address}

    def join(self, members: list[dict[str, Any]]) -> bool:
        group = _group(members)
        self._collective.join(group)
        transports: dict[str, Transport] = {
            "grpc": GrpcTransport("router", "free", _CREDENTIALS),
            "collective": self._collective,
        }
        self._bare.join(members)
        while self._collective.ready < group.number:
            time.sleep(_POLL_S)
        for way, transport in transports.items():
            addresses = dict(zip(group.workers, _each(members, way), strict=True))
            placement = striped(1, self._n_workers, group.workers)
            self._exchanges[way] = Exchange(
                placement, addresses, transport, reply_timeout_s=_TIMEOUT_S, rejoin_timeout_s=_TIMEOUT_S
            )
        return True

    def run(self, way: str, n_bytes: int, trips: int) -> float:
        return _timed(self._bare.trip(n_bytes) if way == "bare" else self._trip(way, n_bytes), trips)

    def _trip(self, way: str, n_bytes: int) -> Callable[[], object]:
        rows = n_bytes // ROW_BYTES
        x_TD = torch.randn(rows, HIDDEN_SIZE)
        ids_TK, weights_TK = (torch.arange(rows) % self._n_workers)[:, None], torch.ones(rows, 1)
        over = self._exchanges[way]
        return lambda: over.combine(over.dispatch(0, x_TD, ids_TK, weights_TK))


class _Bare:
    """`all_to_all_single` with uneven splits over gloo, as torch offers it: rows to the workers, and rows back."""

    def __init__(self, rank: int, n_routers: int, n_workers: int) -> None:
        self._rank = rank
        self._n_routers, self._n_workers = n_routers, n_workers
        self._gloo: Any = None
        self._store: Any = None

    def join(self, members: list[dict[str, Any]]) -> None:
        host, port = members[0]["store"].rsplit(":", 1)
        self._store = c10d.PrefixStore("bare", c10d.TCPStore(host, int(port), is_master=False))
        self._gloo = c10d.ProcessGroupGloo(self._store, self._rank, len(members))

    def trip(self, n_bytes: int) -> Callable[[], None]:
        share = n_bytes // self._n_workers
        to_routers = [share] * self._n_routers + [0] * self._n_workers
        to_workers = [0] * self._n_routers + [share] * self._n_workers
        nothing = [0] * len(to_routers)
        is_router = self._rank < self._n_routers
        sent, received = (to_workers, nothing) if is_router else (nothing, to_routers)
        there, back = torch.empty(sum(sent), dtype=torch.uint8), torch.empty(sum(received), dtype=torch.uint8)
        returned = torch.empty(sum(sent), dtype=torch.uint8)

        def once() -> None:
            self._gloo.alltoall_base(back, there, received, sent).wait()
            self._gloo.alltoall_base(returned, back, sent, received).wait()

        return once


def _timed(trip: Callable[[], object], trips: int) -> float:
    trip()
    began = time.perf_counter()
    for _ in range(trips):
        trip()
    return (time.perf_counter() - began) / trips


def _group(members: list[dict[str, Any]]) -> Group:
    routers = tuple(f"router-{index}" for index in range(sum("store" in member for member in members)))
    workers = tuple(f"worker-{index}" for index in range(len(members) - len(routers)))
    return Group(1, members[0]["store"], routers, workers, tuple(member["pid"] for member in members))


def _each(members: list[dict[str, Any]], key: str) -> list[Any]:
    return [member[key] for member in members if key in member]


def start(rank: int, n_routers: int, n_workers: int) -> Callable[[dict[str, Any]], Any]:
    """The function that answers."""
    member: Rank = (Router if rank < n_routers else Worker)(rank, n_routers, n_workers)

    def answer(request: dict[str, Any]) -> Any:
        return getattr(member, request.pop("do"))(**request)

    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(lambda: start(*map(int, sys.argv[1:])))
