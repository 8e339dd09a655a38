"""The placement in force and the one that is to follow it. Plain logic: no Ray, no clock, no I/O.

A change goes: the workers load what it adds, beside what they hold; every new replica is compared with one that was
there; it is published; when every live router works with it, workers unload what it no longer names. Until it is
published, whatever goes wrong leaves the placement before in force.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.control.view import Member, Preparation
from cluster.errors import PlacementError
from cluster.placement.placement import Placement, Replica
from workers.probe import Probe


@dataclass(slots=True)
class Change:
    """One change of the placement, from its proposal to its end."""

    placement: Placement
    adds: frozenset[Replica]
    removes: frozenset[Replica]
    reason: str
    began: float
    deadline: float
    published: float | None = None
    ended: float | None = None
    error: str = ""  # why it was given up
    mismatch: bool = False  # whether a new replica answered otherwise than an old one

    @property
    def done(self) -> bool:
        return self.ended is not None


@dataclass(slots=True)
class Epochs:
    """What is in force, and what is on the way. `version` rises with everything that members are to know."""

    placement: Placement
    next: Placement | None = None  # workers load what it adds
    acknowledged: bool = True  # every live router works with `placement`: what it does not name is out of use
    version: int = 0
    change: Change | None = None  # the newest one; it may have ended
    _preparations: dict[str, Preparation] = field(default_factory=dict)

    def adopt(self, placement: Placement) -> None:
        """A member knows a newer placement than a controller that was restarted: that one is in force."""
        if placement.epoch > self.placement.epoch:
            if self.next is not None and self.change is not None:  # it would replace what it does not know of
                self._give_up(self.change, "a member knows a newer placement", self.change.began)
            self.placement, self.acknowledged = placement, False
            self.version += 1

    def propose(self, placement: Placement, reason: str, now: float, timeout_s: float) -> Change:
        """Begin a change. PlacementError while another is under way, or when it does not follow the one in force.

        One that is published need not be acknowledged: a router that waits for a lost expert cannot do so before there
        is another replica of it.
        """
        if self.next is not None and self.change is not None:
            raise PlacementError(f"another change is under way: {self.change.reason}")
        if placement.epoch != self.placement.epoch + 1:
            raise PlacementError(
                f"epoch {placement.epoch} does not follow epoch {self.placement.epoch}: the placement has changed since"
            )
        if self.change is not None and self.change.ended is None:
            self.change.ended = now
        before, after = self.placement.all_replicas(), placement.all_replicas()
        self.change = Change(placement, after - before, before - after, reason, now, now + timeout_s)
        self.next = placement
        self._preparations.clear()
        self.version += 1
        return self.change

    def give_way(self, reason: str, now: float) -> None:
        """Something else comes first: a change that is not published yet is given up."""
        if self.next is not None and self.change is not None:
            self._give_up(self.change, reason, now)

    @property
    def refusing(self) -> frozenset[str]:
        """Workers that could not hold what the newest change wanted of them."""
        return frozenset(worker for worker, said in self._preparations.items() if said.error)

    def prepared(self, worker: str, preparation: Preparation) -> None:
        """What a worker says of the placement that is being prepared."""
        if self.next is not None and preparation.epoch == self.next.epoch:
            self._preparations[worker] = preparation

    def advance(self, members: Mapping[str, Member], now: float, away: Collection[str] = ()) -> None:
        """Take the next step that what is known allows: publish, give up, or end. Nobody waits for who is `away`."""
        change = self.change
        if self.next is not None and change is not None:
            live = {m.id: m for m in _live(members.values()) if m.id not in away}
            error = self._obstacle(change, live, now)
            if error:
                self._give_up(change, error, now)
            elif self._complete(change, live):
                self.placement, self.next, self.acknowledged = self.next, None, False
                change.published = now
                self.version += 1
        elif not self.acknowledged and self.in_use(members.values()) >= self.placement.epoch:
            self.acknowledged = True
            self.version += 1
            if change is not None and change.published is not None and change.ended is None:
                change.ended = now

    def in_use(self, members: Collection[Member]) -> int:
        """The oldest epoch that a live router works with.

        One that is isolated may wait for a lost reply for long; it will ask for it again by the newest placement.
        """
        given_up = ("lost", "isolated")
        routers = [m for m in members if m.role == "router" and m.state not in given_up and m.epoch]
        return min((member.epoch for member in routers), default=self.placement.epoch)

    def _obstacle(self, change: Change, live: Mapping[str, Member], now: float) -> str:
        """Why the change cannot go on; empty while it can."""
        for worker in sorted({replica.worker for replica in change.adds}):
            if worker not in live:
                return f"{worker} was lost while it loaded"
            if worker in self._preparations and self._preparations[worker].error:
                return f"{worker}: {self._preparations[worker].error}"
        for replica in sorted(change.adds):
            if (added := self._probe(replica)) is None:
                continue
            for worker in self.placement.holders(replica.layer, replica.expert):
                other = self._probe(replica._replace(worker=worker))
                if worker not in live or other is None:
                    continue
                if not added.agrees(other, same_machine=live[worker].node == live[replica.worker].node):
                    change.mismatch = True
                    where = f"layer {replica.layer}, expert {replica.expert}"
                    return f"{where} on {replica.worker} answers otherwise than on {worker}: one of them is damaged"
        if now > change.deadline:
            late = sorted({replica.worker for replica in change.adds if self._probe(replica) is None})
            return f"{', '.join(late) or 'its verification'} took longer than {change.deadline - change.began:g} s"
        return ""

    def _complete(self, change: Change, live: Mapping[str, Member]) -> bool:
        """Whether every new replica is there and was compared with an old one, where one is left."""
        for replica in change.adds:
            if self._probe(replica) is None:
                return False
            holders = [w for w in self.placement.holders(replica.layer, replica.expert) if w in live]
            if holders and all(self._probe(replica._replace(worker=worker)) is None for worker in holders):
                return False
        return True

    def _probe(self, replica: Replica) -> Probe | None:
        preparation = self._preparations.get(replica.worker)
        return None if preparation is None else preparation.probes.get((replica.layer, replica.expert))

    def _give_up(self, change: Change, error: str, now: float) -> None:
        change.error, change.ended = error, now
        self.next = None
        self.version += 1


def _live(members: Iterable[Member]) -> list[Member]:
    """The expert workers that have loaded."""
    return [member for member in members if member.role == "expert" and member.state in ("ready", "draining")]
