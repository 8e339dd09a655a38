"""From the bytes of a stream to messages of `wire`: a `Sink` that writes large ones straight to their place.

A gRPC message is five bytes, one that says whether it is compressed and its length, then a frame of `wire`.
"""

from __future__ import annotations

from typing import Protocol

from workers import wire
from workers.errors import WireError
from workers.transport.grpc.http2_outbox import MESSAGE_PREFIX
from workers.wire import FRAME_BYTES, HEADER_BYTES, Header

_NOWHERE = memoryview(b"")


class Receiver(Protocol):
    """Whom the messages are for."""

    def whole(self, message: memoryview) -> bool:
        """One frame that came alone; it may be left in the inbox. False: it shall come as others do."""

    def begin(self, header: Header) -> memoryview:
        """Where the payload of a message is to be written. Raises WireError if it is not wanted."""

    def end(self, header: Header) -> None:
        """The payload is there. Raises WireError if it makes no sense."""

    def malformed(self, reason: str) -> None:
        """The bytes make no sense; no more of them will be looked at."""


class Messages:
    """Puts together the messages of one stream; see `Sink`."""

    def __init__(self, receiver: Receiver) -> None:
        self.received = 0
        self._receiver = receiver
        self._is_broken = False
        self._pieces = bytearray()  # of a prefix or header that came in parts
        self._header: Header | None = None  # of the message that is being received
        self._target = _NOWHERE  # its payload
        self._done = 0  # bytes of that which have come
        self._frame_left = 0  # bytes of the frame that have not
        self._head_due = False  # whether they begin with a header

    @property
    def is_whole(self) -> bool:
        """Whether no message lacks bytes."""
        return self._header is None and not self._frame_left and not self._pieces

    def whole(self, message: memoryview) -> bool:
        """See `Sink`."""
        if self._header is not None or self._frame_left or self._pieces or len(message) < HEADER_BYTES:
            return False
        return not self._is_broken and self._receiver.whole(message)

    def take(self, data: memoryview) -> None:
        """See `Sink`."""
        try:
            while data and not self._is_broken:
                data = self._payload(data) if self._header is not None and self._frame_left else self._head(data)
        except WireError as error:
            self._break(error)

    @property
    def missing(self) -> int:
        """See `Sink`."""
        return len(self._target) - self._done

    def place(self) -> memoryview:
        """See `Sink`; no further than the frame goes, as a prefix follows it."""
        return self._target[self._done : self._done + self._frame_left]

    def placed(self, n: int) -> None:
        """See `Sink`."""
        self._done += n
        self._frame_left -= n
        if self._done == len(self._target):
            self._end()

    def _payload(self, data: memoryview) -> memoryview:
        n = min(len(data), self._frame_left)
        self._target[self._done : self._done + n] = data[:n]
        self.placed(n)
        return data[n:]

    def _head(self, data: memoryview) -> memoryview:
        """Read a prefix or a header; returns what follows."""
        if self._head_due:
            head, data = self._gather(data, HEADER_BYTES)
            if head is not None:
                self._begin(wire.parse_head(head))
            return data
        head, data = self._gather(data, MESSAGE_PREFIX.size)
        if head is None:
            return data
        is_compressed, n_bytes = MESSAGE_PREFIX.unpack_from(head)
        if is_compressed:
            raise WireError("a compressed message; compression was not offered")
        if self._header is not None:
            wire.check_frame(n_bytes, len(self._target) - self._done)
        elif not HEADER_BYTES <= n_bytes <= FRAME_BYTES:
            raise WireError(f"a first frame of {n_bytes} bytes, not of {HEADER_BYTES} to {FRAME_BYTES}")
        else:
            self._head_due = True
        self._frame_left = n_bytes
        return data

    def _begin(self, header: Header) -> None:
        wire.check_frame(self._frame_left, HEADER_BYTES + header.payload_bytes)
        self._target, self._done = self._receiver.begin(header), 0
        self._header, self._head_due = header, False
        self._frame_left -= HEADER_BYTES
        if not self._target:
            self._end()

    def _end(self) -> None:
        header, self._header, self._target, self._done = self._header, None, _NOWHERE, 0
        assert header is not None
        try:
            self._receiver.end(header)
        except WireError as error:
            self._break(error)

    def _break(self, error: WireError) -> None:
        self._is_broken = True
        self._target, self._done = _NOWHERE, 0
        self._receiver.malformed(str(error))

    def _gather(self, data: memoryview, n: int) -> tuple[memoryview | None, memoryview]:
        """The next `n` bytes and what follows; None: some have not come yet."""
        if not self._pieces and len(data) >= n:
            return data[:n], data[n:]
        missing = n - len(self._pieces)
        self._pieces += data[:missing]
        if len(self._pieces) < n:
            return None, data[missing:]
        whole, self._pieces = memoryview(self._pieces), bytearray()
        return whole, data[missing:]
