"""Homes for when workers are lost. Catches an expert with both homes on one worker, a spare that is planned away, a
worker that gets more than it has room for, and a pinned replica that moves."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.placement import zipf
from cluster.errors import PlacementError
from cluster.placement import edit
from cluster.placement.placement import Placement, Replica, striped
from cluster.placement.planner import Limits, Worker, balance
from cluster.placement.routes import Routes
from cluster.placement.spares import homeless, sheltered, without

NAMES = ("a", "b", "c", "d")


def least_homes(placement: Placement) -> int:
    return min(len(set(holders)) for experts in placement.replicas for holders in experts)


@pytest.mark.parametrize(("n_workers", "spares"), [(2, 1), (3, 1), (4, 1), (4, 2), (4, 3)])
def test_the_first_placement_has_spares_that_get_rows_only_after_a_loss(n_workers: int, spares: int) -> None:
    names = NAMES[:n_workers]
    placement = striped(4, 8, names, spares=spares)
    plain = striped(4, 8, names)
    assert least_homes(placement) == 1 + spares
    held = [len(placement.shard(name)) for name in names]
    assert max(held) - min(held) <= 4
    routes = Routes(placement)
    for layer in range(4):
        assert not routes.has_choice(layer), "a spare that gets rows has its weights read for nothing"
        owner_E = routes.owners(layer, None)
        assert [names[owner] for owner in owner_E] == [plain.holders(layer, e)[0] for e in range(8)]
        after_E = Routes(placement, {"a"}).owners(layer, np.ones(8, np.int64))
        assert 0 not in after_E
    if n_workers == 4 and spares == 1:  # whoever is lost, its work is divided
        owner_E = np.concatenate([Routes(placement, {"a"}).owners(layer, None) for layer in range(4)])
        assert np.bincount(owner_E, minlength=4)[1:].max() <= 12


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
@pytest.mark.parametrize(("n_workers", "slots"), [(2, 32), (3, 24), (4, 20), (4, 16)])
def test_a_plan_keeps_two_homes_each(exponent: float, n_workers: int, slots: int) -> None:
    loads_LE = zipf(4, 8, exponent, np.random.default_rng(1))
    names = NAMES[:n_workers]
    workers = [Worker(name, slots) for name in names]
    current = striped(4, 8, names, spares=1)
    plan = balance(loads_LE, workers, current, Limits(least_homes=2))
    assert least_homes(plan.placement) >= 2
    edit.check(plan.placement, dict.fromkeys(names, slots))
    assert plan.forecast.imbalance_after <= 1.1, "two homes each leave room to divide the rows"
    grown = balance(loads_LE, [*workers, Worker("e", slots)], plan.placement, Limits(least_homes=2))
    assert least_homes(grown.placement) >= 2


def test_what_cannot_have_two_homes_is_refused() -> None:
    loads_LE = np.ones((4, 8))
    with pytest.raises(PlacementError, match="need 2 workers; there are 1"):
        balance(loads_LE, [Worker("a", 99)], striped(4, 8, ("a",)), Limits(least_homes=2))
    with pytest.raises(PlacementError, match="2 replicas of 32 experts do not fit into the 60 slots"):
        balance(loads_LE, [Worker("a", 30), Worker("b", 30)], striped(4, 8, ("a", "b")), Limits(least_homes=2))


def test_lost_experts_find_a_shelter_where_there_is_room_and_leave_it_again() -> None:
    placement = striped(4, 8, NAMES)
    lost = placement.shard("a")
    assert homeless(placement, {"a"}) == list(lost)
    slots = {"b": 12, "c": 12, "d": 12}
    after = sheltered(placement, {"a"}, slots)
    edit.check(after, slots, placement)
    assert not homeless(after, {"a"})
    assert after.shard("a") == lost, "it may come back with what it had"
    routes, back = Routes(after, {"a"}), Routes(after)
    for layer, expert in lost:
        assert back.owners(layer, None)[expert] == 0, "the shelter gets rows only while the worker is away"
        assert routes.owners(layer, None)[expert] != 0
    added = after.all_replicas() - placement.all_replicas()
    assert without(after, added).homes() == placement.homes()
    few = sheltered(placement, {"a"}, {"b": 9, "c": 8, "d": 8})
    assert len(few.all_replicas()) == len(placement.all_replicas()) + 1, "no worker above its slots"


def test_what_is_pinned_stays_whatever_is_planned() -> None:
    placement = striped(2, 4, ("a", "b"))
    pinned = edit.pin(edit.pin(placement, 0, 1, "a"), 0, 0, "a")
    assert pinned.pins == {Replica("a", 0, 1), Replica("a", 0, 0)} and pinned.epoch == 3
    loads_LE = np.array([[100.0, 100.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    workers = [Worker("a", 5), Worker("b", 5)]
    plan = balance(loads_LE, workers, pinned)
    assert plan.placement.pins == pinned.pins
    assert {"a"} <= set(plan.placement.holders(0, 0)) and {"a"} <= set(plan.placement.holders(0, 1))
    edit.check(plan.placement, {"a": 5, "b": 5})
    for refused in (
        lambda: edit.drop(pinned, 0, 1, "a"),
        lambda: edit.move(pinned, 0, 0, "a", "b"),
        lambda: balance(loads_LE, [Worker("b", 16)], pinned),
    ):
        with pytest.raises(PlacementError, match="pinned"):
            refused()
    free = edit.unpin(pinned, 0, 1, "a")
    assert edit.drop(free, 0, 1, "a").holders(0, 1) == ("b",)
    with pytest.raises(PlacementError, match="is not pinned to b"):
        edit.unpin(pinned, 0, 1, "b")
