"""What waits to be sent to one gateway: at most one Event, into which the outputs of further steps are merged."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.errors import RequestError
from cluster.router.codec import encode_refusal, merge_output
from cluster.router.params import StepOutput
from workers.pb import generation_pb2 as pb


@dataclass(eq=False, slots=True)
class Outbox:
    """One gateway's stream as the service sees it; belongs to the asyncio loop."""

    open: dict[str, str] = field(default_factory=dict)  # the gateway's request id -> the engine's
    pending_tokens: int = 0
    _event: pb.Event = field(default_factory=pb.Event)
    _outputs: dict[str, pb.Output] = field(default_factory=dict)  # those of _event, by request id
    _filled: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    def announce(self, state: str) -> None:
        self._event.state = state
        self._filled.set()

    def put(self, request_id: str, output: StepOutput) -> None:
        merge_output(self._output(request_id), output)
        self.pending_tokens += len(output.token_ids)

    def refuse(self, request_id: str, error: RequestError) -> None:
        message = self._output(request_id)
        message.finish = "error"
        message.refusal.CopyFrom(encode_refusal(error))

    async def take(self) -> pb.Event | None:
        """Everything that waits, as soon as there is something; None once closed."""
        await self._filled.wait()
        if self._closed:
            return None
        event = self._event
        self._event, self._outputs, self.pending_tokens = pb.Event(), {}, 0
        self._filled.clear()
        return event

    def close(self) -> None:
        """Drop what waits and end the stream."""
        self._closed = True
        self._event, self._outputs, self.pending_tokens = pb.Event(), {}, 0
        self._filled.set()

    def _output(self, request_id: str) -> pb.Output:
        if (message := self._outputs.get(request_id)) is None:
            message = self._outputs[request_id] = self._event.outputs.add(request_id=request_id)
            self._filled.set()
        return message
