"""How a controller is to do what it does."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.control.autoscale import AutoscaleOptions
from cluster.control.rebalancer import RebalanceOptions
from cluster.observe.logs import Format


@dataclass(frozen=True, slots=True)
class AdminOptions:
    """Where the admin API listens, and what it asks for."""

    host: str  # "": the address of its node that Ray uses
    port: int  # 0: any free one
    token: str


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    """Where the controller's series are shown and how many, and what it logs."""

    host: str  # "": the address of its node that Ray uses
    port: int  # the first one to try; 0: any
    per_expert: bool  # whether there are series for each expert and layer
    log_level: str = "info"
    log_format: Format = "text"


@dataclass(frozen=True, slots=True)
class ProcessBytes:
    """What one more process takes of this machine's memory before it does anything; 0: it may start elsewhere."""

    worker: int = 0  # without experts: those move
    router: int = 0
    gateway: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """Those of one cluster."""

    admin: AdminOptions
    metrics: MetricsOptions
    rebalance: RebalanceOptions = field(default_factory=RebalanceOptions)
    autoscale: AutoscaleOptions = field(default_factory=AutoscaleOptions)
    max_sequences: int = 64  # places in the batch of a router
    expert_bytes: int = 0  # of one replica
    process_bytes: ProcessBytes = field(default_factory=ProcessBytes)
    spare_replicas: int = 0
    allow_chaos: bool = False
    drain_timeout_s: float = 30.0  # for a router that leaves to finish what it has
