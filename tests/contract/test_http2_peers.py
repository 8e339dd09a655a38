"""Our ends of an Exchange stream with a peer that speaks HTTP/2 as it likes: frames cut, padded and mixed in every way.

Each test is a peer that is allowed to do what it does, or one that must not do harm.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, TrailersReceived
from h2.settings import SettingCodes

from tests.contract.harness import GrpcWorkers
from workers import wire
from workers.errors import WorkerLost
from workers.transport.base import Rows, Tag
from workers.transport.grpc import http2
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.options import EXCHANGE_METHOD, split_address
from workers.wire import HEADER_BYTES

TAG = Tag(1, 1, 1, 0, 0, 0)
ONE_P = torch.zeros(1, dtype=torch.int32)
WIDTH = 32
CALL = [
    *((":method", "POST"), (":scheme", "http"), (":path", EXCHANGE_METHOD), (":authority", "x")),
    *(("te", "trailers"), ("content-type", "application/grpc")),
]
_DATA, _END_STREAM, _PADDED = 0, 1, 8


def prefixed(frames: Iterator[wire.Frame]) -> bytes:
    """gRPC messages, one after the other."""
    return b"".join(struct.pack(">BI", 0, sum(map(len, frame))) + b"".join(frame) for frame in frames)


def request(rows: int, tag: Tag = TAG) -> bytes:
    pairs_P = torch.arange(rows, dtype=torch.int32)
    return prefixed(wire.request_frames(tag, torch.ones(rows, WIDTH), pairs_P, torch.zeros_like(pairs_P)))


def data(stream: int, content: bytes, flags: int = 0) -> bytes:
    """A DATA frame."""
    return struct.pack(">IBI", len(content) << 8 | _DATA, flags, stream) + content


class Peer:
    """A client of our server that writes frames itself and lets h2 read the answers."""

    def __init__(self, address: str, window: int = 1 << 30) -> None:
        self.socket = socket.create_connection(split_address(address), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.h2 = H2Connection()
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.h2.increment_flow_control_window(1 << 30)
        self.replies: dict[int, bytes] = {}
        self.statuses: dict[int, bytes] = {}

    def open(self, stream: int) -> None:
        self.h2.send_headers(stream, CALL)
        self.say()

    def say(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def hear(self) -> None:
        received = self.socket.recv(1 << 20)
        assert received, "the connection was closed"
        for event in self.h2.receive_data(received):
            if isinstance(event, DataReceived):
                assert event.data is not None
                self.replies[event.stream_id] = self.replies.get(event.stream_id, b"") + event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            elif isinstance(event, TrailersReceived):
                self.statuses[event.stream_id] = dict(event.headers)[b"grpc-status"]  # type: ignore[call-overload]
        self.say()

    def hear_all(self, stream: int, n_bytes: int) -> bytes:
        while len(self.replies.get(stream, b"")) < n_bytes:
            self.hear()
        return self.replies[stream]


def reply_bytes(rows: int) -> int:
    return len(prefixed(wire.reply_frames(TAG, rows, torch.ones(rows, WIDTH), 0)))


@pytest.mark.parametrize("pause", [False, True])
def test_one_data_frame_may_hold_several_messages(workers: GrpcWorkers, pause: bool) -> None:
    """Catches bytes behind the end of a message that are taken for its own, or lost; also where they come later."""
    peer = Peer(workers.addresses["a"])
    peer.open(1)
    first, rest = request(20000), request(3) + request(20000) + request(1)
    frame = data(1, first + rest)
    for cut in (9 + len(first), 9 + 5 + wire.FRAME_BYTES):  # between messages, and between two frames of one
        sent = peer.replies.get(1, b"")
        expected = len(sent) + 2 * reply_bytes(20000) + reply_bytes(3) + reply_bytes(1)
        peer.socket.sendall(frame[:cut])
        if pause:
            threading.Event().wait(0.2)
        peer.socket.sendall(frame[cut:])
        assert len(peer.hear_all(1, expected)) == expected


@pytest.mark.parametrize("rows", [1, 900, 20000])
@pytest.mark.parametrize("padding", [0, 1, 255])
def test_padding_is_not_content(workers: GrpcWorkers, rows: int, padding: int) -> None:
    """Catches padding that is read as rows, in frames of every size, and the end of a stream that is padded."""
    peer = Peer(workers.addresses["a"])
    peer.open(1)
    message = request(rows)
    half = len(message) // 2
    for part, flags in ((message[:half], _PADDED), (message[half:], _PADDED | _END_STREAM)):
        peer.socket.sendall(data(1, bytes((padding,)) + part + b"\xee" * padding, flags))
    assert len(peer.hear_all(1, reply_bytes(rows))) == reply_bytes(rows)
    while 1 not in peer.statuses:
        peer.hear()
    assert peer.statuses[1] == b"0"


def test_more_padding_than_there_are_bytes_ends_the_connection(workers: GrpcWorkers) -> None:
    peer = Peer(workers.addresses["a"])
    peer.open(1)
    peer.socket.sendall(data(1, b"\xff" + bytes(100), _PADDED))
    with pytest.raises((AssertionError, ConnectionError)):
        while True:
            peer.hear()


def test_pings_and_settings_between_the_frames_of_a_message(workers: GrpcWorkers) -> None:
    """Catches a connection that takes whatever comes within a message for a part of it."""
    peer = Peer(workers.addresses["a"])
    peer.open(1)
    message = request(60000)
    step = 700_001
    for at in range(0, len(message), step):
        peer.h2.ping(b"expected")
        peer.h2.update_settings({SettingCodes.MAX_HEADER_LIST_SIZE: 1000 + at})
        peer.say()
        peer.socket.sendall(data(1, b"") + data(1, message[at : at + step]))
    assert len(peer.hear_all(1, reply_bytes(60000))) == reply_bytes(60000)


def test_two_streams_of_one_connection_do_not_mix(workers: GrpcWorkers) -> None:
    """Catches a message continued with another stream's bytes, and memory lent to one and given to the other."""
    peer = Peer(workers.addresses["a"])
    for stream in (1, 3):
        peer.open(stream)
    long, short = request(20000, TAG._replace(step=1)), request(2, TAG._replace(step=3))
    for at in range(0, len(long), 100_000):
        peer.socket.sendall(data(1, long[at : at + 100_000]) + data(3, short))
    n_short = len(range(0, len(long), 100_000))
    replies = {
        stream: peer.hear_all(stream, n) for stream, n in ((1, reply_bytes(20000)), (3, n_short * reply_bytes(2)))
    }
    for stream, reply in replies.items():
        assert wire.parse_head(reply[5 : 5 + HEADER_BYTES]).tag == TAG._replace(step=stream)
    assert len(replies[3]) == n_short * reply_bytes(2)


def test_windows_that_shrink_to_nothing_hold_up_no_other_stream(workers: GrpcWorkers) -> None:
    """Catches a server that waits for the window of one stream, writes past it, or forgets what waits for it."""
    peer = Peer(workers.addresses["a"], window=0)
    for stream in (1, 3):
        peer.open(stream)
        peer.socket.sendall(data(stream, request(20000)))
    peer.h2.increment_flow_control_window(1 << 30, 3)
    peer.say()
    assert len(peer.hear_all(3, reply_bytes(20000))) == reply_bytes(20000)
    assert 1 not in peer.replies
    peer.h2.increment_flow_control_window(1 << 30, 1)
    peer.say()
    assert len(peer.hear_all(1, reply_bytes(20000))) == reply_bytes(20000)


def test_replies_that_nobody_makes_room_for_are_bounded(workers: GrpcWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a worker whose memory fills with what a client asks for and never takes."""
    monkeypatch.setattr("workers.transport.grpc.exchange._MOST_HELD_BYTES", 1 << 20)
    peer = Peer(workers.addresses["a"], window=0)
    peer.open(1)
    for _ in range(8):
        peer.socket.sendall(data(1, request(2000)))
    while 1 not in peer.statuses:
        peer.hear()
    assert peer.statuses[1] == b"8"  # RESOURCE_EXHAUSTED


def test_windows_are_opened_again(workers: GrpcWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a peer that is stopped after 2 GiB because nobody told it that there is room."""
    monkeypatch.setattr(http2, "_REOPEN_BYTES", 100_000)
    peer = Peer(workers.addresses["a"])
    peer.open(1)
    message = request(20000)
    while peer.h2.local_flow_control_window(1) < (1 << 31) - 1:
        peer.hear()
    for n in range(1, 4):
        peer.h2.outbound_flow_control_window -= len(message)
        peer.h2.streams[1].outbound_flow_control_window -= len(message)
        peer.socket.sendall(data(1, message[:1000]) + data(1, message[1000:]))
        peer.hear_all(1, n * reply_bytes(20000))
    assert peer.h2.local_flow_control_window(1) > (1 << 31) - len(message)


def reply(rows: int, part: int = 0) -> bytes:
    tag = TAG._replace(part=part)
    return prefixed(wire.reply_frames(tag, rows, torch.full((rows, WIDTH), float(rows)), 5))


@contextmanager
def served(answer: Callable[[socket.socket], None]) -> Iterator[GrpcTransport]:
    """A way to a worker `a` written by hand: once it has been asked, it says `answer`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(20)
            h2 = H2Connection(H2Configuration(client_side=False))
            h2.initiate_connection()
            h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1, SettingCodes.MAX_FRAME_SIZE: 1 << 21})
            h2.increment_flow_control_window((1 << 31) - 1 - h2.inbound_flow_control_window)
            while True:
                sock.sendall(h2.data_to_send())
                if any(isinstance(event, DataReceived) for event in h2.receive_data(sock.recv(1 << 20))):
                    break
            h2.send_headers(1, [(":status", "200"), ("content-type", "application/grpc")])
            sock.sendall(h2.data_to_send())
            with suppress(OSError):  # the router has had enough
                answer(sock)
                while sock.recv(1 << 20):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    transport = GrpcTransport()
    transport.connect("a", f"127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield transport
    finally:
        transport.disconnect("a")
        thread.join()
        listener.close()


def ask(transport: GrpcTransport, part: int = 0) -> None:
    transport.send("a", Rows(TAG._replace(part=part), torch.ones(1, WIDTH), ONE_P, ONE_P))


def receive(transport: GrpcTransport, rows: int, part: int = 0, timeout_s: float = 20) -> None:
    out_PD = torch.zeros(rows, WIDTH)
    assert transport.receive("a", TAG._replace(part=part), timeout_s, out_PD) == 5
    assert torch.equal(out_PD, torch.full_like(out_PD, rows))


@pytest.mark.parametrize("size", [1, 97, 20_000, 1 << 20])
def test_a_reply_may_come_in_pieces_of_any_size(size: int) -> None:
    """Catches a router that needs a frame, a header or the rows of a reply in one piece."""
    content = data(1, b"") + data(1, reply(30)) + data(1, reply(9000, 1)[:50]) + data(1, reply(9000, 1)[50:])

    def answer(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        slow = content if size > 97 else content[:9000]
        for at in range(0, len(slow), size):
            sock.sendall(slow[at : at + size])
        sock.sendall(content[len(slow) :])

    with served(answer) as transport:
        ask(transport)
        receive(transport, 30)
        receive(transport, 9000, 1)


def test_replies_that_come_together_or_before_they_are_awaited() -> None:
    """Catches a reply that is lost, or written over another one's rows, because it came with another."""
    content = b"".join(data(1, reply(rows, part)) for part, rows in enumerate((3, 9000, 5, 7)))
    with served(lambda sock: sock.sendall(content + data(1, reply(7, 3)) + data(1, reply(2, 4)))) as transport:
        ask(transport)
        for part, rows in ((0, 3), (1, 9000), (3, 7), (4, 2)):
            receive(transport, rows, part)
        assert transport.dropped_replies == 2  # the third, and the fourth when it came again


def test_a_reply_that_trickles_in_is_late() -> None:
    """Catches a deadline that begins anew with every byte."""

    def answer(sock: socket.socket) -> None:
        for byte in data(1, reply(9000)):
            sock.sendall(bytes((byte,)))
            threading.Event().wait(0.02)

    with served(answer) as transport:
        ask(transport)
        with pytest.raises(WorkerLost, match="deadline"):
            receive(transport, 9000, timeout_s=0.3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "no HTTP/2|not DATA", id="HTTP/1"),
        pytest.param(bytes(3) + b"\xff" + bytes(5), "deadline", id="a frame of no known kind"),
        pytest.param(data(1, b"\1" + reply(1)[1:]), "malformed reply: a compressed", id="compressed"),
        pytest.param(data(1, reply(1)[:5] + b"Y" + reply(1)[6:]), "malformed reply: magic", id="no message"),
        pytest.param(data(1, reply(2)), "malformed reply: 2 rows", id="rows nobody asked for"),
        pytest.param(data(1, b"\xff" + bytes(9), _PADDED), "padding", id="too much padding"),
        pytest.param(data(1, reply(1)[:40]), "deadline", id="half a reply"),
        pytest.param(struct.pack(">IBII", 4 << 8 | 3, 0, 1, 7), "reset with code", id="the stream is reset"),
        pytest.param(struct.pack(">IBIII", 8 << 8 | 7, 0, 0, 1, 0), "goes away", id="it goes away"),
    ],
)
def test_what_makes_no_sense_or_ends_the_stream_loses_the_worker_and_says_why(content: bytes, why: str) -> None:
    """Catches an exception that is not WorkerLost and would end the step loop, and a router that waits for nothing."""
    with served(lambda sock: sock.sendall(content)) as transport:
        ask(transport)
        with pytest.raises(WorkerLost, match=why):
            receive(transport, 1, timeout_s=0.5)
        with pytest.raises(WorkerLost):
            ask(transport)


def test_two_peers_that_write_16_mb_at_each_other_at_once() -> None:
    """Catches a router that writes without reading: neither would ever go on."""
    rows = (16 << 20) // (4 * WIDTH)
    content = data_frames(reply(rows))
    heard = threading.Event()

    def answer(sock: socket.socket) -> None:
        sock.sendall(content)  # before it reads on
        heard.set()

    with served(answer) as transport:
        pairs_P = torch.arange(rows, dtype=torch.int32)
        for step in range(2):
            transport.send("a", Rows(TAG._replace(step=2 + step), torch.ones(rows, WIDTH), pairs_P, 0 * pairs_P))
        receive(transport, rows)
        assert heard.is_set()


def data_frames(content: bytes) -> bytes:
    return b"".join(data(1, content[at : at + 1_000_000]) for at in range(0, len(content), 1_000_000))
