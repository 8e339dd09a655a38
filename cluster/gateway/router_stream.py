"""One multiplexed stream to one router, kept open: connect, read events, reconnect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc
import grpc.aio

from cluster.router.stream_options import CLIENT_OPTIONS
from workers.pb import generation_pb2 as pb
from workers.pb import generation_pb2_grpc

log = logging.getLogger(__name__)

_RETRY_S = 0.1  # between two streams; gRPC itself spaces the attempts to connect


class RouterStream:
    """The stream to one router. `state` is what the router last said of itself, "" while there is no stream.

    `on_event(stream, event)` is called for each event, `on_change(stream)` when `state` changed; both in the loop.
    """

    def __init__(
        self,
        router: str,
        address: str,
        on_event: Callable[[RouterStream, pb.Event], None],
        on_change: Callable[[RouterStream], None],
    ) -> None:
        self.router = router
        self.address = address
        self.state = ""
        self.retired = False  # the router left the fleet: finish what is open, take nothing new
        self.n_open = 0  # requests that run on it; the session counts
        self._on_event = on_event
        self._on_change = on_change
        self._commands: asyncio.Queue[pb.Command] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name=f"stream to {router}")

    def send(self, command: pb.Command) -> None:
        """Queue a command; one that the stream breaks under is lost with it."""
        self._commands.put_nowait(command)

    def close(self) -> asyncio.Task[None]:
        """End the stream; the task returned is done once the connection is closed."""
        self._task.cancel()
        return self._task

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self.address, options=CLIENT_OPTIONS) as channel:
            stub = generation_pb2_grpc.GenerationStub(channel)
            while True:
                try:
                    await self._stream(stub)
                    reason = "the router ended it"
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                except Exception:
                    log.exception("router %s at %s: the stream failed", self.router, self.address)
                    reason = "an error of our own"
                if self.state:
                    log.warning("router %s at %s: stream lost (%s)", self.router, self.address, reason)
                    self._set_state("")
                await asyncio.sleep(_RETRY_S)

    async def _stream(self, stub: generation_pb2_grpc.GenerationAsyncStub) -> None:
        """One stream, from the router's first word to the last."""
        self._commands = asyncio.Queue()  # what a broken stream left unsent belongs to other routers by now
        call = stub.Stream(wait_for_ready=True)
        writer = asyncio.create_task(self._write(call))
        try:
            async for event in call:
                if event.state:
                    self._set_state(event.state)
                if event.outputs:
                    self._on_event(self, event)
        finally:
            writer.cancel()
            call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.Command, pb.Event]) -> None:
        try:
            while True:
                await call.write(await self._commands.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream broke; its reader says so

    def _set_state(self, state: str) -> None:
        self.state = state
        self._on_change(self)
