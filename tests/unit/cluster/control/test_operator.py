"""Catches a verb that leaves half of itself behind, that runs beside another, and an admin API that anybody may use."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any
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
from tests.fake_fleet import SKEWED, WORKERS, Fleet
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


def test_a_verb_that_can_go_neither_on_nor_back_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an operator who is told that all is as before while half of a rebalance is in force."""
    monkeypatch.setattr(module, "_STEP", 1)
    fleet = Fleet()
    fleet.failing = {2, 3}
    with pytest.raises(PlacementError, match=r"no memory; and the placement before cannot be restored \(.*no memory\)"):
        asyncio.run(fleet.operator.rebalance())
    assert "cannot be restored" in fleet.operator.receipts[0].error


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
    rows = Counter[str]()
    for layer, expert in product(range(2), range(4)):
        for worker, share in planned.homes()[layer][expert].items():
            rows[worker] += share * SKEWED[layer, expert]
    assert rows["expert-0"] > 2.5 * rows["expert-1"] > 0
    assert len(planned.shard("expert-2")) <= 2, "one slot stays free for moves"


@pytest.mark.parametrize("least", [1, 2])
def test_of_three_workers_one_can_be_drained_or_taken_away(least: int) -> None:
    """Would catch three workers, each with half more than an equal share as on CPUs, of which none can ever leave."""
    share = -(-3 * 8 * least // (2 * 3))
    fleet = Fleet(share, most_slots=0)
    fleet.membership.epochs.placement = striped(2, 4, WORKERS, spares=least - 1)
    operator = Operator(fleet.membership, fleet.change, 10, least_homes=least)
    asyncio.run(operator.drain("expert-1"))
    assert fleet.membership.epochs.placement.holding == {"expert-0", "expert-2"}
    full = Fleet(share, most_slots=share)
    with pytest.raises(PlacementError, match="do not fit"):
        asyncio.run(Operator(full.membership, full.change, 10, least_homes=least).drain("expert-1"))


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
    applied = client.put("/placement", json=planned)
    stale = client.put("/placement", json=planned)
    assert stale.status_code == 409 and "planned for epoch 1, and epoch 2 is in force" in stale.json()["detail"]
    assert applied.status_code == 200 and applied.json()["added"] == planned["forecast"]["moved_replicas"] > 0
    assert client.put("/placement", json={"homes": planned["homes"][:1]}).status_code == 409
    assert client.post("/rebalance", json={"dry_run": True}).json()["forecast"]["moved_replicas"] == 0
    assert client.get("/rebalancer").json()["mode"] == "advise"
    assert client.get("/receipts").json()[0]["action"] == "apply a placement"


SECRET = {"Authorization": "Bearer secret"}


def client_of(fleet: Fleet) -> TestClient:
    rebalancer = Rebalancer(fleet.operator, RebalanceOptions(), 10)
    app = create_app(fleet.membership, fleet.operator, fleet.scaler, rebalancer, "secret")
    return TestClient(app, headers=SECRET)


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("POST /placement/replicate", '{"layer": 0, "expert": 99}', 409, "there is no expert 99; experts are 0 to 3"),
        ("POST /placement/replicate", '{"layer": 9, "expert": 0}', 409, "there is no layer 9"),
        ("POST /placement/replicate", '{"layer": 0, "expert": 0, "worker": "expert-1"}', 409, "expert-1 is drained"),
        ("POST /placement/move", '{"layer": 0, "expert": 0, "target": "expert-1"}', 409, "expert-1 is drained"),
        ("POST /placement/pin", '{"layer": 0, "expert": 0, "worker": "expert-1"}', 409, "drain expert-1 --undo"),
        ("PUT /placement", '{"homes": {"expert-1": 1}}', 409, "expert-1 is drained"),
        ("PUT /placement", '{"homes": {}}', 409, "layer 0, expert 0 would have no replica"),
        ("PUT /placement", '{"homes": {"expert-0": 2, "expert-2": -1}}', 422, "homes.0.0.expert-2: Input should be"),
        ("PUT /placement", '{"homes": {"expert-0": NaN}}', 422, "homes.0.0.expert-0: Input should be a finite"),
        ("PUT /placement", '{"homes": {"expert-0": 1e999}}', 422, "homes.0.0.expert-0: Input should be a finite"),
        ("POST /placement/plan", '{"loads": [[NaN, 1, 1, 1]]}', 422, "loads.0.0: Input should be a finite"),
        ("POST /workers/expert-7/undrain", "", 409, "there is no expert worker expert-7"),
        ("POST /scale", '{"expert_workers": 1000000000}', 422, "expert_workers: Input should be less"),
        ("POST /scale", '{"expert_workers": 9}', 409, "9 expert workers are more than the model has experts"),
        ("POST /scale", '{"routers": 2, "timeout_s": Infinity}', 422, "timeout_s: Input should be less"),
        (
            "POST /chaos",
            '{"kind": "slow", "member": "expert-0", "seconds": 1e999}',
            422,
            "seconds: Input should be less",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(path: str, body: str, status: int, why: str) -> None:
    """Would catch a verb that answers 500, that takes a share below 0 or a NaN, or fills a worker that was drained."""
    fleet = Fleet()
    asyncio.run(fleet.operator.drain("expert-1"))
    before = fleet.homes
    if '"homes"' in body:  # the placement in force, with these homes of its first expert
        first = json.dumps(before).replace(json.dumps(before[0][0]), body[len('{"homes": ') : -1], 1)
        body = f'{{"homes": {first}}}'
    method, url = path.split()
    answer = client_of(fleet).request(method, url, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, why in answer.json()["detail"]) == (status, True), answer.text
    assert fleet.homes == before and fleet.membership.goal.scaling is None


def test_a_stranger_s_body_is_not_read_and_nobody_s_is_read_without_end() -> None:
    """Would catch a controller that anybody who reaches its port can fill."""
    app = create_app(Mock(), Mock(), Mock(), Mock(), "secret")
    read = []

    async def ask(token: str) -> int:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            read.append(token)
            return {"type": "http.request", "body": bytes(2**20), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "PUT", "path": "/placement", "query_string": b"", "headers": headers}
        await app(scope, receive, send)  # type: ignore[arg-type]
        return int(sent[0]["status"])

    assert asyncio.run(ask("wrong")) == 401 and not read
    assert asyncio.run(ask("secret")) == 413 and 30 < len(read) < 40


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
