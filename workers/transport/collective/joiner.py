"""Builds the groups a process is to take part in, in the background, and watches over the signs of life in them.

Who is dead or hangs is noticed within the deadline, also while there is no work. Workers beat, routers listen. A worker
that computes for long still beats, so that slow is told from dead; and a beat goes only when its router asks for it, so
that the worker notices a router that hangs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from workers.transport.collective.group import Group
from workers.transport.collective.interface import interface_of
from workers.transport.collective.mesh import Broken, Mesh
from workers.transport.collective.ranks import Lane, connect_store, gloo_interface

_log = logging.getLogger(__name__)
BUILD_S = 20.0  # for every rank to come; a group that takes longer is given up


class Joiner:
    """Every group it builds lives in a thread of its own, which runs `live` until the group has ended."""

    def __init__(
        self,
        name: str,
        host: str,
        device: torch.device,
        live: Callable[[Mesh], None],
        on_change: Callable[[], None] | None,
        steps: bool = False,
    ) -> None:
        """on_change: called by any thread when a group broke. steps: whether whole steps go over its groups too.

        Raises RuntimeError when `host` is not local.
        """
        self._name = name
        self._device = device
        self._live = live
        self._on_change = on_change
        self._steps = steps
        self._interface = gloo_interface(host)
        if device.type == "cuda" and (interface := interface_of(host)) is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # NCCL would choose one by itself
        self._lock = threading.Lock()
        self._newest = 0
        self._closed = False
        self._clients: list[tuple[str, Any]] = []  # idle ones, by the store's address
        self._meshes: dict[Mesh, threading.Thread] = {}
        self.broken = 0  # number of the newest group that broke, or could not be built

    def join(self, group: Group | None) -> None:
        """Build `group` unless that was begun before, or it does not mean this process. Returns at once."""
        rank = None if group is None else group.rank(self._name, os.getpid())
        if group is None or rank is None:
            return
        with self._lock:
            if group.number <= self._newest or self._closed:
                return
            self._newest = group.number
        threading.Thread(target=self._run, args=(group, rank), name=f"group-{group.number}", daemon=True).start()

    def changed(self) -> None:
        """Tell whoever wants to know that a group became ready or broke."""
        if self._on_change is not None:
            self._on_change()

    def close(self) -> None:
        """End every group, and build no more."""
        with self._lock:
            self._closed = True
            meshes = dict(self._meshes)
        for mesh, thread in meshes.items():
            mesh.close()
            if thread is not threading.current_thread():
                thread.join()

    def _run(self, group: Group, rank: int) -> None:
        try:
            mesh = self._build(group, rank)
        except Exception as error:
            _log.warning("%s: group %d could not be built: %s", self._name, group.number, error)
            self._note_broken(group.number)
            return
        with self._lock:
            self._meshes[mesh] = threading.current_thread()
            closed = self._closed
        try:
            if not closed:
                self._live(mesh)
        except Exception:
            _log.exception("%s: group %d", self._name, group.number)
            mesh.fail("an unforeseen error; see the log")
        finally:
            mesh.close()
            with self._lock:
                del self._meshes[mesh]

    def _build(self, group: Group, rank: int) -> Mesh:
        """A client of the store is used again: to connect looks up the host's name, which may take seconds."""
        with self._lock:
            idle, self._clients = [client for address, client in self._clients if address == group.store], []
        store = idle.pop() if idle else connect_store(group.store, BUILD_S)
        mesh = Mesh(group, rank, store, self._interface, self._device, BUILD_S, self._broke, self._steps)
        with self._lock:
            self._clients = [(group.store, client) for client in (*idle, store)]
        return mesh

    def _broke(self, mesh: Mesh) -> None:
        _log.warning("%s: group %d broke: %s", self._name, mesh.group.number, mesh.broken)
        self._note_broken(mesh.group.number)

    def _note_broken(self, number: int) -> None:
        with self._lock:
            self.broken = max(self.broken, number)
        self.changed()


def listen(mesh: Mesh, first_s: float, deadline_s: float) -> Iterator[None]:
    """Yields each time every worker has beaten once more. The first beats may take `first_s`.

    Raises Broken, with the worker's name, when one is gone or silent for `deadline_s`.
    """
    blocks = {worker: torch.empty(1, dtype=torch.uint8) for worker in mesh.workers}
    due = {worker: mesh.receive(worker, Lane.BEAT, block) for worker, block in blocks.items()}
    timeout_s = first_s
    while True:
        for worker, block in blocks.items():
            _wait(mesh, worker, due[worker], timeout_s)
            due[worker] = mesh.receive(worker, Lane.BEAT, block)
        timeout_s = deadline_s
        yield


def beat(mesh: Mesh, routers: Callable[[], Collection[int]], first_s: float, deadline_s: float) -> None:
    """Beat four times a deadline for all of `routers()`, until there are none or the mesh has ended.

    Raises Broken, with the router's name, when one is gone or takes no beat for `deadline_s`.
    """
    block = torch.zeros(1, dtype=torch.uint8)
    timeout_s = first_s
    while not mesh.ended.is_set() and (present := routers()):
        sent = {router: mesh.send(router, Lane.BEAT, block) for router in present}
        for router, work in sent.items():
            try:
                _wait(mesh, router, work, timeout_s)
            except Broken:
                if router in routers():
                    raise
        timeout_s = deadline_s
        mesh.ended.wait(deadline_s / 4)


def _wait(mesh: Mesh, rank: int, work: object, timeout_s: float) -> None:
    try:
        mesh.wait(work, timeout_s)
    except Broken as broken:
        raise Broken(f"{mesh.name(rank)}: {broken}") from None
