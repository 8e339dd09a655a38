"""What members and controller tell each other: a Member says how one process is, a View how the cluster is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.control.goal import NO_GOAL, Goal
from cluster.observe.discovery import Target
from cluster.placement.load import Load
from cluster.placement.placement import Placement
from workers.probe import Probe
from workers.transport.collective.group import Group

GATEWAYS = "gateways"  # those of Ray Serve, in `View.failures`
Role = Literal["gateway", "router", "expert", "controller"]
# isolated: a router that cannot reach an expert worker which others reach. Its requests go on elsewhere.
State = Literal["starting", "ready", "isolated", "draining", "lost"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How far an expert worker is with the placement that is to come."""

    epoch: int  # of that placement
    probes: Mapping[tuple[int, int], Probe]  # of the experts that get a replica and that it holds, by (layer, expert)
    error: str = ""  # why it cannot hold what that placement wants of it


@dataclass(frozen=True, slots=True)
class Member:
    """One process, as `expertmesh status --json` shows it."""

    role: Role
    id: str  # stable over restarts: `expert-0`, `router-1`
    pid: int
    node: str  # Ray node id
    state: State
    address: str  # host:port of its gRPC service; the base URL for a gateway
    metrics_url: str | None = None
    epoch: int = 0  # the placement epoch it works with: a router's acknowledgement
    store: str = ""  # of a router that takes part in collective groups: host:port of the store it hosts, once loaded
    group: Group | None = None  # the one it was told last
    broken: int = 0  # number of the newest group that broke under it
    unreachable: tuple[str, ...] = ()  # of a router: expert workers that do not answer it
    told: int = 0  # epoch of the newest placement it has heard of
    aims: int = 0  # revision of the newest goal it has heard of
    slots: int = 0  # of an expert worker: experts that plans may give it, those it holds among them; 0: not known
    most_slots: int = 0  # of an expert worker: experts it may hold at most; 0: as many as it finds memory for
    bytes_per_s: int = 0  # of an expert worker: what its memory gives, which is what decoding takes; 0: not known
    detail: dict[str, object] = field(default_factory=dict)  # numbers for people: experts held, blocks free
    # For the controller alone, not shown to the other members:
    load: Load | None = None  # of a router: the rows it dispatched
    preparation: Preparation | None = None  # of an expert worker


@dataclass(frozen=True, slots=True)
class View:
    """What every member hears. A higher version is a newer view, also across restarts of the controller."""

    version: int
    members: tuple[Member, ...]  # by role and id; those that left stay, as `lost`
    placement: Placement
    next: Placement | None = None  # the one being prepared: workers load what it adds, nobody routes by it
    acknowledged: bool = True  # every live router works with `placement`: workers unload what it does not name
    goal: Goal = NO_GOAL
    failures: Mapping[str, str] = field(default_factory=dict)  # why a process of the goal does not start, by its id
    serving: bool = False  # the gateways take requests
    group: Group | None = None  # None: there is none yet, or the last one broke; those in it leave it
    isolated: tuple[str, ...] = ()  # routers that are to serve nobody for now, see `reach`
    draining: bool = False  # the cluster is being stopped: finish what is open, take nothing new
    controller_metrics_url: str | None = None

    def targets(self) -> tuple[Target, ...]:
        """The metrics endpoints of all processes that live."""
        found = [
            Target(member.id, member.role, member.metrics_url)
            for member in self.members
            if member.state != "lost" and member.metrics_url is not None and member.role != "controller"
        ]
        if self.controller_metrics_url is not None:
            found.append(Target("controller", "controller", self.controller_metrics_url))
        return tuple(found)

    def addresses(self, role: Role) -> Mapping[str, str]:
        """`id -> host:port` of the live members of `role` that have an address."""
        return {
            member.id: member.address
            for member in self.members
            if member.role == role and member.state != "lost" and member.address
        }

    @property
    def complete(self) -> bool:
        """Whether every worker of the placement answers; one that is draining still does."""
        answering = {m.id for m in self.members if m.role == "expert" and m.state in ("ready", "draining")}
        return answering.issuperset(self.placement.workers)
