"""The controller: one Ray actor that every process calls in a loop. It holds no connection and touches no token."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import psutil
import ray

from cluster.control.autoscale import Limits
from cluster.control.autoscaler import Autoscaler
from cluster.control.chaos import Chaos
from cluster.control.client import NAME
from cluster.control.epochs import Change
from cluster.control.events import Events
from cluster.control.fleet import Fleet, Launcher
from cluster.control.goal import Bounds, Goal, Processes
from cluster.control.membership import Membership
from cluster.control.observation import observe
from cluster.control.operator import Operator
from cluster.control.options import AdminOptions, MetricsOptions, Options
from cluster.control.readings import ControllerReadings
from cluster.control.rebalancer import Rebalancer
from cluster.control.rescue import Rescuer
from cluster.control.scaling import Scaler
from cluster.control.view import Member, View
from cluster.errors import PlacementError
from cluster.observe import endpoint, logs
from cluster.observe.exposition import Readings
from cluster.observe.process import ProcessReadings
from cluster.placement.placement import Placement
from workers.ending import end_process

_log = logging.getLogger(__name__)

CHANGE_TIMEOUT_S = 300.0  # for the workers to load and verify what a change adds
_ADMIN_RETRY_S = 1.0
_POLL_S = 1.0  # a call that has no news returns after this: it is the heartbeat
_SWEEP_S = 0.25


class Controller:
    """Membership, health, placement epochs and the fleet, behind one call. A Ray async actor.

    Everything it knows comes from its constructor and from the calls of the members, so a restarted controller is
    complete again after one round of calls.
    """

    def __init__(self, placement: Placement, processes: Processes, launcher: Launcher, options: Options) -> None:
        """`placement` is the first one, `processes` those there are to be at first: members may know better later."""
        # Nanoseconds: a restarted controller starts above every version it ever gave out.
        self._membership = Membership(placement, Goal(processes=processes), time.monotonic(), time.time_ns())
        self._changed = asyncio.Condition()
        self._processes: dict[str, psutil.Process] = {}  # of this node, by member: psutil tells a recycled pid apart
        self._node = ray.get_runtime_context().get_node_id()
        self._events = Events()
        least = 1 + options.spare_replicas
        self._operator = Operator(self._membership, self.change, options.expert_bytes, self._events, least)
        self._scaler = Scaler(
            self._membership, self._operator, options.drain_timeout_s, options.expert_bytes, options.process_bytes
        )
        self._rebalancer = Rebalancer(self._operator, options.rebalance, options.expert_bytes)
        self._autoscaler = Autoscaler(self._membership, self._scaler, options.autoscale, options.max_sequences)
        self._chaos = Chaos(self._membership, self._events, options.allow_chaos)
        self._launcher = launcher
        self._fleet = Fleet(self._membership, launcher)
        rescuer = Rescuer(self._membership, self._operator, self._changed, least)
        self._admin_address = ""
        self._metrics_url = self._serve_metrics(options.metrics, options.expert_bytes, least)
        tasks = (
            self._bring_about(), self._rebalancer.run(), self._autoscaler.run(), rescuer.run(), self._sweep(),
            self._serve_admin(options.admin),
        )  # fmt: skip
        self._tasks = [asyncio.get_event_loop().create_task(task) for task in tasks]
        for task in self._tasks:
            task.add_done_callback(_end_with)

    async def sync(self, member: Member, known_version: int, heard: View | None = None) -> View | None:
        """Register, live, acknowledge `member.epoch`, and hear of the others.

        Returns as soon as the view is another than `known_version`, else after a second with the same one. None asks
        for another call at once, with the last view that the member `heard`: that is newer than what is known here,
        because this controller was restarted.
        """
        now = time.monotonic()
        if heard is not None:
            self._membership.adopt(heard)
        self._membership.report(member, now, known_version)
        self._remember(member)
        await self._notify()
        if self._membership.outdated(member):
            return None
        return await self._news(known_version)

    async def watch(self, known_version: int) -> View:
        """The view with the controller itself among the members, as soon as it differs, else after a second."""
        view = await self._news(known_version)
        load = self._membership.load
        detail: dict[str, object] = {} if load is None else {"imbalance": load.imbalance}
        myself = Member(
            "controller", NAME, os.getpid(), self._node, "ready", self._admin_address, self._metrics_url, detail=detail
        )
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

    async def scale(self, workers: int | None, routers: int | None) -> None:
        """See `Scaler.scale`; for the Serve application, which says itself how many gateways there are."""
        await self._scaler.scale(workers, routers)

    async def limit(self, routers: Limits, workers: Limits) -> None:
        """How far the autoscaler may go from now on, also of a controller that is restarted."""
        self._membership.aim(replace(self._membership.goal, bounds=Bounds(routers, workers)))
        await self._notify()

    async def declare_gateways(self, n: int) -> None:
        """There are to be `n` gateways, which is seen to elsewhere."""
        goal = self._membership.goal
        self._membership.aim(replace(goal, processes=replace(goal.processes, gateways=n)))

    async def launched(self) -> Launcher:
        """What this cluster's processes are made of."""
        return self._launcher

    async def drain(self) -> None:
        """Tell every member that the cluster is being stopped."""
        self._membership.drain()
        await self._notify()

    async def _bring_about(self) -> None:
        async with self._operator.lock:  # no verb before it is known what is in force
            await self._fleet.begin()
        await asyncio.gather(self._fleet.run(), self._scaler.resume())

    async def _notify(self) -> None:
        self._events.see(self._membership.view.members, self._membership.goal.processes.ids)
        async with self._changed:
            self._changed.notify_all()

    def _serve_metrics(self, options: MetricsOptions, expert_bytes: int, least_homes: int) -> str | None:
        logs.configure(options.log_level, options.log_format, NAME)
        membership = self._membership
        own = ControllerReadings(
            membership,
            self._operator,
            self._rebalancer,
            self._autoscaler,
            expert_bytes,
            least_homes,
            options.per_expert,
        )
        process = ProcessReadings("controller", lambda: membership.epochs.placement.epoch)
        membership.metrics_url = endpoint.serve(
            Readings(NAME, (own, process)), _host(options.host), options.port, lambda: "ready"
        )
        return membership.metrics_url

    async def _serve_admin(self, options: AdminOptions) -> None:
        # The members register first: FastAPI takes its time.
        api = await asyncio.to_thread(import_module, "cluster.control.api")

        def listening(address: str) -> None:
            self._admin_address = address

        options = replace(options, host=_host(options.host))
        app = api.create_app(
            self._membership, self._operator, self._scaler, self._rebalancer, options.token, self._chaos,
            self._autoscaler,
        )  # fmt: skip
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


def _end_with(task: asyncio.Task[None]) -> None:
    """A controller that lacks one of its tasks is half alive: it ends, and Ray starts another."""
    if not task.cancelled() and (error := task.exception()) is not None:
        end_process(_log, "a task of the controller failed; its process ends", error)


def _host(given: str) -> str:
    """Where a server listens: by default where Ray's of this node do."""
    return given or str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
