"""Catches a plan that is worse than it need be, that breaks a limit, or that is another one the next time."""

from __future__ import annotations

from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from benchmarks.placement import lower_bound, zipf
from cluster.errors import PlacementError
from cluster.placement.edit import check
from cluster.placement.placement import striped
from cluster.placement.planner import Limits, Worker, balance, imbalance
from cluster.placement.steps import steps


def fleet(n: int, slots: int, **others: float) -> list[Worker]:
    return [Worker(f"w{i}", slots, others.get(f"w{i}", 1.0)) for i in range(n)]


@pytest.mark.parametrize("shape", [(6, 8, 4, 12), (6, 8, 8, 16), (3, 64, 8, 72), (2, 7, 3, 12)])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_where_slots_suffice_the_load_is_even(shape: tuple[int, int, int, int], exponent: float) -> None:
    n_layers, n_experts, n_workers, n_slots = shape
    loads_LE = zipf(n_layers, n_experts, exponent, np.random.default_rng(1))
    workers = fleet(n_workers, n_slots // n_workers * n_layers)
    plan = balance(loads_LE, workers, striped(n_layers, n_experts, [worker.name for worker in workers]))
    check(plan.placement, {worker.name: worker.slots for worker in workers})
    assert all(share >= 0 for experts in plan.placement.homes() for homes in experts for share in homes.values())
    bound = lower_bound(loads_LE, n_workers, n_slots).sum() * n_workers / loads_LE.sum()
    assert plan.forecast.imbalance_after <= 1.01 * bound
    assert plan.forecast.imbalance_after == pytest.approx(imbalance(loads_LE, workers, plan.placement))
    again = balance(loads_LE, workers, plan.placement)
    assert again.forecast.moved_replicas == 0, "what is good enough stays"


def test_it_is_near_the_optimum_where_slots_are_scarce() -> None:
    """Four experts, three workers with two slots: every assignment of six slots is tried, shares by a fine grid."""
    rng = np.random.default_rng(2)
    for _ in range(6):
        load_E = rng.uniform(0.2, 3.0, 4)
        best = np.inf
        pairs = list(combinations_with_replacement(range(4), 2))
        for homes in product(pairs, repeat=3):
            count_E = np.bincount([e for pair in homes for e in set(pair)], minlength=4)
            if count_E.min() == 0:
                continue
            best = min(best, _least(load_E, homes))
        plan = balance(load_E[None], fleet(3, 2), striped(1, 4, ["w0", "w1", "w2"]))
        assert plan.forecast.imbalance_after <= 1.1 * best * 3 / load_E.sum()


def _least(load_E: np.ndarray, homes: tuple[tuple[int, int], ...]) -> float:
    """The smallest largest load of fixed homes: max over sets of experts of their rows by the workers they reach."""
    least = 0.0
    for chosen in product((0, 1), repeat=len(load_E)):
        experts = [e for e, take in enumerate(chosen) if take]
        reach = sum(any(e in pair for e in experts) for pair in homes)
        if experts:
            least = max(least, float(load_E[experts].sum()) / reach)
    return least


def test_a_faster_worker_gets_more() -> None:
    workers = fleet(3, 4 * 6, w0=2.0)
    loads_LE = zipf(4, 8, 1.0, np.random.default_rng(3))
    plan = balance(loads_LE, workers, striped(4, 8, ["w0", "w1", "w2"]))
    assert plan.forecast.imbalance_after < 1.01
    shares = [plan.placement.homes()[0][e].get("w0", 0.0) * loads_LE[0, e] for e in range(8)]
    assert sum(shares) / loads_LE[0].sum() == pytest.approx(0.5, abs=0.01)


def test_few_bytes_are_spent_where_they_gain_most_and_none_where_it_is_good() -> None:
    loads_LE = zipf(16, 8, 1.0, np.random.default_rng(4))
    current = striped(16, 8, ["w0", "w1", "w2", "w3"])
    before, moved = np.inf, -1
    for budget in (0, 20, 40, 80, None):
        limits = Limits(expert_bytes=10, moved_bytes=None if budget is None else 10 * budget)
        forecast = balance(loads_LE, fleet(4, 48), current, limits).forecast
        assert budget is None or forecast.moved_bytes <= 10 * budget
        assert forecast.imbalance_after < before or forecast.imbalance_after == pytest.approx(1.0, abs=0.01)
        assert forecast.moved_replicas >= moved
        before, moved = forecast.imbalance_after, forecast.moved_replicas


def test_drift_moves_less_than_a_fresh_plan() -> None:
    rng = np.random.default_rng(5)
    loads_LE = zipf(32, 8, 1.0, rng)
    plan = balance(loads_LE, fleet(4, 96), striped(32, 8, ["w0", "w1", "w2", "w3"]))
    drifted = balance(loads_LE * np.exp(rng.normal(0, 0.2, loads_LE.shape)), fleet(4, 96), plan.placement)
    assert drifted.forecast.imbalance_after < 1.02
    assert drifted.forecast.moved_replicas < 0.25 * len(plan.placement.all_replicas())


def test_a_worker_that_is_left_out_holds_nothing_and_one_that_comes_is_used() -> None:
    loads_LE = zipf(4, 8, 1.0, np.random.default_rng(6))
    current = striped(4, 8, ["w0", "w1", "w2", "w3"])
    fewer = balance(loads_LE, fleet(3, 16), current)
    assert fewer.placement.workers == ("w0", "w1", "w2") and fewer.placement.epoch == 2
    assert balance(loads_LE, fleet(5, 16), fewer.placement).placement.shard("w4")
    with pytest.raises(PlacementError, match="32 experts do not fit into the 20 slots of 2 workers"):
        balance(loads_LE, fleet(2, 10), current)


def test_it_says_the_same_twice_and_replicas_are_on_different_hosts() -> None:
    loads_LE = zipf(4, 8, 1.5, np.random.default_rng(7))
    workers = [Worker(f"w{i}", 12, host=f"h{i // 4}") for i in range(8)]
    current = striped(4, 8, [worker.name for worker in workers])
    plan = balance(loads_LE, workers, current)
    assert plan == balance(loads_LE, workers[::-1], current)
    host = {worker.name: worker.host for worker in workers}
    twice = [plan.placement.holders(layer, e) for layer in range(4) for e in range(8)]
    assert all(len({host[name] for name in holders}) > 1 for holders in twice if len(holders) > 2)


def test_without_any_rows_nothing_breaks() -> None:
    plan = balance(np.zeros((2, 4)), fleet(2, 6), striped(2, 4, ["w0", "w1"]))
    assert plan.forecast.moved_replicas == 0


def test_layers_without_experts_stay_without() -> None:
    loads_LE = zipf(4, 8, 1.0, np.random.default_rng(8))
    current = striped(4, 8, ["w0", "w1"], dense_layers=[0, 2])
    plan = balance(loads_LE, fleet(2, 12), current)
    assert [len(experts) for experts in plan.placement.replicas] == [0, 8, 0, 8]
    assert plan.forecast.imbalance_after < 1.01
    last = list(steps(current, plan.placement, {}, 4))[-1]
    assert last.homes() == plan.placement.homes()


def test_two_slots_a_worker_are_filled_by_pairs() -> None:
    """144 workers with two slots for 256 experts: greedy packing leaves the largest worker a quarter above the mean."""
    loads_LE = zipf(3, 256, 0.5, np.random.default_rng(0))
    workers = fleet(144, 2 * 3)
    plan = balance(loads_LE, workers, striped(3, 256, [worker.name for worker in workers]))
    check(plan.placement, {worker.name: worker.slots for worker in workers})
    assert plan.forecast.imbalance_after < 1.2
    drifted = balance(
        loads_LE * np.exp(np.random.default_rng(1).normal(0, 0.25, loads_LE.shape)), workers, plan.placement
    )
    assert drifted.forecast.imbalance_after < 1.2
    assert drifted.forecast.moved_replicas < 3 * 288 / 2, "a fresh plan moves nearly all of them"
    total = sum(share for experts in plan.placement.homes() for homes in experts for share in homes.values())
    assert total == pytest.approx(3 * 256)


@pytest.mark.parametrize("slower", [0.5, 0.1, 0.004])
def test_two_homes_of_one_expert_are_done_at_the_same_time(slower: float) -> None:
    """Would catch a division that goes too far, sees that it became worse, and stays there: 1.5 instead of 1.0."""
    workers = [Worker("w0", 9), Worker("w1", 9, speed=slower)]
    plan = balance(np.array([[100.0, 0.0, 0.0]]), workers, striped(1, 3, ["w0"]), Limits(least_homes=2))
    assert plan.forecast.imbalance_after == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("scale", [1.0, 1e100, 1e307])
def test_loads_of_any_size_give_the_same_plan(scale: float) -> None:
    loads_LE = zipf(3, 8, 1.0, np.random.default_rng(3))
    before = striped(3, 8, ["w0", "w1", "w2"])
    plan, same = (balance(loads, fleet(3, 12), before) for loads in (loads_LE, loads_LE / loads_LE.max() * scale))
    assert same.placement.replicas == plan.placement.replicas
    assert same.forecast.imbalance_after == pytest.approx(plan.forecast.imbalance_after)


@pytest.mark.parametrize("load", [np.nan, np.inf, -1.0])
def test_loads_that_are_none_are_refused(load: float) -> None:
    with pytest.raises(PlacementError, match="finite numbers, 0 or more"):
        balance(np.array([[1.0, load]]), fleet(2, 2), striped(1, 2, ["w0", "w1"]))
    with pytest.raises(PlacementError, match="the speed of w1 is no number above 0"):
        balance(np.array([[1.0, 1.0]]), fleet(2, 2, w1=load), striped(1, 2, ["w0", "w1"]))


def test_a_forecast_counts_the_workers_that_leave() -> None:
    """Would catch an imbalance below 1: what those hold would count for nothing."""
    before = striped(4, 8, ["w0", "w1", "w2", "w3"])
    forecast = balance(np.ones((4, 8)), fleet(2, 17), before).forecast
    assert forecast.imbalance_before == pytest.approx(1.0) and forecast.imbalance_after == pytest.approx(1.0)
