"""The GPUs of all nodes of a Ray cluster, asked of each node itself."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config import Config
from cluster.errors import StartError
from cluster.fleet.launcher import EXPERT_RESOURCE, ROUTER_RESOURCE, reserve
from workers.device import Gpu, gpus

_NODES_S = 1800.0  # for an autoscaler to bring the first nodes
_POLL_S = 2.0


def found(config: Config) -> tuple[Gpu, ...]:
    """Those there are. Where `config` names GPUs and the nodes have fewer, its processes ask for theirs first.

    Raises StartError when not enough come within half an hour.
    """
    wanted = _bundles(config)
    needed = math.ceil(sum(bundle["GPU"] for bundle in wanted.values()) - 1e-6)
    deadline = time.monotonic() + _NODES_S
    while True:
        there = _ask(_nodes())
        if len(there) >= needed:
            return there
        for process, bundle in wanted.items():
            reserve(process, bundle)
        if time.monotonic() > deadline:
            raise StartError(f"{needed} GPUs are needed, and {len(there)} were there after {_NODES_S:g} s")
        time.sleep(_POLL_S)


def _nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0)]  # type: ignore[no-untyped-call]


def _ask(nodes: list[str]) -> tuple[Gpu, ...]:
    task: Any = ray.remote(gpus)
    calls = [task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
             for node in nodes]  # fmt: skip
    return tuple(gpu for of_node in ray.get(calls) for gpu in of_node)


def _bundles(config: Config) -> dict[str, dict[str, float]]:
    """What the processes that are to be on GPUs will ask for, as far as that is known before their sizes are."""
    wanted: dict[str, dict[str, float]] = {}
    roles = (
        ("router", config.router_device, config.routers, config.gpus_per_router, config.cpus_per_router),
        ("expert", config.expert_device, config.expert_workers or 0, config.gpus_per_expert_worker,
         config.cpus_per_expert_worker),
    )  # fmt: skip
    for role, device, n, share, cpus in roles:
        resource = ROUTER_RESOURCE if role == "router" else EXPERT_RESOURCE
        for i in range(n if device == "cuda" else 0):
            bundle = {"GPU": share or 1.0, "CPU": cpus, resource: float(config.require_node_roles)}
            wanted[f"{role}-{i}"] = {name: amount for name, amount in bundle.items() if amount}
    return wanted
