"""What a process of the cluster tells the controller about itself, and what it hears back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from workers.transport.collective.group import Group

Role = Literal["gateway", "router", "expert", "controller"]
State = Literal["starting", "ready", "draining", "lost"]


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
    slots: int = 0  # of an expert worker: experts it has memory for, those it holds among them; 0: not known
    bytes_per_s: int = 0  # of an expert worker: what its memory gives, which is what decoding takes; 0: not known
    detail: dict[str, object] = field(default_factory=dict)  # numbers for people: experts held, blocks free
