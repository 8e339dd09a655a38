"""Fail-over as the controller decides it. Catches experts of a lost worker that nobody takes, a fail-over that waits
for another change or for a router that needs it, a router that is cut off and still asked, and one that is blamed for
a worker that hangs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.control.epochs import Change
from cluster.control.goal import Goal
from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.reach import Isolation, away
from cluster.control.rescue import Rescuer
from cluster.control.view import Member, Preparation
from cluster.errors import PlacementError
from cluster.placement.edit import move, replicate
from cluster.placement.placement import Placement, Replica, striped
from workers.probe import Probe

WORKERS = ("expert-0", "expert-1", "expert-2")
GOOD = Probe("x", (1.0,))


def expert(name: str, **values: object) -> Member:
    return replace(Member("expert", name, 1, "n", "ready", "x:1", epoch=1, slots=8), **values)  # type: ignore[arg-type]


def router(name: str, *unreachable: str, epoch: int = 1) -> Member:
    return Member("router", name, 1, "n", "ready", "x:1", epoch=epoch, unreachable=unreachable)


class Fleet:
    """Three workers with eight experts, two routers, and workers that load at once what they are told to."""

    def __init__(self, least: int = 1, spares: int = 0) -> None:
        self.now = 100.0
        self.membership = Membership(striped(2, 4, WORKERS, spares=spares), Goal(), 0.0, 1)
        self.operator = Operator(self.membership, self.change, 10, least_homes=least)
        self.rescuer = Rescuer(self.membership, self.operator, asyncio.Condition(), least)
        self.members = {name: expert(name) for name in WORKERS} | {"r0": router("r0"), "r1": router("r1")}
        self.routers_follow = True
        self.say()

    def say(self, *changed: Member) -> None:
        self.members |= {member.id: member for member in changed}
        for member in self.members.values():
            self.membership.report(member, self.now)
        self.rescuer.down(self.now)

    async def change(self, placement: Placement, reason: str) -> Change:
        change = self.membership.propose(placement, reason, self.now, 10.0)
        for worker in {replica.worker for replica in placement.all_replicas()}:
            probes = dict.fromkeys(placement.shard(worker), GOOD)
            if self.members[worker].state == "ready":
                said = replace(self.members[worker], preparation=Preparation(placement.epoch, probes))
                self.membership.report(said, self.now)
        if self.routers_follow:
            self.say(*(router(name, epoch=placement.epoch) for name in ("r0", "r1")))
        if change.error:
            raise PlacementError(change.error)
        return change

    def look(self, after_s: float = 0.0) -> None:
        self.now += after_s
        asyncio.run(self.rescuer.look(self.now))

    @property
    def placement(self) -> Placement:
        return self.membership.epochs.placement


@pytest.mark.parametrize("how", ["lost", "unreachable", "starting again"])
def test_what_a_lost_worker_held_alone_goes_to_survivors_until_it_is_back(how: str) -> None:
    fleet = Fleet()
    fleet.look()
    before = fleet.placement
    assert before.epoch == 1
    if how == "unreachable":  # it hangs: nobody has missed it yet but the routers
        fleet.say(router("r0", "expert-0"), router("r1", "expert-0"))
    else:
        fleet.say(expert("expert-0", state="lost" if how == "lost" else "starting"))
    if how == "unreachable":
        fleet.look()
        assert fleet.placement.epoch == 1, "it may only have had no core for a moment"
        fleet.now += 0.5
    fleet.look()
    assert fleet.placement.epoch == 2
    for layer, index in before.shard("expert-0"):
        assert len(fleet.placement.holders(layer, index)) == 2
    fleet.look(5)
    fleet.say(expert("expert-0"), router("r0", epoch=2), router("r1", epoch=2))
    fleet.look()
    fleet.look(9)
    assert fleet.placement.epoch == 2, "it has only just come back"
    fleet.look(2)
    assert fleet.placement.homes() == before.homes() and fleet.placement.epoch == 3
    assert [receipt.action for receipt in fleet.operator.receipts] == ["fail-over of expert-0", "end of the fail-over"]


def test_a_worker_that_starts_for_the_first_time_is_awaited() -> None:
    fleet = Fleet()
    fleet.rescuer._loaded.clear()
    fleet.say(expert("expert-0", state="starting"))
    fleet.look(60)
    assert fleet.placement.epoch == 1


def test_with_spares_a_loss_needs_nothing_until_it_lasts() -> None:
    fleet = Fleet(least=2, spares=1)
    fleet.say(expert("expert-0", state="lost"))
    fleet.look()
    fleet.look(15)
    assert fleet.placement.epoch == 1
    fleet.look(10)
    assert fleet.placement.epoch == 2
    live = {"expert-1", "expert-2"}
    assert all(
        live <= set(holders) for layer in range(2) for holders in map(fleet.placement.holders, [layer] * 4, range(4))
    )
    with pytest.raises(PlacementError, match="with --spare-replicas 1 there are to be 2"):
        asyncio.run(Fleet(least=2, spares=1).operator.drop(0, 0, "expert-0"))


def test_where_there_is_no_room_nothing_is_pretended() -> None:
    fleet = Fleet()
    fleet.say(*(expert(name, most_slots=len(fleet.placement.shard(name))) for name in WORKERS))
    fleet.say(expert("expert-0", state="lost"))
    fleet.look()
    assert fleet.placement.epoch == 1
    assert "find no free slot" in fleet.operator.events.after(0)[-1].text


def test_a_fail_over_waits_for_no_other_change_and_for_no_router_that_needs_it() -> None:
    fleet = Fleet()
    now = fleet.placement
    moving = move(now, 0, 1, "expert-1", "expert-2")
    waiting = fleet.membership.propose(moving, "a move", fleet.now, 10.0)
    fleet.say(expert("expert-0", state="lost"))
    fleet.routers_follow = False
    fleet.look()
    assert "gave way" in waiting.error and fleet.placement.epoch == 2
    assert not fleet.membership.epochs.acknowledged
    fleet.say(expert("expert-0"), expert("expert-1", state="lost"))
    fleet.look()
    assert fleet.placement.epoch == 3, "a router waits for what it cannot get before the next placement"


def test_a_verb_that_gave_way_does_not_undo_the_fail_over() -> None:
    fleet = Fleet()

    async def both() -> str:
        verb = asyncio.create_task(fleet.operator.move(0, 1, "expert-1", "expert-2"))
        await asyncio.sleep(0)
        fleet.say(expert("expert-0", state="lost"))
        await fleet.rescuer.look(fleet.now)
        try:
            await verb
        except PlacementError as error:
            return str(error)
        return ""

    asyncio.run(both())
    for layer, index in striped(2, 4, WORKERS).shard("expert-0"):
        assert set(fleet.placement.holders(layer, index)) - {"expert-0"}


def test_a_router_that_is_cut_off_is_told_apart_from_a_worker_that_hangs() -> None:
    placement = striped(2, 4, WORKERS)
    workers = [expert(name) for name in WORKERS]
    isolation = Isolation()
    alone = [*workers, router("r0", "expert-1"), router("r1")]
    assert not away(alone)
    assert isolation.look(placement, alone, 1.0) == (), "the other one may only not have noticed yet"
    assert isolation.look(placement, alone, 2.5) == ("r0",)
    both = [*workers, router("r0", "expert-1"), router("r1", "expert-1")]
    assert away(both) == {"expert-1"}
    assert isolation.look(placement, both, 3.0) == ()
    assert isolation.look(placement, alone, 4.0) == (), "counted anew"
    each = [*workers, router("r0", "expert-1"), router("r1", "expert-2")]
    assert isolation.look(placement, each, 9.0) == (), "somebody has to serve"
    spared = Placement(1, WORKERS, ((((0, 1)), (1, 2)),))
    assert Isolation().look(spared, alone, 9.0) == ()
    only = Isolation()
    only.look(spared, alone, 1.0)
    assert only.look(spared, alone, 9.0) == (), "it reaches another replica of everything"
    assert away([expert("expert-0", state="starting"), router("r0")]) == {"expert-0"}


def test_verbs_go_on_while_a_worker_is_away() -> None:
    fleet = Fleet()
    fleet.say(expert("expert-0", state="lost"))
    asyncio.run(fleet.operator.replicate(0, 1, "expert-2"))
    assert Replica("expert-2", 0, 1) in fleet.placement.all_replicas()
    with pytest.raises(PlacementError, match="there is no expert worker expert-0"):
        asyncio.run(fleet.operator.replicate(0, 1, "expert-0"))
    assert replicate(fleet.placement, 0, 0, "expert-1").epoch == 3
