"""What both ends of an Exchange stream agree on: its name, its addresses, and how a silent peer is noticed."""

from __future__ import annotations

import socket
from contextlib import suppress

EXPERTS_SERVICE = "expertmesh.experts.v1.Experts"
EXCHANGE_METHOD = f"/{EXPERTS_SERVICE}/Exchange"
DESCRIBE_METHOD = f"/{EXPERTS_SERVICE}/Describe"

_IDLE_S, _INTERVAL_S, _PROBES = 10, 2, 3
_UNANSWERED_MS = 15_000


def set_options(sock: socket.socket) -> None:
    """Send at once, and let the kernels find out whether the other machine is there.

    A worker that computes for long answers no ping, but its kernel does; whether the process lives is a matter of
    deadlines.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _INTERVAL_S),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", _UNANSWERED_MS),
    ):
        if hasattr(socket, name):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port`."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def connecting(address: str) -> socket.socket:
    """A socket that is being connected to `address`, or is; it waits, but for this. Raises OSError when it cannot be.

    The name of a host is looked up here. Of its addresses the first one counts that is not refused at once.
    """
    host, port = split_address(address)
    failure: OSError | None = None
    for family, *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family)
        try:
            set_options(sock)
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(place)
            sock.setblocking(True)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure or OSError("the host has no address")
