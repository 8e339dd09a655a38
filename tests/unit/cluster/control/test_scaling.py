"""Catches a scaling that ends a process somebody still needs, leaves half of itself, or is forgotten in a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from cluster.control import fleet as fleet_module
from cluster.control import operator as operator_module
from cluster.control import scaling as scaling_module
from cluster.control.fleet import Fleet as Follower
from cluster.control.goal import Goal, Processes, Scaling, check_resized
from cluster.control.options import ProcessBytes
from cluster.control.scaling import Scaler
from cluster.control.view import GATEWAYS, Member, View
from cluster.errors import PlacementError
from tests.fake_fleet import WORKERS, FakeLauncher, Fleet
from tests.loop import until

NOW = Processes(WORKERS, ("router-0",), 1)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_POLL_S", 0.001)
    monkeypatch.setattr(scaling_module, "_POLL_S", 0.001)


def run(fleet: Fleet, launcher: FakeLauncher, act: Callable[[], Awaitable[object]]) -> None:
    """`act` while the fleet is followed, until all that it asked for is there."""

    async def both() -> None:
        follower = Follower(fleet.membership, launcher)
        await follower.begin()
        task = asyncio.create_task(follower.run())
        try:
            await until(lambda: launcher.gateways > 0)
            await act()
        finally:
            await until(lambda: launcher.running == fleet.membership.goal.processes.ids)
            task.cancel()

    asyncio.run(both())


def started() -> tuple[Fleet, FakeLauncher]:
    fleet = Fleet()
    return fleet, FakeLauncher(fleet.membership, NOW.ids)


def test_numbers_go_up_and_the_highest_leave() -> None:
    more = NOW.resized(workers=4, routers=3)
    assert more.workers == (*WORKERS, "expert-3") and more.routers == ("router-0", "router-1", "router-2")
    fewer = more.resized(workers=2, routers=1, gateways=2)
    assert fewer == Processes(("expert-0", "expert-1"), ("router-0",), 2)
    assert (more | fewer) == replace(more, gateways=2) and str(fewer) == "2 expert workers, 1 router, 2 gateways"


def test_who_is_to_hold_experts_is_known_before_the_others_have_left() -> None:
    """Would catch workers that have no room yet for what those who leave are about to give them."""
    goal = Goal(processes=NOW)
    assert (goal.n_holding, Goal().n_holding) == (3, 0)
    assert replace(goal, drained=frozenset({"expert-1"})).n_holding == 2
    assert replace(goal, scaling=Scaling(NOW, NOW.resized(workers=2))).n_holding == 2


def test_who_was_drained_leaves_first() -> None:
    """Would catch an operator who drains a bad worker, takes one away, and loses a good one."""
    fleet, launcher = started()

    async def drain_and_scale() -> None:
        await fleet.operator.drain("expert-0")
        await fleet.scaler.scale(workers=2)
        await until(lambda: "end expert-0" in launcher.log)
        await fleet.scaler.scale(workers=3)

    run(fleet, launcher, drain_and_scale)
    assert launcher.log == ["end expert-0", "start expert-3"] and not fleet.membership.goal.drained
    assert fleet.membership.goal.processes.workers == ("expert-1", "expert-2", "expert-3")


@pytest.mark.parametrize(
    ("now", "sizes", "why"),
    [
        (NOW, {"workers": 0}, "at least one expert worker"),
        (NOW, {"routers": 0}, "at least one router"),
        (NOW, {"gateways": 0}, "one gateway"),
        (Processes((), ("router-0",), 1), {"workers": 2}, "no expert workers"),
        (Processes((), ("router-0",), 1), {"routers": 2}, "the one router holds all experts"),
    ],
)
def test_what_cannot_be_is_refused(now: Processes, sizes: dict[str, int], why: str) -> None:
    with pytest.raises(PlacementError, match=why):
        check_resized(now, now.resized(**sizes), has_experts=True)


def test_more_get_experts_and_fewer_lose_theirs_before_they_go() -> None:
    fleet, launcher = started()
    run(fleet, launcher, lambda: fleet.scaler.scale(workers=4, routers=2, gateways=3))
    assert fleet.membership.epochs.placement.shard("expert-3")
    assert launcher.log == ["start expert-3", "start router-1"] and launcher.gateways == 3
    goal = fleet.membership.goal
    assert goal.scaling is None and str(goal.processes) == "4 expert workers, 2 routers, 3 gateways"
    run(fleet, launcher, lambda: fleet.scaler.scale(workers=2))
    assert launcher.log[2:] == ["end expert-2", "end expert-3"]
    assert {name for experts in fleet.homes for homes in experts for name in homes} == {"expert-0", "expert-1"}


def test_a_router_that_leaves_ends_only_when_it_has_nothing_more_to_do() -> None:
    fleet, launcher = started()
    open_at_end: list[object] = []
    end = launcher.end

    def note(process: str) -> None:
        open_at_end.extend(m.detail["open"] for m in fleet.membership.view.members if m.id == process)
        end(process)

    launcher.end = note  # type: ignore[method-assign]

    async def router(n_open: int) -> None:
        """What router-1 does: it drains once it is told to, and its requests finish one by one."""
        member = Member("router", "router-1", 1, "n", "ready", "x:1", epoch=1, detail={"open": n_open})
        fleet.membership.report(member, 0.0)
        await until(lambda: "router-1" in fleet.membership.goal.leaving)
        for left in range(n_open, -1, -1):
            fleet.membership.report(replace(member, state="draining", detail={"open": left}), 0.0)
            await asyncio.sleep(0.01)

    async def more_and_fewer() -> None:
        await fleet.scaler.scale(routers=2)
        await asyncio.gather(router(3), fleet.scaler.scale(routers=1))

    run(fleet, launcher, more_and_fewer)
    assert open_at_end == [0]
    assert not fleet.membership.goal.leaving


def test_more_than_there_is_memory_for_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch `scale --routers 100` on a laptop, after which the system ends whatever process it likes."""
    fleet, launcher = started()
    scaler = Scaler(fleet.membership, fleet.operator, 5.0, 10, ProcessBytes(worker=3 << 30, router=1 << 30))
    monkeypatch.setattr(scaling_module, "available_bytes", lambda: 4 << 30)

    async def scale() -> None:
        with pytest.raises(
            PlacementError, match="5 expert workers, 1 router, 1 gateway need 6,144 MiB more, 4,096 MiB"
        ):
            await scaler.scale(workers=5)
        assert (await scaler.scale(workers=4, routers=2)).error == ""

    run(fleet, launcher, scale)
    assert launcher.log == ["start expert-3", "start router-1"]


def test_a_new_worker_that_holds_experts_is_not_ended_when_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a scaling that a fail-over interrupts, and that then ends the only home of experts."""
    monkeypatch.setattr(operator_module, "_STEP", 1)
    fleet, launcher = started()

    async def scale() -> None:
        fleet.failing = {2, 3}  # the second step, and the first one back
        with pytest.raises(PlacementError, match="that hold experts by now stay"):
            await fleet.scaler.scale(workers=5)

    run(fleet, launcher, scale)
    stayed = fleet.membership.epochs.placement.holding - set(WORKERS)
    assert 1 <= len(stayed) <= 2 and set(fleet.membership.goal.processes.workers) == stayed | set(WORKERS)
    assert sum(line.startswith("end") for line in launcher.log) == 2 - len(stayed)


def test_whatever_goes_wrong_ends_the_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an autoscaler that waits for ever for a scaling that a fault of ours ended."""
    fleet, launcher = started()
    monkeypatch.setattr(fleet.operator, "plan", lambda *_: 1 // 0)

    async def scale() -> None:
        with pytest.raises(ZeroDivisionError):
            await fleet.scaler.scale(workers=4)

    run(fleet, launcher, scale)
    assert fleet.membership.goal.scaling is None and fleet.membership.goal.processes == NOW


@pytest.mark.parametrize(
    ("broken", "sizes", "why"),
    [
        ({"expert-3": "no memory"}, {"workers": 4}, "expert-3 did not start: no memory"),
        ({"router-1": "no GPU"}, {"workers": 4, "routers": 2}, "router-1 did not start: no GPU"),
        ({GATEWAYS: "Serve says no"}, {"workers": 4, "gateways": 2}, "gateways did not start: Serve says no"),
        ({}, {"workers": 1}, "do not fit"),
    ],
)
def test_what_does_not_start_leaves_the_fleet_as_it_was(
    broken: dict[str, str], sizes: dict[str, int], why: str
) -> None:
    fleet, launcher = started()
    before = fleet.homes

    async def scale() -> None:
        launcher.broken = broken
        with pytest.raises(PlacementError, match=why):
            await fleet.scaler.scale(**sizes)

    run(fleet, launcher, scale)
    goal = fleet.membership.goal
    assert goal.processes == NOW and goal.scaling is None and fleet.homes == before
    assert not fleet.membership.view.failures


def test_one_that_hangs_is_given_up_at_its_deadline() -> None:
    fleet, launcher = started()

    async def forever(process: str) -> None:
        await asyncio.sleep(3600)

    async def scale() -> None:
        launcher.ready = forever  # type: ignore[method-assign]
        with pytest.raises(PlacementError, match="expert-3 did not start within"):
            await fleet.scaler.scale(workers=4, timeout_s=0.05)

    run(fleet, launcher, scale)
    assert fleet.membership.goal.processes == NOW


def test_a_restarted_controller_goes_on_with_what_was_begun_and_knows_who_is_drained() -> None:
    """The members alone know: the constructor's arguments are those of the first start."""
    old, _ = started()
    asyncio.run(old.operator.drain("expert-1"))
    after = NOW.resized(workers=4)
    goal = old.membership.goal
    assert goal.drained == {"expert-1"}
    old.membership.aim(replace(goal, processes=NOW | after, scaling=Scaling(NOW, after)))
    heard: View = old.membership.view

    fleet, launcher = started()
    launcher.running.add("expert-3")  # was started, and is not in the arguments

    async def resume() -> None:
        await fleet.scaler.resume()

    async def members() -> None:
        member = Member("expert", "expert-3", 1, "n", "ready", "x:1", epoch=1, slots=8, aims=heard.goal.revision)
        fleet.membership.report(member, 0.0)
        assert fleet.membership.outdated(member) and not fleet.membership.settled(0.0)
        fleet.membership.adopt(heard)
        assert not fleet.membership.outdated(member)

    asyncio.run(members())
    run(fleet, launcher, resume)
    assert launcher.log == [] and fleet.membership.goal.processes == after
    assert fleet.membership.epochs.placement.shard("expert-3")
    assert fleet.operator.drained == {"expert-1"} and not fleet.membership.epochs.placement.shard("expert-1")
    assert fleet.membership.epochs.placement.epoch > heard.placement.epoch


def test_nobody_is_ended_before_all_that_are_there_have_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "LOST_AFTER_S", 0.05)
    fleet, launcher = started()
    launcher.running.add("expert-9")
    follower = Follower(fleet.membership, launcher)

    async def begin() -> None:
        waiting = asyncio.create_task(follower.begin())
        await asyncio.sleep(0.02)
        assert not waiting.done() and launcher.log == []
        await waiting

    asyncio.run(begin())


def test_a_worker_that_was_ended_on_purpose_is_forgotten_and_one_that_died_is_not() -> None:
    fleet, _ = started()
    fleet.membership.aim(replace(fleet.membership.goal, processes=replace(NOW, workers=WORKERS[:2])))
    fleet.membership.sweep(0.1, lambda member: member.id in ("expert-1", "expert-2"))
    assert {m.id: m.state for m in fleet.membership.view.members if m.role == "expert"} == {
        "expert-0": "ready", "expert-1": "lost"
    }  # fmt: skip
