"""Catches a placement in force before its experts are there and compared, weights freed that a router still uses, a
failed change that leaves anything behind, and a restarted controller that goes back to an older placement."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.control.epochs import Epochs
from cluster.control.view import Member, Preparation
from cluster.errors import PlacementError
from cluster.placement.edit import move, replicate
from cluster.placement.placement import Placement, striped
from workers.probe import Probe

FIRST = striped(1, 2, ("a", "b"))  # expert 0 on a, 1 on b
SECOND = replicate(FIRST, 0, 0, "b")
GOOD, OTHER = Probe("x", (1.0, -2.0)), Probe("y", (3.0, 5.0))
ROUNDED = Probe("z", (1.001, -2.001))


def member(name: str, epoch: int = 1, node: str = "n") -> Member:
    return Member("router" if name[0] == "r" else "expert", name, 1, node, "ready", "x:1", epoch=epoch)


def fleet(*changed: Member) -> dict[str, Member]:
    return {each.id: each for each in (member("a"), member("b"), member("r0"), member("r1"), *changed)}


def begun(placement: Placement = SECOND) -> Epochs:
    epochs = Epochs(FIRST)
    epochs.propose(placement, "a test", now=0.0, timeout_s=10.0)
    return epochs


def say(epochs: Epochs, worker: str, probe: Probe | None = None, error: str = "", epoch: int = 2) -> None:
    epochs.prepared(worker, Preparation(epoch, {} if probe is None else {(0, 0): probe}, error))


def test_a_change_is_loaded_compared_published_acknowledged_and_then_over() -> None:
    epochs = begun(move(FIRST, 0, 0, "a", "b"))
    epochs.advance(fleet(), 1.0)
    assert epochs.placement is FIRST and epochs.next is not None
    say(epochs, "b", GOOD)
    epochs.advance(fleet(), 2.0)
    assert epochs.placement is FIRST, "the replica that is there has not been asked yet"
    say(epochs, "a", GOOD)
    epochs.advance(fleet(), 3.0)
    assert (epochs.placement.epoch, epochs.next, epochs.acknowledged) == (2, None, False)
    epochs.advance(fleet(member("r0", epoch=2)), 4.0)
    assert not epochs.acknowledged, "the other router still routes by the old one"
    epochs.advance(fleet(member("r0", epoch=2), member("r1", epoch=2)), 5.0)
    assert epochs.acknowledged
    change = epochs.change
    assert change is not None and (change.published, change.ended, change.error) == (3.0, 5.0, "")


def test_a_lost_router_and_one_that_has_no_placement_yet_hold_nothing_up() -> None:
    epochs = begun()
    say(epochs, "a", GOOD)
    say(epochs, "b", GOOD)
    epochs.advance(fleet(), 1.0)
    rest = replace(member("r1"), state="lost"), member("r2", epoch=0)
    epochs.advance(fleet(member("r0", epoch=2), *rest), 2.0)
    assert epochs.acknowledged


@pytest.mark.parametrize(
    ("why", "error", "mismatch"),
    [("refused", "b: no memory", False), ("lost", "b was lost", False), ("late", "b took longer", False),
     ("damaged", "otherwise than on a", True)],
)  # fmt: skip
def test_what_goes_wrong_leaves_the_placement_before_in_force(why: str, error: str, mismatch: bool) -> None:
    epochs = begun()
    members, now = fleet(), 1.0
    if why == "refused":
        say(epochs, "b", error="no memory")
    elif why == "lost":
        members = fleet(replace(member("b"), state="lost"))
    elif why == "late":
        now = 10.5
    else:
        say(epochs, "a", GOOD)
        say(epochs, "b", OTHER)
    version = epochs.version
    epochs.advance(members, now)
    change = epochs.change
    assert change is not None and change.done and error in change.error and change.mismatch is mismatch
    assert epochs.placement is FIRST and epochs.next is None and epochs.version > version
    epochs.propose(SECOND, "again", now, 10.0)


def test_unlike_machines_may_round_and_one_machine_may_not() -> None:
    assert GOOD.agrees(ROUNDED, same_machine=False) and not GOOD.agrees(ROUNDED, same_machine=True)
    assert not GOOD.agrees(OTHER, same_machine=False)
    assert not Probe("v", (float("nan"), 1.0)).agrees(GOOD, same_machine=False)


def test_an_expert_without_a_live_replica_has_nothing_to_be_compared_with() -> None:
    epochs = begun()
    say(epochs, "b", GOOD)
    epochs.advance(fleet(replace(member("a"), state="lost")), 1.0)
    assert epochs.placement.epoch == 2


def test_one_change_at_a_time_each_on_what_is_in_force() -> None:
    epochs = begun()
    with pytest.raises(PlacementError, match="under way"):
        epochs.propose(SECOND, "another", 0.0, 1.0)
    with pytest.raises(PlacementError, match="epoch 3 does not follow epoch 1"):
        Epochs(FIRST).propose(SECOND.numbered(3), "too far", 0.0, 1.0)


def test_a_change_that_began_on_an_older_placement_gives_way_to_the_newer_one() -> None:
    """Would catch a controller that, just restarted, puts the second epoch in the place of the seventh."""
    epochs = begun()
    change = epochs.change
    epochs.adopt(FIRST.numbered(7))
    epochs.advance(fleet(member("r0", 7), member("r1", 7)), 1.0)
    assert epochs.placement.epoch == 7 and epochs.next is None
    assert change is not None and change.done and "newer placement" in change.error


def test_a_restarted_controller_takes_the_newer_placement_and_has_it_acknowledged_again() -> None:
    epochs = Epochs(FIRST)
    epochs.adopt(SECOND.numbered(7))
    epochs.adopt(SECOND.numbered(5))
    assert epochs.placement.epoch == 7 and not epochs.acknowledged
    epochs.advance(fleet(member("r0", 7), member("r1", 7)), 1.0)
    assert epochs.acknowledged
