"""One Exchange stream to one expert worker: frames out, frames in, and the words that began it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import grpc

from workers.transport.grpc.credentials import Credentials, Metadata
from workers.transport.grpc.handshake import EXCHANGE_METHOD, Hello
from workers.transport.grpc.serving import channel_options, open_channel, text_values
from workers.wire import FRAME_BYTES, Frame

_LAST_WORDS_S = 1.0


class StreamBroken(Exception):
    """The stream ended. The text says why."""


class Stream:
    """A bidirectional stream to `address`. One thread writes and reads; any thread may `cancel`.

    Nothing here has a time limit of its own: whoever waits sets `deadline`, and a watchdog cancels the stream that is
    overdue.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        hello: Hello,
        offers: Metadata,
        on_end: Callable[[str], None],
    ) -> None:
        """on_end: called once, by any thread, with the reason. Raises ExpertMeshError without its TLS files."""
        self.address = address
        self.deadline = math.inf  # time.monotonic()
        self.broken: str | None = None
        self._hello = hello
        self._on_end = on_end
        self._cancelled: str | None = None
        self._over = threading.Event()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._channel = open_channel(address, credentials, channel_options(FRAME_BYTES))
        exchange: Any = self._channel.stream_stream(EXCHANGE_METHOD)  # no serialisers: frames are the bytes on the wire
        metadata = (*credentials.metadata, *hello.metadata, *offers)
        self._call = exchange(iter(self._outbox.get, None), metadata=metadata)
        if not self._call.add_callback(self._ended):
            self._ended()

    def greeting(self) -> dict[str, str]:
        """What the worker said before its first reply. Raises StreamBroken unless it is the one that was awaited."""
        try:
            values = text_values(self._call.initial_metadata())
        except grpc.RpcError:
            values = {}
        other = Hello.from_metadata(values)
        if not other.worker:
            if not self._over.wait(_LAST_WORDS_S):  # a refusal comes after the metadata that it has none of
                self._call.cancel()
            raise StreamBroken(self._reason())
        if (objection := other.objection(self._hello)) is not None:
            self.cancel(f"{self.address}: {objection}")
            raise StreamBroken(self._reason())
        return values

    def write(self, frame: Frame) -> None:
        """Send `frame` behind those before it. Raises StreamBroken when the stream is known to be broken."""
        if self.broken is not None:
            raise StreamBroken(self.broken)
        self._outbox.put(b"".join(frame))

    def read(self) -> bytes:
        """The next frame. Raises StreamBroken when there will be none."""
        try:
            frame: bytes = next(self._call)
        except (grpc.RpcError, StopIteration):
            raise StreamBroken(self._reason()) from None
        return frame

    def check_deadline(self) -> None:
        """Cancel the stream if it is overdue. From any thread."""
        if self.deadline < time.monotonic():
            self.cancel("no answer within the deadline")

    def cancel(self, reason: str) -> None:
        """End the stream from any thread; who waits in `read` gets StreamBroken with `reason`."""
        self._cancelled = self._cancelled or reason
        self._call.cancel()

    def close(self) -> None:
        """End the stream and free what it holds."""
        self.cancel("closed")
        self._channel.close()

    def _reason(self) -> str:
        code, details = self._call.code(), self._call.details()
        return self._cancelled or f"stream ended: {details or code.name.replace('_', ' ').lower()}"

    def _ended(self) -> None:
        self.broken = self._reason()
        self._over.set()
        self._outbox.put(None)  # ends the thread of grpc's that waits for the next frame
        self._on_end(self.broken)
