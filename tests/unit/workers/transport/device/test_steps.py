"""Steps through memory that router and workers share, each a process of its own: as captured on a GPU, in host memory.

Catches sums that depend on where experts live, a step that hangs on a dead peer, rows of a step that was thrown away in
a later one, and routers that read the weights apart where they could together.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.local_transport import LocalTransport
from tests.contract.model import Batch, Model, batch
from tests.unit.workers.transport.device.device_worker import LIMIT_S, serve
from workers.transport.base import Tag
from workers.transport.device.offer import Offer, Shape
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay

MODEL = Model(n_layers=3)
CPU = torch.device("cpu")
NO_ROWS = StreamRows()
N_ROWS = 16
SHAPE = Shape(MODEL.n_layers, MODEL.n_experts, 2, MODEL.hidden_size, MODEL.dtype, N_ROWS)


class Workers:
    """Worker processes by name."""

    def __init__(self) -> None:
        self.processes: dict[str, BaseProcess] = {}
        self.pipes: dict[str, Connection] = {}

    def start(self, placement: Placement) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([serve.__module__])  # else each imports torch
        for worker in placement.workers:
            if worker in self.processes:
                continue
            pipe, other = context.Pipe()
            args = (other, MODEL, placement.shard(worker), "cpu")
            self.processes[worker] = context.Process(target=serve, args=args, daemon=True)
            self.processes[worker].start()
            self.pipes[worker] = pipe
            other.close()

    def join(self, way: DeviceWay, placement: Placement) -> None:
        """The handshake of one router, which goes through gRPC in the product."""
        for worker in placement.workers:
            if worker in way.members:
                continue
            offered = way.offer(worker)
            assert offered is not None
            self.pipes[worker].send(("offer", offered.text))
            what, text = self.pipes[worker].recv()
            assert what == "accepted", text
            offered.accepted(text)

    def kill(self, worker: str) -> None:
        process = self.processes.pop(worker)
        process.kill()
        process.join()
        del self.pipes[worker]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    for worker in list(workers.processes):
        workers.kill(worker)


def owners(placement: Placement) -> NDArray[np.int32]:
    """[L, E]: which of the placement's workers computes each expert; the last of several."""
    return np.array([[holders[-1] for holders in layer] for layer in placement.replicas], np.int32)


def wait_ready(way: DeviceWay, placement: Placement) -> None:
    end = time.monotonic() + 20
    while not way.ready(placement.workers, owners(placement)):
        assert time.monotonic() < end, "the workers do not become ready"
        time.sleep(0.005)


def step(way: DeviceWay, given: Batch) -> Tensor | None:
    """y [L, T, D] of all layers; None where the step was void, or the workers did not answer in time."""
    if not way.begin_step(len(given.x_TD), Tag(0, 0, 0, 0, 0, 0), 1.0):
        return None
    experts = way.experts
    y_LTD = [
        experts.combine(experts.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
        for layer in range(MODEL.n_layers)
    ]
    report = way.end_step()
    if report is None:
        return None
    expected_E = given.ids_TK.flatten().bincount(minlength=MODEL.n_experts)
    assert (report.rows_LE == expected_E.numpy()).all(), "the rows of experts are counted wrong"
    return torch.stack(y_LTD)


def check(y_LTD: Tensor | None, given: Batch) -> None:
    assert y_LTD is not None
    for layer in range(MODEL.n_layers):
        expected_TD = MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK)
        torch.testing.assert_close(y_LTD[layer].double(), expected_TD, atol=1e-5, rtol=1e-5)


def test_sums_do_not_depend_on_where_experts_live_and_survive_a_kill(workers: Workers) -> None:
    placement = Placement(1, ("a", "b", "c"), tuple(tuple((e % 3, (e + 1) % 3) for e in range(6)) for _ in range(3)))
    workers.start(placement)
    way = DeviceWay(SHAPE, CPU, LIMIT_S, NO_ROWS)
    workers.join(way, placement)
    wait_ready(way, placement)
    first = batch(MODEL, 9, seed=1)
    y_LTD = step(way, first)
    check(y_LTD, first)
    for n_rows in (1, 16, 5):  # what an earlier step left in the memory must not show
        given = batch(MODEL, n_rows, seed=n_rows)
        check(step(way, given), given)

    others = tuple(tuple((holders[0],) for holders in layer) for layer in placement.replicas)
    moved = Placement(2, placement.workers, others)
    wait_ready(way, moved)  # the owners change under the same memory, and with them no bit
    again = step(way, first)
    assert again is not None and y_LTD is not None and torch.equal(again, y_LTD)

    workers.kill("b")
    began = time.monotonic()
    assert step(way, first) is None, "a step without a worker is void"
    assert time.monotonic() - began < 3 * LIMIT_S, "each layer waited for the dead worker"
    way.offer("b")  # its stream broke, and is opened anew
    assert not way.ready(moved.workers, owners(moved))

    wrong = Placement(3, ("a", "c"), tuple(tuple((1,) for _ in range(6)) for _ in range(3)))
    wait_ready(way, wrong)
    assert step(way, first) is None, "an expert was asked of a worker that does not hold it"

    rest = Placement(3, ("a", "c"), tuple(tuple((int(e % 3 == 1),) for e in range(6)) for _ in range(3)))
    wait_ready(way, rest)  # the two that live hold all experts; they were left in a void step
    given = batch(MODEL, 7, seed=5)
    check(step(way, given), given)

    workers.start(placement)  # b comes back
    workers.join(way, placement)
    wait_ready(way, placement)
    again = step(way, first)
    assert again is not None and y_LTD is not None and torch.equal(again, y_LTD)


def test_routers_step_together_and_alone(workers: Workers) -> None:
    placement = striped(MODEL.n_layers, MODEL.n_experts, ("d", "e"))
    workers.start(placement)
    ways = [DeviceWay(SHAPE, CPU, LIMIT_S, NO_ROWS) for _ in range(3)]
    for way in ways:
        workers.join(way, placement)
    wrong: list[str] = []

    def route(number: int, n_steps: int) -> None:
        try:
            wait_ready(ways[number], placement)
            for n in range(n_steps):
                given = batch(MODEL, 1 + (n + number) % N_ROWS, seed=100 * number + n)
                check(step(ways[number], given), given)
        except Exception as error:
            wrong.append(f"router {number}: {error!r}")

    for alone in range(3):
        route(alone, 3)
    threads = [threading.Thread(target=route, args=(number, 6 + 3 * number)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_router_that_dies_holds_nobody_up(workers: Workers) -> None:
    placement = striped(MODEL.n_layers, MODEL.n_experts, ("d", "e"))
    workers.start(placement)
    stays, dies = DeviceWay(SHAPE, CPU, LIMIT_S, NO_ROWS), DeviceWay(SHAPE, CPU, LIMIT_S, NO_ROWS)
    for way in (stays, dies):
        workers.join(way, placement)
        wait_ready(way, placement)
    given = batch(MODEL, 4)
    check(step(dies, given), given)
    check(step(stays, given), given)
    asks = threading.Thread(
        target=dies.begin_step, args=(4, Tag(0, 0, 0, 0, 0, 0), 1.0)
    )  # agreed, and never heard of again
    asks.start()
    y_LTD = step(stays, given)  # in the same step, which is void, or in the next
    asks.join()
    if y_LTD is None:
        wait_ready(stays, placement)
        y_LTD = step(stays, given)
    check(y_LTD, given)


def test_an_offer_that_does_not_fit_is_declined_with_a_reason(workers: Workers) -> None:
    placement = striped(MODEL.n_layers, MODEL.n_experts, ("d", "e"))
    workers.start(placement)
    pipe = workers.pipes["d"]
    other = DeviceWay(Shape(4, 6, 2, 32, torch.float32, 8), CPU, LIMIT_S, NO_ROWS).offer("d")
    assert other is not None
    gone = json.dumps({"steps": Offer(1, 0, "cpu", "1 1 00", "1 1", SHAPE).text(), "other": ""})
    for text, reason in (
        (other.text, "another model"),
        (gone, "cannot be opened|is no ring"),
        ("{}", "cannot be read"),
        ("[", "be read"),
    ):
        pipe.send(("offer", text))
        what, said = pipe.recv()
        assert what == "declined"
        assert re.search(reason, said), said


def test_an_exchange_counts_the_rows_of_whole_steps_and_says_which_were_void(workers: Workers) -> None:
    placement = striped(MODEL.n_layers, MODEL.n_experts, ("f", "g"))
    workers.start(placement)
    way = DeviceWay(SHAPE, CPU, LIMIT_S, NO_ROWS)
    workers.join(way, placement)
    wait_ready(way, placement)
    exchange = Exchange(placement, {}, LocalTransport({}), reply_timeout_s=1, rejoin_timeout_s=1, step_way=way)
    given, experts = batch(MODEL, 6, seed=3), exchange.steps
    assert experts is not None

    def whole_step() -> bool:
        for layer in range(MODEL.n_layers):
            experts.combine(experts.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
        return exchange.end_steps()

    assert exchange.begin_steps(6)
    assert whole_step()
    chosen_E = given.ids_TK.flatten().bincount(minlength=MODEL.n_experts).numpy()
    assert (exchange.counters.rows_LE == chosen_E).all()
    assert sum(exchange.counters.worker_rows().values()) == MODEL.n_layers * given.ids_TK.numel()
    width = given.x_TD[0].nbytes
    for index, worker in enumerate(placement.workers):  # a row travels once, its pairs come back
        wanted_LTK = (owners(placement) == index)[:, given.ids_TK.numpy()]
        traffic = exchange.counters.traffic[worker, "device"]
        assert traffic.sent_bytes == wanted_LTK.any(2).sum() * width
        assert traffic.received_bytes == wanted_LTK.sum() * width
        assert 0 < traffic.wait_seconds < 20
        end = time.monotonic() + 20
        while True:  # it counts a step a moment after the router has it
            workers.pipes[worker].send(("computed", ""))
            n_pairs, seconds = workers.pipes[worker].recv()
            if n_pairs or time.monotonic() > end:
                break
        assert (n_pairs, 0 < seconds < 20) == (wanted_LTK.sum(), True), "the controller would take it for idle"
    assert exchange.begin_steps(6)
    workers.kill("g")
    assert not whole_step()
    assert (exchange.counters.captured_steps, exchange.counters.void_steps) == (1, 1)
    assert exchange.counters.rows_LE.sum() == MODEL.n_layers * given.ids_TK.numel(), "a void step was counted"
    assert exchange.epoch == placement.epoch, "an epoch is held for ever"
