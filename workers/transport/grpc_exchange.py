"""One router's Exchange stream, as the worker sees it: frames in, requests to compute, replies out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from grpc import StatusCode
from torch import Tensor

from workers import wire
from workers.errors import WireError
from workers.transport.answer import reason
from workers.transport.grpc_call import Call, Handler
from workers.transport.grpc_messages import Messages
from workers.wire import HEADER_BYTES, Header

_log = logging.getLogger(__name__)
_MOST_HELD_BYTES = 256 << 20  # of replies that a client which asks for more has not made room for


class Job(NamedTuple):
    """A request that waits to be computed."""

    stream: ExchangeStream
    header: wire.Header
    request: wire.Request


class ExchangeStream(Handler):
    """Answers one Exchange call. Bytes that make no sense end it; rows that do not fit are refused. A `Receiver`."""

    def __init__(
        self,
        call: Call,
        on_job: Callable[[Job], None],
        on_end: Callable[[ExchangeStream], None],
    ) -> None:
        self._call = call
        self._on_job = on_job
        self._on_end = on_end
        self.sink: Messages = Messages(self)
        self._payload = memoryview(b"")  # of the request that is being received
        self._n_waiting = 0
        self._half_closed = False
        call.begin(self)

    @property
    def is_open(self) -> bool:
        """Whether there is someone to answer."""
        return self._call.is_open

    @property
    def is_flushed(self) -> bool:
        """Whether every reply has left."""
        return self._call.is_flushed

    def whole(self, message: memoryview) -> bool:
        """A request that came alone: `message` is all of it, header and payload, where it was received.

        It lies there until the request is answered. False: it makes no sense as it is.
        """
        try:
            header = wire.parse_head(message)
            if header.payload_bytes != len(message) - HEADER_BYTES:
                return False
            self._wait(header, message[HEADER_BYTES:])
        except WireError:
            return False
        return True

    def begin(self, header: Header) -> memoryview:
        """See `Receiver`."""
        # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
        self._payload = np.empty(header.payload_bytes, np.uint8).data
        return self._payload

    def end(self, header: Header) -> None:
        """See `Receiver`."""
        payload, self._payload = self._payload, memoryview(b"")
        self._wait(header, payload)

    def malformed(self, reason: str) -> None:
        """See `Receiver`."""
        _log.warning("stream of %s closed: %s", self._call.peer, reason)
        self._call.finish(StatusCode.INVALID_ARGUMENT, reason)

    def half_closed(self) -> None:
        """The router asks nothing more; it still gets what it asked for."""
        self._half_closed = True
        if not self.sink.is_whole:
            self.malformed("the stream ended within a message")
        elif not self._n_waiting:
            self._call.finish()

    def ended(self) -> None:
        """The router is gone."""
        self._on_end(self)

    def answer(self, header: Header, result: Tensor | Exception, compute_ns: int) -> None:
        """Send y_PD, or why there is none. Requests are answered in the order in which they came."""
        if isinstance(result, Exception):
            frames = wire.error_frames(header.tag, reason(header, result))
        else:
            frames = wire.reply_frames(header.tag, header.n_tokens, result, compute_ns)
        for frame in frames:
            self._call.send(frame)
        self.drop()

    def drop(self) -> None:
        """A request does not wait any more; it was answered, or nobody is there to be answered."""
        self._n_waiting -= 1
        self._call.answered()
        if self._half_closed:
            self.half_closed()

    def _wait(self, header: Header, payload: memoryview) -> None:
        """The request waits from now on. Raises WireError if it makes no sense."""
        job = Job(self, header, wire.request(header, payload))
        if self._call.held_bytes > _MOST_HELD_BYTES:
            self._call.finish(StatusCode.RESOURCE_EXHAUSTED, "more is asked for, but replies are not taken in")
            return
        self._n_waiting += 1
        self._call.take_in_hand()
        self._on_job(job)
