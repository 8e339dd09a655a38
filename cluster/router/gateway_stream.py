"""One gateway's stream: its open requests, and what waits to be sent to it, as Events of a bounded size."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.router.codec import encode_queue, encode_refusal, merge_output, output_bytes
from cluster.router.params import StepOutput
from cluster.router.queue import Queue
from workers.pb import generation_pb2 as pb

_EVENT_BYTES = 1024 * 1024  # about where the next Event begins; a larger output of one step is an Event of its own


@dataclass(eq=False, slots=True)
class _Waiting:
    """One Event in the making."""

    event: pb.Event = field(default_factory=pb.Event)
    outputs: dict[str, pb.Output] = field(default_factory=dict)  # those of the event, by request id
    tokens: int = 0
    n_bytes: int = 0  # about; on the wire


@dataclass(eq=False, slots=True)
class GatewayStream:
    """One gateway's stream as the service sees it; belongs to the asyncio loop."""

    number: int = 0  # tells it from the router's other streams
    open: dict[str, str] = field(default_factory=dict)  # its requests: the gateway's id -> the engine's
    pending_tokens: int = 0
    pending_bytes: int = 0
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _filled: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    def announce(self, state: str) -> None:
        self._last(0).event.state = state

    def tell(self, queue: Queue) -> None:
        self._last(0).event.queue.CopyFrom(encode_queue(queue))

    def put(self, request_id: str, output: StepOutput) -> None:
        merge_output(self._message(request_id, output_bytes(output), len(output.token_ids)), output)

    def refuse(self, request_id: str, error: RequestError) -> None:
        refusal = encode_refusal(error)
        message = self._message(request_id, refusal.ByteSize() + 64, 0)
        message.finish = "error"
        message.refusal.CopyFrom(refusal)

    async def take(self) -> pb.Event | None:
        """The oldest Event, as soon as there is one; None once closed."""
        await self._filled.wait()
        if self._closed:
            return None
        first = self._waiting.popleft()
        self.pending_tokens -= first.tokens
        self.pending_bytes -= first.n_bytes
        if not self._waiting:
            self._filled.clear()
        return first.event

    def close(self) -> None:
        """Drop what waits and end the stream."""
        self._closed = True
        self._waiting.clear()
        self._filled.set()

    def _message(self, request_id: str, n_bytes: int, tokens: int) -> pb.Output:
        """The message that takes `n_bytes` more of a request."""
        last = self._last(n_bytes)
        last.tokens += tokens
        last.n_bytes += n_bytes
        self.pending_tokens += tokens
        self.pending_bytes += n_bytes
        if (message := last.outputs.get(request_id)) is None:
            message = last.outputs[request_id] = last.event.outputs.add(request_id=request_id)
        return message

    def _last(self, n_bytes: int) -> _Waiting:
        """The Event that takes `n_bytes` more."""
        if not self._waiting or 0 < self._waiting[-1].n_bytes > _EVENT_BYTES - n_bytes:
            self._waiting.append(_Waiting())
            self._filled.set()
        return self._waiting[-1]
