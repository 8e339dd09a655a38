"""Expert workers that are stopped (SIGSTOP) and go on, as processes of their own. Catches a step that waits for its
whole deadline, one that writes to a process which hangs, and a worker that stays away for good once it was slow."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import MODEL_NAME
from tests.contract.model import Model, batch
from tests.contract.test_results import run
from tests.credentials import CREDENTIALS
from tests.waiting import wait_until
from workers.transport.base import FastWay
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.router import ShmWay
from workers.transport.shm.worker import ShmAcceptor

MODEL = Model()
TWICE = Placement(1, ("a", "b", "c"), tuple(tuple((e % 3, (e + 1) % 3) for e in range(6)) for _ in range(2)))
ONCE = striped(2, 6, ("a", "b", "c"))
GIVEN = batch(MODEL, 9)


def serve(connection: Connection, worker: str, experts: tuple[tuple[int, int], ...]) -> None:
    torch.set_num_threads(1)
    server = ExpertServer(
        MODEL.shard(experts), worker, "127.0.0.1", model=MODEL_NAME, credentials=CREDENTIALS, ways=(ShmAcceptor,)
    )
    server.start()
    connection.send(server.address)
    connection.recv()


class Processes:
    """Three workers; each holds what `TWICE` gives it, which is more than `ONCE` does."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[BaseProcess, Connection]] = {}
        context = get_context("spawn")
        for worker in TWICE.workers:
            ours, theirs = context.Pipe()
            held = tuple(sorted({*TWICE.shard(worker), *ONCE.shard(worker)}))
            process = context.Process(target=serve, args=(theirs, worker, held), daemon=True)
            process.start()
            self._running[worker] = process, ours
        self.addresses = {worker: ours.recv() for worker, (_, ours) in self._running.items()}

    def signal(self, worker: str, number: signal.Signals) -> None:
        pid = self._running[worker][0].pid
        assert pid is not None
        os.kill(pid, number)
        if number == signal.SIGSTOP:  # its threads stop one by one
            states = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
            wait_until(lambda: all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states))

    def close(self) -> None:
        for process, _ in self._running.values():
            process.kill()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    running = Processes()
    yield running
    running.close()


@pytest.fixture(params=[(), (ShmWay,)], ids=["grpc", "shm"])
def transport(request: pytest.FixtureRequest) -> Iterator[GrpcTransport]:
    ways: list[FastWay] = [way() for way in request.param]
    transport = GrpcTransport("router", MODEL_NAME, CREDENTIALS, ways=ways)
    yield transport
    transport.close()


def exchange_over(transport: GrpcTransport, placement: Placement, processes: Processes) -> Exchange:
    return Exchange(placement, processes.addresses, transport, reply_timeout_s=60, rejoin_timeout_s=60)


def test_a_worker_that_hangs_is_left_for_a_replica_until_it_goes_on(
    transport: GrpcTransport, processes: Processes
) -> None:
    exchange = exchange_over(transport, TWICE, processes)
    before = run(exchange, GIVEN)
    for _ in range(40):  # what is usual has to be learned
        run(exchange, GIVEN)
    processes.signal("b", signal.SIGSTOP)
    try:
        assert torch.equal(run(exchange, GIVEN), before)
        repairs = exchange.counters.repairs
        assert repairs >= 1
        for _ in range(20):
            assert torch.equal(run(exchange, GIVEN), before)
        assert exchange.counters.repairs == repairs, "a worker that hangs is asked again and again"
        wait_until(lambda: exchange.unreachable == {"b"})
    finally:
        processes.signal("b", signal.SIGCONT)
    wait_until(lambda: not exchange.unreachable)
    asked = exchange.counters.worker_rows()["b"]

    def is_asked() -> bool:
        assert torch.equal(run(exchange, GIVEN), before)
        return exchange.counters.worker_rows()["b"] > asked

    wait_until(is_asked)


def test_without_a_replica_a_worker_that_hangs_is_noticed_and_the_step_goes_on_with_it(
    transport: GrpcTransport, processes: Processes
) -> None:
    noticed: list[set[str]] = []

    def go_on() -> None:
        noticed.append(set(transport.unreachable))
        if transport.unreachable:
            processes.signal("a", signal.SIGCONT)

    exchange = exchange_over(transport, ONCE, processes)
    before = run(exchange, GIVEN)
    wait_until(lambda: transport.answers("a"))
    transport._on_reach = go_on
    processes.signal("a", signal.SIGSTOP)
    assert torch.equal(run(exchange, GIVEN), before)
    assert {"a"} in noticed
