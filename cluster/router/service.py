"""The Generation service of one router: gateways' streams on one side, the engine's step loop on the other."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from cluster.errors import RequestError, StartError
from cluster.router.admission import Admission
from cluster.router.codec import MESSAGE_BYTES, ROUTER_KEY, SERVICE, decode_sampling
from cluster.router.engine_thread import EngineLike, EngineThread, Refused
from cluster.router.gateway_stream import GatewayStream
from cluster.router.params import StepOutput
from workers.pb import generation_pb2 as pb
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.serving import Context, Server, text_values

if TYPE_CHECKING:  # the service itself needs no torch
    from cluster.router.exchange.exchange import Exchange

log = logging.getLogger(__name__)

# A gateway that reads nothing while so much waits for it is gone; its requests go on through another. Tokens with
# log-probabilities take up to 300 bytes, and so does each token of a scored prompt.
_MAX_PENDING_TOKENS = 65536
_MAX_PENDING_BYTES = 32 * 1024 * 1024
_TELL_S = 0.05  # from a change of the queue to the word of it


class GenerationService:
    """Serves `engine` on `host:port` (port 0: any free one) until `stop`.

    `state` is what gateways hear: only "ready" routers get new requests. `exchange` is the engine's
    way to its experts when they are elsewhere; only its numbers are asked for here. All methods belong to the
    asyncio loop that called `start`.
    """

    def __init__(
        self,
        engine: EngineLike,
        host: str,
        port: int = 0,
        *,
        credentials: Credentials,
        router: str = "router-0",
        state: str = "ready",
        exchange: Exchange | None = None,
        admission: Admission | None = None,
    ) -> None:
        """`admission`: whom to refuse at once; None: the engine alone refuses, between two steps."""
        self._admission = admission
        self.router = router
        self.state = state
        self.address = f"{host}:{port}"  # with the port that it got, once it has started
        self._host, self._port = host, port
        self._credentials = credentials
        self._engine = engine
        self._exchange = exchange
        self._thread = EngineThread(engine, self._hand_over)
        self._streams: dict[int, GatewayStream] = {}  # by number; each has its open requests
        self._numbers = count()  # of streams, and of requests
        self._inbox: list[StepOutput | Refused] = []
        self._inbox_lock = threading.Lock()
        self._telling: asyncio.TimerHandle | None = None

    @property
    def n_open(self) -> int:
        """Requests that were taken and have not ended."""
        return sum(len(stream.open) for stream in self._streams.values())

    @property
    def n_gateways(self) -> int:
        """Gateways that have a stream open."""
        return len(self._streams)

    async def start(self) -> None:
        """Listen and start the step loop.

        StartError when the address cannot be bound; ExpertMeshError when others could reach it without TLS.
        """
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = Server(self._credentials, MESSAGE_BYTES)
        stream = grpc.stream_stream_rpc_method_handler(self._serve, pb.Command.FromString, pb.Event.SerializeToString)
        describe = grpc.unary_unary_rpc_method_handler(
            self._describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
        )
        self._server.add(SERVICE, {"Stream": stream, "Describe": describe})
        try:
            self.address = self._server.bind(self._host, self._port)
        except OSError as error:
            raise StartError(f"router {self.router} {error}") from error
        await self.set_state(self.state)
        self._thread.start()
        await self._server.start()

    async def set_state(self, state: str) -> None:
        """Tell every gateway and the health service: "starting", "ready", "isolated" or "draining"."""
        self.state = state
        await self._server.set_serving(state == "ready")
        for stream in self._streams.values():
            stream.announce(state)

    async def isolate(self) -> None:
        """Serve nobody until the state is another: the gateways continue what is open on other routers."""
        log.warning("router %s cannot reach what others reach; %d requests go on elsewhere", self.router, self.n_open)
        await self.set_state("isolated")
        for stream in list(self._streams.values()):
            self._drop(stream, list(stream.open))
            stream.close()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and let the open ones finish; False when some were still open after `timeout_s`."""
        await self.set_state("draining")
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("router %s: %d requests outlived the drain; they go on elsewhere", self.router, self.n_open)
            return False
        return True

    async def stop(self) -> None:
        """End every stream at once (gateways continue what was open on other routers) and the step loop."""
        if self._telling is not None:
            self._telling.cancel()
        await self._server.stop()
        for stream in self._streams.values():  # here, because their own handlers may end later than the step loop
            self._drop(stream, list(stream.open))
        if not await asyncio.to_thread(self._thread.stop, 10.0):
            log.warning("router %s: the step in progress did not end; its thread is left behind", self.router)

    def describe(self) -> pb.DescribeReply:
        """The numbers of engine and exchange that DescribeReply has a field for."""
        fields = pb.DescribeReply.DESCRIPTOR.fields_by_name
        known = {name: value for name, value in self.numbers().items() if name in fields}
        return pb.DescribeReply(router=self.router, pid=os.getpid(), state=self.state, **known)

    def numbers(self) -> dict[str, Any]:
        """The numbers of engine and exchange by name, for people and metrics."""
        stats: Any = self._engine.stats()
        return asdict(stats) | ({} if self._exchange is None else self._exchange.numbers())

    # From the gateways.

    async def _serve(self, commands: AsyncIterator[pb.Command], context: Context) -> None:
        """One gateway: commands in, events out. When it ends, for whatever reason, its requests are cancelled."""
        if (awaited := text_values(context.invocation_metadata()).get(ROUTER_KEY)) != self.router:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is router {self.router!r}, not {awaited!r}")
        stream = GatewayStream(next(self._numbers))
        self._streams[stream.number] = stream
        stream.announce(self.state)
        if self._admission is not None:
            stream.tell(self._admission.queue)
        reader = asyncio.create_task(self._read(stream, commands))
        try:
            while (event := await stream.take()) is not None:
                await context.write(event)
        finally:
            reader.cancel()
            del self._streams[stream.number]
            self._drop(stream, list(stream.open))

    async def _describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        return self.describe()

    async def _read(self, stream: GatewayStream, commands: AsyncIterator[pb.Command]) -> None:
        try:
            async for command in commands:
                if command.HasField("submit"):
                    self._submit(stream, command.submit)
                elif command.cancel.request_id in stream.open:
                    self._drop(stream, [command.cancel.request_id])
        except Exception:
            log.exception("router %s: a gateway's stream broke off", self.router)
        finally:
            stream.close()

    def _submit(self, stream: GatewayStream, submit: pb.Submit) -> None:
        self._tell_soon()  # in any case: the gateway took for granted that the request is taken
        if self.state in ("draining", "isolated"):  # another router is asked
            why = "is being stopped" if self.state == "draining" else "cannot reach every expert worker"
            error = RequestError(f"this router {why}", code="draining", status=503, retry_after_s=1)
            stream.refuse(submit.request_id, error)
            return
        if submit.request_id in stream.open:
            error = RequestError(f"request id {submit.request_id} is in use", code="invalid_value", param="request_id")
            stream.refuse(submit.request_id, error)
            return
        # This id says whose request it is, and which of those that had this id.
        engine_id = f"{stream.number}/{next(self._numbers)}/{submit.request_id}"
        if self._admission is not None:
            tenant = submit.sampling.tenant
            admitted_elsewhere = bool(submit.emitted_ids)
            if not admitted_elsewhere and (refusal := self._admission.refuse(tenant)) is not None:
                stream.refuse(submit.request_id, refusal)
                return
            self._admission.taken(engine_id, tenant)
        stream.open[submit.request_id] = engine_id
        self._idle.clear()
        params = decode_sampling(submit.sampling)
        self._thread.submit(engine_id, list(submit.prompt_ids), params, list(submit.emitted_ids))

    def _find(self, engine_id: str) -> tuple[GatewayStream, str] | None:
        """The stream of an open request and its id there; None once it was cancelled."""
        number, _, request_id = engine_id.split("/", 2)
        stream = self._streams.get(int(number))
        return (stream, request_id) if stream is not None and stream.open.get(request_id) == engine_id else None

    def _drop(self, stream: GatewayStream, request_ids: Sequence[str]) -> None:
        if request_ids:
            self._thread.cancel([stream.open[request_id] for request_id in request_ids])
            for request_id in request_ids:
                self._forget(stream, request_id)

    def _forget(self, stream: GatewayStream, request_id: str) -> None:
        engine_id = stream.open.pop(request_id)
        if self._admission is not None:
            self._admission.ended(engine_id)
            self._tell_soon()
        if not self.n_open:
            self._idle.set()

    # To the gateways.

    def _tell_soon(self) -> None:
        """The queue has changed: let the gateways know, those of many changes the last."""
        if self._telling is None:
            self._telling = self._loop.call_later(_TELL_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        if self._admission is not None:
            for stream in self._streams.values():
                stream.tell(self._admission.queue)

    # From the engine.

    def _hand_over(self, outputs: Sequence[StepOutput | Refused]) -> None:
        """In the engine's thread: wake the loop once, however many steps it is behind."""
        with self._inbox_lock:
            asleep = not self._inbox
            self._inbox += outputs
        if asleep:
            try:
                self._loop.call_soon_threadsafe(self._distribute)
            except RuntimeError:  # the loop was closed before the step ended: nobody is left to tell
                log.debug("router %s: outputs after the loop's end", self.router)

    def _distribute(self) -> None:
        with self._inbox_lock:
            outputs, self._inbox = self._inbox, []
        for output in outputs:
            if (found := self._find(output.request_id)) is None:
                continue  # cancelled while the step ran
            stream, request_id = found
            if isinstance(output, Refused):
                stream.refuse(request_id, output.error)
            else:
                stream.put(request_id, output)
            if isinstance(output, Refused) or output.finish is not None:
                self._forget(stream, request_id)
            if stream.pending_tokens > _MAX_PENDING_TOKENS or stream.pending_bytes > _MAX_PENDING_BYTES:
                log.warning("router %s: a gateway reads too slowly; its stream is closed", self.router)
                self._drop(stream, list(stream.open))
                stream.close()
