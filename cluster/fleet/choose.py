"""Which transport a cluster uses, and why. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import Config
from workers.device import Gpu


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and the reason as people read it."""

    transport: Literal["local", "device", "shm", "grpc", "collective"]
    reason: str


def apart(gpus: Sequence[Gpu]) -> str:
    """Why processes on these GPUs cannot all share their memory, as far as that is known; "" where they may."""
    if (n_hosts := len({gpu.host for gpu in gpus})) > 1:
        return f"the GPUs are in {n_hosts} hosts"
    for gpu in gpus:
        for other in gpu.strangers:
            return f"GPU {gpu.index} does not reach the memory of GPU {other} directly"
    return ""


def choose(config: Config, *, has_experts: bool = True, gpus: Sequence[Gpu] = ()) -> Choice:
    """What `config.transport` says, or for "auto" what suits the devices, which are settled.

    has_experts: whether the model has any. gpus: that there are.
    """
    if not has_experts:
        return Choice("local", "the model has no experts: routers serve it alone")
    if config.transport != "auto":
        return Choice(config.transport, "as configured")
    if config.expert_workers == 0:
        return Choice("local", "one process holds everything")
    if config.router_device == config.expert_device == "cuda":
        if not (why := apart(gpus)):
            return Choice("device", "routers and expert workers are on GPUs; gRPC where they do not share memory")
        if config.collective_interface is not None and config.trusted_network:
            return Choice("collective", f"NCCL: {why}")
        return Choice("grpc", f"{why}; NCCL needs --collective-interface NAME and --trusted-network")
    return Choice("shm", "not both of routers and expert workers are on GPUs; gRPC between hosts")
