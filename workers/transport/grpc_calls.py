"""A gRPC server that one thread drives: it waits for events, handles them and answers, all by itself.

gRPC's public Python server hands every message from a polling thread to a thread of its pool, and waits in that one for
another hand-off after every message sent. For a worker that computes one batch at a time this buys nothing: on an
exchange of a few rows the hand-offs took longer than the bytes. Like `grpc_stream` this drives gRPC's C core through
`cygrpc`, which is not a public API; pyproject.toml bounds the version of grpcio.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol

from grpc import StatusCode

cygrpc: Any = import_module("grpc._cython.cygrpc")  # it has no type stubs

_log = logging.getLogger(__name__)
_NO_FLAGS = 0
_FULL = 4  # replies in an outbox


class Handler(Protocol):
    """What answers one call. The serving thread alone calls it."""

    def received(self, message: bytes) -> None:
        """A message that `Call.ask` asked for."""

    def half_closed(self) -> None:
        """There will be no further message; `Call.finish` is still owed."""

    def ended(self) -> None:
        """The client is gone, or the status was sent."""


class Call:
    """One call of a client. Owned by the serving thread."""

    def __init__(self, event: Any, on_gone: Callable[[Call], None]) -> None:
        self.method: str = event.call_details.method.decode()
        self.is_open = True
        self._call = event.call
        self._on_gone = on_gone
        self._handler: Handler | None = None
        self._outbox: deque[Iterator[bytes]] = deque()
        self._sending = False
        self._asked = False  # but the outbox is full
        self._finishing = False
        self._due = 0

    @property
    def peer(self) -> str:
        """Who called, for people."""
        return str(self._call.peer())

    @property
    def is_flushed(self) -> bool:
        """Whether everything handed to `send` has left."""
        return not self._sending

    def begin(self, handler: Handler) -> None:
        """From now on `handler` hears of this call."""
        self._handler = handler
        self._operate(self._closed, cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        self._operate(self._done, cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS))

    def ask(self) -> None:
        """Let the next message come, once the client has taken most of what was sent."""
        self._asked = len(self._outbox) > _FULL
        if self.is_open and not self._asked:
            self._operate(self._received, cygrpc.ReceiveMessageOperation(_NO_FLAGS))

    def send(self, messages: Iterator[bytes]) -> None:
        """Send messages one after the other, each made when it is its turn. Never waits."""
        self._outbox.append(messages)
        if not self._sending:
            self._send_next()

    def finish(self, code: StatusCode = StatusCode.OK, details: str = "", message: bytes | None = None) -> None:
        """End the call, with a last `message` where there is one. What has not left is dropped."""
        if self.is_open:
            self._end()
            status = cygrpc.SendStatusFromServerOperation(None, code.value[0], details.encode(), _NO_FLAGS)
            last = () if message is None else (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
            self._operate(self._done, *last, status)

    def finish_when_flushed(self) -> None:
        """End the call well once everything handed to `send` has left."""
        self._finishing = True
        if self.is_flushed:
            self.finish()

    def _operate(self, tag: Callable[[Any], None], *operations: Any) -> None:
        self._due += 1
        self._call.start_server_batch(operations, tag)

    def _received(self, event: Any) -> None:
        assert self._handler is not None
        message = event.batch_operations[0].message()
        try:
            if self.is_open and message is not None:
                self._handler.received(message)
            elif self.is_open:
                self._handler.half_closed()
        finally:
            self._done(event)

    def _send_next(self) -> None:
        while self._outbox:
            message = next(self._outbox[0], None)
            if message is not None:
                self._sending = True
                self._operate(self._sent, cygrpc.SendMessageOperation(message, _NO_FLAGS))
                return
            self._outbox.popleft()
            if self._asked:
                self.ask()
        if self._finishing:
            self.finish()

    def _sent(self, event: Any) -> None:
        self._sending = False
        self._send_next()
        self._done(event)

    def _closed(self, event: Any) -> None:
        assert self._handler is not None
        self._end()
        self._handler.ended()
        self._done(event)

    def _end(self) -> None:
        self.is_open = False
        self._outbox.clear()

    def _done(self, _event: Any) -> None:
        self._due -= 1
        # The core keeps a call, and a server that is being stopped, until its last operation has come back.
        if self._due == 0 and not self.is_open:
            self._on_gone(self)


class CallServer:
    """Listens on one address and hands every call to `accept`, which begins or finishes it.

    One thread calls `take` until it raises `Stopped`; `start` and `stop` are for others.
    """

    class Stopped(Exception):
        """There will be no further events."""

    def __init__(self, address: str, options: Iterable[tuple[bytes, int]], accept: Callable[[Call], None]) -> None:
        """`address` is `host:port`, port 0 for any. Raises OSError when that cannot be had."""
        self._accept = accept
        self._calls: set[Call] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        try:
            self.port: int = self._server.add_http2_port(address.encode())
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        if not self.port:
            raise OSError(f"cannot listen on {address}")

    def start(self) -> None:
        """Take calls from now on."""
        self._server.start()
        self._request_call()

    def stop(self) -> None:
        """End every call; `take` raises `Stopped` once all are gone."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._server.shutdown(self._queue, self._shut_down)
            self._server.cancel_all_calls()

    def take(self, wait: bool) -> bool:
        """Handle one event, waiting for it if there is none and `wait`; whether there was one."""
        event = self._queue.poll(None if wait else time.time())
        if event.completion_type == cygrpc.CompletionType.queue_timeout:
            return False
        try:
            event.tag(event)
        except CallServer.Stopped:
            raise
        except Exception:
            # It belongs to one call; the others go on.
            _log.exception("an event of a call failed")
        return True

    def _request_call(self) -> None:
        with self._lock:
            if not self._stopping:
                self._server.request_call(self._queue, self._queue, self._called)

    def _called(self, event: Any) -> None:
        if not event.success or self._stopping:
            return
        self._request_call()
        call = Call(event, self._calls.discard)
        self._calls.add(call)
        self._accept(call)

    def _shut_down(self, _event: Any) -> None:
        with self._lock:  # `stop` may still be at its last line
            self._server.destroy()
        raise CallServer.Stopped


class Unary:
    """Answers a call of one message with what `answer` makes of it."""

    def __init__(self, call: Call, answer: Callable[[bytes], bytes]) -> None:
        """`answer` may raise `Refused`."""
        self._call = call
        self._answer = answer
        call.begin(self)
        call.ask()

    def received(self, message: bytes) -> None:
        try:
            reply = self._answer(message)
        except Refused as refused:
            self._call.finish(refused.code, str(refused))
        except Exception as error:
            _log.exception("%s failed", self._call.method)
            self._call.finish(StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        else:
            self._call.finish(message=reply)

    def half_closed(self) -> None:
        self._call.finish(StatusCode.INVALID_ARGUMENT, "a message is missing")

    def ended(self) -> None:
        pass


class Refused(Exception):
    """Ends a call with `code`; the text says why."""

    def __init__(self, code: StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


def unimplemented(_message: bytes) -> bytes:
    """The answer to a method that does not exist."""
    raise Refused(StatusCode.UNIMPLEMENTED, "there is no such method")
