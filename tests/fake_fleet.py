"""A fleet without processes: what the control plane does with it can be seen at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator, Iterable
from typing import Any

import numpy as np

from cluster.control.epochs import Change
from cluster.control.goal import Goal, Processes
from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.scaling import Scaler
from cluster.control.view import Member
from cluster.errors import PlacementError
from cluster.placement.load import Load
from cluster.placement.placement import Placement, striped

WORKERS = ("expert-0", "expert-1", "expert-2")
SKEWED = np.array([[100.0, 10, 10, 10], [5, 5, 5, 500]]) * 100


def goal_of(ids: Iterable[str]) -> Goal:
    """There are to be these expert workers and routers."""
    given = tuple(ids)
    workers = tuple(name for name in given if not name.startswith("router-"))
    return Goal(processes=Processes(workers, tuple(name for name in given if name.startswith("router-"))))


class Fleet:
    """A membership whose changes come into force at once, but for those in `failing` by their place in order.

    Its processes are started and ended by a `FakeLauncher`, once `control.fleet.Fleet` is run.
    """

    def __init__(self, slots: int = 8, most_slots: int = 8) -> None:
        goal = Goal(processes=Processes(WORKERS, ("router-0",), 1))
        self.membership = Membership(striped(2, 4, WORKERS), goal, 0.0, 1)
        for worker in WORKERS:
            said = {"epoch": 1, "slots": slots, "most_slots": most_slots}
            self.membership.report(Member("expert", worker, 1, "n", "ready", "x:1", **said), 0.0)
        by_worker = dict.fromkeys(WORKERS, 1e5)
        load = Load(SKEWED.astype(np.int64), SKEWED, dict.fromkeys(WORKERS, 1), by_worker)
        self.membership.report(Member("router", "router-0", 1, "n", "ready", "x:1", epoch=1, load=load), 0.0)
        self.failing: set[int] = set()
        self.changes = 0
        self.running = 0
        self.operator = Operator(self.membership, self.change, expert_bytes=10)
        self.scaler = Scaler(self.membership, self.operator, drain_timeout_s=5.0, expert_bytes=10)

    async def change(self, placement: Placement, reason: str) -> Change:
        self.running += 1
        assert self.running == 1, "one change at a time"
        change = self.membership.propose(placement, reason, 0.0, 1.0)
        await asyncio.sleep(0)
        self.changes += 1
        epochs = self.membership.epochs
        epochs.next, change.ended = None, 1.0
        self.running -= 1
        if self.changes in self.failing:
            raise PlacementError("expert-2: no memory")
        epochs.placement, epochs.acknowledged = placement, True
        return change

    @property
    def homes(self) -> list[list[dict[str, float]]]:
        return self.membership.epochs.placement.homes()


class _Ready:
    """Awaits that a process is ready; unlike a coroutine it may be left alone."""

    def __init__(self, launcher: FakeLauncher, process: str) -> None:
        self._launcher = launcher
        self._process = process

    def __await__(self) -> Generator[Any, None, None]:
        return self._launcher.ready(self._process).__await__()


class FakeLauncher:
    """Processes that are ready as soon as they are started, but for those in `broken`, which say why they are not."""

    def __init__(self, membership: Membership, present: Iterable[str] = ()) -> None:
        self.membership = membership
        self.running = set(present)
        self.gateways = self.n_gateways = 0
        self.broken: dict[str, str] = {}
        self.log: list[str] = []  # starts and ends in order

    def present(self) -> frozenset[str]:
        return frozenset(self.running)

    def start(self, process: str) -> Awaitable[object]:
        if process not in self.running:
            self.log.append(f"start {process}")
        self.running.add(process)
        return _Ready(self, process)

    async def ready(self, process: str) -> None:
        await asyncio.sleep(0)
        if process in self.broken:
            raise RuntimeError(self.broken[process])
        role = "router" if process.startswith("router-") else "expert"
        self.membership.report(Member(role, process, 1, "n", "ready", "x:1", epoch=1, slots=8, most_slots=8), 0.0)

    def end(self, process: str) -> None:
        self.log.append(f"end {process}")
        self.running.discard(process)

    def scale_gateways(self, n: int) -> None:
        if n > self.gateways and "gateways" in self.broken:
            raise RuntimeError(self.broken["gateways"])
        self.gateways = n
        for i in range(n):
            self.membership.report(Member("gateway", f"gateway-{i}", 1, "n", "ready", "http://x"), 0.0)

    def why(self, error: Exception) -> str:
        return str(error)
