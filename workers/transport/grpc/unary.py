"""Calls of one message and one answer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from grpc import StatusCode

from workers.transport.grpc.call import Call, Handler
from workers.transport.grpc.http2_outbox import MESSAGE_PREFIX

_log = logging.getLogger(__name__)
_MOST_BYTES = 1 << 16


class Refused(Exception):
    """Ends a call with `code`; the text says why."""

    def __init__(self, code: StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class Unary(Handler):
    """Answers a call of one message with what `answer` makes of it. A `Sink`."""

    missing = 0

    def __init__(self, call: Call, answer: Callable[[bytes], bytes]) -> None:
        """`answer` may raise `Refused`."""
        self.received = 0
        self.sink = self
        self._call = call
        self._answer = answer
        self._content = bytearray()
        call.begin(self)

    def whole(self, message: memoryview) -> bool:
        """See `Sink`."""
        return False

    def take(self, data: memoryview) -> None:
        """See `Sink`."""
        if len(self._content) + len(data) > _MOST_BYTES:
            self._call.finish(StatusCode.RESOURCE_EXHAUSTED, f"a message of more than {_MOST_BYTES} bytes")
        else:
            self._content += data

    def place(self) -> memoryview:
        """See `Sink`."""
        return memoryview(b"")

    def placed(self, n: int) -> None:
        """See `Sink`."""

    def half_closed(self) -> None:
        """See `Handler`."""
        try:
            self._call.send((self._answer(self._message()),))
        except Refused as refused:
            self._call.finish(refused.code, str(refused))
        except Exception as error:
            _log.exception("%s failed", self._call.method)
            self._call.finish(StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        else:
            self._call.finish()

    def _message(self) -> bytes:
        if len(self._content) < MESSAGE_PREFIX.size:
            raise Refused(StatusCode.INVALID_ARGUMENT, "a message is missing")
        is_compressed, n_bytes = MESSAGE_PREFIX.unpack_from(self._content)
        message = bytes(self._content[MESSAGE_PREFIX.size :])
        if is_compressed:
            raise Refused(StatusCode.UNIMPLEMENTED, "compression was not offered")
        if len(message) != n_bytes:
            raise Refused(StatusCode.INVALID_ARGUMENT, f"{len(message)} bytes where one message of {n_bytes} was due")
        return message


def unimplemented(_message: bytes) -> bytes:
    """Answers calls of what is not served here."""
    raise Refused(StatusCode.UNIMPLEMENTED, "there is no such method")
