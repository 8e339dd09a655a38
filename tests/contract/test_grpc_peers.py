"""Our ends of an Exchange stream with gRPC's own library at the other.

Catches what only we would understand, what stalls at the windows and frame sizes of others, and a connection whose
damage spreads.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.connection import H2Connection

from tests.contract.harness import GrpcWorkers
from tests.contract.model import Model
from workers import wire
from workers.errors import WorkerLost
from workers.pb import experts_pb2, experts_pb2_grpc
from workers.transport.base import Rows, Tag
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.options import EXCHANGE_METHOD, split_address
from workers.wire import FRAME_BYTES, HEADER_BYTES

MODEL = Model()
TAG = Tag(1, 1, 1, 0, 0, 0)
ONE_P = torch.zeros(1, dtype=torch.int32)
LIMITS = [("grpc.max_receive_message_length", FRAME_BYTES), ("grpc.max_send_message_length", FRAME_BYTES)]
Frames = Iterator[bytes]


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
    expected_PD = workers.shard("a").forward(0, torch.ones(1, 32), ONE_P, ONE_P).expand(rows, 32)
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        call = channel.stream_stream(EXCHANGE_METHOD)
        replies = list(call(iter(request(rows)), timeout=20))
        assert torch.allclose(rows_of(replies), expected_PD, atol=1e-6)
        assert len(list(call(iter(request(1) * 9), timeout=20))) == 9, "more than a worker takes in hand"


def test_a_client_that_does_not_read_holds_up_nobody_else(workers: GrpcWorkers) -> None:
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        asked = threading.Event()

        def frames() -> Iterator[bytes]:
            for _ in range(12):
                yield from request(20000)
            asked.set()

        replies = channel.stream_stream(EXCHANGE_METHOD)(frames(), timeout=30)
        transport = workers.transport()
        transport.connect("a", workers.addresses["a"])
        for step in range(5):
            tag = TAG._replace(step=step)
            transport.send("a", Rows(tag, torch.ones(1, 32), ONE_P, ONE_P))
            transport.receive("a", tag, 20, torch.empty(1, 32))
        assert sum(map(len, replies)) == 12 * (HEADER_BYTES + 20000 * 32 * 4)
        assert asked.is_set()


def test_calls_that_end_badly_leave_the_others_of_their_connection_alone(workers: GrpcWorkers) -> None:
    with grpc.insecure_channel(workers.addresses["a"], options=LIMITS) as channel:
        state = experts_pb2_grpc.ExpertsStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        good = channel.stream_stream(EXCHANGE_METHOD)
        for content in (b"noise", request(20000)[0][:-1], bytes(FRAME_BYTES)):
            with pytest.raises(grpc.RpcError) as caught:
                list(good(iter([content, *request(20000)]), timeout=20))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert state.Describe(experts_pb2.DescribeRequest()).worker == "a"
            assert rows_of(list(good(iter(request(3)), timeout=20))).shape == (3, 32)
        for call, code in (
            (lambda: health.Check(health_pb2.HealthCheckRequest(service="nobody")), grpc.StatusCode.NOT_FOUND),
            (lambda: channel.unary_unary("/no/Such")(b"", timeout=20), grpc.StatusCode.UNIMPLEMENTED),
            (lambda: channel.unary_unary("/no/Such")(bytes(1 << 19), timeout=20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == code
        cancelled = good(iter(request(60000)), timeout=20)
        cancelled.cancel()
        assert state.Describe(experts_pb2.DescribeRequest()).worker == "a"
        deadline = time.monotonic() + 10
        while state.Describe(experts_pb2.DescribeRequest()).streams and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state.Describe(experts_pb2.DescribeRequest()).streams == 0, "a stream that ended is still held"


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
        assert experts_pb2_grpc.ExpertsStub(channel).Describe(experts_pb2.DescribeRequest()).worker == "a"


def test_bytes_may_come_one_by_one(workers: GrpcWorkers) -> None:
    """A frame's head, a prefix or a header that is cut anywhere."""
    h2 = H2Connection()
    h2.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":path", EXCHANGE_METHOD), (":authority", "x")]
    h2.send_headers(1, [*headers, ("te", "trailers"), ("content-type", "application/grpc")])
    frame = request(2)[0]
    prefixed = b"\0" + len(frame).to_bytes(4, "big") + frame
    h2.send_data(1, prefixed[:3])
    h2.send_data(1, prefixed[3:100], pad_length=7)
    h2.send_data(1, prefixed[100:] + prefixed, end_stream=True)
    replies = b""
    with socket.create_connection(split_address(workers.addresses["a"]), timeout=10) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in h2.data_to_send():
            peer.sendall(bytes((byte,)))
        while not replies.endswith(b"trailers"):
            for event in h2.receive_data(peer.recv(1 << 16)):
                replies += getattr(event, "data", None) or b""
                if type(event).__name__ == "TrailersReceived":
                    assert dict(event.headers)[b"grpc-status"] == b"0"  # type: ignore[attr-defined]
                    replies += b"trailers"
    n_bytes = HEADER_BYTES + 2 * 32 * 4
    assert len(replies) == 2 * (5 + n_bytes) + len(b"trailers")
    for reply in (replies[: 5 + n_bytes], replies[5 + n_bytes : -len(b"trailers")]):
        assert reply[:5] == b"\0" + n_bytes.to_bytes(4, "big")
        assert rows_of([reply[5:]]).shape == (2, 32)


@contextmanager
def grpc_server(exchange: Callable[[Frames, grpc.ServicerContext], Frames]) -> Iterator[GrpcTransport]:
    """A way to a worker `a`, which is gRPC's own server with its own limits."""
    server = grpc.server(ThreadPoolExecutor(2), options=LIMITS)
    service, method = EXCHANGE_METHOD.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    transport = GrpcTransport()
    transport.connect("a", address)
    try:
        yield transport
    finally:
        transport.close()
        server.stop(0).wait()


def doubling(frames: Frames, _context: grpc.ServicerContext) -> Frames:
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
            assert transport.receive("a", tag, 20, out_PD) == 7
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
    with subprocess.Popen([sys.executable, "-c", _SILENT, service], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        transport = GrpcTransport()
        try:
            transport.connect("a", f"127.0.0.1:{process.stdout.readline().strip()}")
            transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
            assert process.stdout.readline() == "asked\n"
            process.kill()
            with pytest.raises(WorkerLost, match=r"closed by the peer|reset by peer|Broken pipe"):
                transport.receive("a", TAG, 50, torch.empty(1, 32))
        finally:
            process.kill()
            transport.close()


def test_a_worker_that_nobody_is_at_is_lost_when_its_reply_is_due() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        transport = GrpcTransport()
        for where in (address, "no-such-host.invalid:1"):
            transport.connect("a", where)
            with pytest.raises(WorkerLost):
                transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
                transport.receive("a", TAG, 20, torch.empty(1, 32))
        nobody.listen(1)  # who is there, but says nothing
        transport.connect("a", address)
        transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
        with pytest.raises(WorkerLost, match="deadline"):
            transport.receive("a", TAG, 0.3, torch.empty(1, 32))
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
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    transport.receive("a", TAG, 20, torch.empty(1, 32))
    workers.close()


def test_a_worker_by_the_name_of_its_host(workers: GrpcWorkers) -> None:
    """A name may have addresses of both kinds, and the worker listen on one."""
    port = split_address(workers.addresses["a"])[1]
    transport = workers.transport()
    transport.connect("a", f"localhost:{port}")
    transport.send("a", Rows(TAG, torch.ones(1, 32), ONE_P, ONE_P))
    transport.receive("a", TAG, 20, torch.empty(1, 32))
