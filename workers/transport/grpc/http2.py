"""One HTTP/2 connection over a socket: h2 speaks the protocol, but the bytes of gRPC messages go past it.

h2 copies everything it receives several times and in small pieces. So the DATA frames of a stream that has a `Sink`
are read here, straight from the socket to where they are wanted; headers, settings, windows, pings and the ends of
streams are h2's.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import numpy as np
from h2.events import Event, RemoteSettingsChanged, WindowUpdated
from h2.exceptions import ProtocolError
from hyperframe.frame import DataFrame, WindowUpdateFrame

from workers.transport.grpc.http2_beginning import connection
from workers.transport.grpc.http2_outbox import FRAME_HEAD, MESSAGE_HEAD, MESSAGE_PREFIX, ConnectionLost, Outbox
from workers.wire import HEADER_BYTES, Buffer

_PREFACE_BYTES = 24  # that a client begins with
_REOPEN_BYTES = 1 << 30  # received since the windows were opened
_INBOX_BYTES = 1 << 18
_DIRECT_BYTES = 1 << 14  # so many that are missing are worth a system call that writes them to their place
_HEAD_BYTES, _MESSAGE_HEAD_BYTES = FRAME_HEAD.size, MESSAGE_HEAD.size
_DATA, _END_STREAM, _PADDED = 0, 1, 8
_ALIGNMENT = 64


class Sink(Protocol):
    """Takes the payload of a stream's DATA frames."""

    received: int  # bytes since the window was opened; counted by the connection

    @property
    def missing(self) -> int:
        """Bytes of payload that are still to come of what has begun."""

    def whole(self, message: memoryview) -> bool:
        """A whole gRPC message, which may be left in the inbox (`Http2.lent`). False: let `take` have it."""

    def take(self, data: memoryview) -> None:
        """Bytes that came; they are there only during the call."""

    def place(self) -> memoryview:
        """Where the bytes that come next are to be written; empty: they are for `take`."""

    def placed(self, n: int) -> None:
        """So many were written there."""


class Http2(Outbox):
    """A connection. One thread uses it; nothing here waits unless asked to.

    `sinks`: by stream, for those whose DATA does not go through h2. `on_event` hears of h2's other events.
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[Event], None], is_client: bool) -> None:
        self.sinks: dict[int, Sink] = {}
        self.h2 = connection(is_client)
        super().__init__(sock, self.h2)
        self.lent = 0  # messages in the inbox that are still needed: what comes next goes elsewhere
        self._receive_into = sock.recv_into
        self._on_event = on_event
        self._inbox = _new_inbox()
        self._begin = self._end = 0  # of what was received and not looked at
        self._next: memoryview | None = self._inbox  # where to receive; None: there is no room
        self.is_between = is_client  # whether the next bytes begin a frame, which may be a whole message
        self._preface_left = 0 if is_client else _PREFACE_BYTES
        self._stream = self._flags = self._left = self._padding = 0  # of the DATA frame that is being received
        self._direct: Sink | None = None  # whose place `_next` is
        self._received = 0  # bytes of DATA since the window was opened

    def receive(self, wait: bool = False) -> bool:
        """Take in what has come; waits, as long as the socket says, for something to come if asked to.

        Whether there was something. Raises ConnectionLost when there will be nothing more.
        """
        target = self._next
        if target is None or (self.lent and self._direct is None):
            target = self._make_room(anew=self.lent > 0)
        try:
            n = self._receive_into(target, 0, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        if not n:
            raise ConnectionLost("closed by the peer")
        if self._direct is not None:
            self._received_directly(n)
            return True
        if self.is_between:  # nearly always it is one message
            length_type, flags, stream, is_compressed, n_bytes = MESSAGE_HEAD.unpack_from(self._inbox)
            length = n_bytes + MESSAGE_PREFIX.size
            if n == length + _HEAD_BYTES and length_type == length << 8 and not (flags or is_compressed):
                sink = self.sinks.get(stream)
                if sink is not None and sink.whole(target[_MESSAGE_HEAD_BYTES:n]):
                    self._count(sink, length)
                    return True
        self._end += n
        self._parse()
        return True

    def leave_inbox(self) -> None:
        """What lies in the inbox is needed longer than until the next `receive`."""
        if self._direct is not None:
            self._inbox = _new_inbox()
        else:
            self._make_room(anew=True)

    def _make_room(self, anew: bool) -> memoryview:
        """Where to receive: behind what was not looked at, which moves to the start of the inbox, or of a new one."""
        begin, end = self._begin, self._end
        rest = bytes(self._inbox[begin:end])
        if anew:
            self._inbox = _new_inbox()
        self._begin, self._end = 0, end - begin
        self._inbox[: self._end] = rest
        self._next = self._inbox[self._end :] if self._end else self._inbox
        return self._next

    def _parse(self) -> None:
        inbox, begin, end = self._inbox, self._begin, self._end
        while begin < end:
            if self._left:
                n = min(self._left, end - begin)
                self._left -= n
                begin += n
                if (sink := self.sinks.get(self._stream)) is not None:
                    sink.take(inbox[begin - n : begin])
                self._end_data()
            elif self._padding:
                n = min(self._padding, end - begin)
                self._padding -= n
                begin += n
                self._end_data()
            elif self._preface_left:
                n = min(self._preface_left, end - begin)
                self._preface_left -= n
                begin += n
                self._control(inbox[begin - n : begin])
            elif (n := self._head(inbox[begin:end])) > 0:
                begin += n
            else:
                break
        self._begin, self._end = begin, end
        self.is_between = begin == end and not (self._left or self._padding or self._preface_left)
        self._next_place()

    def _head(self, data: memoryview) -> int:
        """Begin a DATA frame or let h2 read another one; how many bytes that took, 0: the frame is not whole."""
        if len(data) < _HEAD_BYTES:
            return 0
        length_type: int
        length_type, flags, stream = FRAME_HEAD.unpack_from(data)
        length, kind = length_type >> 8, length_type & 0xFF
        sink = self.sinks.get(stream)
        if kind == _DATA and (sink is not None or length > _INBOX_BYTES - _HEAD_BYTES):
            n = _HEAD_BYTES
            self._left, self._padding = length, 0
            if flags & _PADDED and length:
                n += 1
                if len(data) < n:
                    self._left = 0
                    return 0
                self._padding = data[_HEAD_BYTES]
                self._left = length - 1 - self._padding
                if self._left < 0:
                    raise ConnectionLost("no HTTP/2: more padding than there are bytes")
            self._stream, self._flags = stream, flags
            self._count(sink, length)
            self._end_data()
            return n
        length += _HEAD_BYTES
        if length > _INBOX_BYTES:
            raise ConnectionLost(f"a frame of {length} bytes that is not DATA")
        if len(data) < length:
            return 0
        self._control(data[:length])
        return length

    def _received_directly(self, n: int) -> None:
        sink = self._direct
        assert sink is not None
        self._direct = None
        self._left -= n
        sink.placed(n)
        self._end_data()
        self.is_between = not (self._left or self._padding)
        self._next_place()

    def _next_place(self) -> None:
        """Where the next `receive` writes."""
        if self._begin < self._end:  # of a frame h2 shall read; there is room for all of it once this has moved
            self._next = None
            return
        self._begin = self._end = 0
        self._next = self._inbox
        sink = self.sinks.get(self._stream)
        if sink is None:
            return
        missing = sink.missing
        if self._left >= _DIRECT_BYTES and missing:
            if place := sink.place():
                self._direct, self._next = sink, place[: self._left]
        elif not self._left and missing >= _DIRECT_BYTES:
            self._next = self._inbox[:_MESSAGE_HEAD_BYTES]  # the heads alone, and then its bytes directly
            self.is_between = False

    def _end_data(self) -> None:
        """If a DATA frame has been read, tell h2 what it has to know."""
        if not (self._left or self._padding) and self._flags & _END_STREAM:
            self._flags = 0
            self._control(DataFrame(self._stream, flags=["END_STREAM"]).serialize())

    def _control(self, data: Buffer) -> None:
        """Let h2 read a frame. Raises ConnectionLost for one that makes no sense."""
        try:
            events = self.h2.receive_data(bytes(data))
        except ProtocolError as error:
            self.send_control()  # it says why, if the socket takes that
            raise ConnectionLost(f"no HTTP/2: {error}") from None
        self.send_control()
        for event in events:
            if isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
                self.let_go()
            else:
                self._on_event(event)

    def _count(self, sink: Sink | None, n_bytes: int) -> None:
        """Open the windows again long before they are used up. h2 does not know of these bytes."""
        self._received += n_bytes
        if sink is not None:
            sink.received += n_bytes
        if self._received >= _REOPEN_BYTES:
            self.write(WindowUpdateFrame(0, window_increment=self._received).serialize())
            self._received = 0
            for stream, each in self.sinks.items():
                if each.received:
                    self.write(WindowUpdateFrame(stream, window_increment=each.received).serialize())
                    each.received = 0


def _new_inbox() -> memoryview:
    """Aligned so that the tensors of a message that comes alone are."""
    memory = np.empty(_INBOX_BYTES + _ALIGNMENT, np.uint8)
    start = -(memory.__array_interface__["data"][0] + _MESSAGE_HEAD_BYTES + HEADER_BYTES) % _ALIGNMENT
    return memory[start : start + _INBOX_BYTES].data
