"""Catches a lost member that is not noticed, news that wakes nobody or everybody, an epoch acknowledged too early."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.control.membership import HUNG_AFTER_S, LOST_AFTER_S, REBUILD_S, Membership
from cluster.control.view import Member, Preparation, View
from cluster.errors import PlacementError
from cluster.placement.edit import replicate
from cluster.placement.load import Load
from cluster.placement.placement import striped
from tests.fake_fleet import goal_of

ROUTER = Member("router", "router-0", 10, "n", "ready", "127.0.0.1:1", epoch=1)
OTHER = Member("router", "router-1", 11, "n", "ready", "127.0.0.1:2", epoch=1)
EXPERT = Member("expert", "expert-0", 12, "n", "ready", "127.0.0.1:3")


def membership(processes: tuple[str, ...] = ()) -> Membership:
    return Membership(striped(2, 4, ["expert-0"]), goal_of(processes), now=0.0, first_version=100)


def test_news_changes_the_version_and_numbers_for_people_do_not() -> None:
    m = membership()
    m.report(EXPERT, 1.0)
    version = m.view.version
    assert version > 100
    m.report(replace(EXPERT, detail={"rows": 5}), 2.0)
    assert m.view.version == version
    assert m.view.members[0].detail == {"rows": 5}
    m.report(replace(EXPERT, address="127.0.0.1:9"), 3.0)
    assert m.view.version > version
    assert m.view.addresses("expert") == {"expert-0": "127.0.0.1:9"}


def test_a_silent_member_is_lost_and_comes_back() -> None:
    m = membership()
    m.report(EXPERT, 0.0)
    m.report(ROUTER, LOST_AFTER_S)
    version = m.view.version
    m.sweep(LOST_AFTER_S + 0.1, lambda member: False)
    assert {member.id: member.state for member in m.view.members} == {"expert-0": "lost", "router-0": "ready"}
    assert m.view.version > version
    assert m.view.addresses("expert") == {}
    m.report(replace(EXPERT, pid=99), LOST_AFTER_S + 0.2)
    assert m.view.addresses("expert") == {"expert-0": "127.0.0.1:3"}


def test_a_dead_process_is_lost_at_once() -> None:
    m = membership()
    m.report(EXPERT, 0.0)
    m.report(ROUTER, 0.0)
    m.sweep(0.1, lambda member: member.pid == EXPERT.pid)
    assert m.view.addresses("expert") == {}
    assert m.view.addresses("router") == {"router-0": "127.0.0.1:1"}


def sweep(m: Membership, first: int, last: int) -> list[str]:
    """A sweep every second; who is to be ended."""
    hung = []
    for now in range(first, last + 1):
        m.sweep(now, lambda member: False)
        hung += [member.id for member in m.hung(now)]
    return hung


def test_a_member_that_hangs_is_ended_once_and_one_that_loads_is_not() -> None:
    m = membership()
    m.report(EXPERT, 0.0)
    m.report(replace(ROUTER, state="starting"), 0.0)
    assert sweep(m, 1, int(HUNG_AFTER_S) - 1) == []
    assert sweep(m, int(HUNG_AFTER_S), 100) == ["expert-0"]
    m.report(replace(EXPERT, pid=99), 100)
    assert sweep(m, 101, 101 + int(HUNG_AFTER_S)) == ["expert-0"]


def test_a_controller_that_stood_still_itself_ends_nobody() -> None:
    m = membership()
    m.report(EXPERT, 0.0)
    assert sweep(m, 1, 2) == []
    assert sweep(m, 1000, 1001) == []
    m.report(EXPERT, 1001)
    assert sweep(m, 1002, 1000 + int(HUNG_AFTER_S)) == []


def test_a_change_that_no_worker_has_room_for_is_refused() -> None:
    m = membership()
    m.report(replace(EXPERT, most_slots=8), 0.0)
    with pytest.raises(PlacementError, match="there is no expert worker expert-9; there are expert-0"):
        m.propose(replicate(m.view.placement, 0, 0, "expert-9"), "a test", 0.0, 1.0)
    m.report(replace(EXPERT, id="expert-1", most_slots=1), 0.0)
    two = replicate(replicate(m.view.placement, 0, 0, "expert-1"), 0, 1, "expert-1")
    with pytest.raises(PlacementError, match="expert-1 has room for 1 experts and would hold 2"):
        m.propose(two.numbered(2), "a test", 0.0, 1.0)


def test_a_change_is_news_and_what_is_for_the_controller_alone_is_not() -> None:
    m = membership()
    m.report(replace(EXPERT, preparation=Preparation(9, {})), 0.0)
    version = m.view.version
    m.report(replace(EXPERT, preparation=Preparation(10, {})), 0.0)
    assert m.view.version == version and m.view.members[0].preparation is None
    m.propose(m.view.placement.numbered(2), "a test", 0.0, 1.0)
    assert m.view.version > version and m.view.placement.epoch == 2, "nothing had to be loaded"


def test_a_restarted_controller_waits_for_the_placement_that_a_member_has_heard_of() -> None:
    m = membership(("router-0",))
    m.report(replace(ROUTER, told=5), 0.1, known_version=10**20)
    assert not m.settled(0.2) and m.view.version >= 10**20
    m.adopt(View(10**20, (), striped(2, 4, ["expert-0"], epoch=5)))
    assert m.settled(0.2) and m.view.placement.epoch == 5


def test_who_left_counts_in_no_imbalance_and_has_no_series() -> None:
    """Would catch an imbalance of 2 after four workers became two, and one of 1 where a worker gets nothing at all."""
    m = membership()
    m.report(EXPERT, 0.0)
    m.epochs.placement = striped(2, 4, ["expert-0", "expert-1"], epoch=2)
    zero_LE = np.zeros((2, 4))
    load = Load(
        zero_LE.astype(np.int64), zero_LE, {"expert-0": 90, "expert-9": 50}, {"expert-0": 30.0, "expert-9": 9.0}
    )
    m.report(replace(ROUTER, load=load), 0.0)
    assert m.load is not None and m.load.recent == {"expert-0": 30.0, "expert-1": 0.0} and m.load.imbalance == 2.0
    assert m.rows == {"expert-0": 90, "expert-1": 0}
    m.report(replace(EXPERT, pid=EXPERT.pid + 1), 0.0)
    assert m.restarts == {"expert-0": 1}
    m.ended("expert-0")
    assert not m.restarts


def test_a_restarted_controller_shows_nothing_before_it_heard_everybody() -> None:
    m = membership(("expert-0", "router-0"))
    m.report(EXPERT, 0.1)
    assert not m.settled(0.2)
    m.report(ROUTER, 0.3)
    assert m.settled(0.3)
    assert membership(("never-comes",)).settled(REBUILD_S)


def test_draining_is_news() -> None:
    m = membership()
    version = m.view.version
    m.drain()
    assert m.view.draining
    assert m.view.version > version
