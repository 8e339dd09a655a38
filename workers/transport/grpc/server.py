"""The expert worker's side of the gRPC transport: a server around an ExpertShard."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import grpc.aio
import numpy as np

from workers import wire
from workers.errors import ExpertNotHeld, WireError
from workers.pb import experts_pb2 as pb
from workers.shard import ExpertShard
from workers.transport.base import Accepted, Acceptor, Declined
from workers.transport.batcher import Batcher, reason
from workers.transport.grpc import peer_weights
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.handshake import EXPERTS_SERVICE, Hello, key
from workers.transport.grpc.serving import Context, Server, text_values
from workers.transport.threads import LoopThread
from workers.wire import FRAME_BYTES, HEADER_BYTES, Frame, Header

_log = logging.getLogger(__name__)
_MOST_STREAMS = 256
_SOON_READ_BYTES = 1 << 28  # weights that are read in some ten milliseconds


class ExpertServer:
    """Serves one shard to any number of routers: Exchange, Weights, Describe and gRPC's health service.

    An asyncio loop in a thread of its own receives and answers. Few rows of a router that is alone are computed there
    where the weights they need are soon read; everything else in one other thread, and what arrives meanwhile is its
    next batch.
    """

    def __init__(
        self,
        shard: ExpertShard,
        worker: str,
        host: str,
        port: int = 0,
        *,
        model: str,
        credentials: Credentials,
        epoch: Callable[[], int] = int,
        ways: Sequence[Callable[[Batcher], Acceptor]] = (),
    ) -> None:
        """Listens on `host`:`port` alone (0: any free one). Raises OSError when that cannot be had.

        model: `Checkpoint.fingerprint`. epoch: of the placement that it serves. ways: make what serves a router on
        this host faster, with the same batcher.
        """
        self._shard = shard
        self._worker, self._model, self._epoch = worker, model, epoch
        self._batcher = Batcher(shard)
        self._ways = [make(self._batcher) for make in ways]
        self._credentials = credentials
        self._streams = 0
        self._accepted: set[Accepted] = set()  # their faster ways
        self._in_hand = 0  # messages that came and are not answered
        self._loop = LoopThread("expert-server")
        try:
            self.address = self._loop.run(self._listen(host, port))
        except OSError as error:
            self._loop.close()
            raise OSError(f"expert worker {worker} {error}") from None

    @property
    def batcher(self) -> Batcher:
        """What computes, and counts that."""
        return self._batcher

    def start(self) -> None:
        """Take requests from now on; the shard is loaded."""
        self._loop.run(self._start())

    def drain(self) -> None:
        """Say NOT_SERVING; the routers that are connected are still answered."""
        self._loop.run(self._server.set_serving(False))

    def stop(self, grace_s: float) -> None:
        """Drain, answer what has arrived (at most `grace_s` seconds), then close every stream. May be repeated."""
        if not self._loop.is_alive:
            return
        self._loop.run(self._stop(grace_s))
        self._loop.close()
        while self._accepted:  # of streams that ended too late to close them
            self._accepted.pop().close()

    def numbers(self) -> dict[str, object]:
        """For people: experts held, bytes, rows and seconds computed, open streams."""
        return {
            "experts": self._shard.n_held,
            "weight_bytes": self._shard.weight_bytes,
            "rows": self._batcher.rows,
            "compute_seconds": round(self._batcher.compute_seconds, 3),
            "waited_seconds": round(self._batcher.waited_seconds, 3),
            "streams": self._streams,
            "streams_over_shared_memory": len(self._accepted),
        }

    async def _listen(self, host: str, port: int) -> str:
        self._idle = asyncio.Event()
        self._idle.set()
        self._server = Server(self._credentials, FRAME_BYTES)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            # No serialisers: frames are the bytes on the wire.
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Weights": grpc.unary_stream_rpc_method_handler(self._weights, pb.WeightsRequest.FromString),
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
            ),
        }
        self._server.add(EXPERTS_SERVICE, handlers)
        await self._server.set_serving(False)
        return self._server.bind(host, port)

    async def _start(self) -> None:
        await self._server.start()
        await self._server.set_serving(True)

    async def _stop(self, grace_s: float) -> None:
        await self._server.set_serving(False)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        await self._server.stop()

    async def _exchange(self, _frames: object, context: Context) -> None:
        """One router, for as long as it lives."""
        ended, nonsense = threading.Event(), asyncio.get_running_loop().create_future()
        # What ends with it does so without waiting: a stream that ends may be cancelled at each await, also here.
        with ExitStack() as stream:
            stream.callback(ended.set)
            accepted = await self._greet(context, nonsense, stream)
            self._count_stream(1)
            stream.callback(self._count_stream, -1)
            if accepted is not None:
                accepted.start()
            try:
                while (first := await _read(context, nonsense)) is not grpc.aio.EOF:
                    self._take_in_hand(1)
                    try:
                        await self._answer(first, context, lambda: not ended.is_set())
                    finally:
                        self._take_in_hand(-1)
            except WireError as error:
                await self._abort(context, str(error))

    async def _greet(self, context: Context, nonsense: asyncio.Future[str], stream: ExitStack) -> Accepted | None:
        """Refuse whoever awaits another worker or model; else say who this is, and which faster way it takes, which
        ends with `stream`.

        nonsense: why the stream has to end, from that way.
        """
        values = text_values(context.invocation_metadata())
        asked = Hello.from_metadata(values)
        hello = Hello(self._worker, asked.router, self._model, self._epoch())
        if (objection := hello.objection(asked)) is not None:
            _log.warning("%s (router %r) is refused: %s", context.peer(), asked.router, objection)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, objection)
        if self._streams >= _MOST_STREAMS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MOST_STREAMS} streams are open already")
        accepted, words = None, list(hello.metadata)
        loop = asyncio.get_running_loop()

        def end(reason: str) -> None:
            loop.call_soon_threadsafe(lambda: None if nonsense.done() else nonsense.set_result(reason))

        for way in self._ways:
            offer = values.get(key(way.name, "offer"))
            if offer is None or accepted is not None:
                continue
            accepting = asyncio.ensure_future(self._loop.off_loop(way.accept, offer, asked.router, end))
            stream.callback(accepting.add_done_callback, self._leave)  # nobody may wait for it any more
            try:
                accepted = await asyncio.shield(accepting)
                self._accepted.add(accepted)
                words.append((key(way.name, "accept"), accepted.text))
            except Declined as declined:
                words.append((key(way.name, "declined"), str(declined)))
        await context.send_initial_metadata(tuple(words))
        return accepted

    def _leave(self, accepting: asyncio.Future[Accepted]) -> None:
        if not accepting.cancelled() and accepting.exception() is None:
            self._accepted.discard(accepting.result())
            accepting.result().close()

    def _count_stream(self, streams: int) -> None:
        self._streams += streams

    def _take_in_hand(self, messages: int) -> None:
        self._in_hand += messages
        if self._in_hand:
            self._idle.clear()
        else:
            self._idle.set()

    async def _abort(self, context: Context, reason: str) -> None:
        """End a stream of which nothing can be understood any more."""
        _log.warning("stream of %s closed: %s", context.peer(), reason)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)

    async def _answer(self, first: bytes, context: Context, is_wanted: Callable[[], bool]) -> None:
        """Receive the rest of a message and send the reply. Raises WireError for a message that makes no sense.

        Whatever else is raised on the way is said in the reply: the router repairs it elsewhere.
        """
        header, message = await _whole(first, context)
        try:
            frames = await self._respond(header, message, is_wanted)
        except WireError:
            raise
        except Exception as error:
            frames = wire.error_frames(header.tag, reason(header, error))
        for frame in frames:
            await context.write(b"".join(frame))

    async def _respond(self, header: Header, message: memoryview, is_wanted: Callable[[], bool]) -> Iterable[Frame]:
        """The frames of the reply; none if nobody wants it any more."""
        is_here = self._streams == 1 and self._is_soon_done(header)
        if is_here and (reply := self._batcher.answer(message)) is not None:
            return ((reply,),)
        job = self._batcher.enqueue(header, wire.request(header, message[HEADER_BYTES:]), is_wanted)
        result = await self._loop.off_loop(self._batcher.outcome, job)
        if result is None:
            return ()
        if isinstance(result, str):
            return wire.error_frames(header.tag, result)
        y_PD, compute_ns = result
        return wire.reply_frames(header.tag, header.n_tokens, y_PD, compute_ns)

    def _is_soon_done(self, header: Header) -> bool:
        """Whether it takes milliseconds: the loop has to say meanwhile that this process lives."""
        layer = header.tag.layer
        n_experts = len(self._shard.weights(layer)) if layer < self._shard.n_layers else 0
        return min(header.n_pairs, n_experts) * self._shard.expert_bytes <= _SOON_READ_BYTES

    async def _weights(self, request: pb.WeightsRequest, context: Context) -> AsyncIterator[bytes]:
        """One replica, for another worker."""
        asked = Hello.from_metadata(text_values(context.invocation_metadata()))
        objection = Hello(self._worker, asked.router, self._model, self._epoch()).objection(asked)
        if objection is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, objection)
        try:
            said, tensors = await self._loop.off_loop(peer_weights.words, self._shard, request.layer, request.expert)
        except ExpertNotHeld as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        await context.send_initial_metadata(said)
        async for piece in peer_weights.pieces(tensors):
            yield piece

    async def _describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        return pb.DescribeReply(
            worker=self._worker,
            pid=os.getpid(),
            slots=[pb.Slot(layer=slot.layer, expert=slot.expert, rows=slot.rows) for slot in self._shard.slots],
            weight_bytes=self._shard.weight_bytes,
            rows=self._batcher.rows,
            compute_seconds=self._batcher.compute_seconds,
            streams=self._streams,
        )


async def _read(context: Context, nonsense: asyncio.Future[str]) -> Any:
    """The next frame. Raises WireError where a faster way of the stream makes no sense any more."""
    frame = asyncio.ensure_future(context.read())
    try:
        await asyncio.wait((frame, nonsense), return_when=asyncio.FIRST_COMPLETED)
        if nonsense.done():
            raise WireError(nonsense.result())
        return frame.result()
    finally:
        frame.cancel()  # nobody awaits it any more
        del frame  # what it raised holds this call, which shall not hold it: the stream's rings would stay with both


async def _whole(first: bytes, context: Context) -> tuple[Header, memoryview]:
    """A message, header and all, that begins with `first`. Raises WireError when the rest does not follow."""
    header = wire.parse_head(first)
    wire.check_request(header)
    left = HEADER_BYTES + header.payload_bytes
    wire.check_frame(len(first), left)
    if len(first) == left:
        return header, memoryview(first)
    # numpy leaves the pages untouched: an announced size costs memory only as its bytes arrive.
    message, at, frame = np.empty(left, np.uint8).data, 0, first
    while True:
        message[at : at + len(frame)] = frame
        at += len(frame)
        if at == left:
            return header, message
        frame = await context.read()
        if frame is grpc.aio.EOF:
            raise WireError("the stream ended within a message")
        wire.check_frame(len(frame), left - at)
