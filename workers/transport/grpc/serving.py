"""A gRPC server of the cluster, and the options of both ends. Needs no torch.

Every call but the health checks shows the cluster's token. What a stranger can do is bounded by gRPC's core: pings that
come too often, connections without a call and handshakes that do not end are closed.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from workers.transport.grpc.credentials import TLS_NAME, Credentials

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Option = tuple[str, int | str]

# A peer that hangs, or whose machine is gone without a word, is noticed within the sum of both.
_PING_EVERY_MS, _PING_ANSWER_MS = 5000, 5000
_WINDOW_BYTES = 16 << 20
_HTTP2_FRAME_BYTES = (1 << 24) - 1  # the most that HTTP/2 allows
_MOST_WATCHES = 64  # of the health service, which asks for no token
_HEALTH = "/grpc.health.v1.Health/"
# gRPC's limit on a header block counts once the peer has acknowledged it. Until then half a million entries may become
# Python objects at once, of which by default each 700 start a garbage collection: most of the time it would take.
_OBJECTS_BEFORE_COLLECTION = 100_000


def _options(message_bytes: int) -> list[Option]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        # A message of many frames goes out without waiting for the peer to say how much it can take.
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.max_frame_size", _HTTP2_FRAME_BYTES),
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_ANSWER_MS),
        # Where an answer to another ping is already awaited, this limit counts instead, and its default is a minute.
        ("grpc.http2.ping_timeout_ms", _PING_ANSWER_MS),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(message_bytes: int) -> list[Option]:
    """For a client whose messages have at most `message_bytes`."""
    return [
        *_options(message_bytes),
        ("grpc.min_reconnect_backoff_ms", 5000),  # which is also the time that connecting may take
        # Every stream has a channel and a connection of its own: none waits for the back-off of an older one.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.ssl_target_name_override", TLS_NAME),
    ]


def open_channel(address: str, credentials: Credentials, options: list[Option]) -> grpc.Channel:
    """A connection of its own, with TLS where the cluster has it. Raises ExpertMeshError without its files."""
    secured = credentials.for_channel()
    if secured is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, secured, options)


def text_values(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Metadata by name, without what is binary."""
    return {name: value for name, value in metadata or () if isinstance(value, str)}


class Server:
    """Serves on one address. All methods belong to the asyncio loop that made it."""

    def __init__(self, credentials: Credentials, message_bytes: int) -> None:
        """message_bytes: the most of one message."""
        self._credentials = credentials
        self._health = _Health()
        self._names = [""]
        options = [
            *_options(message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
            ("grpc.max_concurrent_streams", 100),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 60_000),  # who belongs here keeps a stream open
            ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
        ]
        self.grpc = grpc.aio.server(options=options, interceptors=(_TokenCheck(credentials),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    def add(self, service: str, handlers: dict[str, Handler]) -> None:
        """Serve the methods of `service`."""
        self._names.append(service)
        self.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    def bind(self, host: str, port: int) -> str:
        """Listen on `host`:`port` alone (0: any free port); the address.

        Raises OSError when that cannot be had, ExpertMeshError when it would be open to other machines without TLS.
        """
        self._credentials.check_exposure(host)
        bracketed = f"[{host}]" if ":" in host else host
        address, credentials = f"{bracketed}:{port}", self._credentials.for_server()
        try:
            if credentials is None:
                bound = self.grpc.add_insecure_port(address)
            else:
                bound = self.grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from None
        return f"{bracketed}:{bound}"

    async def start(self) -> None:
        """Take calls from now on."""
        gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)
        await self.grpc.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service says, of the server and of every service that was added."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self) -> None:
        """End every call at once."""
        await self.grpc.stop(grace=None)


class _Health(health_aio.HealthServicer):  # type: ignore[misc]
    """gRPC's health service. Probes come without a token, so watches are few, and one that is not read holds up none.

    The library writes to a watch while it holds what every change of state waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watches = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if self._watches >= _MOST_WATCHES:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MOST_WATCHES} others watch already")
        self._watches += 1
        latest = _Latest()
        watching = asyncio.create_task(super().Watch(request, latest))
        try:
            while True:
                await context.write(await latest.take())
        finally:
            self._watches -= 1
            watching.cancel()


class _Latest:
    """The context of a watch, as far as the library knows it: the newest of what it wrote."""

    def __init__(self) -> None:
        self._written: asyncio.Queue[health_pb2.HealthCheckResponse] = asyncio.Queue()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        while not self._written.empty():
            self._written.get_nowait()
        self._written.put_nowait(message)

    async def take(self) -> health_pb2.HealthCheckResponse:
        return await self._written.get()


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without the cluster's token before anything of them is read."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        is_open = handler is None or details.method.startswith(_HEALTH)
        return handler if is_open or self._credentials.admits(details.invocation_metadata) else _refusing(handler)


def _refusing(handler: Handler) -> Handler:
    async def refuse(_request: object, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or another cluster's")

    if handler.request_streaming or handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
