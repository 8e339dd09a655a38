"""One router's Exchange stream, as the worker sees it: requests to compute, replies out."""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

import numpy as np
from grpc import StatusCode
from torch import Tensor

from workers import wire
from workers.errors import WireError
from workers.transport.answer import reason
from workers.transport.grpc.call import Call, Handler
from workers.transport.grpc.messages import Messages
from workers.wire import HEADER_BYTES, Header, Request

_log = logging.getLogger(__name__)
_MOST_HELD_BYTES = 256 << 20  # of replies that a client which asks for more has not made room for


class Job(NamedTuple):
    """A request that waits to be computed."""

    stream: ExchangeStream
    header: Header
    message: memoryview  # header and all
    request: Request  # its tensors


class Worker(Protocol):
    """Who computes."""

    def at_once(self, message: memoryview) -> memoryview | None:
        """The reply, if nothing else waits and it is a request that can be answered as it is."""

    def add(self, job: Job) -> None:
        """A request waits from now on."""

    def ended(self, stream: ExchangeStream) -> None:
        """The router is gone."""


class ExchangeStream(Handler):
    """Bytes that make no sense end it; rows that do not fit are refused. A `Receiver`."""

    def __init__(self, call: Call, worker: Worker) -> None:
        self.sink = self._messages = Messages(self)
        self._call = call
        self._worker = worker
        self._message = memoryview(b"")  # that is being received
        self._n_waiting = 0
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
        """See `Receiver`. `message` stays where it was received until it is answered."""
        if self._call.is_flushed and (reply := self._worker.at_once(message)) is not None:
            self._call.send((reply,))
            return True
        try:
            header = wire.parse_head(message)
            is_request = header.payload_bytes == len(message) - HEADER_BYTES
            if is_request:
                self._wait(header, message)
        except WireError:
            return False
        return is_request

    def begin(self, header: Header) -> memoryview:
        """See `Receiver`."""
        wire.check_request(header)
        # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
        self._message = np.empty(HEADER_BYTES + header.payload_bytes, np.uint8).data
        wire.put_head(self._message, header)
        return self._message[HEADER_BYTES:]

    def end(self, header: Header) -> None:
        """See `Receiver`."""
        message, self._message = self._message, memoryview(b"")
        self._wait(header, message)

    def malformed(self, reason: str) -> None:
        """See `Receiver`."""
        if self.is_open:
            _log.warning("stream of %s closed: %s", self._call.peer, reason)
            self._call.finish(StatusCode.INVALID_ARGUMENT, reason)

    def half_closed(self) -> None:
        """The router asks nothing more; it still gets what it asked for."""
        if not self._messages.is_whole:
            self.malformed("the stream ended within a message")
        elif not self._n_waiting:
            self._call.finish()

    def ended(self) -> None:
        """See `Handler`."""
        self._worker.ended(self)

    def answer(self, header: Header, result: Tensor | Exception, compute_ns: int) -> None:
        """Send y_PD, or why there is none. Requests are answered in the order in which they came."""
        if isinstance(result, Exception):
            frames = wire.error_frames(header.tag, reason(header, result))
        else:
            frames = wire.reply_frames(header.tag, header.n_tokens, result, compute_ns)
        for frame in frames:
            self._call.send(frame)
        self._answered()

    def answer_whole(self, reply: memoryview) -> None:
        """Send a reply, header and all."""
        self._call.send((reply,))
        self._answered()

    def drop(self) -> None:
        """A request does not wait any more: nobody is there to be answered."""
        self._answered()

    def _wait(self, header: Header, message: memoryview) -> None:
        """The request waits from now on. Raises WireError if it makes no sense."""
        request = wire.request(header, message[HEADER_BYTES:])
        if self._call.held_bytes > _MOST_HELD_BYTES:
            self._call.finish(StatusCode.RESOURCE_EXHAUSTED, "more is asked for, but replies are not taken in")
        elif self.is_open:
            self._n_waiting += 1
            self._call.take_in_hand()
            self._worker.add(Job(self, header, message, request))

    def _answered(self) -> None:
        self._n_waiting -= 1
        self._call.answered()
        if self._call.is_half_closed:
            self.half_closed()
