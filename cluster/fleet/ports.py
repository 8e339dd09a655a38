"""A port for a server of somebody else's that has to be told one: nobody can take it before that server binds it."""

from __future__ import annotations

import contextlib
import socket

# Held until this process ends. A port that was only found free can be drawn by any connection before it is bound: it
# lies in the range from which the system gives ports away.
_held: list[socket.socket] = []


def reserve_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that from now on only servers of this user can bind which set SO_REUSEPORT."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind((host, 0))  # and does not listen: connections go to whoever does
    _held.append(holder)
    return int(holder.getsockname()[1])


def free_port(host: str, first: int) -> int:
    """`first` if it is free, else any that is. Somebody else may take it before it is bound."""
    for port in (first, 0):
        with contextlib.suppress(OSError), socket.create_server((host, port)) as found:
            return int(found.getsockname()[1])
    raise OSError(f"no port of {host} is free")
