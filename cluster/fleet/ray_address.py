"""A Ray cluster to join: whether it is there, asked before Ray itself asks, which takes minutes and hears no Ctrl-C."""

from __future__ import annotations

import socket
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import StartError

_CONNECT_S = 5.0


def check_there(address: str) -> str:
    """`host:port` of the cluster at `address` (or of the one on this machine, for `auto`). StartError if it is gone."""
    found = _running_here() if address == "auto" else address
    parts = urlsplit(found if "://" in found else f"//{found}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise StartError(f"ray_address: {address!r} is neither `auto` nor HOST:PORT")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        where = f"{address} ({found})" if found != address else address
        raise StartError(
            f"no Ray at {where}: {error.strerror or error}; unset RAY_ADDRESS or --ray-address to start one here"
        ) from error
    return found


def _running_here() -> str:
    services: Any = import_module("ray._private.services")
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        raise StartError(
            f"ray_address: `auto`, but {' '.join(str(error).split())} "
            "Unset RAY_ADDRESS or --ray-address to start one here"
        ) from error
