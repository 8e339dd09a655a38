"""A Ray cluster to join: whether it is there, asked before Ray itself asks, which takes minutes and hears no Ctrl-C."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import StartError

_CONNECT_S = 4.0
_ANSWER_S = 4.0  # both together less than the ten seconds for which somebody would wait
_ELSEWHERE = "unset RAY_ADDRESS or --ray-address to start one here"


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
        _ask(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except OSError as error:
        where = f"{address} ({found})" if found != address else address
        raise StartError(f"no Ray at {where}: {error.strerror or error}; {_ELSEWHERE}") from error
    return found


def _ask(target: str) -> None:
    """Raises ConnectionError unless a gRPC server answers there, as that of a Ray does, whatever it answers."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # Ray has the certificates, and says so if they are wrong
        return
    with grpc.insecure_channel(target, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(f"nothing answers within {_ANSWER_S:g} s") from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise ConnectionError("something else listens there") from error


def _running_here() -> str:
    services: Any = import_module("ray._private.services")
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        raise StartError(
            f"ray_address: `auto`, but {' '.join(str(error).split()).rstrip('.')}; {_ELSEWHERE}"
        ) from error
