"""The series of an expert worker, read from its server's counters and its shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.observe.distribution import Distribution
from cluster.observe.exposition import Reading
from cluster.observe.series import worker as series
from workers.shard import ExpertShard
from workers.transport.batcher import Batcher


@dataclass(slots=True)
class Loads:
    """Experts loaded since start, and the seconds that took."""

    experts: int = 0
    seconds: float = 0.0

    def add(self, n: int, seconds: float) -> None:
        self.experts += n
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class WorkerReadings:
    """A source of readings. `slots`: how many experts the worker has room for."""

    shard: ExpertShard
    batcher: Batcher
    loads: Loads
    slots: Callable[[], int]

    def __call__(self) -> Iterable[Reading]:
        shard, batcher = self.shard, self.batcher
        yield Reading(series.ROWS, batcher.rows)
        yield Reading(series.COMPUTE, batcher.compute_seconds)
        yield Reading(series.WAITED, batcher.waited_seconds)
        calls = Distribution(series.CALL_ROWS.buckets)
        calls.counts, calls.total = list(batcher.calls), float(batcher.call_rows)
        yield Reading(series.CALL_ROWS, calls)
        yield Reading(series.SLOTS, self.slots())
        yield Reading(series.SLOTS_USED, shard.n_held)
        yield Reading(series.EXPERT_BYTES, shard.weight_bytes)
        yield Reading(series.LOADED, self.loads.experts)
        yield Reading(series.LOAD, self.loads.seconds)
