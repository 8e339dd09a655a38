"""Which transport a cluster uses, and why. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.config import Config


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and the reason as people read it."""

    transport: Literal["local", "device", "shm", "grpc", "collective"]
    reason: str


def choose(config: Config, *, has_experts: bool = True) -> Choice:
    """What `config.transport` says, or for "auto" what suits the devices, which are settled.

    has_experts: whether the model has any.
    """
    if not has_experts:
        return Choice("local", "the model has no experts: routers serve it alone")
    if config.transport != "auto":
        return Choice(config.transport, "as configured")
    if config.expert_workers == 0:
        return Choice("local", "one process holds everything")
    if config.router_device == config.expert_device == "cuda":
        return Choice("device", "routers and expert workers are on GPUs; gRPC where they do not share memory")
    return Choice("shm", "not both of routers and expert workers are on GPUs; gRPC between hosts")
