"""Whole decoding steps, captured: whether the workers take part, and what is counted of them.

Legend: L layers, E experts, W workers that take part.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.router.exchange.sender import Sender
from workers.model.experts import Experts


class StepWay(Protocol):
    """A way on which whole steps can be captured: what `workers.transport.device.way.DeviceWay` is."""

    @property
    def experts(self) -> Experts: ...
    def ready(self, workers: tuple[str, ...], owner_LE: NDArray[np.int32]) -> bool: ...
    def begin_step(self, n_rows: int) -> bool: ...
    def end_step(self) -> NDArray[np.int64] | None: ...


class CapturedSteps:
    """Steps over a `StepWay`. The step loop's alone."""

    def __init__(self, sender: Sender, way: StepWay) -> None:
        self._sender = sender
        self._way = way
        self._owners: tuple[int, tuple[str, ...], NDArray[np.int64]] = (0, (), np.zeros((0, 0), np.int64))

    @property
    def experts(self) -> Experts:
        """What the steps are captured with."""
        return self._way.experts

    def begin(self, n_rows: int) -> bool:
        """Before a captured step of `n_rows` rows: whether the workers take part."""
        epoch = self._sender.enter()
        routes = self._sender.routes
        owner_LE = routes.fixed_owners()
        used = np.unique(owner_LE)  # a worker that owns nothing is not waited for
        workers = tuple(routes.workers[index] for index in used.tolist())
        placed_LE = np.searchsorted(used, owner_LE)
        if self._way.ready(workers, placed_LE.astype(np.int32)) and self._way.begin_step(n_rows):
            self._owners = (epoch, workers, placed_LE)
            return True
        self._sender.views.leave(epoch)
        return False

    def end(self) -> bool:
        """After a captured step, which it waits for: False when it is void, since a worker did not answer in time."""
        rows_LE = self._way.end_step()
        epoch, workers, placed_LE = self._owners
        self._sender.views.leave(epoch)
        counters = self._sender.counters
        if rows_LE is None:
            counters.void_steps += 1
            return False
        counters.captured_steps += 1
        counters.rows_LE += rows_LE
        for layer, (rows_E, placed_E) in enumerate(zip(rows_LE, placed_LE, strict=True)):
            for worker, rows in zip(workers, np.bincount(placed_E, rows_E, len(workers)).tolist(), strict=True):
                counters.add_rows(worker, layer, int(rows))
        return True
