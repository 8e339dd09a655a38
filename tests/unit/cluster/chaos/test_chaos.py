"""Catches a schedule that is another one the next time or hits nobody, and figures that hide a fault."""

from __future__ import annotations

import random

import pytest

from cluster.bench.chaos_stream import Stream
from cluster.bench.disturbed import Comparison, longest_gaps
from cluster.chaos.campaign import Report
from cluster.chaos.schedule import PAUSES_S, draw
from cluster.control.faults import Fault
from cluster.errors import ExpertMeshError

FLEET = {"router-0": "router", "router-1": "router", "expert-0": "expert", "expert-1": "expert", "gateway-0": "gateway"}
KINDS = ("kill", "pause", "slow", "partition")


def drawn(seed: int, roles: tuple[str, ...] = ("expert", "router")) -> list[Fault]:
    rng = random.Random(seed)
    return [draw(rng, KINDS, roles, FLEET) for _ in range(200)]


def test_a_seed_says_everything_and_every_kind_of_fault_meets_everybody_it_may() -> None:
    faults = drawn(1)
    assert faults == drawn(1) and faults != drawn(2)
    for kind in ("kill", "pause", "slow"):
        hit = {fault.member for fault in faults if fault.kind == kind}
        assert hit == {"router-0", "router-1", "expert-0", "expert-1"}
    cut = {(fault.member, fault.peer) for fault in faults if fault.kind == "partition"}
    assert cut == {(f"router-{i}", f"expert-{j}") for i in range(2) for j in range(2)}
    assert {fault.seconds for fault in faults if fault.kind == "pause"} == set(PAUSES_S)
    assert all(fault.seconds > 0 for fault in faults if fault.kind in ("slow", "partition"))
    assert {fault.member for fault in drawn(1, ("expert",)) if fault.kind == "kill"} == {"expert-0", "expert-1"}
    with pytest.raises(ExpertMeshError, match="no controller for a kill"):
        draw(random.Random(0), ("kill",), ("controller",), FLEET)


def test_the_report_gives_each_fault_its_pause_and_each_kind_its_figures() -> None:
    def seen(*arrivals: float) -> Stream:
        return Stream(["a"] * (len(arrivals) - 1), [9.0] * (len(arrivals) - 1), list(arrivals), "length")

    report = Report(Comparison([seen(0, 1, 1.1, 1.2, 1.3, 1.4)]))
    report.comparison.streams = [seen(10, 11, 11.5, 14, 14.1, 14.2), seen(20, 21, 21.1, 21.2, 21.5, 21.6)]
    report.faults = [Fault("kill", "expert-0"), Fault("pause", "router-1", 2.0), Fault("kill", "expert-1")]
    report.begun, report.over = [11.5, 21.05, 21.4], [12.0, 21.15, 21.45]
    result = report.result()
    assert [fault["pause_s"] for fault in result["faults"]] == pytest.approx([2.5, 0.1, 0.3])
    assert [fault["at_once_s"] for fault in result["faults"]] == pytest.approx([2.5, 0.1, 0.3])
    assert result["pause_s"]["kill expert"] == pytest.approx({"count": 2, "p50": 1.4, "p99": 2.478, "max": 2.5})
    assert result["pause_s"]["pause router 2 s"]["count"] == 1
    assert (result["streams"], result["changed"], result["errors"]) == (2, 0, [])
    report.comparison.streams[1].tokens[3] = "b"
    assert report.result()["changed"] == 1


def test_what_a_fault_cost_at_once_is_told_apart_from_what_its_recovery_cost() -> None:
    """Would catch a fail-over that is blamed for what starting a process takes from a small machine, or hides in it."""
    arrivals = [0.0, 1.0, 1.4, 1.5, 3.0, 3.9, 4.0]
    report = Report(Comparison([], [Stream(["a"] * 6, [9.0] * 6, arrivals, "length")]))
    report.faults, report.begun, report.over = [Fault("kill", "expert-0")], [1.1], [4.0]
    assert report._waits(1.1, 4.0) == pytest.approx({"pause_s": 1.5, "at_once_s": 1.5, "first_token_s": 0.0})
    assert report._waits(0.2, 4.0) == pytest.approx({"pause_s": 1.5, "at_once_s": 0.4, "first_token_s": 1.0})


def test_a_stream_that_hangs_until_it_is_given_up_is_a_pause() -> None:
    """Would catch figures that are the better the more streams never go on."""
    hanging = Stream(["a"], [9.0], [0.0, 1.0], None, left=61.0)
    unanswered = Stream([], [], [2.0], None, left=50.0)
    assert longest_gaps([hanging, unanswered], 3.0, 4.0) == (60.0, 48.0)
