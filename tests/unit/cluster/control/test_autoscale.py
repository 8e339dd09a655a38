"""Catches a pool that flaps, that grows without need or beyond its limits, and one that shrinks into an overload."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control.autoscale import TOLERANCE, AutoscaleOptions, Decision, Limits, Sample, decide
from cluster.control.autoscaler import Autoscaler, router_signals
from cluster.control.goal import Bounds
from cluster.control.view import Member
from tests.fake_fleet import WORKERS, Fleet

OPTIONS = AutoscaleOptions("auto", Limits(1, 8), Limits(1, 8), interval_s=5, window_s=30, idle_s=300, cooldown_s=60)
LIMITS = Limits(1, 8)


def series(n: int, load: Callable[[float], float], seconds: float, start: float = 0.0) -> list[Sample]:
    """Samples of a pool of `n`, every five seconds; `load` by the time since the first."""
    return [Sample(start + t, n, {"queue": load(t), "KV cache": 0.1}) for t in range(0, int(seconds) + 1, 5)]


@pytest.mark.parametrize(
    ("samples", "n", "why"),
    [
        (series(2, lambda t: 1.6, 30), 4, "queue at 1.60"),
        (series(2, lambda t: 9.0, 30), 4, "queue at 9.00"),  # at most twice as many at once
        (series(6, lambda t: 1.5, 30), 8, "queue at 1.50"),  # and not above the limit
        (series(8, lambda t: 1.5, 30), 8, "there may be no more"),
        (series(2, lambda t: 1.6, 20), 2, "watched for 20 s of 30 s"),
        (
            series(2, lambda t: 5.0 if t == 30 else 0.8, 30),
            3,
            "queue at 1.40",
        ),  # a peak counts for its part
        (series(2, lambda t: 1.0, 600), 2, "queue at 1.00"),
        (series(2, lambda t: 1.0 + TOLERANCE, 600), 2, "queue at 1.10"),
        (series(4, lambda t: 0.2, 295), 4, "watched for 295 s of 300 s"),
        (series(4, lambda t: 0.2, 300), 3, "one less would have been at 0.27"),
        (series(4, lambda t: 0.7 if t == 100 else 0.2, 300), 4, "one less would have been at 0.93"),
        (series(1, lambda t: 0.0, 600), 1, "of its target"),
        ([Sample(0.0, 9, {})], 8, "between 1 and 8"),
    ],
)
def test_decisions(samples: Sequence[Sample], n: int, why: str) -> None:
    decision = decide(samples, LIMITS, OPTIONS)
    assert decision.n == n and why in decision.reason, decision


def test_after_a_change_it_cools_down_and_looks_at_what_came_since() -> None:
    before, after = series(2, lambda t: 2.0, 30), series(4, lambda t: 1.5, 90, start=35.0)
    for i in range(1, len(after)):
        decision = decide(before + after[:i], LIMITS, OPTIONS)
        passed = after[i - 1].at - 35.0
        assert (decision.n == 6) == (passed >= 60), (passed, decision)
    failed = decide(before, LIMITS, OPTIONS, tried=25.0)
    assert failed == Decision(2, "cools down for 55 s more")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=120), st.integers(1, 12), st.integers(1, 4), st.integers(4, 12)
)
def test_whatever_comes_it_stays_within_limits_and_shrinks_by_one(
    loads: list[float], n: int, least: int, most: int
) -> None:
    samples = [Sample(5.0 * i, n, {"queue": load}) for i, load in enumerate(loads)]
    decision = decide(samples, Limits(least, most), OPTIONS)
    assert least <= decision.n <= most
    if least <= n <= most:
        assert n - 1 <= decision.n <= 2 * n


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 30.0))
def test_steady_traffic_ends_in_a_steady_pool(traffic: float) -> None:
    """`traffic` processes' worth: once it has grown or shrunk to that, it does neither any more."""
    n, now, sizes = 1, 0.0, []
    samples: list[Sample] = []
    for _ in range(2000):
        samples.append(Sample(now, n, {"utilisation": traffic / n}))
        n = decide(samples[-100:], Limits(1, 32), OPTIONS).n
        sizes.append(n)
        now += 5.0
    assert len(set(sizes[-400:])) == 1
    assert traffic / n <= 1 + TOLERANCE and (n == 1 or traffic / (n - 1) > 1 - TOLERANCE - 1e-9)


def test_signals_of_routers_are_multiples_of_the_targets() -> None:
    details = [
        {"running": 32, "waiting": 12, "free_blocks": 20, "total_blocks": 100},
        {"running": 0, "waiting": 4, "free_blocks": 100, "total_blocks": 100},
    ]
    routers = [Member("router", f"router-{i}", 1, "n", "ready", "x:1", detail=dict(d)) for i, d in enumerate(details)]
    signals = router_signals(routers, 64, OPTIONS)
    assert signals is not None
    assert signals["queue"] == 2.0 and math.isclose(signals["KV cache"], 0.5)
    assert math.isclose(signals["places in the batch"], 0.25 / 0.8)
    assert router_signals([], 64, OPTIONS) is None


@pytest.mark.parametrize("mode", ["advise", "auto"])
def test_advice_is_given_and_only_auto_acts(mode: str) -> None:
    fleet = Fleet()
    asked: list[tuple[int | None, int | None, str]] = []

    class Scaler:
        async def scale(self, workers: int | None, routers: int | None, reason: str) -> None:
            asked.append((workers, routers, reason))

    options = AutoscaleOptions(mode, Limits(1, 4), Limits(1, 6))  # type: ignore[arg-type]
    autoscaler = Autoscaler(fleet.membership, Scaler(), options, 64)  # type: ignore[arg-type]

    async def looks() -> None:
        for i in range(8):  # workers compute nine tenths of the time, requests wait twice as often as they should
            for worker in WORKERS:
                counted = {"compute_seconds": 4.5 * i, "waited_seconds": 10.0 * i}
                member = Member("expert", worker, 1, "n", "ready", "x:1", epoch=1, slots=8, detail=dict(counted))
                fleet.membership.report(member, 0.0)
            await autoscaler.look(5.0 * i)

    asyncio.run(looks())
    assert autoscaler.health.targets == {"router": 1, "expert": 6}
    assert "waiting at 2.00" in autoscaler.health.reasons["expert"]
    assert asked == ([] if mode == "advise" else [(6, None, "autoscale, expert: waiting at 2.00 of its target")])


def test_a_drained_worker_does_not_hide_the_load_of_the_others() -> None:
    fleet = Fleet()
    fleet.membership.aim(replace(fleet.membership.goal, drained=frozenset({"expert-0"})))
    autoscaler = Autoscaler(fleet.membership, None, AutoscaleOptions("advise"), 64)  # type: ignore[arg-type]
    for i in range(2):
        for worker in WORKERS:
            detail: dict[str, object] = {"compute_seconds": 0.0 if worker == "expert-0" else 3.5 * i}
            fleet.membership.report(Member("expert", worker, 1, "n", "ready", "x:1", epoch=1, detail=detail), 0.0)
        asyncio.run(autoscaler.look(5.0 * i))
    assert autoscaler.health.signals["expert"]["utilisation"] == pytest.approx(1.0)


def test_limits_may_change_while_it_runs() -> None:
    """A pool that was at its limit grows on under a higher one, as after an upgrade of the chart; a controller that was
    restarted, with the options of the start, hears of it from the members."""
    fleet = Fleet()
    options = AutoscaleOptions("advise", Limits(1, 4), Limits(1, 3))
    autoscaler = Autoscaler(fleet.membership, None, options, 64)  # type: ignore[arg-type]

    async def looks(first: int) -> None:
        for i in range(first, first + 8):
            for worker in WORKERS:
                counted = {"compute_seconds": 4.5 * i, "waited_seconds": 10.0 * i}
                member = Member("expert", worker, 1, "n", "ready", "x:1", epoch=1, slots=8, detail=dict(counted))
                fleet.membership.report(member, 0.0)
            await autoscaler.look(5.0 * i)

    asyncio.run(looks(0))
    assert autoscaler.health.targets["expert"] == 3
    changed = replace(fleet.membership.goal, bounds=Bounds(Limits(1, 4), Limits(1, 5)))
    fleet.membership.aim(changed)
    asyncio.run(looks(8))
    assert autoscaler.health.targets["expert"] == 5

    heard = fleet.membership.view
    fleet = Fleet()
    fleet.membership.adopt(heard)
    autoscaler = Autoscaler(fleet.membership, None, options, 64)  # type: ignore[arg-type]
    asyncio.run(looks(0))
    assert autoscaler.health.targets["expert"] == 5
