"""Catches an imbalance that is another number on the page, in the admin API, in `status` and in a receipt."""

from __future__ import annotations

import json

import numpy as np
from fastapi.testclient import TestClient

from cluster.control.api import create_app
from cluster.control.events import Events
from cluster.control.goal import Goal
from cluster.control.membership import Membership
from cluster.control.observation import observe
from cluster.control.operator import Operator
from cluster.control.rebalancer import RebalanceOptions, Rebalancer
from cluster.control.scaling import Scaler
from cluster.control.view import Member
from cluster.placement.load import Load
from cluster.placement.placement import striped

WORKERS = ("expert-0", "expert-1", "expert-2")


def parts() -> tuple[Membership, Operator, Rebalancer]:
    membership = Membership(striped(3, 4, WORKERS, dense_layers=[0]), Goal(), 0.0, 1)
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
