"""The expert worker's side of the gRPC transport: a server around an ExpertShard, and the thread that drives both."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from workers.errors import WireError
from workers.pb import experts_pb2 as pb
from workers.shard import ExpertShard
from workers.transport.answer import check
from workers.transport.batcher import Batcher
from workers.transport.grpc.call import Call
from workers.transport.grpc.calls import CallServer
from workers.transport.grpc.exchange import ExchangeStream, Job
from workers.transport.grpc.health import HEALTH_METHOD, Health
from workers.transport.grpc.options import DESCRIBE_METHOD, EXCHANGE_METHOD, EXPERTS_SERVICE
from workers.transport.grpc.unary import Unary, unimplemented

_FLUSH_S = 0.01


class ExpertServer:
    """Serves one shard to any number of routers: Exchange, Describe and gRPC's health check.

    One thread receives, computes and answers. What arrives while it computes is its next batch.
    """

    def __init__(self, shard: ExpertShard, worker: str, host: str, port: int = 0) -> None:
        """Listens on `host`:`port` alone (0: any free port). Raises OSError when that cannot be had."""
        self._shard = shard
        self._worker = worker
        self._batcher = Batcher(shard)
        self._health = Health(EXPERTS_SERVICE)
        self._streams: set[ExchangeStream] = set()
        self._waiting: deque[Job] = deque()  # what is being computed included
        try:
            self._server = CallServer(host, port, self._accept)
        except OSError as error:
            raise OSError(f"expert worker {worker} {error}") from None
        bracketed = f"[{host}]" if ":" in host else host
        self.address = f"{bracketed}:{self._server.port}"
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    def start(self) -> None:
        """Take requests from now on; the shard is loaded."""
        self._server.start()
        self._health.is_serving = True
        self._thread.start()

    def drain(self) -> None:
        """Say NOT_SERVING; the routers that are connected are still answered."""
        self._health.is_serving = False

    def stop(self, grace_s: float) -> None:
        """Drain, answer what has arrived (at most `grace_s` seconds), then close every stream."""
        self.drain()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and (self._waiting or not all(s.is_flushed for s in tuple(self._streams))):
            time.sleep(_FLUSH_S)
        self._server.stop()
        self._thread.join()

    def numbers(self) -> dict[str, object]:
        """For people: experts held, bytes, rows and seconds computed, open streams."""
        return {
            "experts": len(self._shard.slots),
            "weight_bytes": self._shard.weight_bytes,
            "rows": self._batcher.rows,
            "compute_seconds": round(self._batcher.compute_seconds, 3),
            "streams": len(self._streams),
        }

    def at_once(self, message: memoryview) -> memoryview | None:
        """See `Worker`. Where there are several routers, others may be about to wait for the same layer."""
        if self._waiting or len(self._streams) > 1:
            return None
        return self._batcher.answer(message)

    def add(self, job: Job) -> None:
        """See `Worker`."""
        self._waiting.append(job)

    def ended(self, stream: ExchangeStream) -> None:
        """See `Worker`."""
        self._streams.discard(stream)

    def _run(self) -> None:
        try:
            while True:
                self._server.take(wait=True)
                while self._waiting:
                    # Others may wait for the same layer; a router that is alone does not pay for the question.
                    while len(self._streams) > 1 and self._server.take(wait=False):
                        pass
                    self._compute()
        except CallServer.Stopped:
            pass

    def _compute(self) -> None:
        """What waits for the layer of the oldest request, as one batch."""
        jobs = self._next_batch()
        wanted = []
        for job in jobs:
            if job.stream.is_open:
                wanted.append(job)
            else:
                job.stream.drop()
        reply = self._batcher.answer(wanted[0].message) if len(wanted) == 1 else None
        if reply is not None:
            wanted[0].stream.answer_whole(reply)
        else:
            self._answer(wanted)
        for job in jobs:
            self._waiting.remove(job)

    def _answer(self, jobs: list[Job]) -> None:
        """Each stream gets its answers in the order of its jobs."""
        refusals = [self._refusal(job) for job in jobs]
        fitting = [job.request for job, refusal in zip(jobs, refusals, strict=True) if refusal is None]
        results = iter(self._batcher.compute_batch(jobs[0].header.tag.layer, fitting) if fitting else ())
        for job, refusal in zip(jobs, refusals, strict=True):
            job.stream.answer(job.header, *(next(results) if refusal is None else (refusal, 0)))

    def _refusal(self, job: Job) -> WireError | None:
        """Why the shard cannot compute the rows of `job`."""
        try:
            check(self._shard, job.header, job.request)
        except WireError as error:
            return error
        return None

    def _next_batch(self) -> list[Job]:
        """A stream's requests are answered in their order: none goes before one of its own for another layer."""
        layer = self._waiting[0].header.tag.layer
        jobs, passed = [], set()
        for job in self._waiting:
            if job.header.tag.layer == layer and job.stream not in passed:
                jobs.append(job)
            else:
                passed.add(job.stream)
        return jobs

    def _accept(self, call: Call) -> None:
        if call.method == EXCHANGE_METHOD:
            self._streams.add(ExchangeStream(call, self))
        elif call.method == DESCRIBE_METHOD:
            Unary(call, self._describe)
        elif call.method == HEALTH_METHOD:
            Unary(call, self._health.check)
        else:
            Unary(call, unimplemented)

    def _describe(self, _request: bytes) -> bytes:
        return pb.DescribeReply(
            worker=self._worker,
            pid=os.getpid(),
            slots=[pb.Slot(layer=slot.layer, expert=slot.expert, rows=slot.rows) for slot in self._shard.slots],
            weight_bytes=self._shard.weight_bytes,
            rows=self._batcher.rows,
            compute_seconds=self._batcher.compute_seconds,
            streams=len(self._streams),
        ).SerializeToString()
