"""From the frames of one Exchange stream to requests, for a server that gets each frame as an event."""

from __future__ import annotations

import numpy as np

from workers import wire


class Assembly:
    """Puts together the requests of one stream."""

    def __init__(self) -> None:
        self._header: wire.Header | None = None  # of a request that lacks frames
        self._buffer = memoryview(b"")
        self._done = 0

    @property
    def is_whole(self) -> bool:
        """Whether no request lacks frames."""
        return self._header is None

    def add(self, frame: bytes) -> tuple[wire.Header, wire.Request] | None:
        """The request that `frame` completes. Raises WireError when the frames can no longer be told apart."""
        header = self._header
        if header is None:
            header = wire.parse(frame)
            content = memoryview(frame)[wire.HEADER_BYTES :]
            if len(content) == header.payload_bytes:
                return header, wire.request(header, content)
            # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
            self._buffer = np.empty(header.payload_bytes, np.uint8).data
            self._header, self._done = header, 0
        else:
            wire.check_frame(frame, header.payload_bytes - self._done)
            content = memoryview(frame)
        self._buffer[self._done : self._done + len(content)] = content
        self._done += len(content)
        if self._done < header.payload_bytes:
            return None
        content, self._buffer, self._header = self._buffer, memoryview(b""), None
        return header, wire.request(header, content)
