"""What leaves by an HTTP/2 connection: gRPC messages, written straight from where they lie, and what h2 has to say.

h2 would copy a message several times. It keeps the windows of the peer, from which the bytes written here are taken.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from h2.connection import H2Connection

from workers.wire import Buffer

MESSAGE_HEAD = struct.Struct(">IBIBI")  # length << 8 and type, flags, stream; then what begins a gRPC message:
MESSAGE_PREFIX = struct.Struct(">BI")  # whether it is compressed, and its length
FRAME_HEAD = struct.Struct(">IBI")
_DATA = 0
_MOST_PARTS = 512  # of one system call; Linux takes 1024


class ConnectionLost(Exception):
    """There will be nothing more. The text says why."""


class Outbox:
    """Sends by `sock` and never waits: what does not leave at once is kept until `flush` or a window lets it go."""

    def __init__(self, sock: socket.socket, h2: H2Connection) -> None:
        self._send = sock.sendmsg
        self._h2 = h2
        self._out: deque[Buffer] = deque()  # what the socket did not take
        self._held: dict[int, deque[Buffer | Callable[[], None]]] = {}  # by stream: what its window did not let go
        self._is_letting_go = False

    @property
    def is_flushed(self) -> bool:
        """Whether everything has left."""
        return not self._out and not self._held

    @property
    def is_full(self) -> bool:
        """Whether the socket holds up anything."""
        return bool(self._out)

    @property
    def unsent(self) -> int:
        """Bytes that have not left."""
        return sum(len(part) for part in self._out) + sum(map(self.held, self._held))

    def held(self, stream: int) -> int:
        """Bytes that the windows of the peer hold up."""
        return sum(len(part) for part in self._held.get(stream, ()) if not callable(part))

    def send_message(self, stream: int, parts: Sequence[Buffer], n_bytes: int) -> None:
        """A gRPC message of `parts`, `n_bytes` together; they must stay as they are until it is flushed.

        Raises ConnectionLost.
        """
        h2, length = self._h2, n_bytes + MESSAGE_PREFIX.size
        of_stream = h2.streams[stream]
        if (
            length <= of_stream.outbound_flow_control_window
            and length <= h2.outbound_flow_control_window
            and length <= h2.max_outbound_frame_size
            and not self._held
        ):
            of_stream.outbound_flow_control_window -= length
            h2.outbound_flow_control_window -= length
            head = MESSAGE_HEAD.pack(length << 8 | _DATA, 0, stream, 0, n_bytes)
            self._write((head, *parts), length + FRAME_HEAD.size)
        else:
            self._held.setdefault(stream, deque()).extend((MESSAGE_PREFIX.pack(0, n_bytes), *parts))
            self.let_go()

    def after(self, stream: int, action: Callable[[], None]) -> None:
        """Do `action`, which makes h2 say something, once all messages of the stream have been written."""
        if stream in self._held:
            self._held[stream].append(action)
        else:
            action()
            self.send_control()

    def drop(self, stream: int) -> None:
        """What waits for the window of a stream is not to be sent any more."""
        self._held.pop(stream, None)

    def send_control(self) -> None:
        """Send what h2 has to say. Raises ConnectionLost."""
        if data := self._h2.data_to_send():
            self._write((data,), len(data))

    def write(self, data: bytes) -> None:
        """Send `data`, whole frames. Raises ConnectionLost."""
        self._write((data,), len(data))

    def flush(self) -> None:
        """Send what the socket takes now. Raises ConnectionLost."""
        waiting, self._out = self._out, deque()
        while waiting and not self._out:
            some = tuple(waiting.popleft() for _ in range(min(len(waiting), _MOST_PARTS)))
            self._write(some, sum(map(len, some)))
        self._out.extend(waiting)

    def keep(self) -> None:
        """Copy what has not left, so that it may change where it lies."""
        self._out = deque(map(bytes, self._out))
        for stream, parts in self._held.items():
            self._held[stream] = deque(part if callable(part) else bytes(part) for part in parts)

    def let_go(self) -> None:
        """Write what the windows have room for, which may have grown. Raises ConnectionLost."""
        if self._is_letting_go:  # an action ended a stream; the call that is under way sees to the rest
            return
        self._is_letting_go = True
        try:
            for stream in tuple(self._held):
                self._let_go(stream)
        finally:
            self._is_letting_go = False

    def _let_go(self, stream: int) -> None:
        held = self._held[stream]
        frames: list[Buffer] = []
        while held:
            part = held[0]
            if callable(part):
                held.popleft()
                self._write(frames, sum(map(len, frames)))
                frames = []
                part()
                self.send_control()
                continue
            h2, of_stream = self._h2, self._h2.streams[stream]
            windows = (h2.outbound_flow_control_window, of_stream.outbound_flow_control_window)
            n = min(len(part), h2.max_outbound_frame_size, *windows)
            if n <= 0 < len(part):
                break
            if n < len(part):
                held[0] = memoryview(part)[n:]
                part = memoryview(part)[:n]
            else:
                held.popleft()
            h2.outbound_flow_control_window -= n
            of_stream.outbound_flow_control_window -= n
            frames += (FRAME_HEAD.pack(n << 8 | _DATA, 0, stream), part)
        if not held:
            self._held.pop(stream, None)
        self._write(frames, sum(map(len, frames)))

    def _write(self, parts: Sequence[Buffer], n_bytes: int) -> None:
        """Send `n_bytes` in the order of the calls; what the socket does not take is kept."""
        if self._out:
            self._out.extend(parts)
            return
        if len(parts) > _MOST_PARTS:
            self._out.extend(parts)
            self.flush()
            return
        try:
            sent = self._send(parts, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        if sent == n_bytes:
            return
        for part in parts:
            if sent < len(part):
                self._out.append(memoryview(part)[sent:] if sent else part)
            sent = max(0, sent - len(part))
