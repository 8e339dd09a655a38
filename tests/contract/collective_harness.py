"""Expert workers in process groups over gloo, and what the controller does for them: the next group when one is due."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from tests.contract.harness import GatedShard, gated
from tests.contract.model import Model
from workers.shard import ExpertShard
from workers.transport.base import Transport
from workers.transport.collective import mesh as collective_mesh
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import Group, host_store
from workers.transport.collective.server import CollectiveServer

_HOST = "127.0.0.1"
_READY_S = 20
_DEADLINE_S = 1.0


class CollectiveWorkers:
    """Servers and routers of this process; their ranks reach each other through the network stack."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.addresses: dict[str, str] = {}
        self.shards: dict[str, GatedShard] = {}
        self.number = 0
        self._servers: dict[str, CollectiveServer] = {}
        self._transports: dict[str, CollectiveTransport] = {}
        self._store, self._store_address = host_store(_HOST)
        self._lock = threading.RLock()
        self._started = 0
        self._closed = False

    def start(self, worker: str, experts: Iterable[tuple[int, int]]) -> None:
        self.shards[worker] = gated(self.model, experts)
        server = CollectiveServer(self.shards[worker], worker, _HOST, deadline_s=_DEADLINE_S, on_change=self._look)
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
        name = f"router-{len(self._transports)}"
        transport = CollectiveTransport(name, _HOST, deadline_s=_DEADLINE_S, on_change=self._look)
        with self._lock:
            self._transports[name] = transport
        self.regroup()
        return transport

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


class RowsApartWorkers(CollectiveWorkers):
    """As on GPUs: rows travel apart from their headers, in a group for each direction; gloo plays NCCL."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._row_groups = collective_mesh.row_groups
        collective_mesh.row_groups = _gloo_row_groups

    def close(self) -> None:
        super().close()
        collective_mesh.row_groups = self._row_groups


class _GlooRows(collective_mesh.c10d.ProcessGroupGloo):  # type: ignore[misc, name-defined]
    def abort(self) -> None:
        """End every wait, as NCCL's does."""
        with contextlib.suppress(RuntimeError):
            nobody = (self.rank() + 1) % self.size()
            self.recv([torch.empty(1, dtype=torch.uint8)], nobody, 9).wait(timedelta(milliseconds=1))


def _gloo_row_groups(device: torch.device, group: Group, rank: int, store: Any) -> dict[collective_mesh.Lane, Any]:
    lanes = (collective_mesh.Lane.REQUEST, collective_mesh.Lane.REPLY)
    size, timeout = len(group.members), timedelta(seconds=20)
    prefixes = {lane: collective_mesh.c10d.PrefixStore(f"{group.number}-{lane.name}", store) for lane in lanes}
    return {lane: _GlooRows(prefix, rank, size, timeout) for lane, prefix in prefixes.items()}
