"""What only the gRPC transport can suffer: malformed bytes, killed and frozen processes; and the server's services."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.placement.placement import Placement, striped
from cluster.router.exchange.exchange import Exchange
from tests.contract.harness import MODEL_NAME, GrpcWorkers
from tests.contract.model import Model, batch
from tests.contract.test_results import exchange_over, run
from tests.credentials import CREDENTIALS, PATIENT_S
from workers import wire
from workers.errors import WorkerLost
from workers.pb import experts_pb2, experts_pb2_grpc
from workers.transport.base import Rows, Tag
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.handshake import EXCHANGE_METHOD, Hello
from workers.transport.grpc.server import ExpertServer

MODEL = Model()
TAG = Tag(1, 1, 1, 0, 0, 0)
ONE_P = torch.zeros(1, dtype=torch.int32)
GOOD = b"".join(next(wire.request_frames(TAG, torch.ones(1, 32), ONE_P, ONE_P)))
LONG = [b"".join(frame) for frame in wire.request_frames(TAG, torch.ones(20000, 32), ONE_P, ONE_P)]


def pairs(tokens: list[int], experts: list[int]) -> list[bytes]:
    token_P, expert_P = torch.tensor(tokens, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32)
    frames = wire.request_frames(TAG, torch.ones(2, 32), token_P, expert_P)
    return [b"".join(frame) for frame in frames]


REPLY = b"".join(next(wire.reply_frames(TAG, 1, torch.ones(1, 32), 0)))


def metadata(worker: str) -> tuple[tuple[str, str], ...]:
    """Of a call to `worker` as a router makes it."""
    return CREDENTIALS.metadata + Hello(worker, "router-0", MODEL_NAME).metadata


@pytest.fixture
def channel(workers: GrpcWorkers) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(workers.addresses["a"]) as channel:
        yield channel


def answers(channel: grpc.Channel, *frames: bytes) -> Iterator[bytes]:
    return channel.stream_stream(EXCHANGE_METHOD)(iter(frames), timeout=20, metadata=metadata("a"))


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([b""], id="empty"),
        pytest.param([b"GET / HTTP/1.1\r\n"], id="another protocol"),
        pytest.param([os.urandom(5000)], id="noise"),
        pytest.param([GOOD[:-1]], id="truncated"),
        pytest.param([GOOD + b"\0"], id="too long"),
        pytest.param([LONG[0]], id="ends within a message"),
        pytest.param([LONG[0], b"short", LONG[1]], id="a frame of another length"),
        pytest.param([GOOD[:-8] + b"\x09\0\0\0" + GOOD[-4:]], id="a row that is not there"),
        pytest.param([GOOD[:-4] + b"\xff\xff\xff\xff"], id="a negative expert"),
        pytest.param([GOOD, REPLY], id="a reply"),
        pytest.param(pairs([0, 0], [0, 0]), id="a pair twice"),
        pytest.param(pairs([1, 0], [3, 3]), id="tokens that fall within an expert"),
        pytest.param(pairs([0] * 65537, [0] * 65537), id="a pair 65,537 times"),
    ],
)
def test_malformed_bytes_end_their_stream_and_no_other(
    workers: GrpcWorkers, channel: grpc.Channel, frames: list[bytes]
) -> None:
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    out_PD = torch.empty(1, 32)
    rows = Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P)
    transport.send("a", rows)
    with pytest.raises(grpc.RpcError) as caught:
        list(answers(channel, *frames))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    for _ in range(2):
        transport.receive("a", TAG, 20, out_PD)
        assert torch.equal(out_PD, workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P))
        transport.send("a", rows)


@pytest.mark.parametrize(
    ("tag", "x_TD", "expert", "text"),
    [
        (TAG, torch.ones(1, 31), 0, "rows of 31"),
        (TAG, torch.ones(1, 32).half(), 0, "float16"),
        (TAG._replace(layer=2), torch.ones(1, 32), 0, "layer 2"),
        (TAG, torch.ones(1, 32), 6, "expert 6"),
        (TAG, torch.ones(1, 32), wire.MAX_EXPERTS - 1, "expert 65535"),
    ],
)
def test_rows_that_do_not_fit_the_shard_are_refused_and_the_stream_goes_on(
    workers: GrpcWorkers, tag: Tag, x_TD: torch.Tensor, expert: int, text: str
) -> None:
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    transport.send("a", Rows(tag, x_TD, ONE_P, ONE_P + expert))
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    with pytest.raises(WorkerLost, match=f"refused.*{text}"):
        transport.receive("a", tag, 20, torch.empty_like(x_TD))
    out_PD = torch.empty(1, 32)
    transport.receive("a", TAG, 20, out_PD)
    assert torch.equal(out_PD, workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P))


def test_what_computing_raises_is_said_to_the_request_and_the_stream_goes_on(workers: GrpcWorkers) -> None:
    shard = workers.shards["a"]
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    for name in ("answer", "forward"):  # the two ways to compute

        def broken(*_: object, name: str = name) -> None:
            raise RuntimeError(f"no {name}")

        setattr(shard, name, broken)
        transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        with pytest.raises(WorkerLost, match=f"RuntimeError: no {name}"):
            transport.receive("a", TAG, 20, torch.empty(1, 32))
        shard.answer = lambda message: None  # type: ignore[method-assign]
    del shard.answer, shard.forward
    out_PD = torch.empty(1, 32)
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    transport.receive("a", TAG, 20, out_PD)
    assert torch.equal(out_PD, shard.forward(0, torch.ones(1, 32), ONE_P, ONE_P))


def test_what_several_routers_wait_for_is_one_batch_by_layer(workers: GrpcWorkers) -> None:
    """Catches layers or routers that are mixed up, and an expert whose weights each router reads anew."""
    shard = workers.shards["a"]
    calls: list[tuple[int, int]] = []
    forward = shard.forward

    def counting(layer: int, x_TD: torch.Tensor, token_P: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append((layer, len(token_P)))
        return forward(layer, x_TD, token_P, *rest)

    shard.forward = counting  # type: ignore[method-assign]
    shard.answer = lambda message: None  # type: ignore[method-assign]
    asked = [(0, 0), (1, 1), (0, 2), (1, 3), (0, 7)]  # layer and expert of each router
    routers = [workers.transport() for _ in asked]
    shard.open.clear()
    for router, (layer, expert) in zip(routers, asked, strict=True):
        router.connect("a", workers.addresses["a"])
        router.send("a", Rows(TAG._replace(layer=layer), torch.ones(1, 32), ONE_P, ONE_P + expert))
        while not calls:  # the first one is being computed while the others arrive
            time.sleep(0.01)
    time.sleep(0.5)
    shard.open.set()
    for router, (layer, expert) in zip(routers, asked, strict=True):
        tag, out_PD = TAG._replace(layer=layer), torch.empty(1, 32)
        if expert == 7:
            with pytest.raises(WorkerLost, match="expert 7"):
                router.receive("a", tag, 20, out_PD)
        else:
            router.receive("a", tag, 20, out_PD)
            assert torch.equal(out_PD, forward(layer, torch.ones(1, 32), ONE_P, ONE_P + expert))
    assert calls == [(0, 1), (1, 2), (0, 1)]


def test_a_refusal_does_not_overtake_the_rows_before_it(workers: GrpcWorkers) -> None:
    transport, other = workers.transport(), workers.transport()
    for router in (transport, other):  # with one router alone each request is a batch
        router.connect("a", workers.addresses["a"])
    time.sleep(0.2)
    workers.shards["a"].open.clear()
    experts = (0, 1, 7)  # the first holds the worker up, so that the other two are one batch
    for part, expert in enumerate(experts):
        transport.send("a", Rows(TAG._replace(part=part), torch.ones(1, 32), ONE_P, ONE_P + expert))
        time.sleep(0.2)
    workers.shards["a"].open.set()
    for part in (0, 1):
        out_PD = torch.empty(1, 32)
        transport.receive("a", TAG._replace(part=part), 5, out_PD)
        assert torch.equal(out_PD, workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P + part))
    with pytest.raises(WorkerLost, match="expert 7"):
        transport.receive("a", TAG._replace(part=2), 5, torch.empty(1, 32))
    assert transport.dropped_replies == 0


def test_a_worker_that_answers_nonsense_is_lost() -> None:
    class Liar:
        def exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            context.send_initial_metadata(Hello("liar", "", MODEL_NAME).metadata)
            for frame in frames:
                yield b"".join(next(wire.reply_frames(wire.parse_head(frame).tag, 1, torch.ones(1, 3), 0)))

    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    service, method = EXCHANGE_METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(Liar().exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, silent_after_s=PATIENT_S)
    transport.connect("liar", address)
    transport.send("liar", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    with pytest.raises(WorkerLost, match="malformed reply"):
        transport.receive("liar", TAG, 20, torch.empty(1, 32))
    transport.close()
    server.stop(0).wait()


def test_two_peers_that_write_at_the_same_time_do_not_wait_for_each_other(workers: GrpcWorkers) -> None:
    """Requests and replies of many frames in flight at once are more than gRPC's windows hold."""
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    pairs_P = torch.arange(60000, dtype=torch.int32)
    x_TD = (pairs_P % 7)[:, None].expand(60000, 32).float()
    expected_PD = workers.shard("a").forward(0, x_TD, pairs_P, torch.zeros_like(pairs_P))
    for step in range(6):
        transport.send("a", Rows(TAG._replace(step=step), x_TD, pairs_P, torch.zeros_like(pairs_P)))
    out_PD = torch.empty(60000, 32)
    for step in range(6):
        transport.receive("a", TAG._replace(step=step), 20, out_PD.fill_(step))
        assert torch.equal(out_PD, expected_PD)


def test_describe_and_health(workers: GrpcWorkers, channel: grpc.Channel) -> None:
    run(exchange_over(workers, striped(2, 6, ("a",))), batch(MODEL, 5))
    state = experts_pb2_grpc.ExpertsStub(channel).Describe(experts_pb2.DescribeRequest(), metadata=CREDENTIALS.metadata)
    assert (state.worker, state.pid, state.streams, state.rows) == ("a", os.getpid(), 1, 10)
    assert [(slot.layer, slot.expert) for slot in state.slots] == [(layer, e) for layer in range(2) for e in range(6)]
    assert sum(slot.rows for slot in state.slots if slot.layer == 1) == 10
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_a_worker_that_stops_answers_what_has_arrived(workers: GrpcWorkers, channel: grpc.Channel) -> None:
    gate, server = workers.shards["a"].open, workers.servers["a"]
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    server.drain()
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    gate.clear()
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    time.sleep(0.15)  # not long: a closed gate holds up the loop that answers whether the process lives
    stopping = threading.Thread(target=server.stop, args=(20,))
    stopping.start()
    time.sleep(0.15)
    gate.set()
    out_PD = torch.empty(1, 32)
    transport.receive("a", TAG, 20, out_PD)
    assert torch.equal(out_PD, workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P))
    stopping.join()
    with pytest.raises(WorkerLost):
        transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        transport.receive("a", TAG, 20, torch.empty(1, 32))


def test_a_port_that_is_taken_is_an_error_that_names_it(workers: GrpcWorkers) -> None:
    host, port = workers.addresses["a"].split(":")
    with pytest.raises(OSError, match=f"{host}:{port}"):
        ExpertServer(workers.shard("a"), "b", host, int(port), model=MODEL_NAME, credentials=CREDENTIALS)


def start_process(worker: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "tests.contract.worker_process", worker]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_processes_that_are_killed_or_frozen_change_no_bit() -> None:
    """kill -9 with and without a replica, SIGSTOP with one; the survivors of each answer the same step."""
    both = Placement(1, ("a", "b"), tuple(tuple((e % 2, (e + 1) % 2) for e in range(6)) for _ in range(2)))
    given = batch(MODEL, 9)
    processes = dict(zip(both.workers, map(start_process, both.workers), strict=True))
    transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, silent_after_s=PATIENT_S)
    try:
        addresses = {worker: address for worker, (_, address) in processes.items()}
        exchange = Exchange(both, addresses, transport, reply_timeout_s=1, rejoin_timeout_s=60)
        before = run(exchange, given)

        os.kill(processes["b"][0].pid, signal.SIGSTOP)
        assert torch.equal(run(exchange, given), before)
        os.kill(processes["b"][0].pid, signal.SIGCONT)

        handle = exchange.dispatch(1, given.x_TD, given.ids_TK, given.weights_TK)
        os.kill(processes["a"][0].pid, signal.SIGKILL)
        assert torch.equal(exchange.combine(handle), before)

        os.kill(processes["b"][0].pid, signal.SIGKILL)
        restarted: list[tuple[subprocess.Popen[str], str]] = []

        def restart() -> None:
            restarted.append(start_process("a"))
            exchange.publish(both, {"a": restarted[0][1]})

        thread = threading.Thread(target=restart)
        thread.start()
        assert torch.equal(run(exchange, given), before)
        thread.join()
        processes["again"] = restarted[0]
    finally:
        transport.close()
        for process, _ in processes.values():
            process.kill()
            process.wait()
