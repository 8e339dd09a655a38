"""Who is in the cluster, and which placement and group are in force. Plain logic: no Ray, no clock, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from cluster.control.epochs import Change, Epochs
from cluster.control.goal import Goal
from cluster.control.groups import regroup
from cluster.control.reach import Isolation, away
from cluster.control.view import GATEWAYS, Member, View
from cluster.placement.edit import check
from cluster.placement.load import Load, merged
from cluster.placement.placement import Placement
from workers.transport.collective.group import Group

LOST_AFTER_S = 5.0  # a member says something every second; on a busy machine a second can be three
HUNG_AFTER_S = 30.0  # silent for this long, a process that still exists is stopped or stuck
REBUILD_S = 2.0  # a controller that just started hears every member within two rounds of calls
REGROUP_S = 0.2  # between two groups after a break, so that one that breaks at once does not make everybody spin


class Membership:
    """The controller's memory. The caller brings the time, so that it needs none of its own.

    Until all processes of the goal reported, or `REBUILD_S` passed, the view is not `settled` and is shown to nobody: a
    controller that was restarted would else tell routers that all workers left.
    """

    def __init__(self, placement: Placement, goal: Goal, now: float, first_version: int) -> None:
        self.epochs = Epochs(placement)
        self.goal = goal
        self._failures: dict[str, str] = {}
        self._serving = False
        self._loads: dict[str, Load] = {}
        self._started = now
        self._version = first_version
        self._draining = False
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self.restarts: Counter[str] = Counter()  # by member, since this controller started
        self.metrics_url: str | None = None  # of the controller itself
        self._hung_at: dict[str, float] = {}  # of members that have started: loading may keep a process busy
        self._swept = now
        self._isolation = Isolation()
        self._isolated: tuple[str, ...] = ()
        self._group: Group | None = None
        self._newest_group = 0
        self._regroup_at = now
        self._view: View | None = None

    def report(self, member: Member, now: float, known_version: int = 0) -> None:
        """`member` said something: it registers, lives on, acknowledges an epoch, or tells of its group.

        `known_version` is that of its view: versions rise also across a restart with a clock that was put back.
        """
        if known_version > self._version:
            self._version = known_version
            self._changed()
        if member.load is not None:
            self._loads[member.id] = member.load
        if member.preparation is not None:
            self.epochs.prepared(member.id, member.preparation)
        member = replace(member, load=None, preparation=None)
        known = self._members.get(member.id)
        self._members[member.id] = member
        if known is not None:
            self.restarts[member.id] += known.pid != member.pid
        self._heard[member.id] = now
        if member.state != "starting":
            self._hung_at[member.id] = now + HUNG_AFTER_S
            self._failures.pop(member.id, None)
        if member.group is not None and member.group.number > self._newest_group:  # of the time before a restart
            self._put(member.group)
        if known is None or _news(known) != _news(member):
            self._changed()
        else:
            self._view = None
        self.advance(now)
        self._regroup(now)

    def sweep(self, now: float, is_dead: Callable[[Member], bool]) -> None:
        """Mark as lost whoever is silent for too long or, as far as the caller can tell, dead."""
        for member in list(self._members.values()):
            silent = now - self._heard[member.id] > LOST_AFTER_S
            if member.state != "lost" and (silent or is_dead(member)):
                self._members[member.id] = replace(member, state="lost")
                self._loads.pop(member.id, None)
                self._changed()
        self._forget_unwanted()
        self.advance(now)
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

    def advance(self, now: float) -> None:
        """Let a change of the placement take the next step that is possible, and see who is cut off from whom."""
        before = self.epochs.version
        self.epochs.advance(self._members, now, self.away)
        isolated = self._isolation.look(self.epochs.placement, self._members.values(), now)
        if self.epochs.version != before or isolated != self._isolated:
            self._isolated = isolated
            self._changed()

    @property
    def away(self) -> frozenset[str]:
        """Expert workers that cannot be asked, see `reach`."""
        return away(self._members.values())

    def give_way(self, reason: str, now: float) -> None:
        """A change of the placement that is not published yet is given up for something more urgent."""
        before = self.epochs.version
        self.epochs.give_way(reason, now)
        if self.epochs.version != before:
            self._changed()

    def propose(self, placement: Placement, reason: str, now: float, timeout_s: float) -> Change:
        """Begin a change of the placement. PlacementError when it cannot be made."""
        check(placement, self.most_slots, self.epochs.placement)
        change = self.epochs.propose(placement, reason, now, timeout_s)
        self._changed()
        self.advance(now)
        return change

    def aim(self, goal: Goal) -> None:
        """From now on this is to be brought about."""
        self.goal = replace(goal, revision=self.goal.revision + 1)
        self._failures = {who: why for who, why in self._failures.items() if who in self.goal.processes.ids}
        self._changed()

    def failed(self, process: str, why: str) -> None:
        """A process, or with `GATEWAYS` those of Ray Serve, did not start."""
        if process == GATEWAYS or process in self.goal.processes.ids:
            self._failures[process] = why
            self._changed()

    def served(self) -> None:
        """The gateways take requests."""
        self._serving = True
        self._failures.pop(GATEWAYS, None)
        self._changed()

    def ended(self, process: str) -> None:
        """A process was ended on purpose: one of its name that is heard of from now on is another one."""
        if self._members.pop(process, None) is not None:
            del self._heard[process]
            self._hung_at.pop(process, None)
            self._loads.pop(process, None)
            self.restarts.pop(process, None)
            self._changed()

    def _forget_unwanted(self) -> None:
        """Who left and was meant to is no loss."""
        processes = self.goal.processes
        n_gateways = sum(member.role == "gateway" and member.state != "lost" for member in self._members.values())
        for member in [member for member in self._members.values() if member.state == "lost"]:
            if member.role == "gateway":
                superfluous = 0 < processes.gateways <= n_gateways
            else:
                superfluous = bool(processes.ids) and member.id not in processes.ids
            if superfluous:
                self.ended(member.id)

    def adopt(self, view: View) -> None:
        """A member handed over the last view it heard, after a restart of the controller."""
        before = self.epochs.version
        self.epochs.adopt(view.placement)
        if view.goal.revision > self.goal.revision:
            self.goal = view.goal
            self._changed()
        if self.epochs.version != before:
            self._changed()

    def outdated(self, member: Member) -> bool:
        """Whether `member` has heard of a placement or a goal that is newer than what is known here."""
        return member.told > self.epochs.placement.epoch or member.aims > self.goal.revision

    @property
    def under_way(self) -> str | None:
        """The change of the placement or of the fleet that is being made, in words."""
        change, scaling = self.epochs.change, self.goal.scaling
        if change is not None and not change.done:
            return change.reason
        return None if scaling is None else f"scale to {scaling.after}: waits for processes"

    @property
    def slots(self) -> dict[str, int]:
        """By live expert worker, how many experts a plan may give it; 0: not known."""
        return {m.id: m.slots for m in self._workers()}

    @property
    def most_slots(self) -> dict[str, int]:
        """By live expert worker, how many experts it may hold when others are lost; 0: as many as it has memory for."""
        return {m.id: m.most_slots for m in self._workers()}

    def _workers(self) -> list[Member]:
        return [m for m in self._sorted() if m.role == "expert" and m.state in ("starting", "ready")]

    @property
    def load(self) -> Load | None:
        """What all live routers together dispatched, its window that of the workers that hold experts; None before the
        first router said so."""
        load = merged(self._loads.values())
        return None if load is None else load.among(self.epochs.placement.holding)

    @property
    def rows(self) -> dict[str, int]:
        """Rows that each worker that holds experts has got since the routers started."""
        load = merged(self._loads.values())
        return {} if load is None else {w: load.total.get(w, 0) for w in sorted(self.epochs.placement.holding)}

    def drain(self) -> None:
        """From now on the cluster is being stopped."""
        if not self._draining:
            self._draining = True
            self._changed()

    def settled(self, now: float) -> bool:
        """Whether the view may be shown: all processes of the goal reported, or had the time to."""
        return now - self._started >= REBUILD_S or self.rebuilt(self.goal.processes.ids)

    def rebuilt(self, processes: frozenset[str]) -> bool:
        """Whether all of these have reported, and nobody knows better what is in force and to be brought about."""
        return processes <= self._members.keys() and not any(map(self.outdated, self._members.values()))

    @property
    def view(self) -> View:
        if self._view is None:
            self._view = View(
                self._version, self._sorted(), self.epochs.placement, self.epochs.next, self.epochs.acknowledged,
                self.goal, dict(self._failures), self._serving, self._group, self._isolated, self._draining,
                self.metrics_url,
            )  # fmt: skip
        return self._view

    def _regroup(self, now: float) -> None:
        if not self.settled(now) or (self._group is None and now < self._regroup_at):
            return
        if self._group is not None and not self._heard_of(self._group, now):
            return
        # Versions rise across restarts of the controller, and so do groups that are numbered after them.
        number = max(self._version, self._newest_group) + 1
        group = regroup(self.epochs.placement, self._sorted(), self._group, number)
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
    return replace(member, detail={}, group=None, broken=0, told=0, aims=0)
