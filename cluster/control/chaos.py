"""Faults on purpose, in a cluster whose operator allowed them."""

from __future__ import annotations

import os

import ray
from ray.exceptions import RayActorError

from cluster.control.client import NAME, NAMESPACE
from cluster.control.events import Events
from cluster.control.faults import Fault, inflict
from cluster.control.membership import Membership
from cluster.control.view import Member
from cluster.errors import PlacementError


class Chaos:
    """Lets members of the cluster inflict faults on themselves."""

    def __init__(self, membership: Membership, events: Events, allowed: bool) -> None:
        self._membership = membership
        self._events = events
        self._allowed = allowed

    async def inflict(self, fault: Fault) -> None:
        """Begin `fault`. Raises PlacementError where that is not allowed or names what does not exist."""
        if not self._allowed:
            raise PlacementError("this cluster was not started with --allow-chaos")
        member = None if fault.member == NAME else self._find(fault.member, ("router", "expert"))
        if fault.kind == "partition":
            if member is None or member.role != "router":
                raise PlacementError(f"a partition is between a router and an expert worker, not of {fault.member}")
            self._find(fault.peer, ("expert",))
        self._events.add("chaos", str(fault), level="warning", member=fault.member)
        if member is None:
            inflict(fault, os.getpid())
        else:
            await self._tell(member.id, fault)

    async def _tell(self, member: str, fault: Fault) -> None:
        try:
            await ray.get_actor(member, NAMESPACE).inflict.remote(fault)
        except RayActorError as error:
            if fault.kind not in ("kill", "pause"):
                raise PlacementError(f"{member} is going down or coming up: try again") from error
            # On a busy machine the fault comes before the answer that it will.

    def _find(self, member_id: str, roles: tuple[str, ...]) -> Member:
        there = [m for m in self._membership.view.members if m.role in roles and m.state != "lost"]
        for member in there:
            if member.id == member_id:
                return member
        names = ", ".join(member.id for member in there) or "none"
        raise PlacementError(f"there is no {' or '.join(roles)} {member_id or 'without a name'}; there are {names}")
