"""The controller: one Ray actor that every process calls in a loop. It holds no connection and touches no token."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import psutil
import ray

from cluster.control.admin_options import AdminOptions
from cluster.control.client import NAME
from cluster.control.epochs import Change
from cluster.control.events import Events
from cluster.control.membership import Membership
from cluster.control.observation import observe
from cluster.control.operator import Operator
from cluster.control.rebalancer import RebalanceOptions, Rebalancer
from cluster.control.view import Member, View
from cluster.errors import PlacementError
from cluster.placement.placement import Placement, striped

_log = logging.getLogger(__name__)

CHANGE_TIMEOUT_S = 300.0  # for the workers to load and verify what a change adds
_ADMIN_RETRY_S = 1.0
_POLL_S = 1.0  # a call that has no news returns after this: it is the heartbeat
_SWEEP_S = 0.25


class Controller:
    """Membership, health and placement epochs, behind one call. A Ray async actor.

    Everything it knows comes from its constructor and from the calls of the members, so a restarted controller is
    complete again after one round of calls.
    """

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        workers: Collection[str],
        expected: Collection[str],
        dense_layers: Collection[int] = (),
        expert_bytes: int = 0,
        admin: AdminOptions | None = None,
        rebalance: RebalanceOptions | None = None,
    ) -> None:
        """`workers` hold the first placement, `expected` are all members of a complete cluster."""
        # Nanoseconds: a restarted controller starts above every version it ever gave out.
        placement = striped(n_layers, n_experts, tuple(workers), dense_layers=dense_layers)
        self._membership = Membership(placement, expected, time.monotonic(), time.time_ns())
        self._changed = asyncio.Condition()
        self._processes: dict[str, psutil.Process] = {}  # of this node, by member: psutil tells a recycled pid apart
        self._node = ray.get_runtime_context().get_node_id()
        self._events = Events()
        self._operator = Operator(self._membership, self.change, expert_bytes, self._events)
        self._rebalancer = Rebalancer(self._operator, rebalance or RebalanceOptions(), expert_bytes)
        self._admin_address = ""
        self._admin = None if admin is None else asyncio.get_event_loop().create_task(self._serve_admin(admin))
        self._rebalancing = asyncio.get_event_loop().create_task(self._rebalancer.run())
        self._sweeper = asyncio.get_event_loop().create_task(self._sweep())

    async def sync(self, member: Member, known_version: int, placement: Placement | None = None) -> View | None:
        """Register, live, acknowledge `member.epoch`, and hear of the others.

        Returns as soon as the view is another than `known_version`, else after a second with the same one. None asks
        for another call at once, with the placement that the member heard of last: it is newer than the one known
        here, because this controller was restarted.
        """
        now = time.monotonic()
        if placement is not None:
            self._membership.adopt(placement)
        self._membership.report(member, now, known_version)
        self._remember(member)
        await self._notify()
        if member.told > self._membership.epochs.placement.epoch:
            return None
        return await self._news(known_version)

    async def watch(self, known_version: int, workers: tuple[str, ...] = ()) -> View:
        """The view with the controller itself among the members, as soon as it differs, else after a second.

        For whoever starts the processes: `workers` are the expert workers it has started, and `View.wanted` those
        there are to be.
        """
        if workers and not self._membership.wanted:
            self._membership.want(workers)
        view = await self._news(known_version)
        load = self._membership.load
        detail: dict[str, object] = {} if load is None else {"imbalance": load.imbalance}
        myself = Member("controller", NAME, os.getpid(), self._node, "ready", self._admin_address, detail=detail)
        return replace(view, members=(*view.members, myself))

    async def observe(self, known_epoch: int, known_event: int) -> dict[str, Any]:
        """What the live page shows, see `observation`, and where the admin API is."""
        seen = observe(self._membership, self._operator, self._rebalancer, known_epoch, known_event)
        return seen | {"admin_address": self._admin_address}

    async def change(self, placement: Placement, reason: str, timeout_s: float = CHANGE_TIMEOUT_S) -> Change:
        """Bring the next placement into force, see `epochs`; returns when it is, and what it replaced is out of use.

        Raises PlacementError when it cannot be made or was given up: the placement before is then in force.
        """
        change = self._membership.propose(placement, reason, time.monotonic(), timeout_s)
        await self._notify()
        async with self._changed:
            await self._changed.wait_for(lambda: change.done)
        if change.error:
            raise PlacementError(f"{reason}: {change.error}")
        return change

    async def drain(self) -> None:
        """Tell every member that the cluster is being stopped."""
        self._membership.drain()
        await self._notify()

    async def _notify(self) -> None:
        self._events.see(self._membership.view.members, self._membership.wanted)
        async with self._changed:
            self._changed.notify_all()

    async def _serve_admin(self, options: AdminOptions) -> None:
        # The members register first: FastAPI takes its time.
        api = await asyncio.to_thread(import_module, "cluster.control.api")

        def listening(address: str) -> None:
            self._admin_address = address

        app = api.create_app(self._membership, self._operator, self._rebalancer, options.token)
        while True:
            try:
                await api.serve(app, options, listening)
            except OSError as error:  # the port of the controller before may be taken for a moment
                _log.warning("the admin API cannot listen on %s:%d: %s", options.host, options.port, error)
            await asyncio.sleep(_ADMIN_RETRY_S)

    async def _news(self, known_version: int) -> View:
        deadline = time.monotonic() + _POLL_S
        while True:
            settled = self._membership.settled(time.monotonic())
            if settled and self._membership.view.version != known_version:
                return self._membership.view
            remaining = deadline - time.monotonic()
            if settled and remaining <= 0:
                return self._membership.view
            try:
                async with asyncio.timeout(remaining if settled else _SWEEP_S), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            before = self._membership.view.version
            self._membership.sweep(time.monotonic(), self._is_dead)
            for member in self._membership.hung(time.monotonic()):
                self._end(member)
            if self._membership.view.version != before:
                await self._notify()

    def _remember(self, member: Member) -> None:
        known = self._processes.get(member.id)
        if member.node == self._node and (known is None or known.pid != member.pid):
            with suppress(psutil.Error):
                self._processes[member.id] = psutil.Process(member.pid)

    def _end(self, member: Member) -> None:
        """Kill a process of this node that hangs. Ray starts it again."""
        process = self._processes.get(member.id)
        if process is not None and process.pid == member.pid:
            with suppress(psutil.Error):
                process.kill()

    def _is_dead(self, member: Member) -> bool:
        """Whether a process of this node is gone; those of other nodes are judged by their silence."""
        return member.node == self._node and not psutil.pid_exists(member.pid)
