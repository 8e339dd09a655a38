"""Our ends of an Exchange stream with gRPC's own library at the other.

Catches what only we would understand, what stalls at the windows and frame sizes of others, and a connection whose
damage spreads.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.contract.harness import MODEL_NAME, GrpcWorkers
from tests.contract.model import Model
from tests.credentials import CREDENTIALS, PATIENT_S
from tests.waiting import wait_until
from workers import wire
from workers.errors import WorkerLost
from workers.pb import experts_pb2, experts_pb2_grpc
from workers.transport.base import Rows, Tag
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.handshake import EXCHANGE_METHOD, Hello
from workers.wire import FRAME_BYTES, HEADER_BYTES

MODEL = Model()
METADATA = CREDENTIALS.metadata + Hello("a", "router-0", MODEL_NAME).metadata
TAG = Tag(1, 1, 1, 0, 0, 0)
ONE_P = torch.zeros(1, dtype=torch.int32)
LIMITS = [("grpc.max_receive_message_length", FRAME_BYTES), ("grpc.max_send_message_length", FRAME_BYTES)]
Frames = Iterator[bytes]


def split_address(address: str) -> tuple[str, int]:
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def describe(channel: grpc.Channel) -> experts_pb2.DescribeReply:
    return experts_pb2_grpc.ExpertsStub(channel).Describe(experts_pb2.DescribeRequest(), metadata=METADATA)


def expected(workers: GrpcWorkers, rows: int) -> torch.Tensor:
    return workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P).expand(rows, 32)


def request(rows: int, tag: Tag = TAG) -> list[bytes]:
    pairs_P = torch.arange(rows, dtype=torch.int32)
    frames = wire.request_frames(tag, torch.ones(rows, 32), pairs_P, torch.zeros_like(pairs_P))
    return [b"".join(frame) for frame in frames]


def rows_of(frames: list[bytes]) -> torch.Tensor:
    message = b"".join(frames)
    header = wire.parse_head(message)
    assert (header.kind, header.tag) == (wire.REPLY, TAG)
    return torch.frombuffer(bytearray(message[HEADER_BYTES:]), dtype=torch.float32).view(header.n_pairs, 32)


@pytest.mark.parametrize("rows", [1, 33, 1000, 60000])
def test_grpcs_client_gets_its_rows_from_our_server(workers: GrpcWorkers, rows: int) -> None:
    """A message larger than the windows and frames that it grants us must not stall."""
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        call = channel.stream_stream(EXCHANGE_METHOD)
        replies = list(call(iter(request(rows)), timeout=20, metadata=METADATA))
        assert torch.allclose(rows_of(replies), expected(workers, rows), atol=1e-6)
        assert len(list(call(iter(request(1) * 9), timeout=20, metadata=METADATA))) == 9, (
            "more than a worker takes in hand"
        )


def test_a_client_that_does_not_read_holds_up_nobody_else(workers: GrpcWorkers) -> None:
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        asked = threading.Event()

        def frames() -> Iterator[bytes]:
            for _ in range(12):
                yield from request(20000)
            asked.set()

        replies = channel.stream_stream(EXCHANGE_METHOD)(frames(), timeout=30, metadata=METADATA)
        transport = workers.transport()
        transport.connect("a", workers.addresses["a"])
        for step in range(5):
            tag = TAG._replace(step=step)
            transport.send("a", Rows(tag, torch.ones(1, 32), ONE_P, ONE_P))
            out_PD = torch.empty(1, 32)
            transport.receive("a", tag, 20, out_PD)
            torch.testing.assert_close(out_PD, expected(workers, 1))  # maybe in one batch with the other's
        assert sum(map(len, replies)) == 12 * (HEADER_BYTES + 20000 * 32 * 4)
        assert asked.is_set()


def test_calls_that_end_badly_leave_the_others_of_their_connection_alone(workers: GrpcWorkers) -> None:
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        good = channel.stream_stream(EXCHANGE_METHOD)
        for content in (b"noise", request(20000)[0][:-1], bytes(FRAME_BYTES)):
            with pytest.raises(grpc.RpcError) as caught:
                list(good(iter([content, *request(20000)]), timeout=20, metadata=METADATA))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert describe(channel).worker == "a"
            assert rows_of(list(good(iter(request(3)), timeout=20, metadata=METADATA))).shape == (3, 32)
        no_method = {grpc.StatusCode.UNIMPLEMENTED}
        for call, codes in (
            (lambda: health.Check(health_pb2.HealthCheckRequest(service="nobody")), {grpc.StatusCode.NOT_FOUND}),
            (lambda: channel.unary_unary("/no/Such")(b"", timeout=20, metadata=METADATA), no_method),
            (  # refused for its size or its name, whichever is seen first
                lambda: channel.unary_unary("/no/Such")(bytes(1 << 19), timeout=20, metadata=METADATA),
                no_method | {grpc.StatusCode.RESOURCE_EXHAUSTED},
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() in codes
        cancelled = good(iter(request(60000)), timeout=20, metadata=METADATA)
        cancelled.cancel()
        assert describe(channel).worker == "a"
        wait_until(lambda: describe(channel).streams == 0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n", id="HTTP/1"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 9, id="a frame that is too large"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\5\0\0\0\0\0\0hello", id="DATA of no stream"),
    ],
)
def test_strangers_are_shown_the_door(workers: GrpcWorkers, content: bytes) -> None:
    with socket.create_connection(split_address(workers.addresses["a"]), timeout=10) as stranger:
        stranger.sendall(content)
        try:
            while stranger.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
    with grpc.insecure_channel(workers.addresses["a"]) as channel:
        assert describe(channel).worker == "a"


@contextmanager
def grpc_server(exchange: Callable[[Frames, grpc.ServicerContext], Frames]) -> Iterator[GrpcTransport]:
    """A way to a worker `a`, which is gRPC's own server with its own limits."""
    server = grpc.server(ThreadPoolExecutor(2), options=LIMITS)
    service, method = EXCHANGE_METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, greet_timeout_s=0.5, silent_after_s=PATIENT_S)
    transport.connect("a", address)
    try:
        yield transport
    finally:
        transport.close()
        server.stop(0).wait()


def doubling(frames: Frames, context: grpc.ServicerContext) -> Frames:
    context.send_initial_metadata(Hello("a", "", MODEL_NAME).metadata)
    for frame in frames:
        header, message = wire.parse_head(frame), frame
        while len(message) < HEADER_BYTES + header.payload_bytes:
            message += next(frames)
        x_TD = wire.request(header, memoryview(message)[HEADER_BYTES:]).x_TD
        for reply in wire.reply_frames(header.tag, header.n_tokens, 2 * x_TD, 7):
            yield b"".join(reply)


def test_our_client_gets_its_rows_from_grpcs_server() -> None:
    with grpc_server(doubling) as transport:
        for step, rows in enumerate((1, 33, 60000, 2, 130000)):
            tag, x_TD, pairs_P = TAG._replace(step=step), torch.randn(rows, 32), torch.arange(rows, dtype=torch.int32)
            out_PD = torch.empty_like(x_TD)
            transport.send("a", Rows(tag, x_TD, pairs_P, torch.zeros_like(pairs_P)))
            assert transport.receive("a", tag, 20, out_PD).compute_ns == 7
            assert torch.equal(out_PD, 2 * x_TD)


def test_rows_may_change_as_soon_as_they_are_sent() -> None:
    """What the socket has not taken yet is copied: a step writes its next rows to the same memory."""
    with grpc_server(doubling) as transport:
        x_TD, pairs_P = torch.empty(60000, 32), torch.arange(60000, dtype=torch.int32)
        for step in range(3):
            x_TD.fill_(step)
            transport.send("a", Rows(TAG._replace(step=step), x_TD, pairs_P, torch.zeros_like(pairs_P)))
        x_TD.fill_(-1)
        for step in range(3):
            out_PD = torch.empty_like(x_TD)
            transport.receive("a", TAG._replace(step=step), 20, out_PD)
            assert torch.equal(out_PD, torch.full_like(x_TD, 2 * step))


def test_a_status_of_grpcs_server_is_why_the_worker_is_lost() -> None:
    def refusing(frames: Frames, context: grpc.ServicerContext) -> Frames:
        context.send_initial_metadata(Hello("a", "", MODEL_NAME).metadata)
        next(frames)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room, größer")
        yield b""

    with grpc_server(refusing) as transport:
        transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        with pytest.raises(WorkerLost, match="no room, größer"):
            transport.receive("a", TAG, 20, torch.empty(1, 32))


_SILENT = """
import sys, time, grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
def exchange(frames, context):
    context.send_initial_metadata(tuple(zip(sys.argv[2::2], sys.argv[3::2])))
    next(frames)
    print("asked", flush=True)
    time.sleep(60)
    yield b""
method = {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(sys.argv[1], method),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
time.sleep(60)
"""


def test_a_server_of_grpcs_that_is_killed_is_a_lost_worker_at_once() -> None:
    """Catches a router that waits for the deadline though the connection is gone."""
    service = EXCHANGE_METHOD.strip("/").split("/")[0]
    words = [word for pair in Hello("a", "", MODEL_NAME).metadata for word in pair]
    with subprocess.Popen(
        [sys.executable, "-c", _SILENT, service, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, greet_timeout_s=0.5, silent_after_s=PATIENT_S)
        try:
            transport.connect("a", f"127.0.0.1:{process.stdout.readline().strip()}")
            transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
            assert process.stdout.readline() == "asked\n"
            process.kill()
            with pytest.raises(WorkerLost, match=r"(?i)socket closed|reset by peer|broken pipe"):
                transport.receive("a", TAG, 50, torch.empty(1, 32))
        finally:
            process.kill()
            transport.close()


def test_a_worker_that_nobody_is_at_is_lost_when_its_reply_is_due() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        transport = GrpcTransport("router-0", MODEL_NAME, CREDENTIALS, greet_timeout_s=0.5, silent_after_s=PATIENT_S)
        for where in (address, "no-such-host.invalid:1"):
            transport.connect("a", where)
            with pytest.raises(WorkerLost):
                transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
                transport.receive("a", TAG, 20, torch.empty(1, 32))
        nobody.listen(1)  # who is there, but says nothing
        transport.connect("a", address)
        with pytest.raises(WorkerLost, match="deadline"):
            transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        transport.close()


def test_a_worker_on_ipv6() -> None:
    workers = GrpcWorkers(MODEL, host="::1")
    try:
        workers.start("a", [(0, 0)])
    except OSError:
        pytest.skip("this machine has no IPv6")
    transport = workers.transport()
    transport.connect("a", workers.addresses["a"])
    assert workers.addresses["a"].startswith("[::1]:")
    out_PD = torch.empty(1, 32)
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    transport.receive("a", TAG, 20, out_PD)
    assert torch.equal(out_PD, expected(workers, 1))
    workers.close()


def test_a_worker_by_the_name_of_its_host(workers: GrpcWorkers) -> None:
    """A name may have addresses of both kinds, and the worker listen on one."""
    port = split_address(workers.addresses["a"])[1]
    transport = workers.transport()
    transport.connect("a", f"localhost:{port}")
    out_PD = torch.empty(1, 32)
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    transport.receive("a", TAG, 20, out_PD)
    assert torch.equal(out_PD, expected(workers, 1))
