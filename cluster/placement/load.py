"""How many rows experts and workers get: totals since start, and a window that forgets.

Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

WINDOW_S = 60.0  # time constant of the window: a row counts exp(-age / WINDOW_S)


@dataclass(frozen=True, slots=True)
class Load:
    """Rows that one router, or several together, dispatched."""

    total_LE: NDArray[np.int64]  # since start
    recent_LE: NDArray[np.float64]  # over the window: for steady traffic, rows per second times WINDOW_S
    total: Mapping[str, int]  # by worker, since start
    recent: Mapping[str, float]  # by worker, over the window

    @property
    def imbalance(self) -> float:
        """Max over mean of the workers' recent rows; 1.0 is perfect, also without any rows."""
        return imbalance(self.recent.values())

    def among(self, workers: Collection[str]) -> Load:
        """The same, its window that of `workers` alone and of all of them: who left is not idle, and who has just come
        is."""
        return replace(self, recent={worker: self.recent.get(worker, 0.0) for worker in sorted(workers)})


def imbalance(loads: Iterable[float]) -> float:
    """max load / mean load; 1.0 where there is none."""
    values = list(loads)
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def merged(loads: Iterable[Load]) -> Load | None:
    """The load of several routers together; None when there is none."""
    given = list(loads)
    if not given:
        return None
    total: Counter[str] = Counter()
    recent: dict[str, float] = {}
    for load in given:
        total.update(load.total)
        for worker, rows in load.recent.items():
            recent[worker] = recent.get(worker, 0.0) + rows
    return Load(
        sum((load.total_LE for load in given[1:]), given[0].total_LE.copy()),
        sum((load.recent_LE for load in given[1:]), given[0].recent_LE.copy()),
        total,
        recent,
    )


class LoadMeter:
    """Reads counters that another thread only ever adds to, so that counting needs no lock.

    rows_LE, worker_rows: give the rows of each expert and of each worker, since start. One thread calls `read`; how
    often makes no difference to what the window says of steady traffic.
    """

    def __init__(
        self,
        rows_LE: Callable[[], NDArray[np.int64]],
        worker_rows: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows_LE = rows_LE
        self._worker_rows = worker_rows
        self._clock = clock
        self._at = clock()
        self._seen_LE = rows_LE()
        self._seen = dict(worker_rows())
        self._recent_LE = np.zeros(self._seen_LE.shape)
        self._recent: dict[str, float] = {}

    def read(self) -> Load:
        """The load by now."""
        now = self._clock()
        passed, self._at = now - self._at, now
        kept = math.exp(-passed / WINDOW_S)
        # Rows of this interval were spread over it, so they have been forgotten in part already.
        fresh = (1 - kept) * WINDOW_S / passed if passed > 0 else 1.0
        seen_LE, seen = self._rows_LE(), dict(self._worker_rows())
        self._recent_LE = self._recent_LE * kept + (seen_LE - self._seen_LE) * fresh
        self._recent = {
            worker: self._recent.get(worker, 0.0) * kept + (rows - self._seen.get(worker, 0)) * fresh
            for worker, rows in seen.items()
        }
        self._seen_LE, self._seen = seen_LE, seen
        return Load(seen_LE, self._recent_LE, seen, self._recent)
