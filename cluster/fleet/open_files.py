"""How many files and sockets may be open: what the cluster needs is known before anything starts."""

from __future__ import annotations

import resource

from cluster.errors import StartError

_WANTED = 65_536  # as Ray asks for
_LEAST = 2_048  # Ray's own processes, and a hundred clients at once
_OTHERS = 256  # of HAProxy's, beside those for clients
_MOST_CLIENTS = 4_096


def raise_limit() -> int:
    """Let this process and its children open as many files as they may; how many that is.

    Raises StartError where that is too few to serve, naming the remedy.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, max(_WANTED, soft))
    if most < _LEAST:
        raise StartError(
            f"only {most} files may be open at once, and a cluster needs {_LEAST}: raise the hard limit "
            f"(`ulimit -Hn {_WANTED}` as root, LimitNOFILE= in systemd, --ulimit nofile={_WANTED} for a container)"
        )
    if soft != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def most_clients(limit: int) -> int:
    """Client connections that HAProxy can hold at once where `limit` files may be open.

    Each takes two, and for every fourth it keeps a pipe of two ends.
    """
    return min(_MOST_CLIENTS, (limit - _OTHERS) * 2 // 5)
