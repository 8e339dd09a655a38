"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import sampling
from cluster.gateway.context import Gateway
from cluster.gateway.conversation import Conversation, converse
from cluster.gateway.generation import Answer, Choice, Usage, respond
from cluster.gateway.parsers.parts import CallStart, Content, Part, Reasoning
from cluster.gateway.parsers.written import Written, call_id
from cluster.gateway.schemas import ChatRequest
from cluster.gateway.sequence_text import Delta, ScoredToken
from cluster.gateway.sse import DONE, TextEvents, error_event, event

_HOLE = "\0"


async def chat(gateway: Gateway, request: ChatRequest) -> Response:
    n_top = _top_logprobs(request)
    conversation = await converse(gateway, request, logprobs=n_top)
    stream, usage = sampling.stream_options(request)
    form = ChatForm(gateway, conversation, logprobs=n_top, usage_in_chunks=usage, reasons=request.include_reasoning)
    return respond(gateway, conversation.choices, request.n or 1, form, stream=stream, usage=usage)


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true", code="invalid_value", param="top_logprobs")
    return None


class ChatForm:
    """Chat completions and their chunks, as OpenAI writes them."""

    done = DONE

    def __init__(
        self,
        gateway: Gateway,
        conversation: Conversation,
        *,
        logprobs: int | None,
        usage_in_chunks: bool,
        reasons: bool | None,
    ):
        self._names = gateway.names
        self._legacy = conversation.tools.legacy
        self._ends_with_calls = (
            "stop" if conversation.tools.named else "function_call" if self._legacy else "tool_calls"
        )
        self._reasons = reasons is not False
        self._logprobs = logprobs
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": gateway.model.id}
        self._tail = {"usage": None} if usage_in_chunks else {}
        self._fast: dict[int, TextEvents] = {}

    def error(self, error: RequestError) -> bytes:
        return error_event(error)

    def opening(self, choice: Choice, first: Delta) -> bytes:
        return event(self._chunk(choice.index, {"role": "assistant", "content": ""}))

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        data = b""
        if choice.parser is not None:
            data = self._parts(choice, delta)
        elif delta.scored:
            data = event(self._chunk(choice.index, {"content": delta.text}, self._scores(delta.scored)))
        elif delta.text:
            if (fast := self._fast.get(choice.index)) is None:
                fast = self._fast[choice.index] = TextEvents(self._chunk(choice.index, {"content": _HOLE}), _HOLE)
            data = fast.event(delta.text)
        if delta.finish is not None:
            data += event(self._chunk(choice.index, {}, finish=self._finish(choice, delta.finish)))
        return data

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        return event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}) if wanted else b""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": answer.choice.index,
                "message": self._message(answer),
                "logprobs": None if self._logprobs is None else self._scores(answer.scored),
                "finish_reason": self._finish(answer.choice, answer.finish),
            }
            for answer in answers
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _finish(self, choice: Choice, finish: str | None) -> str | None:
        called = choice.parser is not None and choice.parser.n_calls > 0
        return self._ends_with_calls if called and finish == "stop" else finish

    def _message(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.choice.parser is None:
            return message
        written = Written.of(answer.parts)
        message["content"] = written.content or (None if written.calls else "")
        if written.reasoning and self._reasons:
            message["reasoning_content"] = written.reasoning
        if written.calls and self._legacy:
            message["function_call"] = {"name": written.calls[0].name, "arguments": written.calls[0].arguments}
        elif written.calls:
            message["tool_calls"] = [
                {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in written.calls
            ]
        return message

    def _parts(self, choice: Choice, delta: Delta) -> bytes:
        """A chunk for each part; the first has the log-probabilities."""
        data, scored = b"", list(delta.scored)
        for part in delta.parts:
            if (content := self._delta_of(part)) is not None:
                data += event(self._chunk(choice.index, content, self._scores(scored) if scored else None))
                scored = []
        if scored:
            data += event(self._chunk(choice.index, {"content": ""}, self._scores(scored)))
        return data

    def _delta_of(self, part: Part) -> dict[str, Any] | None:
        if isinstance(part, Content):
            return {"content": part.text}
        if isinstance(part, Reasoning):
            return {"reasoning_content": part.text} if self._reasons else None
        if isinstance(part, CallStart):
            function = {"name": part.name, "arguments": ""}
            call = {"index": part.index, "id": call_id(), "type": "function", "function": function}
        else:
            function = {"arguments": part.text}
            call = {"index": part.index, "function": function}
        return {"function_call": function} if self._legacy else {"tool_calls": [call]}

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logprobs: object = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | self._tail

    def _scores(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._names.named(token.token_id, token.logprobs.logprob)
            | {"top_logprobs": [self._names.named(*top) for top in token.logprobs.top[: self._logprobs]]}
            for token in scored
        ]
        return {"content": content, "refusal": None}
