"""What the gateway remembers of an open request, so that any router can go on with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import RequestError
from cluster.gateway.router_stream import RouterStream
from cluster.router.codec import encode_submit
from cluster.router.params import SamplingParams, StepOutput
from workers.pb import generation_pb2 as pb


@dataclass(eq=False, slots=True)
class Entry:
    """One open request: its prompt, every token a router gave, and the reader that waits for more.

    Tokens are recorded before the reader can see them, so what the client has is always a part of `emitted_ids`.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    prefixes: Sequence[int] = ()  # names of the prompt's beginnings, by which a router that has them is found
    emitted_ids: list[int] = field(default_factory=list)
    prompt_logprobs_given: bool = False
    routed: int = 0  # tokens whose routing the reader has: another router tells it again from the first on
    outputs: asyncio.Queue[StepOutput | RequestError] = field(default_factory=asyncio.Queue)
    # Where it runs, and how it came there.
    stream: RouterStream | None = None
    full: set[RouterStream] = field(default_factory=set)  # routers whose queue was full in this round
    full_rounds: int = 0  # in which every queue was full, one after another
    losses: int = 0  # routers lost in a row without one token between
    expiry: asyncio.TimerHandle | None = None  # set while it waits for a router

    def submit(self) -> pb.Command:
        """The command with which a router takes the request up where the journal ends."""
        params = self.params
        if self.prompt_logprobs_given:
            params = replace(params, prompt_logprobs=None)
        return encode_submit(self.request_id, self.prompt_ids, params, self.emitted_ids)

    def record(self, output: StepOutput) -> None:
        """Journal what a router gave, then hand it to the reader."""
        self.emitted_ids.extend(output.token_ids)
        self.losses = self.full_rounds = 0
        if output.prompt_logprobs is not None:
            self.prompt_logprobs_given = True
        if output.routing is not None:
            output = replace(output, routing=output.routing.after(self.routed))
            self.routed = self.routed if output.routing is None else output.routing.end
        self.outputs.put_nowait(output)

    def fail(self, error: RequestError) -> None:
        self.outputs.put_nowait(error)

    @property
    def accepted(self) -> bool:
        """Whether some router once took it: from then on a full queue is a pause, not a refusal."""
        return bool(self.emitted_ids) or self.losses > 0

    def end_by_length(self) -> bool:
        """Whether the last router was lost after the last token and before it said so; if so, say it now."""
        prompt_logprobs_due = self.params.prompt_logprobs is not None and not self.prompt_logprobs_given
        if len(self.emitted_ids) < self.params.max_tokens or prompt_logprobs_due:
            return False
        self.record(StepOutput(self.request_id, (), finish="length"))
        return True
