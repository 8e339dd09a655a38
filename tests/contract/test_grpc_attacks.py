"""A worker under attack: what strangers and bad members do costs another router no second, and the worker no memory.

Each attack runs against a worker process for a few seconds while a router of the cluster goes on asking.
"""

from __future__ import annotations

import resource
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.contract.grpc_attacker import (
    ATTACKS,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    SETTINGS,
    connect,
    frame,
    headers,
)
from tests.contract.harness import MODEL_NAME
from tests.contract.model import Model
from tests.credentials import CREDENTIALS, PATIENT_S
from workers.errors import WorkerLost
from workers.transport.base import Rows, Tag
from workers.transport.grpc.client import GrpcTransport

ONE_P = torch.zeros(1, dtype=torch.int32)
ATTACK_S = 3.0
MIB = 1 << 20
DESCRIPTORS = 160  # of the worker's process


class Worker:
    """A worker process, and a router that has a stream to it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.contract.worker_process", "a"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS)),
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.router = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, silent_after_s=PATIENT_S)
        self.router.connect("a", self.address)
        self.step = 0
        self.ask()  # what is made for the first one is not the attack's doing

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def ask(self) -> float:
        """Seconds that one answer took, asked again as the exchange does where the worker seemed silent."""
        began = time.perf_counter()
        while True:
            self.step += 1
            tag, out_PD = Tag(1, 1, self.step, 0, 0, 0), torch.empty(1, 32)
            try:
                self.router.send("a", Rows(tag, torch.ones(1, 32), ONE_P, ONE_P))
                self.router.receive("a", tag, 20, out_PD)
                break
            except WorkerLost as lost:
                assert time.perf_counter() - began < 60, lost
                time.sleep(0.05)
                self.router.connect("a", self.address)
        torch.testing.assert_close(out_PD, EXPECTED)  # alone or in a batch
        return time.perf_counter() - began


EXPECTED = Model().shard([(0, 0)]).forward(0, torch.ones(1, 32), ONE_P, ONE_P)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.router.close()
    worker.process.kill()
    worker.process.wait()


@pytest.mark.parametrize("attack", ATTACKS)
def test_another_router_is_answered_all_the_while(worker: Worker, attack: str) -> None:
    """Catches one thread that is kept busy for a peer, replies that pile up, and a server that ends."""
    before = worker.memory()
    command = [sys.executable, "-m", "tests.contract.grpc_attacker", attack, worker.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker, ExitStack() as stack:
        stack.callback(attacker.kill)  # also when the worker was lost: it never ends by itself
        assert attacker.stdout is not None
        attacker.stdout.readline()  # it has begun
        took, end = [worker.ask()], time.monotonic() + ATTACK_S
        while time.monotonic() < end:
            took.append(worker.ask())
        grown = worker.memory() - before
        attacker.kill()
        sent = int(attacker.stdout.read().split("\n")[-2])
    print(
        f"{attack}: {len(took)} answers, median {statistics.median(took) * 1e3:.1f} ms, "
        f"longest {max(took) * 1e3:.0f} ms; {sent / MIB:.1f} MiB taken, memory +{grown / MIB:.0f} MiB"
    )
    assert grown < 300 * MIB
    assert worker.process.poll() is None


def test_a_full_table_of_descriptors_is_a_closed_door_and_no_spinning(worker: Worker) -> None:
    process = psutil.Process(worker.process.pid)
    with ExitStack() as stack:
        for _ in range(2 * DESCRIPTORS):
            with suppress(OSError):
                stack.enter_context(closing(connect(worker.address)))
        for _ in range(20):
            worker.ask()
        for _ in range(5):  # on a busy machine the connections themselves take a while; spinning does not end
            process.cpu_percent()
            time.sleep(2)
            if (busy := process.cpu_percent()) < 50:
                break
        for _ in range(20):
            worker.ask()
    assert busy < 50, f"{busy} % of a core for nothing"
    deadline = time.monotonic() + 20
    other = GrpcTransport("router-2", MODEL_NAME, CREDENTIALS, silent_after_s=PATIENT_S)
    while True:
        other.connect("a", worker.address)
        try:
            tag = Tag(3, 1, 1, 0, 0, 0)
            other.send("a", Rows(tag, torch.ones(1, 32), ONE_P, ONE_P))
            other.receive("a", tag, 5, torch.empty(1, 32))
            break
        except Exception:
            assert time.monotonic() < deadline, "the door stayed closed"
            time.sleep(0.2)
    other.close()


def test_watches_that_nobody_reads_do_not_hold_up_the_health_service(worker: Worker) -> None:
    """The library writes to a watch while it holds what every change waits for. Comes last: the worker drains."""
    stranger = connect(worker.address)
    stranger.sendall(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 0)))
    for stream in range(1, 161, 2):
        stranger.sendall(frame(HEADERS, END_HEADERS, stream, headers("/grpc.health.v1.Health/Watch")))
        stranger.sendall(frame(DATA, END_STREAM, stream, b"\0\0\0\0\0"))
    time.sleep(0.5)
    worker.process.send_signal(signal.SIGUSR1)  # drain
    with grpc.insecure_channel(worker.address) as channel:
        health, deadline = health_pb2_grpc.HealthStub(channel), time.monotonic() + 15
        while (status := health.Check(health_pb2.HealthCheckRequest(), timeout=5).status) == 1:
            assert time.monotonic() < deadline, "still SERVING"
            time.sleep(0.1)
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    worker.ask()
    stranger.close()
