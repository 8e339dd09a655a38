"""A gRPC server that one thread drives: it waits for sockets, handles what came and answers, all by itself.

gRPC's own Python server hands every message from a polling thread to a thread of its pool, and waits in that one for
another hand-off after every message sent. For a worker that computes one batch at a time this buys nothing: on an
exchange of a few rows the hand-offs took longer than the bytes.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable
from contextlib import suppress

from workers.transport.grpc.call import Call, Connection
from workers.transport.grpc.http2_outbox import ConnectionLost
from workers.transport.grpc.options import set_options

_log = logging.getLogger(__name__)
_BACKLOG = 128


class CallServer:
    """Listens on one address and hands every call to `accept`, which begins or finishes it.

    One thread calls `take` until it raises `Stopped`; `start` and `stop` are for others.
    """

    class Stopped(Exception):
        """There will be no further events."""

    def __init__(self, host: str, port: int, accept: Callable[[Call], None]) -> None:
        """Port 0: any. Raises OSError when that cannot be had."""
        self._accept = accept
        self._connections: dict[int, Connection] = {}
        try:
            self._listener = _listening(host, port)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error}") from None
        self.port: int = self._listener.getsockname()[1]
        self._poll = select.epoll()
        self._waker, self._woken = socket.socketpair()
        self._poll.register(self._woken, select.EPOLLIN)

    def start(self) -> None:
        """Take calls from now on."""
        self._poll.register(self._listener, select.EPOLLIN)

    def stop(self) -> None:
        """Let `take` end every call and raise `Stopped`."""
        with suppress(OSError):  # it has stopped
            self._waker.send(b"\0")

    def take(self, wait: bool) -> bool:
        """Handle what has happened, waiting for something if there is nothing and `wait`; whether there was any."""
        events, is_stopping = self._poll.poll(-1 if wait else 0), False
        for file, event in events:
            connection = self._connections.get(file)
            if connection is not None:
                try:
                    connection.handle(event)
                except ConnectionLost as lost:
                    _log.debug("%s: %s", connection.peer, lost)
                    self._forget(connection)
                except Exception:
                    _log.exception("%s: its calls failed", connection.peer)  # the others go on
                    self._forget(connection)
            elif file == self._listener.fileno():
                self._connect()
            else:
                is_stopping = True
        if is_stopping:
            self._close()
            raise CallServer.Stopped
        return bool(events)

    def _connect(self) -> None:
        with suppress(OSError):  # it is gone already
            sock, _ = self._listener.accept()
            set_options(sock)
            self._connections[sock.fileno()] = Connection(sock, self._accept, self._poll)

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.file]
        connection.close()

    def _close(self) -> None:
        for connection in tuple(self._connections.values()):
            self._forget(connection)
        for each in (self._poll, self._listener, self._waker, self._woken):
            each.close()


def _listening(host: str, port: int) -> socket.socket:
    family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family)
    try:
        # A port whose last connections are still being buried is free; one that somebody listens on is not.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
