"""Fail-over of experts: what a lost worker held alone is loaded on others, and leaves them when it is back."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.receipt import Receipt
from cluster.errors import PlacementError
from cluster.placement.placement import Placement, Replica
from cluster.placement.spares import homeless, sheltered, without

_log = logging.getLogger(__name__)

_LOOK_S = 1.0  # between two looks without news
_SURE_S = 0.3  # a process without a core for a moment answers the next question
_POLL_S = 0.02
_RESPARE_AFTER_S = 20.0  # a worker is back in less; then what it held gets its second home elsewhere
_LEAVE_AFTER_S = 10.0  # with every worker there: one that has just come back may go again
_ABSENT_AFTER_S = 10.0  # since the first worker was ready: one of which a restarted controller has not heard is gone


class Rescuer:
    """Looks whether every expert has a live replica, whenever something has changed.

    Whoever is first counts: the survivor that has loaded an expert, or the restarted worker, which keeps its place in
    the placement all the while.
    """

    def __init__(self, membership: Membership, operator: Operator, changed: asyncio.Condition, least: int) -> None:
        """`least`: replicas of each expert that there are to be."""
        self._membership = membership
        self._operator = operator
        self._changed = changed
        self._least = least
        self._first_ready: float | None = None
        self._loaded: set[str] = set()  # workers that have been ready: one that starts for the first time is awaited
        self._shelters: frozenset[Replica] = frozenset()  # what was added for workers that were away
        self._silent_since: dict[str, float] = {}
        self._down_since: float | None = None
        self._whole_since: float | None = None
        self._going: set[asyncio.Task[Receipt]] = set()
        self._said = ""  # what could not be helped, as it was told

    async def run(self) -> None:
        """For ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SURE_S / 3 if self._silent_since else _LOOK_S), self._changed:
                    await self._changed.wait()
            try:
                await self.look(time.monotonic())
            except PlacementError as error:
                self._tell(str(error))
                await asyncio.sleep(_LOOK_S)
            except Exception:
                _log.exception("fail-over of experts")
                await asyncio.sleep(_LOOK_S)

    async def look(self, now: float) -> None:
        """What has to be done now. PlacementError when it could not be done."""
        placement, down = self._placement, self.down(now)
        self._down_since = None if not down else self._down_since or now
        self._whole_since = None if down else self._whole_since or now
        if homeless(placement, down):
            await self._shelter(placement, down, 1)
        elif self._operator.is_busy or self._membership.epochs.next is not None:
            return  # what is not urgent waits for its turn
        elif self._down_since is not None and now - self._down_since > _RESPARE_AFTER_S:
            await self._shelter(placement, down, self._least)
        elif self._shelters and self._whole_since is not None and now - self._whole_since > _LEAVE_AFTER_S:
            await self._leave(placement)

    def down(self, now: float) -> frozenset[str]:
        """Workers of the placement that cannot be asked, other than those that start for the first time."""
        members = {member.id: member for member in self._membership.view.members if member.role == "expert"}
        self._loaded |= {member.id for member in members.values() if member.state == "ready"}
        away = [members[worker] for worker in self._membership.away]
        silent = [member.id for member in away if member.state not in ("lost", "starting")]
        self._silent_since = {worker: self._silent_since.get(worker, now) for worker in silent}
        down = {member.id for member in away if member.state == "lost" or member.id in self._loaded}
        down -= {worker for worker, since in self._silent_since.items() if now - since < _SURE_S}
        if self._loaded and self._first_ready is None:
            self._first_ready = now
        if self._first_ready is not None and now - self._first_ready > _ABSENT_AFTER_S:
            down |= set(self._placement.workers) - members.keys()
        return frozenset(down & set(self._placement.workers))

    async def _shelter(self, placement: Placement, down: frozenset[str], least: int) -> None:
        members = self._membership.view.members
        able = {member.id for member in members if member.role == "expert" and member.state == "ready"}
        able -= down | self._operator.drained | self._membership.epochs.refusing
        slots = {worker: n for worker, n in self._membership.most_slots.items() if worker in able}
        after = sheltered(placement, down, slots, least)
        added = after.all_replicas() - placement.all_replicas()
        names = ", ".join(sorted(down & set(placement.workers)))
        if added:
            self._shelters |= added
            await self._bring(after, f"fail-over of {names}")
            self._said = ""
        if left := len(homeless(after, down)):
            self._tell(f"{left} experts of {names} find no free slot elsewhere; requests wait until it is back")

    async def _leave(self, placement: Placement) -> None:
        after = without(placement, self._shelters)
        if after.all_replicas() != placement.all_replicas():
            await self._bring(after, "end of the fail-over")
        self._shelters = frozenset()

    async def _bring(self, goal: Placement, action: str) -> None:
        """Returns once `goal` is published: a router that waits for yet another expert has not acknowledged it.

        PlacementError when it was given up.
        """
        going = asyncio.create_task(self._operator.urgently(goal, action))
        self._going.add(going)
        going.add_done_callback(self._gone)
        while not going.done() and self._placement.epoch < goal.epoch:
            await asyncio.wait({going}, timeout=_POLL_S)
        if going.done():
            going.result()

    def _gone(self, going: asyncio.Task[Receipt]) -> None:
        self._going.discard(going)
        if not going.cancelled():
            going.exception()  # it is told of in the receipt

    def _tell(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self._operator.events.add("failover", what, level="error")
            _log.warning("%s", what)

    @property
    def _placement(self) -> Placement:
        return self._membership.epochs.placement
