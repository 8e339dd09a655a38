"""One multiplexed stream to one router, kept open: connect, read events, reconnect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import ExpertMeshError, RequestError
from cluster.gateway.prefixes import SeenPrefixes
from cluster.router.codec import MESSAGE_BYTES, ROUTER_KEY, STREAM_METHOD, decode_queue
from cluster.router.queue import Queue
from workers.pb import generation_pb2 as pb
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.serving import channel_options

log = logging.getLogger(__name__)

_RETRY_S = 0.1  # between two streams; gRPC itself spaces the attempts to connect
_PULSE_S = 1.0  # between two questions whether the router lives, and the time it has to answer
_MISSED = 2  # answers; computing a prompt anew elsewhere costs more than a second


class RouterStream:
    """The stream to one router. `state` is what the router last said of itself, "" while there is no stream.

    `on_event(stream, event)` is called for each event, `on_change(stream)` when `state` changed; both in the loop.
    """

    def __init__(
        self,
        router: str,
        address: str,
        credentials: Credentials,
        on_event: Callable[[RouterStream, pb.Event], None],
        on_change: Callable[[RouterStream], None],
    ) -> None:
        self.router = router
        self.address = address
        self._credentials = credentials
        self._said = ""  # why there is no stream, as it was logged
        self.state = ""
        self.queue: Queue | None = None  # as the router last told, with what went to it since
        self.seen = SeenPrefixes()  # what went to it, as far as it can be of use
        self.retired = False  # the router left the fleet: finish what is open, take nothing new
        self.n_open = 0  # requests that run on it; the session counts
        self._on_event = on_event
        self._on_change = on_change
        self._commands: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name=f"stream to {router}")

    def send(self, command: pb.Command) -> None:
        """Queue a command; one that the stream breaks under is lost with it."""
        self._commands.put_nowait(command)

    def refuse(self, tenant: str) -> RequestError | None:
        """Why the router would not take one more request of `tenant`, by what it last told; None: it would."""
        return None if self.queue is None else self.queue.refuse(tenant)

    def submit(self, command: pb.Command, tenant: str, prefixes: Sequence[int]) -> None:
        """Let a request run there, whose prompt begins with `prefixes`."""
        self.n_open += 1
        self.seen.add(prefixes)
        if self.queue is not None:
            self.queue.add(tenant)
        self.send(command)

    def close(self) -> asyncio.Task[None]:
        """End the stream; the task returned is done once the connection is closed."""
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        # A task that is cancelled while its call fails hears nothing of it: gRPC takes the exception for the call's.
        # The task's own count of cancellations is right in any case.
        while not self._task.cancelling():
            try:
                # A channel for every stream: with TLS it takes up the files as they are now.
                async with self._channel() as channel:
                    await self._stream(channel)
                reason = "the router ended it"
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except ExpertMeshError as error:
                reason = str(error)
            except Exception:
                log.exception("router %s at %s: the stream failed", self.router, self.address)
                reason = "an error of our own"
            if reason != self._said:
                log.warning("router %s at %s: no stream (%s)", self.router, self.address, reason)
            self._said = reason
            if self.state:
                self._set_state("")
            await asyncio.sleep(_RETRY_S)

    def _channel(self) -> grpc.aio.Channel:
        secured, options = self._credentials.for_channel(), channel_options(MESSAGE_BYTES)
        if secured is None:
            return grpc.aio.insecure_channel(self.address, options)
        return grpc.aio.secure_channel(self.address, secured, options)

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        """One stream, from the router's first word to the last."""
        self._commands = asyncio.Queue()  # what a broken stream left unsent belongs to other routers by now
        stream: Any = channel.stream_stream(STREAM_METHOD, pb.Command.SerializeToString, pb.Event.FromString)
        call = stream(metadata=(*self._credentials.metadata, (ROUTER_KEY, self.router)))
        writer = asyncio.create_task(self._write(call))
        pulse = asyncio.create_task(self._feel(health_pb2_grpc.HealthStub(channel).Check, call))
        try:
            async for event in call:
                self._said = ""
                if event.HasField("queue"):
                    self.queue = decode_queue(event.queue)
                if event.state:
                    self._set_state(event.state)
                if event.outputs:
                    self._on_event(self, event)
        except asyncio.CancelledError:
            if pulse.done() and not self._task.cancelling():  # it was the call that was cancelled, not this task
                raise ExpertMeshError("it does not answer") from None
            raise
        finally:
            writer.cancel()
            pulse.cancel()
            call.cancel()

    async def _feel(self, check: Any, call: grpc.aio.StreamStreamCall[pb.Command, pb.Event]) -> None:
        """End the stream of a router that does not answer: one that is stopped or stuck keeps its connection."""
        missed = 0
        while missed < _MISSED:
            await asyncio.sleep(_PULSE_S)
            began = asyncio.get_running_loop().time()
            try:
                await check(health_pb2.HealthCheckRequest(), timeout=_PULSE_S)
                missed = 0
            except grpc.aio.AioRpcError as error:
                late = asyncio.get_running_loop().time() - began > 2 * _PULSE_S  # it was us who stood still
                missed += error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not late
        call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.Command, pb.Event]) -> None:
        try:
            while True:
                await call.write(await self._commands.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream broke; its reader says so

    def _set_state(self, state: str) -> None:
        self.state = state
        if not state:
            self.queue, self.seen = None, SeenPrefixes()
        self._on_change(self)
