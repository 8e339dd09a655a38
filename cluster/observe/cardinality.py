"""How many samples a cluster has of a series: labels multiply, and a Prometheus pays for each."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from cluster.observe.series.base import Series
from cluster.observe.series.table import TABLE

PerExpert = Literal["auto", "on", "off"]
MOST_EXPERTS = 4096  # layers times experts up to which `auto` has series per expert


def per_expert(choice: PerExpert, n_layers: int, n_experts: int) -> bool:
    """Whether a model of `n_layers` layers with `n_experts` experts has series per expert."""
    return choice == "on" or (choice == "auto" and n_layers * n_experts <= MOST_EXPERTS)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the labels range over. `replicas`: of an expert, the mean; transports: one for each router and worker."""

    n_layers: int
    n_experts: int
    n_workers: int
    n_routers: int = 1
    n_gateways: int = 1
    replicas: float = 1.0

    def samples(self, per_expert: bool) -> int:
        """Most samples of one scrape of everything; with `per_expert` false those per expert are left out."""
        return sum(self._samples(series, per_expert) for series in TABLE if per_expert or not series.per_expert)

    def _samples(self, series: Series, per_expert: bool) -> int:
        processes = {
            "gateway": self.n_gateways,
            "router": self.n_routers,
            "expert worker": self.n_workers,
            "controller": 1,
            "every process": self.n_gateways + self.n_routers + self.n_workers + 1,
        }
        ranges: dict[str, float] = {
            "layer": self.n_layers if per_expert or "worker" not in series.labels else 1,
            "expert": self.n_experts,
            "worker": self.replicas if "expert" in series.labels else self.n_workers,
            "router": self.n_routers,
            "process": processes["every process"],
            "state": 4, "role": 1 if "process" in series.labels or series.set_by == "every process" else 3,
            "route": 20, "status": 2, "reason": 6, "action": 4, "result": 2, "mode": 3, "transport": 1, "version": 1,
            "gpu": 1, "signal": 3,
        }  # fmt: skip
        lines = len(series.buckets) + 3 if series.kind == "histogram" else 1
        return round(processes[series.set_by] * lines * prod(ranges[label] for label in series.labels))
