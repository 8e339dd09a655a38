"""The expert worker's side of the gRPC transport: a server around an ExpertShard."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from workers import wire
from workers.errors import WireError
from workers.pb import experts_pb2 as pb
from workers.shard import ExpertShard
from workers.transport.answer import answer
from workers.transport.batcher import Batcher
from workers.transport.grpc_options import EXPERTS_SERVICE, SERVER_OPTIONS

_log = logging.getLogger(__name__)
_MAX_STREAMS = 256  # a stream holds a thread; the threads are started as they are needed


class ExpertServer:
    """Serves one shard to any number of routers: Exchange, Describe and gRPC's health service."""

    def __init__(self, shard: ExpertShard, worker: str, host: str, port: int = 0) -> None:
        """Listens on `host`:`port` alone (0: any free port). Raises OSError when that cannot be had."""
        self._shard = shard
        self._worker = worker
        self._batcher = Batcher(shard)
        self._health = health.HealthServicer()
        self._idle = threading.Condition()
        self._in_flight = 0
        self._streams = 0
        self._server = grpc.server(ThreadPoolExecutor(_MAX_STREAMS, "experts"), options=_options())
        experts = grpc.method_handlers_generic_handler(EXPERTS_SERVICE, self._handlers())
        self._server.add_generic_rpc_handlers((experts,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        bracketed = f"[{host}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{bracketed}:{port}")
        except RuntimeError as error:
            raise OSError(f"expert worker {worker} cannot listen on {bracketed}:{port}: {error}") from None
        self.address = f"{bracketed}:{bound}"

    def start(self) -> None:
        """Take requests from now on; the shard is loaded."""
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Say NOT_SERVING; the routers that are connected are still answered."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def stop(self, grace_s: float) -> None:
        """Drain, answer what has arrived (at most `grace_s` seconds), then close every stream."""
        self.drain()
        with self._idle:
            self._idle.wait_for(lambda: self._in_flight == 0, grace_s)
        self._server.stop(0).wait()

    def numbers(self) -> dict[str, object]:
        """For people: experts held, bytes, rows and seconds computed, open streams."""
        return {
            "experts": len(self._shard.slots),
            "weight_bytes": self._shard.weight_bytes,
            "rows": self._batcher.rows,
            "compute_seconds": round(self._batcher.compute_seconds, 3),
            "streams": self._streams,
        }

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        return {
            # No serialisers: frames are the bytes on the wire.
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
            ),
        }

    def _exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._count(streams=1)
        try:
            for first in frames:
                self._count(in_flight=1)
                try:
                    yield from self._answer(first, frames, context.is_active)
                finally:
                    self._count(in_flight=-1)
        except WireError as error:
            _log.warning("stream of %s closed: %s", context.peer(), error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._count(streams=-1)

    def _answer(self, first: bytes, frames: Iterator[bytes], is_wanted: Callable[[], bool]) -> Iterator[bytes]:
        """The frames of the reply. Raises WireError when the frames of the stream can no longer be told apart."""
        header = wire.parse(first)
        request = wire.request(header, wire.payload(header, first, lambda: _following(frames)))
        result = answer(self._shard, self._batcher, header, request, is_wanted)
        if result is None:
            return iter(())
        if isinstance(result, str):
            return wire.error_frames(header.tag, result)
        return wire.reply_frames(header.tag, header.n_tokens, *result)

    def _describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return pb.DescribeReply(
            worker=self._worker,
            pid=os.getpid(),
            slots=[pb.Slot(layer=slot.layer, expert=slot.expert, rows=slot.rows) for slot in self._shard.slots],
            weight_bytes=self._shard.weight_bytes,
            rows=self._batcher.rows,
            compute_seconds=self._batcher.compute_seconds,
            streams=self._streams,
        )

    def _count(self, *, in_flight: int = 0, streams: int = 0) -> None:
        with self._idle:
            self._in_flight += in_flight
            self._streams += streams
            if self._in_flight == 0:
                self._idle.notify_all()

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in ("", EXPERTS_SERVICE):
            self._health.set(service, status)


def _following(frames: Iterator[bytes]) -> bytes:
    for frame in frames:
        return frame
    raise WireError("the stream ended within a message")


def _options() -> list[tuple[str, int]]:
    return [(name.decode(), value) for name, value in SERVER_OPTIONS]
