"""Catches a Serve application that takes an option which does not exist, and one that changes a cluster that runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Config
from cluster.errors import PlacementError, StartError
from cluster.fleet import node_gpus
from cluster.fleet import serve_cluster as module
from cluster.fleet.launch import autoscale_options
from cluster.fleet.launcher import RayLauncher
from cluster.serve_app import Args

ASKED = Config(model="m", expert_workers=2, require_node_roles=True, trusted_network=True)


def test_its_arguments_are_the_options_of_serve() -> None:
    given = Args.model_validate({"model": "m", "routers": 2, "rebalance": False}).model_dump()
    assert given["routers"] == 2 and given["rebalance"] is False and given["port"] is None
    with pytest.raises(ValidationError, match="not permitted"):
        Args.model_validate({"router": 2})


class Controller:
    """One that runs, as Ray shows it."""

    def __init__(self, asked: Config | None) -> None:
        unused: Any = None
        launcher = RayLauncher(Config(), "", unused, unused, "", unused, unused, asked=asked)
        self.calls: list[tuple[Any, ...]] = []
        self.launched = SimpleNamespace(remote=lambda: launcher)
        self.limit = SimpleNamespace(remote=lambda *bounds: self.calls.append(("limit", *bounds)))
        self.scale = SimpleNamespace(remote=lambda *sizes: self.calls.append(("scale", *sizes)))
        self.declare_gateways = SimpleNamespace(remote=lambda n: self.calls.append(("gateways", n)))


def scaled(monkeypatch: pytest.MonkeyPatch, controller: Controller, config: Config) -> None:
    def get(result: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    ray = SimpleNamespace(get_actor=lambda *_: controller, get=get, exceptions=module.ray.exceptions)
    monkeypatch.setattr(module, "ray", ray)
    module._scaled(config)


def test_other_numbers_scale_what_runs_and_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(ASKED)
    wanted = replace(ASKED, expert_workers=4, gateways=3)
    scaled(monkeypatch, controller, wanted)
    (_, routers, workers), *others = controller.calls
    bounds = autoscale_options(wanted)
    assert (routers, workers) == (bounds.routers, bounds.workers)
    assert others == [("scale", 4, 1), ("gateways", 3)]
    with pytest.raises(StartError, match="block_size, max_context cannot be changed"):
        scaled(monkeypatch, controller, replace(ASKED, block_size=8, max_context=100))
    with pytest.raises(StartError, match="that `expertmesh serve` started"):
        scaled(monkeypatch, Controller(None), ASKED)


def test_a_scaling_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(ASKED)
    failed = module.ray.exceptions.RayError("expert-2 did not start")
    controller.scale = SimpleNamespace(remote=lambda *_: failed)
    with pytest.raises(PlacementError, match="expert-2 did not start"):
        scaled(monkeypatch, controller, ASKED)


def test_processes_on_gpus_ask_for_their_nodes_before_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(ASKED, router_device="cuda", expert_device="cuda", gpus_per_expert_worker=0.5)
    reserved: dict[str, Any] = {}
    gpu: Any = "a GPU"
    looks = iter([(), (gpu,), (gpu, gpu)])
    monkeypatch.setattr(node_gpus, "_nodes", list)
    monkeypatch.setattr(node_gpus, "_ask", lambda nodes: next(looks))
    monkeypatch.setattr(node_gpus, "reserve", lambda process, bundle: reserved.update({process: bundle}))
    monkeypatch.setattr(node_gpus, "_POLL_S", 0.001)
    assert node_gpus.found(config) == (gpu, gpu), "one for the router, half of one for each worker"
    assert reserved == {
        "router-0": {"GPU": 1.0, "expertmesh_router": 1.0},
        "expert-0": {"GPU": 0.5, "expertmesh_expert": 1.0},
        "expert-1": {"GPU": 0.5, "expertmesh_expert": 1.0},
    }
    looks = iter([()])
    assert node_gpus.found(replace(ASKED, router_device="auto")) == (), "nobody has to have one"
