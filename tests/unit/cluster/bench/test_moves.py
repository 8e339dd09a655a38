"""`bench moves` against a cluster of numbers. Catches changes that are counted without having been made, and what a
cluster leaves behind without being told of: experts, memory, processes, a router with an old epoch."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from cluster.bench import disturbed
from cluster.bench import moves as module
from cluster.bench.chaos_stream import Stream
from cluster.bench.disturbed import Comparison
from cluster.bench.moves import Moves, Report
from cluster.errors import PlacementError


class Numbers:
    """Two layers of three experts on two workers, as the admin API and the snapshot show them."""

    def __init__(self) -> None:
        self.homes = [[{"expert-0": 1.0}, {"expert-1": 1.0}, {"expert-0": 0.5, "expert-1": 0.5}] for _ in range(2)]
        self.workers, self.routers, self.epoch = 2, 2, 1
        self.kept = 0  # experts that expert-0 holds beyond what it should
        self.each_bytes = {"expert-0": 100, "expert-1": 100}
        self.behind = 0  # epochs by which router-1 lags

    def ask(self, method: str, path: str, port: int | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
        time.sleep(0.002)  # so that somebody looks meanwhile
        if path == "/placement":
            return {"homes": self.homes, "workers": [{"id": w, "replicas": self.held(w)} for w in self.each_bytes]}
        assert body is not None
        if path == "/scale":
            self.workers = body.get("expert_workers", self.workers)
            self.routers = body.get("routers", self.routers)
            return {}
        homes = self.homes[body["layer"]][body["expert"]]
        gone, new = body.get("source", body.get("worker")), body.get("target", body.get("worker"))
        if path == "/placement/replicate":
            gone = None
        if (path != "/placement/drop" and new in homes) or (path == "/placement/drop" and len(homes) == 1):
            raise PlacementError("it cannot be")
        if gone is not None:
            del homes[gone]
        if path != "/placement/drop":
            homes[str(new)] = 1.0
        self.epoch += 1
        return {}

    def held(self, worker: str) -> int:
        return sum(worker in homes for experts in self.homes for homes in experts)

    def processes(self, port: int | None) -> list[dict[str, Any]]:
        common = {"state": "ready", "pid": 1}
        routers = [
            {"role": "router", "id": f"router-{i}", "epoch": self.epoch - i * self.behind, "detail": {}, **common}
            for i in range(2)
        ]
        held = {worker: self.held(worker) + (worker == "expert-0") * self.kept for worker in self.each_bytes}
        return routers + [
            {"role": "expert", "id": worker, "epoch": self.epoch, **common,
             "detail": {"experts": n, "weight_bytes": n * self.each_bytes[worker]}}
            for worker, n in held.items()
        ]  # fmt: skip


def result(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(module, "ask", numbers.ask)
    monkeypatch.setattr(module, "processes", numbers.processes)
    monkeypatch.setattr(disturbed, "processes", numbers.processes)
    monkeypatch.setattr(module, "_SETTLED_WITHIN_S", 0.05)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    report = Report(60, Comparison([Stream(["a"], [1.0], [0.0, 0.1], "length")]))
    asyncio.run(Moves(None, random.Random(0), report).run())
    return report.result()


def test_as_many_changes_as_planned_and_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()
    seen = result(numbers, monkeypatch)
    assert sum(seen["done"].values()) == 60 and set(seen["done"]) == {"move", "replicate", "drop", "scale"}
    assert numbers.epoch - 1 == 60 - seen["done"]["scale"], "what was refused is not counted"
    assert seen["refused"] > 0 and seen["errors"] == []
    assert 1 <= numbers.workers <= 3 and 1 <= numbers.routers <= 3
    assert seen["oldest_epoch_s"] < 1.0


def test_what_is_left_over_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()
    numbers.kept = 1
    assert "experts instead of" in result(numbers, monkeypatch)["errors"][0]
    numbers = Numbers()
    numbers.each_bytes["expert-1"] = 101
    assert result(numbers, monkeypatch)["errors"] == ["workers hold more memory than their experts take"]


def test_a_router_that_keeps_an_old_epoch_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()
    numbers.behind = 1
    assert result(numbers, monkeypatch)["oldest_epoch_s"] > 0.0


def test_a_watch_that_failed_has_not_seen_that_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(Numbers):
        looks = 0

        def processes(self, port: int | None) -> list[dict[str, Any]]:
            self.looks += 1
            if self.looks == 2:  # the first one of the watch
                raise PlacementError("no snapshot")
            return super().processes(port)

    with pytest.raises(PlacementError, match="no snapshot"):
        result(Blind(), monkeypatch)
