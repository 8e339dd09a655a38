"""Whether the process at the other end answers: it is asked now and then, and silence is soon noticed."""

from __future__ import annotations

import threading
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.serving import channel_options, open_channel

_EVERY_S = 1.0  # between two questions while nothing is overdue
#: A process that has no core for a moment is not silent.
SILENT_AFTER_S = 0.5
_MESSAGE_BYTES = 1 << 16
#: What gRPC says where nobody did. Whatever else comes is an answer, also from a server without health checks.
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_RETRY = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]


class Pulse:
    """The health checks of one worker, over a connection of their own. One thread calls `look`, again and again; any
    thread may `close`.

    A process that is stopped or stuck keeps its connections: only its silence tells. What is computed needs no Python
    lock, so a worker that computes for long answers.
    """

    def __init__(self, address: str, credentials: Credentials, silent_after_s: float) -> None:
        """silent_after_s: how long an answer may take. Raises ExpertMeshError without its TLS files."""
        self.address = address
        self._silent_after_s = silent_after_s
        self.answers: bool | None = None  # None: not known yet. For any thread.
        self._channel = open_channel(address, credentials, [*channel_options(_MESSAGE_BYTES), *_RETRY])
        self._check = health_pb2_grpc.HealthStub(self._channel).Check
        self._lock = threading.Lock()
        self._closed = False
        self._question: Any = None
        self._asked = 0.0
        self._next = 0.0

    def hurry(self) -> None:
        """Ask now. From any thread."""
        self._next = 0.0

    def look(self, now: float, lag_s: float) -> bool:
        """Ask, or take in the answer; whether `answers` has changed.

        now: time.monotonic(). lag_s: how long this process stood still meanwhile, which is not the other's silence.
        """
        with self._lock:  # nobody is asked over a connection that is closed
            return not self._closed and self._look(now, lag_s)

    def close(self) -> None:
        """Ask no more."""
        with self._lock:
            self._closed = True
            self._channel.close()

    def _look(self, now: float, lag_s: float) -> bool:
        before, question = self.answers, self._question
        self._asked += lag_s
        if question is not None and question.done():
            self.answers = not question.cancelled() and question.code() not in _NO_ANSWER
            self._question, self._next = None, now + (_EVERY_S if self.answers else 0.0)
        elif question is not None and now - self._asked > self._silent_after_s:
            self.answers = False
            question.cancel()
            self._question, self._next = None, now
        elif question is None and now >= self._next:
            self._question, self._asked = self._check.future(health_pb2.HealthCheckRequest()), now
        return self.answers is not before
