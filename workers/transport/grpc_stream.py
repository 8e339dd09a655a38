"""One Exchange stream to one expert worker, driven by the thread that calls it.

gRPC's own client moves every message through other threads and copies it on the way; a decoding step does this once
per layer and worker. Here the caller waits in the socket itself, and replies are written where they belong.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from h2.events import ConnectionTerminated, Event, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

from workers import wire
from workers.errors import WireError
from workers.transport.grpc_messages import Messages
from workers.transport.grpc_options import EXCHANGE_METHOD, set_options, split_address
from workers.transport.http2 import ConnectionLost, Http2
from workers.wire import FRAME_BYTES, HEADER_BYTES, Frame, Header, Tag

_STREAM = 1  # a connection has no other
_TIMEVAL = struct.Struct("ll")


class StreamBroken(Exception):
    """The stream ended. The text says why."""


class Awaited(NamedTuple):
    """The reply that is awaited, and where its rows belong."""

    tag: Tag
    shape: tuple[int, ...]  # pairs, width
    dtype: torch.dtype
    rows: memoryview


class Stream:
    """A stream to `address`, `host:port`. One thread uses it; any thread may `shut` it."""

    def __init__(self, address: str, on_dropped: Callable[[], None]) -> None:
        """Returns before there is a connection: what is wrong shows when the stream is used.

        on_dropped: called for every reply that nobody awaited any more.
        """
        self.address = address
        self.broken: str | None = None
        self._on_dropped = on_dropped
        self._awaited: Awaited | None = None
        self._answer: tuple[Header, memoryview] | None = None  # that reply, and its payload
        self._payload = memoryview(b"")  # of the reply that is being received
        self._early: deque[tuple[Header, memoryview]] = deque()  # replies that came before they were awaited
        self._status = "without a status"
        self._timeout_s = 0.0
        self._is_connected = False
        host, port = split_address(address)
        try:
            family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            self._socket, self.broken = socket.socket(), f"{address}: {error}"
            return
        self._socket = socket.socket(family)
        set_options(self._socket)
        self._socket.setblocking(False)
        self._socket.connect_ex(place)
        self._socket.setblocking(True)  # from here on each call says whether it waits
        self._connection = Http2(self._socket, self._on_event, is_client=True)
        self._connection.sinks[_STREAM] = Messages(self)
        self._connection.h2.send_headers(_STREAM, _opening(address))
        try:
            self._connection.send_control()
        except ConnectionLost as lost:
            self._break(str(lost))

    def write(self, frames: Iterable[Frame], timeout_s: float) -> None:
        """Send a message, and take in meanwhile what comes: two peers that write never wait for each other.

        Waits while more than a frame has not left; afterwards it may be changed. Raises StreamBroken, also when
        waiting took longer than `timeout_s`.
        """
        self._check_open()
        connection = self._connection
        try:
            for frame in frames:
                connection.send_message(_STREAM, frame, sum(map(len, frame)))
                if not connection.is_flushed:
                    deadline = time.monotonic() + timeout_s
                    while connection.unsent > FRAME_BYTES:
                        self._poll(deadline)
            if not connection.is_flushed:
                connection.keep()
        except ConnectionLost as lost:
            raise self._break(str(lost)) from None

    def read(self, awaited: Awaited, timeout_s: float) -> tuple[Header, memoryview]:
        """Wait for a reply, and write its rows to their place; its header, and its payload (the text of an ERROR).

        Raises StreamBroken, also after `timeout_s`, and WireError for a reply that is not what was asked for.
        """
        self._awaited, self._answer = awaited, None
        early, self._early = self._early, deque()
        for header, payload in early:
            self._payload = payload
            self.end(header)
        if self._answer is None:
            self._check_open()
            deadline = time.monotonic() + timeout_s
            try:
                while self._answer is None:
                    self._wait(timeout_s, deadline)
            except ConnectionLost as lost:
                broken = self._break(str(lost))
                if self._answer is None:  # else it came just before
                    raise broken from None
        self._awaited = None
        return self._answer

    def shut(self) -> None:
        """End the stream from any thread; who waits gets StreamBroken."""
        self.broken = self.broken or "closed"
        with suppress(OSError):  # it is not connected
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the stream and free what it holds."""
        self.shut()
        self._socket.close()

    def whole(self, message: memoryview) -> bool:
        """See `Receiver`."""
        header = wire.parse_head(message)
        if header.payload_bytes != len(message) - HEADER_BYTES:
            return False
        self.begin(header)[:] = message[HEADER_BYTES:]
        self.end(header)
        return True

    def begin(self, header: Header) -> memoryview:
        """See `Receiver`."""
        awaited = self._awaited if self._answer is None else None
        if awaited is not None and header.tag == awaited.tag and header.kind != wire.ERROR:
            _check(header, awaited)
            self._payload = awaited.rows
        else:
            # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
            self._payload = np.empty(header.payload_bytes, np.uint8).data
        return self._payload

    def end(self, header: Header) -> None:
        """See `Receiver`."""
        awaited = self._awaited
        if awaited is None or self._answer is not None:
            self._early.append((header, self._payload))
        elif header.tag != awaited.tag:
            self._on_dropped()
        else:
            self._answer = header, self._payload
            if header.kind != wire.ERROR and self._payload is not awaited.rows:  # it began before it was awaited
                _check(header, awaited)
                awaited.rows[:] = self._payload

    def malformed(self, reason: str) -> None:
        """See `Receiver`."""
        raise WireError(reason)

    def _wait(self, timeout_s: float, deadline: float) -> None:
        """Until something came."""
        if not self._is_connected or not self._connection.is_flushed:
            self._poll(deadline)
            return
        if timeout_s != self._timeout_s:  # the kernel keeps the time: one system call less for each reply
            self._timeout_s = timeout_s
            microseconds = max(1000, int(timeout_s * 1e6))
            timeval = _TIMEVAL.pack(*divmod(microseconds, 1_000_000))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        if not self._connection.receive(wait=True) or (self._answer is None and time.monotonic() > deadline):
            raise ConnectionLost("no answer within the deadline")

    def _poll(self, deadline: float) -> None:
        """Until something came or could be sent."""
        connection, poll = self._connection, select.poll()
        wants_to_write = connection.wants_to_write or not self._is_connected
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if wants_to_write else 0))
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ConnectionLost("no answer within the deadline")
        if not self._is_connected:
            if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionLost(f"cannot connect: {os.strerror(error)}")
            self._is_connected = True
        connection.flush()
        connection.receive()

    def _check_open(self) -> None:
        if self.broken is not None:
            raise StreamBroken(self.broken)

    def _break(self, reason: str) -> StreamBroken:
        self.broken = self.broken or reason
        self._socket.close()
        return StreamBroken(self.broken)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            headers = dict(event.headers)
            if (http := headers.get(b":status", b"200")) != b"200":
                raise ConnectionLost(f"HTTP status {http.decode()}")
            if (status := headers.get(b"grpc-status")) is not None:
                self._status = unquote(headers.get(b"grpc-message", b"").decode()) or f"with status {status.decode()}"
        elif isinstance(event, StreamEnded):
            raise ConnectionLost(f"stream ended: {self._status}")
        elif isinstance(event, StreamReset):
            raise ConnectionLost(f"stream ended: reset with code {event.error_code!r}")
        elif isinstance(event, ConnectionTerminated):
            raise ConnectionLost(f"stream ended: the worker goes away with code {event.error_code!r}")


def _opening(address: str) -> list[tuple[str, str]]:
    """The headers of a call."""
    return [
        *((":method", "POST"), (":scheme", "http"), (":path", EXCHANGE_METHOD), (":authority", address)),
        *(("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "expertmesh")),
    ]


def _check(header: Header, awaited: Awaited) -> None:
    if header.kind != wire.REPLY or (header.n_pairs, header.width) != awaited.shape or header.dtype != awaited.dtype:
        found = f"{header.n_pairs} rows of {header.width} {header.dtype}"
        raise WireError(f"{found}, awaited: {awaited.shape} {awaited.dtype}")
