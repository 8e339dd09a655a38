"""Requests over all routers: each runs on one of them, and on another when that one is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Self

from cluster.errors import RequestError
from cluster.gateway.journal import Entry
from cluster.gateway.latency import Waits
from cluster.gateway.prefixes import prefixes_of
from cluster.gateway.router_choice import best_router
from cluster.gateway.router_stream import RouterStream
from cluster.gateway.suspects import MAX_LOSSES, Suspects
from cluster.gateway.tenants import tenant
from cluster.observe.context import request_id
from cluster.observe.tracing import current_traceparent
from cluster.router.codec import decode_output, decode_refusal, encode_cancel
from cluster.router.params import SamplingParams, StepOutput
from workers.pb import generation_pb2 as pb
from workers.transport.grpc.credentials import Credentials

log = logging.getLogger(__name__)

_FULL_RETRY_S = 0.25  # a continued request that finds every queue full asks again after this


@dataclass(frozen=True, slots=True)
class StreamStats:
    router: str
    address: str
    state: str  # what the router says of itself; "" without a stream
    requests: int


@dataclass(frozen=True, slots=True)
class SessionStats:
    """Numbers of one gateway: `open` requests, of which `waiting` have no router; the rest counts since start."""

    streams: tuple[StreamStats, ...]
    open: int
    waiting: int
    requests: int
    tokens: int
    fail_overs: int


class Session:
    """The gateway's side of all routers. Belongs to the running asyncio loop.

    `update` says which routers there are; `generate` runs one request. A request waits at most `rejoin_timeout_s` for a
    router when there is none, whether it is new or was running on one that died. `prefix_cache`: a router computes what
    prompts have in common once, so prompts that begin alike are better sent to the same.
    """

    def __init__(
        self,
        credentials: Credentials,
        routers: Mapping[str, str] | None = None,
        *,
        rejoin_timeout_s: float = 120.0,
        prefix_cache: bool = True,
    ) -> None:
        self._credentials = credentials
        self._rejoin_timeout_s = rejoin_timeout_s
        self._prefix_cache = prefix_cache
        self._streams: list[RouterStream] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._ids = count()
        self._suspects = Suspects()
        self._open: dict[str, Entry] = {}  # by request id, oldest first; each says where it runs, or that it waits
        self._requests = self._tokens = self._fail_overs = 0
        self._first_waits, self._next_waits = Waits(), Waits()
        self.update(routers or {})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def update(self, routers: Mapping[str, str]) -> None:
        """The routers of the fleet as id -> `host:port`; the whole view, not a change of it.

        What runs on a router that left the view goes on there as long as its stream lives: a view can be wrong for a
        moment, a stream cannot.
        """
        for stream in self._streams:
            stream.retired = routers.get(stream.router) != stream.address
        known = {(stream.router, stream.address) for stream in self._streams}
        for router, address in routers.items():
            if (router, address) not in known:
                self._streams.append(self._open_stream(router, address))
        self._sweep()
        if self.ready():  # a router is back in the view whose stream never broke: nothing else will say so
            self._place_waiting()

    def _open_stream(self, router: str, address: str) -> RouterStream:
        return RouterStream(router, address, self._credentials, self._on_event, self._on_change)

    @property
    def n_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def ready(self) -> bool:
        """Whether a router is connected and says that it is ready."""
        return any(stream.state == "ready" and not stream.retired for stream in self._streams)

    def stats(self) -> SessionStats:
        """From any thread."""
        streams = tuple(StreamStats(each.router, each.address, each.state, each.n_open) for each in list(self._streams))
        waiting = sum(entry.expiry is not None for entry in list(self._open.values()))
        return SessionStats(streams, len(self._open), waiting, self._requests, self._tokens, self._fail_overs)

    def waits(self) -> dict[str, tuple[float, float] | None]:
        """Median and 95th percentile of the last seconds' waits for first and following tokens. In the loop only."""
        return {"first_token_s": self._first_waits.quantiles(), "next_token_s": self._next_waits.quantiles()}

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[StepOutput, None]:
        """Run one request; the last output has `finish`. Closing the generator cancels the request at once.

        `prompt_logprobs` come at most once. RequestError when it is refused, or can go on nowhere; a refusal comes
        before the first output.
        """
        origin, traceparent, asks = request_id.get(), current_traceparent(), tenant.get()
        if origin or traceparent or asks is not None:
            whose = "" if asks is None else asks.name
            params = replace(params, origin=origin, traceparent=traceparent, tenant=whose)
        prefixes = prefixes_of(prompt_ids, params.cache_salt) if self._prefix_cache else ()
        entry = Entry(str(next(self._ids)), prompt_ids, params, prefixes)
        self._requests += 1
        self._open[entry.request_id] = entry
        try:
            self._place(entry)
            last, waits = time.perf_counter(), self._first_waits
            while True:
                output = await entry.outputs.get()
                if isinstance(output, RequestError):
                    raise output
                if output.token_ids:
                    now = time.perf_counter()
                    waits.add(now - last)
                    last, waits = now, self._next_waits
                yield output
                if output.finish is not None:
                    return
        finally:
            self._leave(entry)

    async def close(self) -> None:
        """End every open request with an error and close all streams."""
        for entry in list(self._open.values()):
            entry.fail(RequestError("the gateway is being stopped", code="service_unavailable", status=503))
            self._leave(entry)
        self.update({})
        while self._closing:
            await asyncio.wait(self._closing)

    # Where a request runs.

    def _place(self, entry: Entry) -> None:
        """Give a request to a ready router, or let it wait for one."""
        candidates = self._candidates(entry)
        if not candidates or self._suspects.holds_back(entry):
            self._wait(entry)
            return
        self._stop_waiting(entry)
        whose = entry.params.tenant
        if not entry.accepted:  # what a router would refuse is refused here, at once
            refusals = [stream.refuse(whose) for stream in candidates]
            candidates = [stream for stream, no in zip(candidates, refusals, strict=True) if no is None]
            if not candidates:
                entry.fail(min(filter(None, refusals), key=lambda error: error.retry_after_s or 0))
                return
        entry.stream = best_router(candidates, entry)
        entry.stream.submit(entry.submit(), whose, entry.prefixes)

    def _place_waiting(self) -> None:
        for entry in [entry for entry in self._open.values() if entry.expiry is not None]:
            self._place(entry)

    def _end_trial(self, entry: Entry) -> None:
        if self._suspects.clear(entry):
            self._place_waiting()

    def _candidates(self, entry: Entry) -> list[RouterStream]:
        """The ready routers that have not said in this round that their queue is full."""
        ready = (stream for stream in self._streams if stream.state == "ready" and not stream.retired)
        return [stream for stream in ready if stream not in entry.full]

    def _wait(self, entry: Entry) -> None:
        if entry.expiry is None:
            entry.expiry = asyncio.get_running_loop().call_later(self._rejoin_timeout_s, self._expire, entry)

    def _stop_waiting(self, entry: Entry) -> None:
        if entry.expiry is not None:
            entry.expiry.cancel()
            entry.expiry = None

    def _expire(self, entry: Entry) -> None:
        self._stop_waiting(entry)
        message = f"no router became available within {self._rejoin_timeout_s:g} s"
        entry.fail(RequestError(message, code="service_unavailable", status=503, retry_after_s=5))

    def _leave(self, entry: Entry) -> None:
        """The reader is done with a request, or gone."""
        self._open.pop(entry.request_id, None)
        self._stop_waiting(entry)
        if entry.stream is not None:
            entry.stream.send(encode_cancel(entry.request_id))
            _release(entry)
            self._sweep()
        self._end_trial(entry)

    def _sweep(self) -> None:
        """Close the streams of routers that left the fleet, once nothing runs on them."""
        for stream in [stream for stream in self._streams if stream.retired and not stream.n_open]:
            self._streams.remove(stream)
            task = stream.close()
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # What routers say.

    def _on_event(self, stream: RouterStream, event: pb.Event) -> None:
        for message in event.outputs:
            entry = self._open.get(message.request_id)
            if entry is None or entry.stream is not stream:
                continue  # cancelled while it was on the way
            if message.finish:
                _release(entry)
            if message.finish == "error":
                self._refused(stream, entry, decode_refusal(message.refusal))
                continue
            output = decode_output(message)
            self._tokens += len(output.token_ids)
            entry.record(output)
            self._end_trial(entry)
        self._sweep()

    def _refused(self, stream: RouterStream, entry: Entry, error: RequestError) -> None:
        if error.code == "draining":
            entry.full.clear()  # so that one that was full is asked again: it has no other way to speak up
            self._place(entry)
        elif error.code == "queue_full":
            entry.full.add(stream)
            if self._candidates(entry):
                self._place(entry)
            elif entry.accepted and entry.full_rounds * _FULL_RETRY_S < self._rejoin_timeout_s:
                entry.full_rounds += 1
                asyncio.get_running_loop().call_later(_FULL_RETRY_S, self._retry, entry)
            else:
                entry.fail(error)
        else:
            entry.fail(error)

    def _retry(self, entry: Entry) -> None:
        if entry.request_id in self._open and entry.stream is None:
            entry.full.clear()
            self._place(entry)

    def _on_change(self, stream: RouterStream) -> None:
        if stream.state == "ready":
            self._place_waiting()
        elif stream.state == "":
            for entry in [entry for entry in self._open.values() if entry.stream is stream]:
                _release(entry)
                self._fail_over(entry)
            self._sweep()

    def _fail_over(self, entry: Entry) -> None:
        entry.losses += 1
        entry.full.clear()
        self._fail_overs += 1
        if entry.losses >= MAX_LOSSES:
            said = {"request_id": entry.params.origin}
            log.error("a request lost %d routers in a row; given up", entry.losses, extra=said)
            message = f"{entry.losses} routers in a row were lost while they worked on this request"
            entry.fail(RequestError(message, code="internal_error", status=500))
        elif not entry.end_by_length():
            self._place(entry)


def _release(entry: Entry) -> None:
    """The request no longer runs on the router it was given to."""
    if entry.stream is not None:
        entry.stream.n_open -= 1
        entry.stream = None
