"""Decoding steps captured whole over shared memory: the bits of one process, also when workers die, hang or refuse.

Would catch rows laid out or added up otherwise than layer by layer, a void step that leaves something behind (a token,
a reply nobody awaits, room that is never free again), and a step that waits for a worker that is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.placement.placement import Placement, striped
from cluster.router.build import build_engine
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import ShmWorkers, start_all
from tests.contract.test_same_bits import CONFIG, SPEC, OnDisk, Result, alone, checkpoint, crowd
from workers.kernels.cpu.library import usable
from workers.transport.shm.router import ShmWay
from workers.transport.shm.steps import RingSteps

__all__ = ["alone", "checkpoint"]
pytestmark = pytest.mark.skipif(not usable(), reason="the CPU kernels cannot be built here")

HOMES = [[((e + layer) % 2, (e + layer + 1) % 2) for e in range(SPEC.n_experts)] for layer in range(SPEC.n_layers)]
TWICE = Placement(1, ("a", "b"), tuple(map(tuple, HOMES)))


class Cluster:
    """Workers of this process over shared memory, and an exchange that captures its steps."""

    def __init__(self, checkpoint: Path, placement: Placement, reply_timeout_s: float = 20) -> None:
        self.placement = placement
        self.workers = ShmWorkers(
            OnDisk(SPEC.n_layers, SPEC.n_experts, SPEC.hidden_size, SPEC.ffn_size, path=checkpoint)
        )
        way = ShmWay()
        self.workers.ways = (way,)
        start_all(self.workers, placement)
        self.steps = RingSteps(way, SPEC.n_layers, SPEC.n_experts)
        self.exchange = Exchange(
            placement, dict(self.workers.addresses), self.workers.transport(),
            reply_timeout_s=reply_timeout_s, rejoin_timeout_s=60, step_way=self.steps,
        )  # fmt: skip
        self._checkpoint = checkpoint

    def results(self) -> list[Result]:
        return crowd(build_engine(CONFIG, self._checkpoint, self.exchange))

    def before_step(self, number: int, what: Callable[[], None]) -> None:
        """Do something when the captured step of that number is about to run."""
        begin, count = self.steps.begin_step, iter(range(1000))

        def begun(*arguments: object) -> bool:
            if next(count) == number:
                what()
            return begin(*arguments)  # type: ignore[arg-type]

        self.steps.begin_step = begun  # type: ignore[method-assign]

    def revive(self, worker: str) -> None:
        self.workers.start(worker, self.placement.shard(worker))
        self.exchange.publish(self.placement, dict(self.workers.addresses))


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(placement: Placement, **options: float) -> Cluster:
        made.append(Cluster(checkpoint, placement, **options))
        return made[-1]

    yield make
    for each in made:
        each.exchange.close()
        each.workers.close()


@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_the_bits_of_one_process(cluster: Callable[..., Cluster], alone: list[Result], n_workers: int) -> None:
    each = cluster(striped(SPEC.n_layers, SPEC.n_experts, ("a", "b", "c")[:n_workers]))
    assert each.results() == alone
    counters = each.exchange.counters
    assert counters.captured_steps >= 5, "the first step connects, all that decode are captured"
    assert counters.void_steps == counters.repairs == 0
    assert counters.rows_LE.sum() == sum(counters.worker_rows().values())
    traffic = counters.of("a", "shm")
    assert min(traffic.requests, traffic.sent_bytes, traffic.received_bytes) > 0
    assert min(traffic.wait_seconds, traffic.compute_seconds) > 0


def test_a_worker_dies_and_comes_back(cluster: Callable[..., Cluster], alone: list[Result]) -> None:
    each = cluster(striped(SPEC.n_layers, SPEC.n_experts, ("a", "b")))

    def kill() -> None:
        each.workers.kill("a")
        threading.Timer(0.3, each.revive, ("a",)).start()

    each.before_step(2, kill)
    assert each.results() == alone
    counters = each.exchange.counters
    assert (counters.void_steps, counters.repairs > 0) == (1, True)
    assert counters.captured_steps >= 4, "after the repair steps are captured again"


def test_a_worker_hangs_and_the_other_replica_takes_its_rows(
    cluster: Callable[..., Cluster], alone: list[Result]
) -> None:
    each = cluster(TWICE, reply_timeout_s=0.5)
    each.before_step(2, each.workers.shards["a"].open.clear)
    assert each.results() == alone
    assert each.exchange.counters.void_steps == 1


def test_a_worker_refuses_what_it_does_not_hold(cluster: Callable[..., Cluster], alone: list[Result]) -> None:
    """As when a view is older than what a worker unloaded: the step is void, nobody is ejected for long."""
    each = cluster(TWICE)

    def unload() -> None:
        for layer in range(SPEC.n_layers):
            for expert in range(SPEC.n_experts):
                each.workers.shard("a").unload(layer, expert)

    each.before_step(2, unload)
    assert each.results() == alone
    assert each.exchange.counters.void_steps >= 1


def test_a_step_that_fails_in_this_process_leaves_the_rings_as_the_next_one_needs_them(
    cluster: Callable[..., Cluster], alone: list[Result]
) -> None:
    """The workers have answered it, and nobody ended it: its replies are not the next step's."""
    each = cluster(striped(SPEC.n_layers, SPEC.n_experts, ("a", "b")))
    end, fails = each.exchange.end_steps, iter([False, True])

    def end_or_fail() -> bool:
        return end() if not next(fails, False) else False

    each.exchange.end_steps = end_or_fail  # type: ignore[method-assign]
    assert each.results() == alone
    assert each.exchange.counters.repairs == 0
