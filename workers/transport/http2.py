"""One HTTP/2 connection over a socket: h2 speaks the protocol, but the bytes of gRPC messages go past it.

h2 copies everything it receives and sends, several times and in small pieces. So the DATA frames of a stream that has
a `Sink` are read here, straight from the socket to where they are wanted, and gRPC messages are written here; headers,
settings, windows, pings and the end of streams are h2's.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RemoteSettingsChanged, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, WindowUpdateFrame

Buffer = bytes | memoryview

_PREFACE_BYTES = 24  # that a client begins with
_WINDOW = (1 << 31) - 1  # the most that HTTP/2 allows: who sends too much is held up by TCP
_FRAME_BYTES = (1 << 24) - 1  # the most that HTTP/2 allows
_INBOX_BYTES = 1 << 18
_MOST_BYTES = 1 << 17  # of DATA that h2 is given; larger frames of streams without a sink are passed over
_DIRECT_BYTES = 1 << 14  # so many are worth a system call of their own to write them to their place
_FRAME = struct.Struct(">IBI")  # length and type, flags, stream
_FRAME_HEAD_BYTES = _FRAME.size
_MESSAGE_HEAD = struct.Struct(">IBIBI")  # a DATA frame's head, then "not compressed" and the length of the message
_MESSAGE_PREFIX = struct.Struct(">BI")
_DATA, _END_STREAM, _PADDED = 0, 1, 8


class ConnectionLost(Exception):
    """There will be nothing more. The text says why."""


class Sink(Protocol):
    """Takes the payload of a stream's DATA frames."""

    def take(self, data: memoryview) -> None:
        """Bytes that came; they are there only during the call."""

    def place(self) -> memoryview | None:
        """Where the bytes that come next are to be written; None: they are for `take`."""

    def placed(self, n: int) -> None:
        """So many were written there."""


class _Nowhere:
    """For what nobody wants any more."""

    def take(self, data: memoryview) -> None:
        pass

    def place(self) -> memoryview | None:
        return None

    def placed(self, n: int) -> None:
        pass


_NOWHERE = _Nowhere()


class Http2:
    """A connection. One thread uses it; nothing here waits unless asked to.

    `sinks`: by stream, for those whose DATA does not go through h2. `on_event` hears of h2's other events.
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[Event], None], is_client: bool) -> None:
        self.sinks: dict[int, Sink] = {}
        self.h2 = _connection(is_client)
        self._socket = sock
        self._on_event = on_event
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._begin = self._end = 0  # of what was received and not looked at
        self._preface_left = 0 if is_client else _PREFACE_BYTES
        self._stream = self._flags = self._left = 0  # of the DATA frame that is being received
        self._received: dict[int, int] = {}  # bytes of DATA by stream since the window was opened again; 0: all
        self._out: deque[Buffer] = deque()  # what the socket did not take
        self._held: dict[int, deque[Buffer | Callable[[], None]]] = {}  # by stream: what its window did not let through

    @property
    def is_flushed(self) -> bool:
        """Whether everything has left."""
        return not self._out and not self._held

    @property
    def unsent(self) -> int:
        """Bytes that have not left."""
        waiting = [part for parts in self._held.values() for part in parts if not callable(part)]
        return sum(len(memoryview(part)) for part in (*self._out, *waiting))

    @property
    def wants_to_write(self) -> bool:
        """Whether there is something that the socket alone holds up."""
        return bool(self._out)

    def receive(self, wait: bool = False) -> bool:
        """Take in what has come; waits, as long as the socket says, for something to come if asked to.

        Whether there was something. Raises ConnectionLost when there will be nothing more.
        """
        try:
            place = None
            if self._left >= _DIRECT_BYTES and self._begin == self._end:
                place = self.sinks.get(self._stream, _NOWHERE).place()
            if place is not None:
                n = self._socket.recv_into(place[: self._left], 0, 0 if wait else socket.MSG_DONTWAIT)
            else:
                n = self._socket.recv_into(self._inbox[self._end :], 0, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        if n == 0:
            raise ConnectionLost("closed by the peer")
        if place is None:
            self._end += n
            self._parse()
        else:
            self._left -= n
            self.sinks[self._stream].placed(n)
            if not self._left:
                self._end_data()
        return True

    def send_message(self, stream: int, parts: Sequence[Buffer], n_bytes: int) -> None:
        """A gRPC message of `parts`, `n_bytes` together. They must stay as they are until it is flushed."""
        length = _MESSAGE_PREFIX.size + n_bytes
        if stream not in self._held and self._room(stream) >= length:
            self._use(stream, length)
            self._write((_MESSAGE_HEAD.pack(length << 8, 0, stream, 0, n_bytes), *parts))
        else:
            self._held.setdefault(stream, deque()).extend((_MESSAGE_PREFIX.pack(0, n_bytes), *parts))
            self._let_through(stream)

    def after(self, stream: int, action: Callable[[], None]) -> None:
        """Do `action`, which tells h2 to send something, when all messages of the stream have been written."""
        if stream in self._held:
            self._held[stream].append(action)
        else:
            action()
            self.send_control()

    def drop(self, stream: int) -> None:
        """What waits for the window of a stream is not to be sent any more."""
        self._held.pop(stream, None)

    def send_control(self) -> None:
        """Send what h2 has to say."""
        if data := self.h2.data_to_send():
            self._write((data,))

    def flush(self) -> None:
        """Send what the socket takes now. Raises ConnectionLost."""
        waiting, self._out = self._out, deque()
        while waiting:
            some = [waiting.popleft() for _ in range(min(len(waiting), 64))]
            self._write(some)
            if self._out:
                self._out.extend(waiting)
                return

    def keep(self) -> None:
        """Copy what has not left, so that it may change where it lies."""
        self._out = deque(bytes(part) for part in self._out)
        for parts in self._held.values():
            for index, part in enumerate(parts):
                parts[index] = bytes(part) if isinstance(part, memoryview) else part

    def _parse(self) -> None:
        inbox, begin, end = self._inbox, self._begin, self._end
        while begin < end:
            if self._left:
                n = min(self._left, end - begin)
                self._left -= n
                begin += n
                self.sinks.get(self._stream, _NOWHERE).take(inbox[begin - n : begin])
                if not self._left:
                    self._end_data()
                continue
            if self._preface_left:
                n = min(self._preface_left, end - begin)
                self._preface_left -= n
                begin += n
                self._control(inbox[begin - n : begin])
                continue
            if end - begin < _FRAME_HEAD_BYTES:
                break
            length_type, flags, stream = _FRAME.unpack_from(inbox, begin)
            length = length_type >> 8
            is_ours = stream in self.sinks and not flags & _PADDED
            if length_type & 0xFF == _DATA and (is_ours or length > _MOST_BYTES):
                begin += _FRAME_HEAD_BYTES
                self._stream, self._flags, self._left = stream, flags, length
                self._count(length)
                if not length:
                    self._end_data()
                continue
            length += _FRAME_HEAD_BYTES
            if length > _INBOX_BYTES:
                raise ConnectionLost(f"a frame of {length} bytes that is not DATA")
            if end - begin < length:
                break
            begin += length
            self._control(inbox[begin - length : begin])
        if begin == end:
            begin = end = 0
        elif begin:
            rest = bytes(inbox[begin:end])
            begin, end = 0, len(rest)
            inbox[:end] = rest
        self._begin, self._end = begin, end

    def _end_data(self) -> None:
        """A DATA frame was read."""
        if self._flags & _END_STREAM:
            self._control(DataFrame(self._stream, flags=["END_STREAM"]).serialize())

    def _control(self, data: Buffer) -> None:
        """Let h2 read a frame. Raises ConnectionLost for one that makes no sense."""
        try:
            events = self.h2.receive_data(bytes(data))
        except ProtocolError as error:
            self.send_control()  # says so, if the socket takes it
            raise ConnectionLost(f"no HTTP/2: {error}") from None
        self.send_control()
        for event in events:
            if isinstance(event, (WindowUpdated, RemoteSettingsChanged)):
                for stream in tuple(self._held):
                    self._let_through(stream)
            elif isinstance(event, DataReceived) and event.stream_id in self.sinks:  # it was padded
                assert event.data is not None and event.flow_controlled_length is not None
                self.sinks[event.stream_id].take(memoryview(event.data))
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self.send_control()
            else:
                self._on_event(event)
            if isinstance(event, (StreamEnded, StreamReset)):
                self._received.pop(event.stream_id, None)

    def _count(self, n_bytes: int) -> None:
        """Open the windows again long before they are used up. h2 does not know of these bytes."""
        for stream in (0, self._stream):
            received = self._received.get(stream, 0) + n_bytes
            if received >= _WINDOW // 2:
                self._write((WindowUpdateFrame(stream, window_increment=received).serialize(),))
                received = 0
            self._received[stream] = received

    def _room(self, stream: int) -> int:
        """How many bytes may go in one DATA frame now."""
        of_stream = self.h2.streams[stream].outbound_flow_control_window
        return min(self.h2.outbound_flow_control_window, of_stream, self.h2.max_outbound_frame_size)

    def _use(self, stream: int, n_bytes: int) -> None:
        self.h2.outbound_flow_control_window -= n_bytes
        self.h2.streams[stream].outbound_flow_control_window -= n_bytes

    def _let_through(self, stream: int) -> None:
        """Write what the window of the stream has room for."""
        held = self._held[stream]
        while held:
            part = held[0]
            if callable(part):
                held.popleft()
                part()
                self.send_control()
                continue
            room = self._room(stream)
            if room <= 0:
                return
            view = memoryview(part).cast("B")
            if len(view) > room:
                held[0], view = view[room:], view[:room]
            else:
                held.popleft()
            self._use(stream, len(view))
            self._write((_FRAME.pack(len(view) << 8 | _DATA, 0, stream), view))
        self._held.pop(stream, None)

    def _write(self, parts: Iterable[Buffer]) -> None:
        """Send in the order of the calls; what the socket does not take is kept for `flush`."""
        if self._out:
            self._out.extend(parts)
            return
        try:
            sent = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ConnectionLost(str(error)) from None
        for part in parts:
            n_bytes = len(part) if isinstance(part, bytes) else part.nbytes
            if sent >= n_bytes:
                sent -= n_bytes
            else:
                self._out.append(memoryview(part).cast("B")[sent:])
                sent = 0


def _connection(is_client: bool) -> H2Connection:
    """h2's side, with its first words said: windows that never hold a peer up."""
    connection = H2Connection(H2Configuration(client_side=is_client, header_encoding=None))
    values = {
        SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW,
        SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES,
        SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
    }
    values |= {SettingCodes.ENABLE_PUSH: 0} if is_client else {SettingCodes.MAX_CONCURRENT_STREAMS: 100}
    connection.local_settings = Settings(client=is_client, initial_values=values)
    connection.max_inbound_frame_size = _FRAME_BYTES
    connection.initiate_connection()
    connection.increment_flow_control_window(_WINDOW - connection.inbound_flow_control_window)
    return connection
