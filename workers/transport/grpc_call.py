"""A client's connection to a gRPC server, and its calls, as the one thread of the server sees them."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote

from grpc import StatusCode
from h2.events import ConnectionTerminated, DataReceived, Event, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from workers.transport.http2 import ConnectionLost, Http2, Sink
from workers.wire import Frame

_FULL_BYTES = 4 << 20  # of replies that have not left: the client is not heard before it took some


class Handler:
    """What answers one call."""

    sink: Sink | None = None  # for the bytes of the call; None: they are for `received`

    def received(self, data: bytes) -> None:
        """Bytes of the call."""

    def half_closed(self) -> None:
        """There will be no more bytes; `Call.finish` is still owed."""

    def ended(self) -> None:
        """The client is gone, or the status was sent."""


class Call:
    """One call of a client."""

    def __init__(self, connection: Connection, stream: int, method: str) -> None:
        self.method = method
        self.is_open = True
        self.handler = Handler()
        self.is_half_closed = False
        self._connection = connection
        self._stream = stream
        self._has_begun = False

    @property
    def peer(self) -> str:
        """Who called, for people."""
        return self._connection.peer

    @property
    def is_flushed(self) -> bool:
        """Whether everything that was sent has left."""
        return self._connection.http2.is_flushed

    def begin(self, handler: Handler) -> None:
        """From now on `handler` hears of this call."""
        self.handler = handler
        if handler.sink is not None:
            self._connection.http2.sinks[self._stream] = handler.sink

    def send(self, message: Frame) -> None:
        """Send a message. Never waits: what it lies in stays as it is until it has left."""
        if self.is_open:
            with suppress(ConnectionLost):  # the next event says so, too
                self._begin()
                self._connection.http2.send_message(self._stream, message, sum(map(len, message)))
                self._connection.settle()

    def hold(self, is_held: bool) -> None:
        """Leave what the client sends where it is, or take it in again."""
        self._connection.is_held = is_held
        self._connection.settle()

    def finish(self, code: StatusCode = StatusCode.OK, details: str = "") -> None:
        """End the call when all that was sent has gone out; but an error waits for nothing."""
        if self.is_open:
            self.is_open = False
            http2 = self._connection.http2
            if code is not StatusCode.OK:
                http2.drop(self._stream)
            with suppress(ConnectionLost):
                http2.after(self._stream, lambda: self._end(code, details))
                self._connection.settle()

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [(":status", "200"), ("content-type", "application/grpc")]
            self._connection.http2.h2.send_headers(self._stream, headers)
            self._connection.http2.send_control()

    def _end(self, code: StatusCode, details: str) -> None:
        with suppress(ProtocolError):  # the client has ended it in the same moment
            self._begin()
            h2 = self._connection.http2.h2
            status = [("grpc-status", str(code.value[0])), ("grpc-message", quote(details, safe=" "))]
            h2.send_headers(self._stream, status, end_stream=True)
            if not self.is_half_closed:
                h2.reset_stream(self._stream)
        self._connection.forget(self._stream)


class Connection:
    """A client's connection."""

    def __init__(self, sock: socket.socket, accept: Callable[[Call], None], poll: select.epoll) -> None:
        self.peer = ":".join(map(str, sock.getpeername()[:2]))
        self.file = sock.fileno()
        self.http2 = Http2(sock, self._on_event, is_client=False)
        self.is_held = False  # whether what the client sends is left where it is
        self._socket = sock
        self._accept = accept
        self._calls: dict[int, Call] = {}
        self._poll = poll
        self._interest = select.EPOLLIN
        poll.register(sock, self._interest)

    def handle(self, event: int) -> None:
        """Do what the socket is ready for. Raises ConnectionLost."""
        if event & select.EPOLLOUT:
            self.http2.flush()
        if event & ~select.EPOLLOUT:
            self.http2.receive()
        self.settle()

    def settle(self) -> None:
        """Wait for what there is to wait for; to be called when that may have changed."""
        wants_to_write = self.http2.wants_to_write
        is_full = wants_to_write and self.http2.unsent > _FULL_BYTES
        interest = (0 if self.is_held or is_full else select.EPOLLIN) | (select.EPOLLOUT if wants_to_write else 0)
        if interest != self._interest:
            self._interest = interest
            self._poll.modify(self.file, interest)

    def forget(self, stream: int) -> None:
        """A call is over."""
        self.http2.sinks.pop(stream, None)
        self.http2.drop(stream)
        if (call := self._calls.pop(stream, None)) is not None:
            call.is_open = False
            call.handler.ended()

    def close(self) -> None:
        """End every call and the connection."""
        for stream in tuple(self._calls):
            self.forget(stream)
        with suppress(ConnectionLost, ProtocolError):
            self.http2.h2.close_connection()
            self.http2.send_control()
        self._poll.unregister(self.file)
        self._socket.close()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            method = dict(event.headers).get(b":path", b"").decode(errors="replace")
            self._calls[event.stream_id] = call = Call(self, event.stream_id, method)
            self._accept(call)
        elif isinstance(event, DataReceived):
            self.http2.h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            self.http2.send_control()
            if (known := self._calls.get(event.stream_id)) is not None and known.is_open:
                known.handler.received(event.data or b"")
        elif isinstance(event, StreamEnded):
            if (known := self._calls.get(event.stream_id)) is not None:
                known.is_half_closed = True
                if known.is_open:
                    known.handler.half_closed()
        elif isinstance(event, StreamReset):
            self.forget(event.stream_id)
        elif isinstance(event, ConnectionTerminated) and not self._calls:
            raise ConnectionLost("the client goes away")
