"""Starts and ends processes as Ray actors, for the controller: each in a bundle that says what it needs of a node."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import Config
from cluster.control.client import NAME, NAMESPACE, ControllerByName
from cluster.errors import ExpertMeshError
from cluster.fleet import gateway
from cluster.fleet.expert_entry import ExpertActor
from cluster.fleet.ray_errors import reason
from cluster.fleet.router_actor import Router
from cluster.gateway.context import ModelCard
from workers.transport.grpc.credentials import Credentials

# Custom resources of Ray's nodes: how many processes of each kind a node may have.
ROUTER_RESOURCE = "expertmesh_router"
EXPERT_RESOURCE = "expertmesh_expert"

_GROUP_PREFIX = "expertmesh:"  # of the names of placement groups
_END_S = 30.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """What one process, a router or an expert worker, takes of a node, and finds in its environment."""

    resource: str  # the custom resource that says on which nodes; "": on any
    cpus: float
    gpus: float
    threads: int
    variables: Mapping[str, str]

    @property
    def bundle(self) -> dict[str, float]:
        """For a placement group; empty when nothing is taken."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus} | ({self.resource: 1.0} if self.resource else {})
        return {name: amount for name, amount in wanted.items() if amount}


@dataclass(frozen=True, slots=True)
class RayLauncher:
    """All that processes of one cluster are made of. A `control.fleet.Launcher`.

    Actors and their placement groups are detached: they outlive the controller that asked for them.
    """

    config: Config
    checkpoint: str
    router: Kind
    worker: Kind
    url: str
    model: ModelCard
    credentials: Credentials
    asked: Config | None = None  # of a Serve application: its configuration, as it was asked for
    n_gateways: int = 0  # that there are without the controller's doing: those of a Serve application

    def present(self) -> frozenset[str]:
        """By the names of their actors."""
        return frozenset(_named_actors()) - {NAME}

    def start(self, process: str) -> Awaitable[object]:
        """Ask Ray for it, unless it is there; see `control.fleet.Launcher`."""
        is_router = process.startswith("router-")
        kind = self._on_nodes(self.router if is_router else self.worker)
        actor: Any = ray.remote(Router if is_router else ExpertActor)
        handle = actor.options(
            name=process,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=kind.cpus,
            num_gpus=kind.gpus or None,
            resources={kind.resource: 1} if kind.resource else None,
            scheduling_strategy=_strategy(process, kind),
            max_restarts=-1,
            runtime_env={"env_vars": dict(kind.variables)} if kind.variables else None,
        ).remote(process, self.config, self.checkpoint, kind.threads, ControllerByName(), self.credentials)
        ready: Awaitable[object] = handle.ready.remote()
        return ready

    def end(self, process: str) -> None:
        """Kill it and give its bundle back; returns once its name is free."""
        _end(process)

    def scale_gateways(self, n: int) -> None:
        """Through Ray Serve; where nobody has started it, it is started."""
        if gateway.is_deployed():
            gateway.scale(n)
        elif self.asked is None:
            gateway.deploy(self.config, self.model, self.url, self.credentials, n)

    def why(self, error: Exception) -> str:
        """The cause of what Ray raised."""
        # What an actor raised is of both kinds, and its text is then Ray's, with a stack in colours.
        return str(error) if isinstance(error, ExpertMeshError) and not isinstance(error, RayError) else reason(error)

    def _on_nodes(self, kind: Kind) -> Kind:
        """Without its custom resource where no node has it, unless it is asked for."""
        there = self.config.require_node_roles or kind.resource in ray.cluster_resources()  # type: ignore[no-untyped-call]
        return kind if there else replace(kind, resource="")


def end_all() -> None:
    """End every process and bundle of an ExpertMesh in this Ray, the controller first: it would start them again."""
    for process in sorted(_named_actors(), key=lambda name: name != NAME):
        _end(process)
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(_GROUP_PREFIX) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group["placement_group_id"]))))


def _named_actors() -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


def _strategy(process: str, kind: Kind) -> PlacementGroupSchedulingStrategy | None:
    """A bundle of its own, which Ray's autoscaler finds a node for; None where nothing is asked of a node."""
    if not kind.bundle:
        return None
    return PlacementGroupSchedulingStrategy(reserve(process, kind.bundle), placement_group_bundle_index=0)


def reserve(process: str, bundle: Mapping[str, float]) -> PlacementGroup:
    """The placement group of a process, asked for if there is none: an autoscaler starts a node where none has room."""
    name = _GROUP_PREFIX + process
    group: PlacementGroup
    try:
        group = ray.util.get_placement_group(name)
    except ValueError:
        group = placement_group([dict(bundle)], name=name, lifetime="detached")
    return group


def _end(process: str) -> None:
    with suppress(ValueError):  # it is gone
        ray.kill(ray.get_actor(process, NAMESPACE), no_restart=True)
    with suppress(ValueError):
        remove_placement_group(ray.util.get_placement_group(_GROUP_PREFIX + process))
    deadline = time.monotonic() + _END_S
    while process in _named_actors() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
