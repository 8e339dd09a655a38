"""Catches a worker that is started twice, or ended although it is wanted."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from cluster.control.view import View
from cluster.fleet import launch
from cluster.fleet.launch import Cluster
from cluster.placement.placement import striped


def test_expert_workers_are_started_and_ended_as_the_view_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    ended: list[object] = []
    monkeypatch.setattr(launch.ray, "kill", lambda actor, no_restart: ended.append((actor, no_restart)))

    def start(worker: str) -> str:
        started.append(worker)
        return f"actor of {worker}"

    actors = {"expert-0": "actor of expert-0", "router-0": "actor of router-0"}
    cluster = Cluster(None, actors, Future(), start, {"expert-0"})
    placement = striped(1, 1, ("expert-0",))
    for wanted in ((), ("expert-0", "expert-1"), ("expert-0", "expert-1"), ("expert-1",)):
        cluster.follow(View(1, (), placement, wanted=wanted))
    assert started == ["expert-1"]
    assert ended == [("actor of expert-0", True)]
    assert cluster.actors.keys() == {"expert-1", "router-0"} and cluster.workers == {"expert-1"}
