"""Which transport a cluster uses, and why. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.config import Config


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and the reason as people read it."""

    transport: Literal["local", "grpc", "collective"]
    reason: str


def choose(config: Config, *, linked_gpus: bool, has_experts: bool = True) -> Choice:
    """What `config.transport` says, or for "auto" what suits the machine.

    linked_gpus: whether every router and expert worker computes on a GPU of its own and reaches the others' directly.
    has_experts: whether the model has any.
    """
    if not has_experts:
        return Choice("local", "the model has no experts: routers serve it alone")
    if config.transport != "auto":
        return Choice(config.transport, "as configured")
    if config.expert_workers == 0:
        return Choice("local", "one process holds everything")
    if not linked_gpus:
        return Choice("grpc", "routers and expert workers compute on CPUs")
    if config.ray_address is not None:
        return Choice("grpc", "how the nodes of a joined Ray reach each other is not known")
    return Choice("collective", "every process has its own GPU, and they reach each other directly")
