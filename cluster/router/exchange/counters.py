"""What the exchange counts, in plain numbers: the step loop adds, others read.

Legend: L layers, E experts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.observe.distribution import Distribution
from cluster.observe.series.router import EXCHANGE


@dataclass(slots=True)
class Traffic:
    """What went to one worker over one transport, and came back."""

    requests: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    dispatch_seconds: float = 0.0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0  # as the worker says


@dataclass(slots=True)
class Counters:
    """Sums since start. Written by the step loop alone; what is sent again after a loss is counted once."""

    rows_LE: NDArray[np.int64]  # rows dispatched to each expert
    rows_L: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # rows that each worker gave back, by layer
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)  # by worker and transport
    captured_steps: int = 0
    void_steps: int = 0  # captured steps that a worker did not answer in time, and that were computed again
    retries: Counter[str] = field(default_factory=Counter)  # parts sent again, by the worker that lost them
    late: Counter[str] = field(default_factory=Counter)  # replies that missed their deadline, by worker
    hedged: Counter[str] = field(default_factory=Counter)  # those that another replica was asked for early, by worker
    split_seconds: float = 0.0
    combine_seconds: float = 0.0
    repair_seconds: float = 0.0  # from a loss to the reply of another replica or of the worker that came back
    exchanges: Distribution = field(default_factory=lambda: Distribution(EXCHANGE.buckets))  # seconds of each

    def of(self, worker: str, transport: str) -> Traffic:
        """What is counted of `worker` while its rows go over `transport`."""
        if (traffic := self.traffic.get((worker, transport))) is None:
            traffic = self.traffic[worker, transport] = Traffic()
        return traffic

    def add_rows(self, worker: str, layer: int, n: int) -> None:
        """`worker` gave `n` rows of `layer` back."""
        self._rows_L(worker)[layer] += n

    def add_layers(self, worker: str, rows_L: NDArray[np.int64]) -> None:
        """`worker` gave the rows of a whole step back."""
        mine_L = self._rows_L(worker)
        mine_L += rows_L

    def _rows_L(self, worker: str) -> NDArray[np.int64]:
        if (rows_L := self.rows_L.get(worker)) is None:
            rows_L = self.rows_L[worker] = np.zeros(len(self.rows_LE), np.int64)
        return rows_L

    def worker_rows(self) -> dict[str, int]:
        """Rows that each worker gave back. From any thread."""
        return {worker: int(rows_L.sum()) for worker, rows_L in self.rows_L.copy().items()}

    @property
    def repairs(self) -> int:
        """Parts sent again after a loss."""
        return self.retries.total()

    @property
    def sent_bytes(self) -> int:
        """Of rows, without headers."""
        return sum(traffic.sent_bytes for traffic in self.traffic.copy().values())
