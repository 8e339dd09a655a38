"""Which processes exchange rows collectively: from who is there to the group in force. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cluster.control.view import Member
from cluster.placement.placement import Placement
from workers.transport.collective.group import Group


def regroup(placement: Placement, members: Iterable[Member], present: Group | None, number: int) -> Group | None:
    """The group that is to be in force: `present` while nothing speaks against it, None while there can be none.

    A group takes in every live router that has a store and every live worker that has loaded. Another process makes a
    larger one, which is built beside the present one. A rank that died, or that says the group broke, ends it for
    all: whoever lives first has to hear of that, so that no group waits for a rank that cannot come. `number` is that
    of the next group.
    """
    routers = [member for member in members if member.role == "router" and member.state != "lost" and member.store]
    workers = [member for member in members if member.role == "expert" and member.state in ("ready", "draining")]
    ranks = [*routers, *workers]
    live = {(member.id, member.pid) for member in ranks}
    if present is not None:
        meant = set(zip(present.members, present.pids, strict=True))
        if not meant <= live or any(member.broken >= present.number for member in ranks):
            return None
        if meant == live:
            return present
    elif not routers or any(member.group is not None for member in ranks):
        return None
    if not _complete(placement, {member.id for member in workers}):
        return present
    return Group(
        number=number,
        store=routers[0].store,
        routers=tuple(member.id for member in routers),
        workers=tuple(member.id for member in workers),
        pids=tuple(member.pid for member in ranks),
    )


def _complete(placement: Placement, workers: Collection[str]) -> bool:
    """Whether every expert has a replica on one of `workers`."""
    held = {index for index, worker in enumerate(placement.workers) if worker in workers}
    return all(not held.isdisjoint(holders) for experts in placement.replicas for holders in experts)
