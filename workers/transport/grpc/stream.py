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
from workers.transport.grpc.http2 import Http2
from workers.transport.grpc.http2_outbox import ConnectionLost
from workers.transport.grpc.messages import Messages
from workers.transport.grpc.options import EXCHANGE_METHOD, connecting
from workers.wire import FRAME_BYTES, Frame, Header, Tag

_STREAM = 1  # a connection has no other
_TIMEVAL = struct.Struct("ll")
_LATE = "no answer within the deadline"


class StreamBroken(Exception):
    """The stream ended. The text says why."""


class Awaited(NamedTuple):
    """The reply that is awaited, and where its rows belong."""

    tag: Tag
    shape: tuple[int, ...]  # pairs, width
    dtype: torch.dtype
    rows: memoryview


class Answer(NamedTuple):
    """What came: nanoseconds the worker computed; or its words why it did not."""

    compute_ns: int
    refusal: str | None = None


class Stream:
    """A stream to `address`, `host:port`. One thread uses it; any thread may `shut` it. A `Receiver`."""

    def __init__(self, address: str, on_dropped: Callable[[], None]) -> None:
        """Returns before there is a connection: what is wrong shows when the stream is used.

        on_dropped: called for every reply that nobody awaited any more.
        """
        self.address = address
        self.broken: str | None = None
        self._on_dropped = on_dropped
        self._awaited: Awaited | None = None
        self._answer: Answer | None = None  # to that
        self._payload = memoryview(b"")  # of the reply that is being received
        self._early: deque[tuple[Header, memoryview]] = deque()  # replies that came before they were awaited
        self._status = "without a status"
        self._timeout_s = 0.0  # of the socket
        self._is_connected = False
        try:
            self._socket = connecting(address)
        except OSError as error:
            self._socket, self.broken = socket.socket(), f"cannot connect to {address}: {error}"
        self._connection = connection = Http2(self._socket, self._on_event, is_client=True)
        connection.sinks[_STREAM] = Messages(self)
        connection.h2.send_headers(_STREAM, _opening(address))

    def write(self, frames: Iterable[Frame], timeout_s: float) -> None:
        """Send a message, and take in meanwhile what comes: two peers that write never wait for each other.

        Waits while more than a frame has not left; afterwards it may be changed. Raises StreamBroken, also when
        waiting took longer than `timeout_s`, and WireError for what makes no sense.
        """
        if self.broken is not None:
            raise StreamBroken(self.broken)
        connection = self._connection
        try:
            if not self._is_connected:
                connection.send_control()
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

    def read(self, awaited: Awaited, timeout_s: float) -> Answer:
        """Wait for a reply, and write its rows to their place.

        Raises StreamBroken, also when nothing came for `timeout_s`, and WireError for a reply that does not fit.
        """
        self._awaited, self._answer = awaited, None
        if self._early:
            self._look_at_early()
        if self._answer is None:
            if self.broken is not None:
                raise StreamBroken(self.broken)
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
        """See `Receiver`: true for the awaited reply."""
        awaited = self._awaited
        if awaited is None or self._answer is not None:
            return False
        tag, shape, dtype, rows = awaited
        compute_ns = wire.reply_ns(message, len(message), tag, shape, dtype)
        if compute_ns is None:
            return False
        rows[:] = message[wire.HEADER_BYTES :]
        self._answer = Answer(compute_ns)
        return True

    def begin(self, header: Header) -> memoryview:
        """See `Receiver`."""
        awaited = self._awaited
        if awaited is not None and self._answer is None and header.tag == awaited.tag and header.kind != wire.ERROR:
            _check(header, awaited)
            self._payload = awaited.rows
        else:
            # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
            self._payload = np.empty(header.payload_bytes, np.uint8).data
        return self._payload

    def end(self, header: Header) -> None:
        """See `Receiver`."""
        if self._awaited is None or self._answer is not None:
            self._early.append((header, self._payload))
        else:
            self._look_at(header, self._payload, self._awaited)

    def malformed(self, reason: str) -> None:
        """See `Receiver`."""
        raise WireError(reason)

    def _look_at(self, header: Header, payload: memoryview, awaited: Awaited) -> None:
        if header.tag != awaited.tag:
            self._on_dropped()
        elif header.kind == wire.ERROR:
            self._answer = Answer(0, bytes(payload).decode(errors="replace"))
        else:
            if payload is not awaited.rows:  # it began before it was awaited
                _check(header, awaited)
                awaited.rows[:] = payload
            self._answer = Answer(header.compute_ns)

    def _look_at_early(self) -> None:
        assert self._awaited is not None
        while self._early and self._answer is None:
            self._look_at(*self._early.popleft(), self._awaited)

    def _wait(self, timeout_s: float, deadline: float) -> None:
        """Until something came."""
        connection = self._connection
        if not self._is_connected or not connection.is_flushed:
            self._poll(deadline)
            return
        if timeout_s != self._timeout_s:  # the kernel keeps the time: one system call less for each reply
            self._timeout_s = timeout_s
            seconds, microseconds = divmod(max(1000, int(timeout_s * 1e6)), 1_000_000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(seconds, microseconds))
        if not connection.receive(wait=True) or (self._answer is None and time.monotonic() > deadline):
            raise ConnectionLost(_LATE)

    def _poll(self, deadline: float) -> None:
        """Until something came or could be sent."""
        connection, poll = self._connection, select.poll()
        wants_to_write = connection.is_full or not self._is_connected
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if wants_to_write else 0))
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ConnectionLost(_LATE)
        if not self._is_connected:
            if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionLost(f"cannot connect to {self.address}: {os.strerror(error)}")
            self._is_connected = True
        connection.flush()
        connection.receive()

    def _break(self, reason: str) -> StreamBroken:
        self.broken = self.broken or reason
        self._socket.close()
        return StreamBroken(self.broken)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            headers = {bytes(name): bytes(value).decode(errors="replace") for name, value in event.headers}
            if headers.get(b":status", "200") != "200":
                raise ConnectionLost(f"HTTP status {headers[b':status']}")
            if b"grpc-status" in headers:
                text = unquote(headers.get(b"grpc-message", ""))
                self._status = f"with status {headers[b'grpc-status']}" + (text and f": {text}")
        elif isinstance(event, StreamEnded):
            raise ConnectionLost(f"stream ended {self._status}")
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
        raise WireError(f"{found}, awaited: {tuple(awaited.shape)} {awaited.dtype}")
