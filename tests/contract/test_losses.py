"""What every transport and the exchange do when a worker is lost, moved, stale or slow: no result changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.collective_harness import CollectiveWorkers
from tests.contract.harness import GrpcWorkers, ShmWorkers, Workers, start_all
from tests.contract.model import Model, batch
from tests.contract.test_results import run
from workers.errors import WorkerLost
from workers.transport.base import Rows, Tag

MakeWorkers = Callable[[Model], Workers]
MODEL = Model()
TWICE = Placement(1, ("a", "b", "c"), tuple(tuple((e % 3, (e + 1) % 3) for e in range(6)) for _ in range(2)))
ONCE = striped(2, 6, ("a", "b"))
GIVEN = batch(MODEL, 9)
EXPECTED = MODEL.reference(1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK)


def exchange_over(workers: Workers, placement: Placement, reply_s: float = 20, rejoin_s: float = 20) -> Exchange:
    start_all(workers, placement)
    return Exchange(
        placement, workers.addresses, workers.transport(), reply_timeout_s=reply_s, rejoin_timeout_s=rejoin_s
    )


@pytest.fixture(params=[GrpcWorkers, ShmWorkers, CollectiveWorkers])
def gated_workers(request: pytest.FixtureRequest) -> Iterator[GrpcWorkers | CollectiveWorkers]:
    workers: GrpcWorkers | CollectiveWorkers = request.param(MODEL)
    yield workers
    workers.close()


def test_a_lost_worker_is_repaired_at_a_replica(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, TWICE)
    before = run(exchange, GIVEN)
    workers.kill("b")
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.counters.repairs >= 1
    repairs = exchange.counters.repairs
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.counters.repairs == repairs, "a worker known to be lost is asked again"


def test_a_worker_lost_between_dispatch_and_combine(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, TWICE)
    handles = [exchange.dispatch(1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK) for _ in range(2)]
    workers.kill("a")
    for handle in handles:
        torch.testing.assert_close(exchange.combine(handle).double(), EXPECTED, atol=1e-5, rtol=1e-5)


def test_without_a_replica_the_step_waits_until_the_worker_is_back_at_a_new_address(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    before = run(exchange, GIVEN)
    workers.kill("a")
    exchange.publish(ONCE, workers.addresses)

    def come_back() -> None:
        workers.start("a", ONCE.shard("a"))
        exchange.publish(ONCE, workers.addresses)

    timer = threading.Timer(0.3, come_back)
    timer.start()
    assert torch.equal(run(exchange, GIVEN), before)
    timer.join()
    repairs = exchange.counters.repairs
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.counters.repairs == repairs


def test_without_a_replica_the_step_waits_for_an_epoch_with_another_holder(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    before = run(exchange, GIVEN)
    workers.kill("a")
    moved = striped(2, 6, ("b", "c"), epoch=2)

    def move() -> None:
        for layer, expert in moved.shard("b"):
            workers.shard("b").load(layer, expert, MODEL.weights(layer, expert))
        workers.start("c", moved.shard("c"))
        exchange.publish(moved, workers.addresses)

    timer = threading.Timer(0.2, move)
    timer.start()
    assert torch.equal(run(exchange, GIVEN), before)
    timer.join()
    assert exchange.epoch == 2


def test_a_worker_that_stays_away_is_named(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE, rejoin_s=0.3)
    workers.kill("b")
    with pytest.raises(WorkerLost, match=r"expert worker b: .*0\.3 s"):
        run(exchange, GIVEN)
    workers.start("b", ONCE.shard("b"))
    exchange.publish(ONCE, workers.addresses)
    exchange.begin_step(2)
    torch.testing.assert_close(run(exchange, GIVEN).double(), EXPECTED, atol=1e-5, rtol=1e-5)


def test_a_step_that_is_computed_again_takes_no_reply_of_the_first_time(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    exchange.begin_step(1)
    exchange.dispatch(1, -GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK)
    exchange.begin_step(1)
    torch.testing.assert_close(run(exchange, GIVEN).double(), EXPECTED, atol=1e-5, rtol=1e-5)


def test_closing_ends_the_wait(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    workers.kill("b")
    threading.Timer(0.2, exchange.close).start()
    began = time.monotonic()
    with pytest.raises(WorkerLost):
        run(exchange, GIVEN)
    assert time.monotonic() - began < 15


def test_a_router_of_a_stale_epoch_is_refused_until_it_hears_the_new_one(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    before = run(exchange, GIVEN)
    moved = striped(2, 6, ("b", "a"), epoch=2)
    for worker in ("a", "b"):
        for layer, expert in moved.shard(worker):
            workers.shard(worker).load(layer, expert, MODEL.weights(layer, expert))
        for layer, expert in ONCE.shard(worker):
            if (layer, expert) not in moved.shard(worker):
                workers.shard(worker).unload(layer, expert)
    threading.Timer(0.2, exchange.publish, (moved, workers.addresses)).start()
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.epoch == 2


def test_an_epoch_is_acknowledged_when_nothing_is_outstanding_under_the_one_before(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, ONCE)
    args = (1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK)
    old = exchange.dispatch(*args)
    exchange.publish(Placement(2, ONCE.workers, ONCE.replicas), workers.addresses)
    new = exchange.dispatch(*args)
    assert exchange.epoch == 1
    exchange.combine(new)
    assert exchange.epoch == 1
    exchange.combine(old)
    assert exchange.epoch == 2
    exchange.publish(Placement(3, ONCE.workers, ONCE.replicas), workers.addresses)
    assert exchange.epoch == 3, "an idle router must not hold up a move"
    exchange.dispatch(*args)
    exchange.publish(Placement(4, ONCE.workers, ONCE.replicas), workers.addresses)
    assert exchange.epoch == 3
    exchange.begin_step(2)
    assert exchange.epoch == 4, "a step that failed must not hold up a move"


def test_a_worker_that_left_the_placement_is_forgotten(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    exchange = exchange_over(workers, TWICE)
    before = run(exchange, GIVEN)
    workers.start("d", striped(2, 6, ("d",)).shard("d"))
    exchange.publish(striped(2, 6, ("d",), epoch=2), workers.addresses)
    assert torch.equal(run(exchange, GIVEN), before)
    for worker in ("a", "b", "c"):
        workers.kill(worker)
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.counters.repairs == 0


def test_replies_nobody_awaits_are_dropped_and_counted(make_workers: MakeWorkers) -> None:
    workers = make_workers(MODEL)
    workers.start("a", striped(2, 6, ("a",)).shard("a"))
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    first_P = torch.zeros(1, dtype=torch.int32)
    rows = [Rows(Tag(7, 1, step, 0, 0, 0), torch.full((1, 32), float(step)), first_P, first_P) for step in (1, 2, 2, 3)]
    for each in rows:
        transport.send("a", each)
    out_PD = torch.empty(1, 32)
    for each in (rows[1], rows[3]):  # the first is never asked for, the second was sent twice
        rows_PD, _ = transport.receive("a", each.tag, 20, out_PD)
        shard = workers.shard("a")
        assert torch.equal(rows_PD, shard.forward(0, *each.request))
    assert transport.dropped_replies == 2


def test_a_late_reply_is_repaired_at_a_replica(gated_workers: GrpcWorkers | CollectiveWorkers) -> None:
    exchange = exchange_over(gated_workers, TWICE, reply_s=0.3)
    before = run(exchange, GIVEN)
    gated_workers.shards["a"].open.clear()
    assert torch.equal(run(exchange, GIVEN), before)
    assert exchange.counters.repairs >= 1


def test_a_late_reply_without_a_replica_is_asked_for_again(gated_workers: GrpcWorkers | CollectiveWorkers) -> None:
    exchange = exchange_over(gated_workers, ONCE, reply_s=0.3)
    before = run(exchange, GIVEN)
    gate = gated_workers.shards["a"].open
    gate.clear()
    threading.Timer(0.8, gate.set).start()
    torch.testing.assert_close(run(exchange, GIVEN), before)
    assert exchange.counters.repairs >= 1
