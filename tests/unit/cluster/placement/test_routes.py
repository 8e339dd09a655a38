"""Which replica takes the rows of an expert, and how the first placement is dealt."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.placement.placement import Placement, striped
from cluster.placement.routes import Routes

REPLICATED = Placement(1, ("a", "b", "c"), (((0,), (0, 1), (1, 2), (2,)),))


def owners(down: tuple[str, ...], *rows: int) -> list[int]:
    return Routes(REPLICATED, down).owners(0, np.array(rows)).tolist()


def test_over_many_dispatches_each_replica_gets_its_share() -> None:
    """Would catch shares that are ignored, a spare that takes rows, and one that does not when it has to."""
    placement = Placement.of(1, ("a", "b", "c"), [[{"a": 3.0, "b": 1.0}, {"b": 1.0, "c": 0.0}]])
    rows = np.random.default_rng(0).integers(0, 20, (4000, 2))
    for down, expected in (((), (0.75, 0.25)), (("a",), (0.0, 1.0))):
        routes, got = Routes(placement, down), np.zeros((2, 3))
        for rows_E in rows:
            np.add.at(got, ([0, 1], routes.owners(0, rows_E)), rows_E)
        assert got[0, :2] / got[0].sum() == pytest.approx(expected, abs=0.01)
        assert got[1, 1] == got[1].sum()
    assert Routes(placement, ("b",)).owners(0, rows[0]).tolist() == [0, 2]


def test_absent_workers_are_passed_over_where_there_is_a_choice() -> None:
    assert owners(("b",), 9, 4, 4, 0) == [0, 0, 2, 2]
    assert owners(("a",), 9, 4, 4, 0) == [0, 1, 1, 2], "the only holder keeps its expert even while it is away"
    assert owners(("b", "c"), 1, 1, 1, 1) == [0, 0, 1, 2]


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5])
def test_striped_shards_differ_by_at_most_one_replica_and_cover_everything(n_workers: int) -> None:
    workers = tuple(f"w{i}" for i in range(n_workers))
    placement = striped(6, 8, workers)
    shards = [placement.shard(worker) for worker in workers]
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(pair for shard in shards for pair in shard) == [(layer, e) for layer in range(6) for e in range(8)]
    for worker, shard in zip(workers, shards, strict=True):
        assert all(placement.holders(layer, expert) == (worker,) for layer, expert in shard)
