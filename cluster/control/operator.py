"""What an operator may ask of the placement: each verb is one transaction, with a receipt.

A verb reaches its goal, or the placement before is in force again and the error says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from cluster.control.epochs import Change
from cluster.control.events import Events, Kind
from cluster.control.membership import Membership
from cluster.control.receipt import Receipt
from cluster.control.tally import Tally
from cluster.errors import PlacementError
from cluster.placement import edit
from cluster.placement.layout import Floats
from cluster.placement.placement import Placement
from cluster.placement.planner import Forecast, Limits, Plan, Worker, balance
from cluster.placement.spares import homeless
from cluster.placement.steps import steps

_log = logging.getLogger(__name__)

_STEP = 64  # replicas that are added under one epoch, about
_RECEIPTS = 100

MakeChange = Callable[[Placement, str], Awaitable[Change]]


class Operator:
    """Carries out verbs one at a time. `change` brings a placement into force, see `Controller.change`."""

    def __init__(
        self,
        membership: Membership,
        change: MakeChange,
        expert_bytes: int,
        events: Events | None = None,
        least_homes: int = 1,
    ) -> None:
        """`events`: where every action is told of. `least_homes`: replicas that no verb may leave an expert without."""
        self.receipts: deque[Receipt] = deque(maxlen=_RECEIPTS)
        self.tally = Tally()
        self._membership = membership
        self._change = change
        self._expert_bytes = expert_bytes
        self._least_homes = least_homes
        self._urgent = 0
        self.events = events or Events()
        self.lock = asyncio.Lock()  # held by the one verb that is under way

    @property
    def drained(self) -> frozenset[str]:
        """Expert workers that are to hold nothing: as they are called, or as long as they are where they are."""
        goal = self._membership.goal
        return goal.drained | {worker for node in goal.ending for worker in self._workers_of(node)}

    async def replicate(self, layer: int, expert: int, worker: str | None) -> Receipt:
        """Another replica of an expert; `worker` None: on the one with most room that has none."""
        async with self.lock:
            target = worker or self._roomiest(layer, expert)
            goal = self._checked(edit.replicate(self._placement, layer, expert, target))
            return await self._go([goal], f"replicate layer {layer}, expert {expert} to {target}")

    async def drop(self, layer: int, expert: int, worker: str) -> Receipt:
        """One replica less."""
        async with self.lock:
            goal = self._checked(edit.drop(self._placement, layer, expert, worker))
            return await self._go([goal], f"drop layer {layer}, expert {expert} from {worker}")

    async def move(self, layer: int, expert: int, source: str | None, target: str) -> Receipt:
        """A replica elsewhere."""
        async with self.lock:
            goal = self._checked(edit.move(self._placement, layer, expert, source, target))
            return await self._go([goal], f"move layer {layer}, expert {expert} to {target}")

    async def pin(self, layer: int, expert: int, worker: str) -> Receipt:
        """A replica of an expert on `worker`, which is loaded where there is none, stays there whatever is planned."""
        async with self.lock:
            goal = self._checked(edit.pin(self._placement, layer, expert, worker))
            return await self._go([goal], f"pin layer {layer}, expert {expert} to {worker}")

    async def unpin(self, layer: int, expert: int, worker: str) -> Receipt:
        """A plan may take that replica away again."""
        async with self.lock:
            goal = edit.unpin(self._placement, layer, expert, worker)
            return await self._go([goal], f"unpin layer {layer}, expert {expert} from {worker}")

    @property
    def is_busy(self) -> bool:
        """Whether a verb is being carried out, which may take many changes."""
        return self.lock.locked()

    async def urgently(self, goal: Placement, action: str) -> Receipt:
        """Bring `goal` into force before whatever else is under way; a change that is not published yet gives way."""
        self._urgent += 1
        try:
            self._membership.give_way(f"gave way to the {action}", time.monotonic())
            return await self._go([goal], action)
        finally:
            self._urgent -= 1

    async def apply(self, homes_LE: list[list[dict[str, float]]], made_for_epoch: int | None = None) -> Receipt:
        """A whole placement: by layer and expert, the workers that are to hold it and their shares.

        `made_for_epoch`: it is a plan that would undo whatever came after that epoch, and is refused then.
        """
        async with self.lock:
            now = self._placement
            if made_for_epoch not in (None, now.epoch):
                raise PlacementError(
                    f"this was planned for epoch {made_for_epoch}, and epoch {now.epoch} is in force: plan again"
                )
            if [len(experts) for experts in homes_LE] != [len(experts) for experts in now.replicas]:
                raise PlacementError(f"the model has {now.n_layers} layers of {now.n_experts} experts")
            named = {worker for experts in homes_LE for homes in experts for worker in homes}
            goal = self._checked(Placement.of(now.epoch + 1, sorted(named), homes_LE, now.pins))
            edit.check(goal, self._membership.slots, now)
            if missing := sorted(now.pins - goal.all_replicas()):
                pin = f"{missing[0].layer}:{missing[0].expert}@{missing[0].worker}"
                raise PlacementError(f"{pin} is pinned; `expertmesh placement unpin {pin}` lets it go")
            return await self.reach(goal, "apply a placement")

    def plan(self, limits: Limits | None = None, without: Iterable[str] = (), loads_LE: Floats | None = None) -> Plan:
        """What `rebalance` would do for the recent load, or for `loads_LE`, rows of each expert. PlacementError when
        the workers that there are cannot hold all experts, or the model has others than `loads_LE`."""
        self._need_workers()
        load = self._membership.load
        now = self._placement
        if loads_LE is None:
            loads_LE = np.zeros((now.n_layers, now.n_experts)) if load is None else load.recent_LE
        if loads_LE.shape != (now.n_layers, now.n_experts):
            raise PlacementError(
                f"the model has {now.n_layers} layers of {now.n_experts} experts; these loads are of another"
            )
        limits = replace(limits or Limits(expert_bytes=self._expert_bytes), least_homes=self._least_homes)
        return balance(loads_LE, self._workers(frozenset(without)), now, limits)

    async def rebalance(self, limits: Limits | None = None, action: str = "rebalance") -> Receipt:
        """The placement that suits the recent load."""
        async with self.lock:
            return await self.follow(self.plan(limits), action)

    @property
    def recent_rows(self) -> float:
        """Rows of all workers in the window."""
        load = self._membership.load
        return 0.0 if load is None else sum(load.recent.values())

    @property
    def total_rows(self) -> dict[str, int]:
        """Rows since start of each worker that holds experts."""
        return self._membership.rows

    async def drain(self, worker: str) -> Receipt:
        """Everything that `worker` holds goes elsewhere, and nothing comes to it until `undrain`."""
        async with self.lock:
            self._check_there(worker)
            receipt = await self._empty([worker], f"drain {worker}")
            self._aim(self._membership.goal.drained | {worker})
            return receipt

    async def drain_node_of(self, worker: str) -> Receipt:
        """Everything that expert workers of the Ray node of `worker` hold goes elsewhere, since the node ends.

        A worker that is started anew on another node is like any other.
        """
        async with self.lock:
            self._check_there(worker)
            node = next(m.node for m in self._membership.view.members if m.id == worker)
            receipt = await self._empty(self._workers_of(node), f"drain the node of {worker}")
            goal = self._membership.goal
            there = {member.node for member in self._membership.view.members}
            self._membership.aim(replace(goal, ending=(goal.ending & there) | {node}))
            return receipt

    async def _empty(self, workers: Collection[str], action: str) -> Receipt:
        """What the others hold stays: a drain is no rebalance."""
        plan = self.plan(Limits(expert_bytes=self._expert_bytes, tolerance=np.inf), workers)
        return await self.follow(plan, action, workers)

    def _check_there(self, worker: str) -> None:
        named = {*self._membership.slots, *self._placement.workers, *self._membership.goal.drained}
        if worker not in named:
            there = ", ".join(sorted(self._membership.slots)) or "none"
            raise PlacementError(f"there is no expert worker {worker}; there are {there}")

    def _workers_of(self, node: str) -> list[str]:
        return [m.id for m in self._membership.view.members if m.role == "expert" and m.node == node]

    def undrain(self, worker: str) -> None:
        """The next `rebalance` may use `worker` again."""
        self._check_there(worker)
        self._aim(self._membership.goal.drained - {worker})

    def _aim(self, drained: frozenset[str]) -> None:
        self._membership.aim(replace(self._membership.goal, drained=drained))

    @property
    def _placement(self) -> Placement:
        return self._membership.epochs.placement

    def _room(self, without: Collection[str]) -> dict[str, int]:
        """Slots of each live worker for a plan that leaves some out: where memory alone limits the others, they have
        room for all experts and half as many."""
        slots, most = self._membership.slots, self._membership.most_slots
        staying = slots.keys() - self.drained - set(without)
        if (without or self.drained) and staying:
            n_replicas = sum(map(len, self._placement.replicas)) * self._least_homes
            share = -(-3 * n_replicas // (2 * len(staying)))
            slots |= {worker: max(slots[worker], share) for worker in staying if slots[worker] and not most[worker]}
        return slots

    def _workers(self, without: Collection[str]) -> list[Worker]:
        left_out, slots = self.drained | set(without), self._room(without)
        members = [m for m in self._membership.view.members if m.role == "expert" and m.state == "ready"]
        members = [member for member in members if member.id not in left_out]
        known = all(member.bytes_per_s for member in members)
        n = self._placement.n_layers * self._placement.n_experts
        # One slot of each stays free, or nothing could be moved.
        return [
            Worker(
                member.id,
                slots[member.id] - 1 if slots[member.id] else n,
                float(member.bytes_per_s) if known else 1.0,
                member.node,
            )
            for member in members
        ]

    def _need_workers(self) -> None:
        if not any(member.role == "expert" for member in self._membership.view.members):
            raise PlacementError("there are no expert workers, routers hold all experts themselves: nothing to place")

    def _roomiest(self, layer: int, expert: int) -> str:
        self._need_workers()
        edit.check_there(self._placement, layer, expert)
        holders = self._placement.holders(layer, expert)
        room = {
            worker: slots - len(self._placement.shard(worker))
            for worker, slots in self._membership.slots.items()
            if worker not in holders and worker not in self.drained
        }
        if not room:
            raise PlacementError(f"every expert worker that is not drained has layer {layer}, expert {expert}")
        return max(sorted(room), key=lambda worker: room[worker])

    async def reach(self, goal: Placement, action: str) -> Receipt:
        """`goal` in steps that each fit beside what is there. The caller holds `lock`."""
        return await self._go(list(steps(self._placement, goal, self._membership.slots, _STEP)), action)

    async def follow(self, plan: Plan, action: str, without: Collection[str] = ()) -> Receipt:
        """The same for a plan that leaves workers out, in the room that it was made for."""
        slots = self._room(without)
        return await self._go(list(steps(self._placement, plan.placement, slots, _STEP)), action, plan.forecast, slots)

    async def _go(
        self,
        way: list[Placement],
        action: str,
        forecast: Forecast | None = None,
        slots: Mapping[str, int] | None = None,
    ) -> Receipt:
        """One placement after another; when one fails, back to the first."""
        before = self._placement
        load = self._membership.load
        receipt = Receipt(action, time.time(), before.epoch, forecast=forecast)
        receipt.imbalance_before = 1.0 if load is None else load.imbalance
        self.receipts.append(receipt)
        self.events.add(_kind(receipt.verb), f"{action}: begun")
        began, reached, urgent = time.monotonic(), before.epoch, self._urgent
        try:
            for placement in way:
                if self._urgent > urgent:
                    raise PlacementError(f"{action}: gave way to a fail-over")
                if not urgent:  # a fail-over may need more than what is planned for
                    edit.check(placement, slots or self._membership.slots, self._placement)
                change = await self._change(placement, action)
                reached = placement.epoch
                receipt.added += len(change.adds)
                receipt.removed += len(change.removes)
        except PlacementError as error:
            receipt.error = str(error)
            if not self._urgent and self._placement.epoch == reached:  # else a fail-over's placement counts
                await self._back(before, receipt)
            elif reached > before.epoch:
                receipt.error += "; what it had changed by then stays"
            raise PlacementError(receipt.error) from error
        finally:
            receipt.seconds = time.monotonic() - began
            receipt.epoch_after = self._placement.epoch
            load = self._membership.load
            receipt.rows_then = {} if load is None else dict(load.total)
            self.tally.add(receipt)
            outcome = receipt.error or (
                f"epoch {receipt.epoch_after} after {receipt.seconds:.2f} s, {receipt.added} replicas loaded, "
                f"{receipt.removed} unloaded"
            )
            self.events.add(_kind(receipt.verb), f"{action}: {outcome}", level="error" if receipt.error else "good")
            _log.info("%s: %s", action, outcome)
        return receipt

    def _checked(self, goal: Placement) -> Placement:
        """`goal`, unless it gives a drained worker something, or takes an expert below the replicas it is to have."""
        added = goal.all_replicas() - self._placement.all_replicas()
        for worker in sorted({replica.worker for replica in added} & self.drained):
            undo = f"; `expertmesh drain {worker} --undo` lets it be used again"
            raise PlacementError(f"{worker} is drained{undo if worker in self._membership.goal.drained else ''}")
        before = set(homeless(self._placement, (), self._least_homes))
        for layer, expert in homeless(goal, (), self._least_homes):
            if (layer, expert) not in before and goal.replicas[layer][expert]:
                raise PlacementError(
                    f"layer {layer}, expert {expert} would have {len(goal.replicas[layer][expert])} replicas; "
                    f"with --spare-replicas {self._least_homes - 1} there are to be {self._least_homes}"
                )
        return goal

    async def _back(self, before: Placement, receipt: Receipt) -> None:
        """After a step that failed: the placement that was in force when the action began; `receipt` says when not."""
        try:
            for placement in steps(self._placement, before, self._membership.slots, _STEP):
                await self._change(placement, f"back to epoch {before.epoch}")
        except PlacementError as error:
            _log.exception("the placement of epoch %d cannot be restored", before.epoch)
            receipt.error += f"; and the placement before cannot be restored ({error}), one between the two is in force"


def _kind(verb: str) -> Kind:
    kinds: dict[str, Kind] = {
        "rebalance": "rebalance", "scale": "scale", "fail-over": "failover", "end": "failover"
    }  # fmt: skip
    return kinds.get(verb, "placement")
