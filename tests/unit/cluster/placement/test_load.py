"""Catches a window that depends on how often it is read, that never forgets, and routers that are not added up."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.placement.load import WINDOW_S, LoadMeter, imbalance, merged


@pytest.mark.parametrize("every_s", [0.5, 1.0, 15.0])
def test_the_window_says_the_same_however_often_it_is_read(every_s: float) -> None:
    """10 rows a second for ten windows, then silence for one."""
    now = SimpleNamespace(s=0.0)
    rows_LE, worker_rows = np.zeros((1, 2), np.int64), {"a": 0}
    meter = LoadMeter(rows_LE.copy, lambda: worker_rows, lambda: now.s)
    while now.s < 10 * WINDOW_S:
        now.s += every_s
        rows_LE[0, 1] += round(10 * every_s)
        worker_rows["a"] += round(10 * every_s)
        load = meter.read()
    assert load.total_LE.tolist() == [[0, 6000]] and load.total == {"a": 6000}
    assert load.recent_LE[0, 1] == pytest.approx(10 * WINDOW_S, rel=1e-3) == load.recent["a"]
    now.s += WINDOW_S
    assert meter.read().recent["a"] == pytest.approx(10 * WINDOW_S / math.e, rel=1e-3)


def test_routers_are_added_up_and_imbalance_is_max_by_mean() -> None:
    now = SimpleNamespace(s=0.0)
    meters = []
    for rows in ({"a": 30, "b": 10}, {"b": 20, "c": 0}):
        counted: dict[str, int] = {}
        meters.append(LoadMeter(np.zeros((1, 1), np.int64).copy, counted.copy, lambda: now.s))
        counted.update(rows)
    load = merged(meter.read() for meter in meters)
    assert load is not None and load.total == {"a": 30, "b": 30, "c": 0}
    assert load.imbalance == pytest.approx(1.5)
    assert merged([]) is None and imbalance([]) == 1.0 == imbalance([0, 0])
