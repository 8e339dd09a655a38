"""What happened in the cluster, for people: the newest events, numbered, as the live page and `status` tell them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.control.view import Member

Kind = Literal["member", "placement", "rebalance", "scale", "failover", "chaos"]
Level = Literal["info", "good", "warning", "error"]

_KEPT = 500


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    number: int  # rises; also across restarts of the controller
    at: float  # seconds since 1970
    kind: Kind
    level: Level
    text: str  # one line
    member: str = ""  # whom it is about, where it is about one process


class Events:
    """A ring of the newest events. In memory: a controller that was restarted begins with the next one."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ring: deque[Event] = deque(maxlen=_KEPT)
        # Milliseconds, so that numbers of a restarted controller lie above those it gave before.
        self._number = int(clock() * 1000)
        self._pids: dict[str, int] = {}
        self._states: dict[str, str] = {}
        self._lost: dict[str, float] = {}

    def add(self, kind: Kind, text: str, *, level: Level = "info", member: str = "") -> None:
        """Something happened just now."""
        self._number += 1
        self._ring.append(Event(self._number, self._clock(), kind, level, text, member))

    def after(self, number: int) -> tuple[Event, ...]:
        """The events that are kept and newer than event `number`, oldest first."""
        return tuple(event for event in self._ring if event.number > number)

    def see(self, members: Iterable[Member], wanted: Iterable[str] = ()) -> None:
        """Note who came, left, came back or drains since the last look.

        `wanted`: the expert workers and routers there are to be, where that is known; another one that ends was meant
        to.
        """
        seen = {member.id: member for member in members}
        expected = frozenset(wanted)
        for member in seen.values():
            leaves = bool(expected) and member.role in ("expert", "router") and member.id not in expected
            if not (leaves and member.state == "lost"):
                self._see(member)
        for gone in self._pids.keys() - seen.keys():
            del self._pids[gone]
            self._states.pop(gone, None)
            self._lost.pop(gone, None)
            self.add("scale", f"{gone} has left the fleet", member=gone)

    def _see(self, member: Member) -> None:
        known = self._pids.get(member.id)
        before = self._states.get(member.id, "")
        if member.id not in self._lost and known is not None and (member.state == "lost" or known != member.pid):
            self._lost[member.id] = self._clock()
            self.add("member", f"{member.id} is lost (process {known})", level="error", member=member.id)
        if member.state == "ready" and (before != "ready" or member.id in self._lost):
            since = self._lost.pop(member.id, None)
            back = "is ready" if since is None else f"is back after {self._clock() - since:.1f} s"
            self.add("member", f"{member.id} {back} (process {member.pid})", level="good", member=member.id)
        if member.state == "draining" and before != "draining":
            self.add("member", f"{member.id} is draining", level="warning", member=member.id)
        if member.state != "lost":
            self._pids[member.id] = member.pid
        self._states[member.id] = member.state
