"""A sample of a router's steps, counted beside the step loop and written down window by window."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cluster.routing.counts import Choices, RoutingCounts
from cluster.routing.trace import Header, Window, append, check

log = logging.getLogger(__name__)

WINDOW_S = 60.0
FEWEST_TOKENS = 256  # of a window: of fewer one could tell what they were
_MOST_WAITING = 4096  # choices of a layer; what comes while so many wait is left out


class _Chosen(NamedTuple):
    layer: int
    q_start: tuple[int, ...] | None
    ids_TK: Choices


class RoutingTrace:
    """Counts a sample of the steps into a file. The step loop copies a few integers; a thread of its own does the rest.

    A failure to write ends the trace and is logged; nothing that is served depends on it.
    """

    def __init__(self, path: Path, name: str, header: Header, *, window_s: float = WINDOW_S, seed: int = 0) -> None:
        """`name`: of the router. Raises OSError when the directory of `path` cannot be made, TraceError when there is
        another trace or something else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        check(path, header)
        self._path, self._name, self._header, self._window_s = path, name, header, window_s
        self._random = random.Random(seed)
        self._queue: queue.SimpleQueue[_Chosen | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="routing-trace", daemon=True)
        self._thread.start()

    def observer(self) -> RoutingTrace | None:
        """Who is to be told of the next step: this, if it is one of the sample. Called once for each step."""
        if self._random.random() >= self._header.sample or not self._thread.is_alive():
            return None
        return self if self._queue.qsize() < _MOST_WAITING else None

    def chosen(self, layer: int, q_start: tuple[int, ...] | None, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """See `workers.model.observer.RoutingObserver`."""
        self._queue.put(_Chosen(layer, q_start, ids_TK.cpu().numpy().copy()))

    def close(self) -> None:
        """Write what is left, if it is of enough tokens, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._window():
                pass
        except OSError as error:
            log.error("the routing trace ends, since %s cannot be written: %s", self._path, error)

    def _window(self) -> bool:
        """Count and write one window; False after the last one."""
        counts = RoutingCounts.zeros(self._header.n_layers, self._header.n_experts)
        began, start = time.time(), time.monotonic()
        goes_on = True
        while goes_on:
            left = self._window_s - (time.monotonic() - start)
            if left <= 0 and counts.tokens >= FEWEST_TOKENS:
                break
            try:
                chosen = self._queue.get(timeout=left if left > 0 else self._window_s)
            except queue.Empty:
                continue
            goes_on = chosen is not None
            if chosen is not None:
                counts.count(*chosen)
        if counts.tokens >= FEWEST_TOKENS:
            append(self._path, self._header, Window(self._name, began, time.monotonic() - start, counts))
        return goes_on
