"""Whom routers reach: expert workers that are away for all of them, and routers that are cut off from one which others
reach. Plain logic: no Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cluster.control.view import Member
from cluster.placement.placement import Placement

_GRACE_S = 1.0  # for the other routers to notice the same: a worker that hangs is not noticed by all at once


def away(members: Iterable[Member]) -> frozenset[str]:
    """Expert workers that cannot be asked: lost, not loaded yet, or without an answer to any router that serves."""
    members = list(members)
    serving = [set(member.unreachable) for member in members if member.role == "router" and _serves(member)]
    nobody_reaches = set.intersection(*serving) if serving else set()
    return frozenset(
        member.id
        for member in members
        if member.role == "expert" and (member.state in ("lost", "starting") or member.id in nobody_reaches)
    )


class Isolation:
    """Which routers are to serve nobody, since they lack experts that another router reaches."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # when each router was first seen to be cut off

    def look(self, placement: Placement, members: Iterable[Member], now: float) -> tuple[str, ...]:
        """The ids of those that have been cut off for a while, while there is one that is not."""
        members = list(members)
        gone = away(members)
        routers = [member for member in members if member.role == "router" and _serves(member)]
        cut_off = {router.id for router in routers if _lacks(placement, gone, router.unreachable)}
        self._since = {router: self._since.get(router, now) for router in cut_off}
        if len(cut_off) == len(routers):
            return ()
        return tuple(sorted(router for router, since in self._since.items() if now - since >= _GRACE_S))


def _serves(member: Member) -> bool:
    return member.state in ("ready", "isolated")


def _lacks(placement: Placement, gone: Collection[str], unreachable: Collection[str]) -> bool:
    """Whether a router that cannot reach `unreachable` lacks an expert that is not `gone`."""
    if not set(unreachable) - set(gone):
        return False
    lost = {i for i, worker in enumerate(placement.workers) if worker in gone}
    missing = lost | {i for i, worker in enumerate(placement.workers) if worker in unreachable}
    return any(
        missing.issuperset(holders) and not lost.issuperset(holders)
        for experts in placement.replicas
        for holders in experts
    )
