"""One stream of raw frames to one expert worker, driven by the thread that calls it.

gRPC's public Python API moves every message of a bidirectional stream through two other threads. A decode step does
this once per layer and worker, so the hand-offs would cost more than the bytes. This file drives gRPC's C core through
`cygrpc`, as grpc's own single-threaded unary streams do: the caller waits on the call's completion queue itself, which
halves the time and the CPU of a small message. `cygrpc` is not a public API; pyproject.toml bounds the version of
grpcio, and this is the only file to change with it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from importlib import import_module
from typing import Any

from grpc import StatusCode

from workers.transport.grpc_options import CLIENT_OPTIONS, EXCHANGE_METHOD

cygrpc: Any = import_module("grpc._cython.cygrpc")  # it has no type stubs

_NO_FLAGS = 0
_STATUS, _METADATA, _SENT, _RECEIVED = "status", "metadata", "sent", "received"


class StreamBroken(Exception):
    """The stream ended. The text says why."""


class Stream:
    """A bidirectional stream to `address`. One thread reads and writes; any thread may `cancel`.

    It always has a receive posted and keeps what arrived, also while a write waits for room: so two peers that write
    at the same time never wait for each other.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.deadline = math.inf  # time.monotonic() after which a watchdog should cancel
        self.broken: str | None = None
        self._inbox: deque[bytes] = deque()
        self._sending = False
        self._cancelled: str | None = None
        self._channel = cygrpc.Channel(address.encode(), CLIENT_OPTIONS, None)
        opening = (
            ((cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),), _METADATA),
            ((cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),), _METADATA),
            ((cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),), _STATUS),
        )
        self._due = len(opening)
        self._call = self._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            EXCHANGE_METHOD.encode(), None, None, None, None, opening, None, None,
        )  # fmt: skip
        self._receive_next()

    def write(self, frame: bytes, timeout_s: float) -> None:
        """Hand `frame` to the core; waits, at most about `timeout_s`, until the one before it has gone."""
        if self._sending:
            self.deadline = time.monotonic() + timeout_s
            while self._sending and self.broken is None:
                self._wait_for_event()
            self.deadline = math.inf
        self._raise_if_broken()
        self._sending = True
        self._operate(cygrpc.SendMessageOperation(frame, _NO_FLAGS), _SENT)

    def read(self) -> bytes:
        """The next frame. Raises StreamBroken when there will be none; sets no deadline of its own."""
        while not self._inbox:
            self._raise_if_broken()
            self._wait_for_event()
        return self._inbox.popleft()

    def cancel(self, reason: str) -> None:
        """End the stream from any thread; who waits in `read` or `write` gets StreamBroken with `reason`."""
        self._cancelled = self._cancelled or reason
        self._call.cancel(StatusCode.CANCELLED.value[0], reason)

    def close(self) -> None:
        """End the stream and free what it holds."""
        if self.broken is None:
            self.cancel("closed")
            while self._due:
                self._wait_for_event()
        self._channel.close(StatusCode.CANCELLED.value[0], "closed")

    def _raise_if_broken(self) -> None:
        if self.broken is not None:
            raise StreamBroken(self.broken)

    def _receive_next(self) -> None:
        self._operate(cygrpc.ReceiveMessageOperation(_NO_FLAGS), _RECEIVED)

    def _operate(self, operation: Any, tag: str) -> None:
        self._due += 1
        self._call.operate((operation,), tag)

    def _wait_for_event(self) -> None:
        event = self._call.next_event()
        self._due -= 1
        if event.tag is _RECEIVED:
            frame = event.batch_operations[0].message()
            if frame is not None:
                self._inbox.append(frame)
                self._receive_next()
        elif event.tag is _SENT:
            self._sending = False
        elif event.tag is _STATUS:
            status = event.batch_operations[0]
            reason = self._cancelled or f"stream ended: {status.details() or status.code()}"
            # The call lives until its last operation has come back.
            while self._due:
                self._wait_for_event()
            self.broken = reason
