"""Catches an imbalance that is another number on the page, in the admin API, in `status` and in a receipt."""

from __future__ import annotations

import json
from unittest.mock import Mock

import numpy as np
from fastapi.testclient import TestClient

from cluster.control.api import create_app
from cluster.control.events import Events
from cluster.control.goal import Goal, Processes
from cluster.control.membership import Membership
from cluster.control.observation import observe
from cluster.control.operator import Operator
from cluster.control.readings import ControllerReadings
from cluster.control.rebalancer import RebalanceOptions, Rebalancer
from cluster.control.scaling import Scaler
from cluster.control.view import Member
from cluster.observe.series import controller as series
from cluster.placement.load import Load
from cluster.placement.placement import striped

WORKERS = ("expert-0", "expert-1", "expert-2")


def parts(spares: int = 0) -> tuple[Membership, Operator, Rebalancer]:
    placement = striped(3, 4, WORKERS, dense_layers=[0], spares=spares)
    membership = Membership(placement, Goal(processes=Processes(WORKERS)), 0.0, 1)
    for worker in WORKERS:
        membership.report(Member("expert", worker, 1, "n", "ready", "secret:1", epoch=1, slots=9), 0.0)

    async def change(placement, reason):  # type: ignore[no-untyped-def]
        raise AssertionError

    operator = Operator(membership, change, 10, Events())
    return membership, operator, Rebalancer(operator, RebalanceOptions(), 10)


def test_one_imbalance_everywhere_equal_to_one_computed_by_hand() -> None:
    membership, operator, rebalancer = parts()
    assert observe(membership, operator, rebalancer)["imbalance"] is None, "nothing was counted yet"
    recent = np.array([[0.0, 0, 0, 0], [60, 60, 60, 60], [240, 0, 0, 80]])
    load = Load(recent.astype(np.int64), recent, {}, {"expert-0": 300.0, "expert-1": 100.0, "expert-2": 200.0})
    membership.report(Member("router", "router-0", 1, "n", "ready", "x:1", epoch=1, load=load), 0.0)
    seen = observe(membership, operator, rebalancer)
    assert seen["imbalance"] == 1.5  # 300 / ((300 + 100 + 200) / 3)
    assert seen["layer_skew"] == [None, 1.0, 3.0]  # 240 / ((240 + 80) / 4)
    app = create_app(membership, operator, Scaler(membership, operator, 1.0, 10), rebalancer, "t")
    client = TestClient(app, headers={"Authorization": "Bearer t"})
    assert client.get("/placement").json()["imbalance"] == 1.5
    assert client.get("/observation").json()["imbalance"] == 1.5
    assert [m["rows"] for m in seen["members"] if m["role"] == "expert"] == [300, 100, 200]


def test_only_what_is_new_is_told_and_no_address() -> None:
    membership, operator, rebalancer = parts()
    operator.events.add("chaos", "kill -9 expert-0")
    first = observe(membership, operator, rebalancer)
    assert first["placement"]["replicas"][0] == () and len(first["events"]) == 1
    again = observe(membership, operator, rebalancer, first["epoch"], first["events"][-1]["number"])
    assert again["placement"] is None and again["events"] == []
    assert "secret:1" not in json.dumps(first)


def test_experts_are_short_of_spares_by_what_is_wanted_of_those_that_are_ready() -> None:
    """Would catch an alert about spares that nobody asked for, and none where two are wanted and one is there."""
    membership, operator, rebalancer = parts(spares=1)
    autoscaler = Mock(health=Mock(targets={}, signals={}))

    def told(least_homes: int) -> tuple[float, ...]:
        read = ControllerReadings(membership, operator, rebalancer, autoscaler, 10, least_homes, per_expert=False)
        values = {each.series: each.value for each in read()}
        names = (series.WITHOUT_REPLICA, series.WITHOUT_SPARE, series.SPARES_WANTED, series.SHORT_OF_SPARES)
        return tuple(float(values[name]) for name in names)  # type: ignore[arg-type]

    assert told(1) == (0, 0, 0, 0)
    assert told(2) == (0, 0, 1, 0)
    assert told(3) == (0, 0, 2, 8)
    assert told(9) == (0, 0, 2, 8), "no more than there are workers for"
    membership.report(Member("expert", "expert-0", 1, "n", "lost", "secret:1", epoch=1, slots=9), 0.0)
    without, one, wanted, short = told(2)
    assert (without, wanted) == (0, 1) and 0 < one == short < 8
