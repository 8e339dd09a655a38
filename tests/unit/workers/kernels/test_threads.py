"""Threads of expert workers: no core without a thread, and never more than two threads for a core."""

from __future__ import annotations

import pytest

from workers.kernels.threads import worker_threads


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(1, 1, 1), (2, 1, 2), (2, 2, 2), (2, 3, 1), (8, 2, 4), (8, 5, 2), (64, 8, 8)]
)
def test_threads_of_each_worker(cores: int, workers: int, threads: int) -> None:
    assert worker_threads(cores, workers) == threads
    assert cores <= workers * threads <= max(workers, 2 * cores)
