"""Shared memory between processes: what is left when one of them is killed, and where it cannot be had."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch

from cluster.placement.placement import Placement
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import MODEL_NAME, ShmWorkers, start_all
from tests.contract.model import Model, batch
from tests.contract.test_results import run
from tests.credentials import CREDENTIALS, PATIENT_S
from tests.waiting import wait_until
from workers.transport.base import Declined, Rows, Tag
from workers.transport.batcher import Batcher
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.handshake import EXCHANGE_METHOD, Hello, key
from workers.transport.grpc.server import ExpertServer
from workers.transport.shm.router import ShmWay
from workers.transport.shm.worker import Lane, ShmAcceptor

MODEL, GIVEN = Model(), batch(Model(), 9)
TWICE = Placement(1, ("a", "b"), tuple(tuple((e % 2, (e + 1) % 2) for e in range(6)) for _ in range(2)))
MAPPED = "memfd:expertmesh-ring"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts one of the processes of this suite by its module; they end with the test."""
    with ExitStack() as stack:

        def started(module: str, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", f"tests.contract.{module}", *arguments]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process

        yield started


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def n_rings(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count(MAPPED)


def exchange_over(addresses: dict[str, str]) -> Exchange:
    transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, ways=(ShmWay(),), silent_after_s=PATIENT_S)
    return Exchange(TWICE, addresses, transport, reply_timeout_s=20, rejoin_timeout_s=20)


def test_a_worker_that_is_killed_costs_nothing_and_leaves_nothing(start: Start) -> None:
    before = set(os.listdir("/dev/shm"))
    workers = {name: start("worker_process", name) for name in ("a", "b")}
    exchange = exchange_over({name: first_line(process) for name, process in workers.items()})
    expected_TD = run(exchange, GIVEN)
    assert all(n_rings(process.pid) == 2 for process in workers.values()), "rows do not go through shared memory"
    handles = [exchange.dispatch(1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK) for _ in range(3)]
    workers["a"].kill()
    began = time.monotonic()
    for handle in handles:
        assert torch.equal(exchange.combine(handle), expected_TD)
    assert time.monotonic() - began < 19, "noticed by the deadline of a reply only"
    assert set(os.listdir("/dev/shm")) == before


def test_a_router_that_is_killed_leaves_nothing_with_its_workers(start: Start) -> None:
    before = set(os.listdir("/dev/shm"))
    worker = start("worker_process", "a")
    address = first_line(worker)
    for _ in range(2):
        router = start("router_process", f"a={address}")
        assert first_line(router) == "asked"
        assert n_rings(worker.pid) == 2
        router.kill()
        deadline = time.monotonic() + 60
        while n_rings(worker.pid):
            assert time.monotonic() < deadline, "the rings of a router that is gone stay"
            time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) == before
    addresses = {"a": address, "b": address}
    exchange = Exchange(
        Placement(1, ("a",), tuple(((0,),) * 6 for _ in range(2))),
        {"a": addresses["a"]},
        GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, ways=(ShmWay(),), silent_after_s=PATIENT_S),
        reply_timeout_s=20,
        rejoin_timeout_s=20,
    )
    expected_TD = MODEL.reference(1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK)
    torch.testing.assert_close(run(exchange, GIVEN).double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moment", ["before the worker has answered", "after it"])
def test_streams_that_are_cancelled_at_any_moment_leave_no_lane(moment: str) -> None:
    """gRPC cancels what serves a stream, and may again while that cleans up: what waits there is never done."""
    workers = ShmWorkers(MODEL)
    workers.start("a", [(0, 0)])
    server, before = workers.servers["a"], n_rings(os.getpid())
    gc.disable()  # rings go with their stream, not when garbage happens to be collected
    try:
        for _ in range(100):
            offered = ShmWay().offer("a")
            asked = (*Hello("a", "cancels", MODEL_NAME).metadata, (key("shm", "offer"), offered.text))
            with grpc.insecure_channel(server.address) as channel:
                over = threading.Event()
                requests = iter(over.wait, True)
                call = channel.stream_stream(EXCHANGE_METHOD)(requests, metadata=CREDENTIALS.metadata + asked)
                if moment == "after it":
                    call.initial_metadata()
                call.cancel()
                over.set()
        del offered
        wait_until(lambda: server.numbers()["streams"] == server.numbers()["streams_over_shared_memory"] == 0)
        wait_until(lambda: all(thread.name != "shm-cancels" for thread in threading.enumerate()))
        wait_until(lambda: n_rings(os.getpid()) == before)
    finally:
        gc.enable()
        workers.close()


@pytest.mark.parametrize("side", ["router", "worker"])
def test_where_memory_cannot_be_shared_rows_go_over_grpc_and_that_is_said_once(
    side: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workers = ShmWorkers(MODEL)
    if side == "router":

        def full(*_arguments: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "memfd_create", full)
    else:

        def elsewhere(path: str) -> str:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "readlink", elsewhere)
    start_all(workers, TWICE)
    exchange = Exchange(TWICE, workers.addresses, workers.transport(), reply_timeout_s=20, rejoin_timeout_s=20)
    expected_TD = MODEL.reference(1, GIVEN.x_TD, GIVEN.ids_TK, GIVEN.weights_TK)
    for _ in range(2):
        torch.testing.assert_close(run(exchange, GIVEN).double(), expected_TD, atol=1e-5, rtol=1e-5)
    said = [record.getMessage() for record in caplog.records if "gRPC, not" in record.getMessage()]
    assert len(said) == (1 if side == "router" else 2), "once in a process, or for each worker that declines"
    assert ("No space left" if side == "router" else "Permission denied") in said[0]
    workers.close()


def test_a_lane_declines_a_ring_that_is_not_there() -> None:
    with pytest.raises(Declined, match="cannot be opened"):
        ShmAcceptor(Batcher(MODEL.shard([]))).accept("1 999 00", "router", print)


def test_a_server_that_stops_ends_every_lane_whatever_else_is_being_done() -> None:
    """Catches a lane that waits in line to be closed when the server's threads end, and answers for ever."""
    open_again, is_asked = threading.Event(), threading.Event()

    class Slow(ShmAcceptor):
        def accept(self, offer: str, router: str, end: Callable[[str], None]) -> Lane:
            if router == "router-2":
                is_asked.set()
                open_again.wait(60)
            return super().accept(offer, router, end)

    server = ExpertServer(
        MODEL.shard([(0, 0)]), "a", "127.0.0.1", model=MODEL_NAME, credentials=CREDENTIALS, ways=[Slow]
    )
    server.start()
    first, second = (
        GrpcTransport(f"router-{n}", MODEL_NAME, CREDENTIALS, ways=(ShmWay(),), silent_after_s=PATIENT_S)
        for n in (1, 2)
    )
    tag, one_P = Tag(1, 1, 1, 0, 0, 0), torch.zeros(1, dtype=torch.int32)
    first.connect("a", server.address)
    first.send("a", Rows(tag, torch.ones(1, 32), one_P, one_P))
    first.receive("a", tag, 20, torch.empty(1, 32))
    assert first.way("a") == "shm"
    second.connect("a", server.address)
    assert is_asked.wait(20)
    server.stop(0)
    deadline = time.monotonic() + 20
    while any(thread.name == "shm-router-1" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a lane goes on"
        time.sleep(0.02)
    open_again.set()
    for transport in (first, second):
        transport.close()
