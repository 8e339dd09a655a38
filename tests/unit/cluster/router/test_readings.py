"""Catches series of expert workers that left long ago."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.router.exchange.counters import Counters
from cluster.router.readings import of_exchange


def test_a_worker_that_left_has_no_series() -> None:
    counters = Counters(np.zeros((2, 4), np.int64))
    for worker in ("expert-0", "expert-1"):
        counters.add_rows(worker, 1, 5)
        counters.of(worker, "shm").requests += 1
        counters.late[worker] += 1
    exchange: Any = SimpleNamespace(
        counters=counters, workers=("expert-0",), ejected=frozenset(), dense_layers=frozenset(), dropped_replies=0
    )
    for per_expert in (False, True):
        labels = {label for reading in of_exchange(exchange, per_expert) for label in reading.labels}
        assert "expert-0" in labels and "expert-1" not in labels
