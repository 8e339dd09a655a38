"""Catches a step that does not fit beside what is there, that leaves an expert without a home, or that goes astray."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.placement import zipf
from cluster.errors import PlacementError
from cluster.placement.edit import check, move
from cluster.placement.placement import Placement, striped
from cluster.placement.planner import Worker, balance
from cluster.placement.steps import steps


@pytest.mark.parametrize("at_most", [1, 8, 10_000])
@pytest.mark.parametrize("free", [1, 5])
def test_every_step_fits_and_the_last_is_the_goal(at_most: int, free: int) -> None:
    workers = [Worker(f"w{i}", 18) for i in range(3)]
    current = striped(6, 8, ["w0", "w1", "w2"])
    goal = balance(zipf(6, 8, 1.0, np.random.default_rng(0)), workers, current).placement
    slots = {worker.name: worker.slots + free for worker in workers}
    before, n = current, 0
    for after in steps(current, goal, slots, at_most):
        assert after.epoch == before.epoch + 1
        check(after, slots)
        adds = after.all_replicas() - before.all_replicas()
        for worker in slots:
            assert len(before.shard(worker)) + sum(r.worker == worker for r in adds) <= slots[worker]
        assert len(adds) <= max(at_most, 3)
        before, n = after, n + 1
    assert before.homes() == goal.homes() and n >= 1


def test_full_workers_are_an_error_that_says_so() -> None:
    current = striped(1, 4, ["a", "b"])
    goal = move(current, 0, 0, "a", "b")
    with pytest.raises(PlacementError, match="no free slot"):
        list(steps(current, goal, {"a": 2, "b": 2}, 10))
    assert list(steps(goal, goal.numbered(9), {}, 10)) == []
    assert isinstance(next(iter(steps(current, goal, {}, 10))), Placement)
