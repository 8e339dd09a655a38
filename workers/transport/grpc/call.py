"""A client's connection to a gRPC server, and its calls, as the one thread of the server sees them."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote

from grpc import StatusCode
from h2.events import ConnectionTerminated, Event, RequestReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from workers.transport.grpc.http2 import Http2, Sink
from workers.transport.grpc.http2_outbox import ConnectionLost
from workers.wire import Frame

_IN_HAND = 4  # requests that wait; the client is heard again once there are fewer
_FULL_BYTES = 4 << 20  # that the socket holds up; the client is heard again once there are fewer


class Handler:
    """What answers one call. The serving thread alone calls it."""

    sink: Sink  # for the bytes of the call

    def half_closed(self) -> None:
        """There will be no more bytes; `Call.finish` is still owed."""

    def ended(self) -> None:
        """The client is gone, or the status was sent."""


class Call:
    """One call of a client. Owned by the serving thread."""

    def __init__(self, connection: Connection, stream: int, method: str) -> None:
        self.method = method
        self.is_open = True
        self.is_half_closed = False
        self.handler = Handler()
        self._connection = connection
        self._http2 = connection.http2
        self._stream = stream

    @property
    def peer(self) -> str:
        """Who called, for people."""
        return self._connection.peer

    @property
    def is_flushed(self) -> bool:
        """Whether everything that was sent has left."""
        return self._http2.is_flushed

    @property
    def held_bytes(self) -> int:
        """Bytes that were sent and that the client has not made room for."""
        return self._http2.held(self._stream)

    def begin(self, handler: Handler) -> None:
        """From now on `handler` hears of this call."""
        self.handler = handler
        self._http2.sinks[self._stream] = handler.sink
        self._http2.h2.send_headers(self._stream, [(":status", "200"), ("content-type", "application/grpc")])
        self._http2.send_control()

    def take_in_hand(self) -> None:
        """A request waits from now on; its message may lie where it was received. Too many stop the client."""
        self._http2.lent += 1

    def send(self, message: Frame) -> None:
        """Send a message. Never waits: what it lies in stays as it is until it has left."""
        if self.is_open:
            with suppress(ConnectionLost):  # the next event says so, too
                self._http2.send_message(self._stream, message, sum(map(len, message)))

    def answered(self) -> None:
        """A request does not wait any more. What was sent to answer it may lie in its message."""
        http2 = self._http2
        if not http2.is_flushed:
            http2.leave_inbox()
        http2.lent -= 1
        self._connection.settle()

    def finish(self, code: StatusCode = StatusCode.OK, details: str = "") -> None:
        """End the call when all that was sent has gone out; but an error waits for nothing."""
        if self.is_open:
            self.is_open = False
            if code is not StatusCode.OK:
                self._http2.drop(self._stream)
            with suppress(ConnectionLost):
                self._http2.after(self._stream, lambda: self._end(code, details))
                self._connection.settle()

    def _end(self, code: StatusCode, details: str) -> None:
        h2 = self._http2.h2
        trailers = [("grpc-status", str(code.value[0]))]
        if details:
            trailers.append(("grpc-message", quote(details, safe=" ")))
        with suppress(ProtocolError):  # the client has ended it in the same moment
            h2.send_headers(self._stream, trailers, end_stream=True)
            if not self.is_half_closed:
                h2.reset_stream(self._stream)
        self._connection.forget(self._stream)


class Connection:
    """A client's connection."""

    def __init__(self, sock: socket.socket, accept: Callable[[Call], None], poll: select.epoll) -> None:
        """Raises OSError when the client is gone."""
        self.peer = ":".join(map(str, sock.getpeername()[:2]))
        self.file = sock.fileno()
        self.http2 = Http2(sock, self._on_event, is_client=False)
        self._socket = sock
        self._accept = accept
        self._calls: dict[int, Call] = {}
        self._poll = poll
        self._interest = select.EPOLLIN
        poll.register(sock, self._interest)

    def handle(self, event: int) -> None:
        """Do what the socket is ready for. Raises ConnectionLost."""
        http2 = self.http2
        if event & select.EPOLLOUT:
            http2.flush()
        if event != select.EPOLLOUT:
            while http2.receive() and not http2.is_between and http2.lent < _IN_HAND:
                pass
        self.settle()

    def settle(self) -> None:
        """Wait for what there is to wait for; to be called when that may have changed."""
        http2 = self.http2
        is_full = http2.is_full
        is_held = http2.lent >= _IN_HAND or (is_full and http2.unsent > _FULL_BYTES)
        interest = (0 if is_held else select.EPOLLIN) | (select.EPOLLOUT if is_full else 0)
        if interest != self._interest and self._socket.fileno() >= 0:
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
        self._poll.unregister(self.file)
        self._socket.close()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            method = dict(event.headers).get(b":path", b"")
            self._calls[event.stream_id] = call = Call(self, event.stream_id, method.decode(errors="replace"))
            self._accept(call)
        elif isinstance(event, StreamEnded):
            self.http2.sinks.pop(event.stream_id, None)  # what comes now is against the rules: h2 shall have it
            if (known := self._calls.get(event.stream_id)) is not None:
                known.is_half_closed = True
                if known.is_open:
                    known.handler.half_closed()
        elif isinstance(event, StreamReset):
            self.forget(event.stream_id)
        elif isinstance(event, ConnectionTerminated):
            raise ConnectionLost("the client goes away")
