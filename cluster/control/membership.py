"""Who is in the cluster, and which placement and group are in force. Plain logic: no Ray, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from cluster.control.groups import regroup
from cluster.control.view import Member, View
from cluster.placement.placement import Placement
from workers.transport.collective.group import Group

LOST_AFTER_S = 5.0  # a member says something every second; on a busy machine a second can be three
HUNG_AFTER_S = 30.0  # silent for this long, a process that still exists is stopped or stuck
REBUILD_S = 2.0  # a controller that just started hears every member within two rounds of calls
REGROUP_S = 0.2  # between two groups after a break, so that one that breaks at once does not make everybody spin


class Membership:
    """The controller's memory. The caller brings the time, so that it needs none of its own.

    `expected` are the ids a complete cluster has. Until they all reported, or `REBUILD_S` passed, the view is not
    `settled` and is shown to nobody: a controller that was restarted would else tell routers that all workers left.
    """

    def __init__(self, placement: Placement, expected: Collection[str], now: float, first_version: int) -> None:
        self._placement = placement
        self._expected = frozenset(expected)
        self._started = now
        self._version = first_version
        self._draining = False
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._hung_at: dict[str, float] = {}  # of members that have started: loading may keep a process busy
        self._swept = now
        self._group: Group | None = None
        self._newest_group = 0
        self._regroup_at = now
        self._view: View | None = None

    def report(self, member: Member, now: float) -> None:
        """`member` said something: it registers, lives on, acknowledges an epoch, or tells of its group."""
        known = self._members.get(member.id)
        self._members[member.id] = member
        self._heard[member.id] = now
        if member.state != "starting":
            self._hung_at[member.id] = now + HUNG_AFTER_S
        if member.group is not None and member.group.number > self._newest_group:  # of the time before a restart
            self._put(member.group)
        if known is None or _news(known) != _news(member):
            self._changed()
        else:
            self._view = None
        self._regroup(now)

    def sweep(self, now: float, is_dead: Callable[[Member], bool]) -> None:
        """Mark as lost whoever is silent for too long or, as far as the caller can tell, dead."""
        for member in list(self._members.values()):
            silent = now - self._heard[member.id] > LOST_AFTER_S
            if member.state != "lost" and (silent or is_dead(member)):
                self._members[member.id] = replace(member, state="lost")
                self._changed()
        self._regroup(now)

    def hung(self, now: float) -> list[Member]:
        """Members that are to be ended, each named once: nobody else does it, and Ray starts only what ended again."""
        if now - self._swept > LOST_AFTER_S:  # it was us who stood still; whoever lives will say so
            self._hung_at = dict.fromkeys(self._hung_at, now + HUNG_AFTER_S)
        self._swept = now
        hung = [member_id for member_id, at in self._hung_at.items() if now >= at]
        for member_id in hung:
            del self._hung_at[member_id]
        return [self._members[member_id] for member_id in hung]

    def publish(self, placement: Placement) -> None:
        """Put the next placement in force; ValueError unless its epoch follows the present one."""
        if placement.epoch != self._placement.epoch + 1:
            raise ValueError(f"epoch {placement.epoch} does not follow epoch {self._placement.epoch}")
        self._placement = placement
        self._changed()

    def drain(self) -> None:
        """From now on the cluster is being stopped."""
        if not self._draining:
            self._draining = True
            self._changed()

    def acknowledged(self) -> int:
        """The newest epoch that every live router works with: experts that only older ones name can be unloaded."""
        routers = [member for member in self._members.values() if member.role == "router" and member.state != "lost"]
        return min((member.epoch for member in routers), default=self._placement.epoch)

    def settled(self, now: float) -> bool:
        """Whether the view may be shown: all expected members reported, or had the time to."""
        return now - self._started >= REBUILD_S or self._expected <= self._members.keys()

    @property
    def view(self) -> View:
        if self._view is None:
            self._view = View(self._version, self._sorted(), self._placement, self._group, self._draining)
        return self._view

    def _regroup(self, now: float) -> None:
        if not self.settled(now) or (self._group is None and now < self._regroup_at):
            return
        if self._group is not None and not self._heard_of(self._group, now):
            return
        # Versions rise across restarts of the controller, and so do groups that are numbered after them.
        group = regroup(self._placement, self._sorted(), self._group, self._version + 1)
        if group != self._group:
            self._put(group)
            if group is not None:
                self._regroup_at = now + REGROUP_S

    def _heard_of(self, group: Group, now: float) -> bool:
        """Whether each of `group` has spoken or had the time to: just after a start, silence says nothing."""
        return now - self._started >= LOST_AFTER_S or set(group.members) <= self._members.keys()

    def _put(self, group: Group | None) -> None:
        self._group = group
        self._newest_group = self._newest_group if group is None else group.number
        self._changed()

    def _sorted(self) -> tuple[Member, ...]:
        return tuple(sorted(self._members.values(), key=lambda member: (member.role, member.id)))

    def _changed(self) -> None:
        self._version += 1
        self._view = None


def _news(member: Member) -> Member:
    """`member` without what changes and need not wake every other member."""
    return replace(member, detail={}, group=None, broken=0)
