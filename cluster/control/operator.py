"""What an operator may ask of the placement: each verb is one transaction, with a receipt.

A verb reaches its goal, or the placement before is in force again and the error says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cluster.control.epochs import Change
from cluster.control.events import Events, Kind
from cluster.control.membership import Membership
from cluster.errors import PlacementError
from cluster.placement import edit
from cluster.placement.layout import Floats
from cluster.placement.load import imbalance
from cluster.placement.placement import Placement
from cluster.placement.planner import Forecast, Limits, Plan, Worker, balance
from cluster.placement.steps import steps

_log = logging.getLogger(__name__)

_STEP = 64  # replicas that are added under one epoch, about
_RECEIPTS = 100
_POLL_S = 0.1

MakeChange = Callable[[Placement, str], Awaitable[Change]]


@dataclass(slots=True)
class Receipt:
    """One action on the placement: why, what it was to bring, what it cost, what came of it."""

    action: str
    began: float  # seconds since 1970
    epoch_before: int
    epoch_after: int = 0
    added: int = 0  # replicas
    removed: int = 0
    seconds: float = 0.0
    forecast: Forecast | None = None
    error: str = ""  # why the placement before is in force
    imbalance_before: float = 1.0  # of the workers' rows in the window at its begin
    rows_then: dict[str, int] | None = None  # of each worker, since start, when it ended

    def realised(self, rows_now: dict[str, int]) -> float | None:
        """Imbalance of the rows that workers got since; None before there were any."""
        then = self.rows_then
        if then is None:
            return None
        since = {worker: rows - then.get(worker, 0) for worker, rows in rows_now.items()}
        return imbalance(since.values()) if sum(since.values()) > 0 else None


class Operator:
    """Carries out verbs one at a time. `change` brings a placement into force, see `Controller.change`."""

    def __init__(
        self, membership: Membership, change: MakeChange, expert_bytes: int, events: Events | None = None
    ) -> None:
        """`events`: where every action is told of."""
        self.receipts: deque[Receipt] = deque(maxlen=_RECEIPTS)
        self.drained: set[str] = set()  # expert workers that are to hold nothing
        self._membership = membership
        self._change = change
        self._expert_bytes = expert_bytes
        self.events = events or Events()
        self._lock = asyncio.Lock()

    async def replicate(self, layer: int, expert: int, worker: str | None) -> Receipt:
        """Another replica of an expert; `worker` None: on the one with most room that has none."""
        async with self._lock:
            target = worker or self._roomiest(layer, expert)
            goal = edit.replicate(self._placement, layer, expert, target)
            return await self._go([goal], f"replicate layer {layer}, expert {expert} to {target}")

    async def drop(self, layer: int, expert: int, worker: str) -> Receipt:
        """One replica less."""
        async with self._lock:
            goal = edit.drop(self._placement, layer, expert, worker)
            return await self._go([goal], f"drop layer {layer}, expert {expert} from {worker}")

    async def move(self, layer: int, expert: int, source: str | None, target: str) -> Receipt:
        """A replica elsewhere."""
        async with self._lock:
            goal = edit.move(self._placement, layer, expert, source, target)
            return await self._go([goal], f"move layer {layer}, expert {expert} to {target}")

    async def apply(self, homes_LE: list[list[dict[str, float]]]) -> Receipt:
        """A whole placement: by layer and expert, the workers that are to hold it and their shares."""
        async with self._lock:
            now = self._placement
            if [len(experts) for experts in homes_LE] != [len(experts) for experts in now.replicas]:
                raise PlacementError(f"the model has {now.n_layers} layers of {now.n_experts} experts")
            named = {worker for experts in homes_LE for homes in experts for worker in homes}
            goal = Placement.of(now.epoch + 1, sorted(named), homes_LE)
            edit.check(goal, self._membership.slots)
            return await self._reach(goal, "apply a placement")

    def plan(self, limits: Limits | None = None, without: Iterable[str] = (), loads_LE: Floats | None = None) -> Plan:
        """What `rebalance` would do for the recent load, or for `loads_LE`, rows of each expert. PlacementError when
        the workers that there are cannot hold all experts, or the model has others than `loads_LE`."""
        load = self._membership.load
        now = self._placement
        if loads_LE is None:
            loads_LE = np.zeros((now.n_layers, now.n_experts)) if load is None else load.recent_LE
        if loads_LE.shape != (now.n_layers, now.n_experts):
            raise PlacementError(
                f"the model has {now.n_layers} layers of {now.n_experts} experts; these loads are of another"
            )
        return balance(loads_LE, self._workers(without), now, limits or Limits(expert_bytes=self._expert_bytes))

    async def rebalance(self, limits: Limits | None = None, action: str = "rebalance") -> Receipt:
        """The placement that suits the recent load."""
        async with self._lock:
            plan = self.plan(limits)
            return await self._reach(plan.placement, action, plan.forecast)

    @property
    def recent_rows(self) -> float:
        """Rows of all workers in the window."""
        load = self._membership.load
        return 0.0 if load is None else sum(load.recent.values())

    @property
    def total_rows(self) -> dict[str, int]:
        """Rows of each worker since start."""
        load = self._membership.load
        return {} if load is None else dict(load.total)

    async def drain(self, worker: str) -> Receipt:
        """Everything that `worker` holds goes elsewhere, and nothing comes to it until `undrain`."""
        async with self._lock:
            if worker not in self._membership.slots and worker not in self._placement.workers:
                there = ", ".join(sorted(self._membership.slots)) or "none"
                raise PlacementError(f"there is no expert worker {worker}; there are {there}")
            # What the others hold stays: a drain is no rebalance.
            plan = self.plan(Limits(expert_bytes=self._expert_bytes, tolerance=np.inf), [worker])
            receipt = await self._reach(plan.placement, f"drain {worker}", plan.forecast)
            self.drained.add(worker)
            return receipt

    async def scale(self, n_workers: int, timeout_s: float) -> Receipt:
        """As many expert workers: new ones get experts once they are ready, those with the highest numbers go first.

        PlacementError when they are not ready within `timeout_s`, or the rest cannot hold all experts: there are then
        as many as before.
        """
        async with self._lock:
            before = self._membership.wanted
            if not before:
                raise PlacementError("this cluster has no expert workers of its own that could become more or fewer")
            if n_workers < 1:
                raise PlacementError("there has to be at least one expert worker")
            ordered = sorted(before, key=_number)
            kept, last = ordered[:n_workers], _number(ordered[-1])
            new = [f"expert-{last + 1 + i}" for i in range(n_workers - len(kept))]
            leaving = ordered[n_workers:]
            self._membership.want([*before, *new])
            try:
                await self._await_ready(new, timeout_s)
                limits = Limits(expert_bytes=self._expert_bytes, tolerance=np.inf if leaving else 0.01)
                plan = self.plan(limits, leaving)
                receipt = await self._reach(plan.placement, f"scale to {n_workers} expert workers", plan.forecast)
            except PlacementError:
                self._membership.want(before)
                raise
            self._membership.want([*kept, *new])
            self.drained -= set(leaving)
            return receipt

    async def _await_ready(self, workers: list[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            ready = {m.id for m in self._membership.view.members if m.role == "expert" and m.state == "ready"}
            missing = [worker for worker in workers if worker not in ready]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise PlacementError(f"{', '.join(missing)} did not start within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    def undrain(self, worker: str) -> None:
        """The next `rebalance` may use `worker` again."""
        self.drained.discard(worker)

    @property
    def _placement(self) -> Placement:
        return self._membership.epochs.placement

    def _workers(self, without: Iterable[str] = ()) -> list[Worker]:
        left_out = self.drained | set(without)
        members = [m for m in self._membership.view.members if m.role == "expert" and m.state == "ready"]
        members = [member for member in members if member.id not in left_out]
        known = all(member.bytes_per_s for member in members)
        n = self._placement.n_layers * self._placement.n_experts
        # One slot of each stays free, or nothing could be moved.
        return [
            Worker(
                member.id,
                member.slots - 1 if member.slots else n,
                float(member.bytes_per_s) if known else 1.0,
                member.node,
            )
            for member in members
        ]

    def _roomiest(self, layer: int, expert: int) -> str:
        holders = self._placement.holders(layer, expert) if 0 <= layer < self._placement.n_layers else ()
        room = {
            worker: slots - len(self._placement.shard(worker))
            for worker, slots in self._membership.slots.items()
            if worker not in holders and worker not in self.drained
        }
        if not room:
            raise PlacementError(f"every expert worker has a replica of layer {layer}, expert {expert}")
        return max(sorted(room), key=lambda worker: room[worker])

    async def _reach(self, goal: Placement, action: str, forecast: Forecast | None = None) -> Receipt:
        way = list(steps(self._placement, goal, self._membership.slots, _STEP))
        return await self._go(way, action, forecast)

    async def _go(self, way: list[Placement], action: str, forecast: Forecast | None = None) -> Receipt:
        """One placement after another; when one fails, back to the first."""
        before = self._placement
        load = self._membership.load
        receipt = Receipt(action, time.time(), before.epoch, forecast=forecast)
        receipt.imbalance_before = 1.0 if load is None else load.imbalance
        self.receipts.append(receipt)
        self.events.add(_kind(action), f"{action}: begun")
        began = time.monotonic()
        try:
            for placement in way:
                change = await self._change(placement, action)
                receipt.added += len(change.adds)
                receipt.removed += len(change.removes)
        except PlacementError as error:
            receipt.error = str(error)
            await self._back(before)
            raise
        finally:
            receipt.seconds = time.monotonic() - began
            receipt.epoch_after = self._placement.epoch
            load = self._membership.load
            receipt.rows_then = {} if load is None else dict(load.total)
            outcome = receipt.error or (
                f"epoch {receipt.epoch_after} after {receipt.seconds:.2f} s, {receipt.added} replicas loaded, "
                f"{receipt.removed} unloaded"
            )
            self.events.add(_kind(action), f"{action}: {outcome}", level="error" if receipt.error else "good")
            _log.info("%s: %s", action, outcome)
        return receipt

    async def _back(self, before: Placement) -> None:
        """After a step that failed: the placement that was in force when the action began."""
        try:
            for placement in steps(self._placement, before, self._membership.slots, _STEP):
                await self._change(placement, f"back to epoch {before.epoch}")
        except PlacementError:
            _log.exception("the placement of epoch %d cannot be restored", before.epoch)


def _kind(action: str) -> Kind:
    verb = action.partition(" ")[0].rstrip(":")
    return "rebalance" if verb == "rebalance" else "scale" if verb == "scale" else "placement"


def _number(worker: str) -> int:
    """N of `expert-N`."""
    return int(worker.rpartition("-")[2])
