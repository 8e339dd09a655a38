"""One router's Exchange stream, as the worker sees it: frames in, requests to compute, replies out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from grpc import StatusCode
from torch import Tensor

from workers import wire
from workers.errors import WireError
from workers.transport.answer import reason
from workers.transport.assembly import Assembly
from workers.transport.grpc_calls import Call

_log = logging.getLogger(__name__)
_IN_HAND = 4  # requests that wait; the router is heard again once there are fewer


class Job(NamedTuple):
    """A request that waits to be computed."""

    stream: ExchangeStream
    header: wire.Header
    request: wire.Request


class ExchangeStream:
    """A `Handler` of one Exchange call. Bytes that make no sense end it; rows that do not fit are refused."""

    def __init__(
        self,
        call: Call,
        on_job: Callable[[Job], None],
        on_end: Callable[[ExchangeStream], None],
    ) -> None:
        self._call = call
        self._on_job = on_job
        self._on_end = on_end
        self._assembly = Assembly()
        self._n_waiting = 0
        self._half_closed = False
        call.begin(self)
        call.ask()

    @property
    def is_open(self) -> bool:
        """Whether there is someone to answer."""
        return self._call.is_open

    @property
    def is_flushed(self) -> bool:
        """Whether every reply has left."""
        return self._call.is_flushed

    def received(self, frame: bytes) -> None:
        """Put the frame to those before it; a request that is complete waits from now on."""
        try:
            complete = self._assembly.add(frame)
        except WireError as error:
            self._end_malformed(str(error))
            return
        if complete is not None:
            self._n_waiting += 1
            self._on_job(Job(self, *complete))
        if self._n_waiting < _IN_HAND:
            self._call.ask()

    def half_closed(self) -> None:
        """The router asks nothing more; it still gets what it asked for."""
        self._half_closed = True
        if not self._assembly.is_whole:
            self._end_malformed("the stream ended within a message")
        elif not self._n_waiting:
            self._call.finish_when_flushed()

    def ended(self) -> None:
        """The router is gone."""
        self._on_end(self)

    def answer(self, header: wire.Header, result: Tensor | Exception, compute_ns: int) -> None:
        """Send y_PD, or why there is none. Requests are answered in the order in which they came."""
        if isinstance(result, Exception):
            self._call.send(wire.error_frames(header.tag, reason(header, result)))
        else:
            self._call.send(wire.reply_frames(header.tag, header.n_tokens, result, compute_ns))
        self._n_waiting -= 1
        if self._half_closed:
            self.half_closed()
        elif self._n_waiting == _IN_HAND - 1:
            self._call.ask()

    def _end_malformed(self, reason: str) -> None:
        _log.warning("stream of %s closed: %s", self._call.peer, reason)
        self._call.finish(StatusCode.INVALID_ARGUMENT, reason)
