"""Expert workers of a collective group as real processes, and what the controller does for them: restart and regroup.

The processes are forked from a server that has imported everything, so that one starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

from cluster.placement.placement import Placement
from cluster.router.exchange.exchange import Exchange
from tests.contract.model import Model
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import Group, host_store
from workers.transport.collective.server import CollectiveServer

HOST = "127.0.0.1"
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["tests.contract.collective_processes"])


def serve(worker: str, model: Model, deadline_s: float, pipe: Connection) -> None:
    """The life of a worker: all experts of the model, the groups that come through `pipe`; ends with it."""
    shard = model.shard((layer, expert) for layer in range(model.n_layers) for expert in range(model.n_experts))
    server = CollectiveServer(shard, worker, HOST, deadline_s=deadline_s)
    pipe.send("loaded")
    try:
        while True:
            server.join(pipe.recv())
    except EOFError:
        os._exit(0)


class Processes:
    """Worker processes, restarted when they die, in a group with the routers of this process."""

    def __init__(self, model: Model, workers: tuple[str, ...], n_routers: int = 1, deadline_s: float = 2.0) -> None:
        self.model = model
        self.number = 0
        self.transports = {
            f"router-{i}": CollectiveTransport(f"router-{i}", HOST, deadline_s=deadline_s, on_change=self._look)
            for i in range(n_routers)
        }
        self.exchanges: list[tuple[Exchange, Placement]] = []  # of the routers, which hear where workers are
        self._deadline_s = deadline_s
        self._store, self._store_address = host_store(HOST)
        self._lock = threading.RLock()
        self._closing, self._closed = _fork.Pipe()
        self._running: dict[str, tuple[Any, Connection]] = {}
        for worker in workers:
            self._start(worker)
        for _, pipe in self._running.values():
            pipe.recv()
        self.regroup()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    @property
    def addresses(self) -> dict[str, str]:
        return {worker: str(process.pid) for worker, (process, _) in self._running.items()}

    def pid(self, worker: str) -> int:
        return int(self._running[worker][0].pid)

    def signal(self, worker: str, number: signal.Signals) -> None:
        os.kill(self.pid(worker), number)

    def regroup(self) -> None:
        """The next group, of all that live."""
        with self._lock:
            self.number += 1
            routers, workers = tuple(self.transports), tuple(self._running)
            pids = (os.getpid(),) * len(routers) + tuple(self.pid(worker) for worker in workers)
            group = Group(self.number, self._store_address, routers, workers, pids)
            for transport in self.transports.values():
                transport.join(group)
            for _, pipe in self._running.values():
                with contextlib.suppress(BrokenPipeError):  # it died just now
                    pipe.send(group)
        self._publish()

    def close(self) -> None:
        self._closing.close()
        self._watcher.join()
        for transport in self.transports.values():
            transport.close()
        for process, pipe in self._running.values():
            pipe.close()
            process.kill()
            process.join()

    def _start(self, worker: str) -> None:
        pipe, other = _fork.Pipe()
        process = _fork.Process(target=serve, args=(worker, self.model, self._deadline_s, other), daemon=True)
        process.start()
        other.close()
        self._running[worker] = (process, pipe)

    def _watch(self) -> None:
        """Restart who dies, and regroup once all are loaded."""
        while True:
            sentinels = {process.sentinel: worker for worker, (process, _) in self._running.items()}
            events = wait([*sentinels, self._closed])
            if self._closed in events:
                return
            with self._lock:
                dead = [sentinels[event] for event in events if event in sentinels]  # type: ignore[index]
                for worker in dead:
                    self._running[worker][1].close()
                    self._start(worker)
                for worker in dead:
                    self._running[worker][1].recv()
                self.regroup()

    def _look(self) -> None:
        with self._lock:
            if any(transport.broken == self.number for transport in self.transports.values()):
                self.regroup()
        self._publish()

    def _publish(self) -> None:
        for exchange, placement in self.exchanges:
            exchange.publish(placement, self.addresses)
