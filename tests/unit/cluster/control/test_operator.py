"""Catches a verb that leaves half of itself behind, that runs beside another, and an admin API that anybody may use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import product
from unittest.mock import Mock

import pytest
from fastapi.testclient import TestClient

from cluster.control import operator as module
from cluster.control.api import create_app
from cluster.control.events import Events
from cluster.control.goal import Goal
from cluster.control.membership import Membership
from cluster.control.operator import Operator
from cluster.control.rebalancer import RebalanceOptions, Rebalancer, decide
from cluster.control.view import Member
from cluster.errors import PlacementError
from cluster.placement.placement import striped
from cluster.placement.planner import Forecast
from tests.fake_fleet import WORKERS, Fleet
from tests.loop import until


def test_a_verb_that_fails_half_way_leaves_the_placement_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP", 1)
    fleet = Fleet()
    before = fleet.homes
    fleet.failing = {2}
    with pytest.raises(PlacementError, match="no memory"):
        asyncio.run(fleet.operator.rebalance())
    assert fleet.changes > 2 and fleet.homes == before
    [receipt] = fleet.operator.receipts
    assert "no memory" in receipt.error and receipt.forecast is not None and receipt.forecast.gain > 0.1


def test_verbs_wait_for_each_other_and_leave_receipts() -> None:
    fleet = Fleet()

    async def both() -> None:
        await asyncio.gather(fleet.operator.rebalance(), fleet.operator.drain("expert-1"))

    asyncio.run(both())
    assert all("expert-1" not in homes for experts in fleet.homes for homes in experts)
    assert [receipt.action for receipt in fleet.operator.receipts] == ["rebalance", "drain expert-1"]
    fleet.operator.undrain("expert-1")
    assert fleet.operator.plan().placement.shard("expert-1")


def test_a_node_that_ends_is_empty_and_its_worker_is_used_again_elsewhere() -> None:
    """As with pods: each time a node is drained a worker would else hold nothing from then on, until none may."""
    fleet = Fleet()
    report = fleet.membership.report
    report(Member("expert", "expert-1", 1, "ends", "ready", "x:1", epoch=1, slots=8), 0.0)
    asyncio.run(fleet.operator.drain_node_of("expert-1"))
    assert all("expert-1" not in homes for experts in fleet.homes for homes in experts)
    assert fleet.operator.drained == {"expert-1"} and not fleet.operator.plan().placement.shard("expert-1")
    report(Member("expert", "expert-1", 2, "new", "ready", "x:1", epoch=1, slots=8), 0.0)
    assert fleet.operator.drained == frozenset() and fleet.operator.plan().placement.shard("expert-1")
    with pytest.raises(PlacementError, match="there is no expert worker expert-7"):
        asyncio.run(fleet.operator.drain_node_of("expert-7"))


def test_of_mixed_cards_the_faster_gets_more_and_the_smaller_what_it_holds() -> None:
    fleet = Fleet()
    for worker, speed, slots in zip(WORKERS, (3, 1, 1), (13, 13, 3), strict=True):
        said = {"epoch": 1, "slots": slots, "bytes_per_s": speed * 10**12}
        fleet.membership.report(Member("expert", worker, 1, "n", "ready", "x:1", **said), 0.0)
    planned = fleet.operator.plan().placement
    fast, slow, small = (len(planned.shard(worker)) for worker in WORKERS)
    assert fast > 2 * slow > 0 and small <= 2, "one slot stays free for moves"


def test_what_a_drain_leaves_alone_stays() -> None:
    fleet = Fleet()
    before = fleet.homes
    asyncio.run(fleet.operator.drain("expert-2"))
    for layer, expert in product(range(2), range(4)):
        was = before[layer][expert]
        assert was == fleet.homes[layer][expert] or "expert-2" in was


def test_the_api_asks_for_its_token_and_says_why_not() -> None:
    fleet = Fleet()
    rebalancer = Rebalancer(fleet.operator, RebalanceOptions("advise"), 10)
    client = TestClient(create_app(fleet.membership, fleet.operator, fleet.scaler, rebalancer, "secret"))
    for token in (None, "Bearer wrong", "secret"):
        answer = client.get("/placement", headers={} if token is None else {"Authorization": token})
        assert answer.status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    shown = client.get("/placement").json()
    assert shown["epoch"] == 1 and {worker["slots"] for worker in shown["workers"]} == {8}
    refused = client.post("/placement/drop", json={"layer": 0, "expert": 0, "worker": "expert-0"})
    assert refused.status_code == 409 and "only replica" in refused.json()["detail"]
    planned = client.get("/placement/plan").json()
    applied = client.put("/placement", json={"homes": planned["homes"]})
    assert applied.status_code == 200 and applied.json()["added"] == planned["forecast"]["moved_replicas"] > 0
    assert client.put("/placement", json={"homes": planned["homes"][:1]}).status_code == 409
    assert client.post("/rebalance", json={"dry_run": True}).json()["forecast"]["moved_replicas"] == 0
    assert client.get("/rebalancer").json()["mode"] == "advise"
    assert client.get("/receipts").json()[0]["action"] == "apply a placement"


def test_where_routers_hold_the_experts_there_is_nothing_to_place() -> None:
    """Would catch an operator who is told that a slot is missing where there are no workers."""
    membership = Membership(striped(2, 4, ("router-0",)), Goal(), 0.0, 1)
    membership.report(Member("router", "router-0", 1, "n", "ready", "x:1", epoch=1), 0.0)
    operator = Operator(membership, Mock(), 10, Events())
    for verb in (operator.rebalance(), operator.replicate(0, 0, None), operator.drain("router-0")):
        with pytest.raises(PlacementError, match="routers hold all experts themselves"):
            asyncio.run(verb)


def test_a_plan_for_other_loads_than_the_recent_ones() -> None:
    """Would catch loads of a trace that are ignored, taken for another model's, or change what is in force."""
    fleet = Fleet()
    rebalancer = Rebalancer(fleet.operator, RebalanceOptions(), 10)
    headers = {"Authorization": "Bearer secret"}
    client = TestClient(
        create_app(fleet.membership, fleet.operator, fleet.scaler, rebalancer, "secret"), headers=headers
    )
    # One expert has all rows of a layer: the plan cuts it between all workers, which the recent load does not ask for.
    planned = client.post("/placement/plan", json={"loads": [[0, 0, 0, 900], [300, 300, 300, 300]]}).json()
    assert planned["homes"][0][3] == pytest.approx(dict.fromkeys(WORKERS, 1 / 3), rel=1e-4)
    assert planned["homes"] != client.get("/placement/plan").json()["homes"]
    assert fleet.changes == 0
    for loads, status in (([[1, 2], [3, 4]], 409), ([[1, 2, 3, 4], [5]], 409), ([[-1.0, 0, 0, 0]] * 2, 422)):
        assert client.post("/placement/plan", json={"loads": loads}).status_code == status


FORECAST = Forecast(1.5, 1.0, 10, 1000, 5.0, 0.3)


@pytest.mark.parametrize(
    ("forecast", "rows", "act", "why"),
    [
        (FORECAST, 1e6, True, "180.0 s saved"),
        (FORECAST, 10.0, False, "too few rows"),
        (replace(FORECAST, gain=0.01), 1e6, False, "not worth it"),
        (replace(FORECAST, seconds=1000.0), 1e6, False, "do not pay"),
    ],
)
def test_it_acts_only_where_that_pays(forecast: Forecast, rows: float, act: bool, why: str) -> None:
    decided, said = decide(forecast, rows, RebalanceOptions("auto"))
    assert decided is act and why in said


def test_advice_changes_nothing_and_a_failure_is_not_repeated_at_once() -> None:
    fleet = Fleet()
    before = fleet.homes
    advise = Rebalancer(fleet.operator, RebalanceOptions("advise"), 10)
    asyncio.run(advise.look())
    assert fleet.homes == before and advise.health.looked is not None
    auto = Rebalancer(fleet.operator, RebalanceOptions("auto", interval_s=0.01), 10)
    fleet.failing = {1}

    async def a_while() -> None:
        task = asyncio.create_task(auto.run())
        await until(lambda: auto.health.actions > 0)
        task.cancel()

    asyncio.run(a_while())
    assert fleet.changes >= 2 and auto.health.succeeded and auto.health.actions >= 1, "after a while it tries again"
