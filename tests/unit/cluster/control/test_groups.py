"""Catches a group that waits for a process that cannot come, leaves out one that lives, or reuses a number."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.groups import regroup
from cluster.control.membership import LOST_AFTER_S, REBUILD_S, REGROUP_S, Membership
from cluster.control.view import Member
from cluster.placement.placement import Placement, striped
from tests.fake_fleet import goal_of
from workers.transport.collective.group import Group

ROUTER = Member("router", "router-0", 10, "n", "ready", "127.0.0.1:1", store="127.0.0.1:9")
OTHER = Member("router", "router-1", 11, "n", "starting", "", store="127.0.0.1:8")
EXPERT = Member("expert", "expert-0", 12, "n", "ready", "127.0.0.1:3")
ALL = (EXPERT, ROUTER, OTHER)
PLACEMENT = striped(2, 4, ["expert-0"])
GROUP = Group(7, "127.0.0.1:9", ("router-0", "router-1"), ("expert-0",), (10, 11, 12))


def test_a_group_is_everybody_who_has_loaded() -> None:
    assert regroup(PLACEMENT, ALL, None, 7) == GROUP
    assert regroup(PLACEMENT, ALL, GROUP, 8) == GROUP
    gateway = replace(ROUTER, role="gateway", id="gateway-0", store="")
    assert regroup(PLACEMENT, (gateway, *ALL), None, 7) == GROUP
    loading = (EXPERT, ROUTER, replace(OTHER, store=""))
    assert regroup(PLACEMENT, loading, None, 7) == Group(7, ROUTER.store, ("router-0",), ("expert-0",), (10, 12))


def test_without_collective_routers_there_is_none() -> None:
    assert regroup(PLACEMENT, (EXPERT, replace(ROUTER, store="")), None, 0) is None


def test_every_expert_needs_a_holder() -> None:
    two = striped(2, 4, ["expert-0", "expert-1"])
    assert regroup(two, ALL, None, 0) is None
    assert regroup(two, (*ALL, replace(EXPERT, id="expert-1", state="starting")), None, 0) is None
    assert regroup(two, (*ALL, replace(EXPERT, id="expert-1", state="lost")), None, 0) is None
    replicas = Placement(1, ("expert-0", "expert-1"), (((0, 1), (1, 0)),))
    assert regroup(replicas, ALL, None, 7) == GROUP


def test_a_newcomer_is_taken_in_beside_the_running_group() -> None:
    members = tuple(replace(member, group=GROUP) for member in ALL)
    newcomer = replace(EXPERT, id="expert-1", pid=20)
    larger = regroup(PLACEMENT, (*members, newcomer), GROUP, 8)
    assert larger is not None
    assert (larger.number, larger.workers, larger.pids) == (8, ("expert-0", "expert-1"), (10, 11, 12, 20))


def test_a_dead_or_restarted_rank_ends_the_group() -> None:
    assert regroup(PLACEMENT, (EXPERT, ROUTER, replace(OTHER, state="lost")), GROUP, 8) is None
    assert regroup(PLACEMENT, (replace(EXPERT, state="lost"), ROUTER, OTHER), GROUP, 8) is None
    assert regroup(PLACEMENT, (EXPERT, ROUTER, replace(OTHER, pid=99)), GROUP, 8) is None


def test_a_group_that_broke_is_replaced_once_everybody_has_left_it() -> None:
    broken = (EXPERT, replace(ROUTER, broken=7, group=GROUP), OTHER)
    assert regroup(PLACEMENT, broken, GROUP, 8) is None
    assert regroup(PLACEMENT, broken, None, 8) is None
    left = (EXPERT, replace(ROUTER, broken=7), OTHER)
    assert regroup(PLACEMENT, left, None, 8) == replace(GROUP, number=8)
    assert regroup(PLACEMENT, left, replace(GROUP, number=8), 9) == replace(GROUP, number=8), "an old break"


def membership(first_version: int = 100) -> Membership:
    return Membership(PLACEMENT, goal_of(member.id for member in ALL), now=0.0, first_version=first_version)


def test_a_restarted_controller_leaves_the_group_alone() -> None:
    m = membership()
    for member in ALL:
        m.report(replace(member, group=GROUP), 0.0)
    assert m.view.group == GROUP
    version = m.view.version
    m.report(EXPERT, 0.1)
    assert m.view.version == version, "who is in which group wakes nobody"


def test_a_member_that_a_restarted_controller_has_not_heard_yet_does_not_end_the_group() -> None:
    m = membership()
    m.report(replace(EXPERT, group=GROUP), REBUILD_S + 0.1)
    m.report(replace(ROUTER, group=GROUP), REBUILD_S + 0.2)
    assert m.view.group == GROUP
    m.sweep(LOST_AFTER_S + 0.1, lambda member: False)
    assert m.view.group is None, "silent for as long as a member that is lost"


def test_a_group_that_cannot_be_built_is_not_tried_without_pause() -> None:
    m = membership()
    for member in ALL:
        m.report(member, 0.0)
    first = m.view.group
    assert first is not None
    m.report(replace(ROUTER, broken=first.number), 0.01)
    assert m.view.group is None
    m.sweep(0.02, lambda member: False)
    assert m.view.group is None
    m.sweep(REGROUP_S + 0.01, lambda member: False)
    second = m.view.group
    assert second is not None
    assert second.number > first.number
    assert second == replace(first, number=second.number)


@dataclass
class Process:
    """One process that behaves: it reports itself and the group it was told."""

    member: Member
    alive: bool = True


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["kill", "start", "break", "report", "sweep", "controller"]), st.integers(0, 4)))
)
def test_whatever_happens_everybody_ends_in_one_group(events: list[tuple[str, int]]) -> None:
    workers = ("expert-0", "expert-1", "expert-2")
    placement = striped(2, 4, workers)
    processes = [Process(replace(ROUTER, id=f"router-{i}", pid=i)) for i in range(2)]
    processes += [Process(replace(EXPERT, id=worker, pid=10 + i)) for i, worker in enumerate(workers)]
    ids = [process.member.id for process in processes]
    now, n_pids = 0.0, 100
    m = Membership(placement, goal_of(ids), now, 1)
    numbers = [0]

    def dead(member: Member) -> bool:
        return not any(process.alive and process.member.pid == member.pid for process in processes)

    def report(process: Process) -> None:
        if not process.alive:
            return
        m.report(process.member, now)
        if m.settled(now):
            group = m.view.group
            if group is not None and group.number != numbers[-1]:
                assert group.number > numbers[-1], "a number was used again"
                numbers.append(group.number)
            process.member = replace(process.member, group=group)

    for kind, index in events:
        now += 0.1
        process = processes[index]
        if kind == "kill":
            process.alive = False
        elif kind == "start" and not process.alive:
            n_pids += 1
            process.member = replace(process.member, pid=n_pids, group=None, broken=0)
            process.alive = True
        elif kind == "break" and process.member.group is not None:
            process.member = replace(process.member, broken=process.member.group.number)
        elif kind == "sweep":
            m.sweep(now, dead)
        elif kind == "controller" and any(p.alive for p in processes):
            m = Membership(placement, goal_of(ids), now, m.view.version + 1)
            for survivor in processes:
                report(survivor)
        report(process)
    for process in processes:
        if not process.alive:
            n_pids += 1
            process.member = replace(process.member, pid=n_pids, group=None, broken=0)
            process.alive = True
    for _ in range(6):
        now += 1.0
        m.sweep(now, dead)
        for process in processes:
            report(process)
    group = m.view.group
    assert group is not None
    assert dict(zip(group.members, group.pids, strict=True)) == {p.member.id: p.member.pid for p in processes}
    assert {process.member.group for process in processes} == {group}
