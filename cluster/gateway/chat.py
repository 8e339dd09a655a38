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
from cluster.gateway.conversation import Conversation, converse, echoed
from cluster.gateway.generation import Answer, Choice, RunningUsage, Usage, respond
from cluster.gateway.offload import give_way
from cluster.gateway.parsers.parts import CallStart, Content, Part, Reasoning
from cluster.gateway.parsers.written import Written, call_id
from cluster.gateway.schemas.chat import ChatRequest
from cluster.gateway.sequence_text import Delta, ScoredToken
from cluster.gateway.sse import DONE, TextEvents, error_event, event
from cluster.gateway.token_fields import TokenFields

_HOLE = "\0"


async def chat(gateway: Gateway, request: ChatRequest) -> Response:
    n_top = _top_logprobs(request)
    await give_way()
    conversation = await converse(gateway, request, logprobs=n_top)
    streaming = sampling.streaming(request)
    form = ChatForm(gateway, request, conversation, n_top, streaming)
    return respond(gateway, conversation.choices, request.n or 1, form, stream=streaming.wanted, usage=streaming.usage)


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
        request: ChatRequest,
        conversation: Conversation,
        logprobs: int | None,
        streaming: sampling.Streaming,
    ):
        self._names = gateway.names.by_id if request.return_tokens_as_token_ids else gateway.names
        self._fields = TokenFields(gateway.names, request)
        self._echo = echoed(request)
        self._legacy = conversation.tools.legacy
        self._ends_with_calls = (
            "stop" if conversation.tools.named else "function_call" if self._legacy else "tool_calls"
        )
        self._reasons = request.include_reasoning is not False
        self._logprobs = logprobs
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": gateway.model.id,
            "system_fingerprint": gateway.fingerprint,
        }
        self._usage = RunningUsage(conversation.choices, request.n or 1, streaming)
        self._fast: dict[int, TextEvents] = {}

    def error(self, error: RequestError) -> bytes:
        return error_event(error)

    def opening(self, choice: Choice, first: Delta) -> bytes:
        first_chunk = self._chunk(choice.index, {"role": "assistant", "content": ""})
        usage = self._usage.before(choice)
        data = event(first_chunk | self._fields.opening(choice) | usage)
        return data + (event(self._chunk(choice.index, {"content": self._echo}) | usage) if self._echo else b"")

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        more = self._fields.chunk(delta)
        finish = self._finish(choice, delta.finish)
        if finish is not None:
            more["stop_reason"] = self._fields.stop_reason(choice)
        if choice.parser is not None:
            end = event(self._chunk(choice.index, {}, finish=finish, more=more)) if more else b""
            return self._parts(choice, delta) + end
        if delta.scored or more or self._usage.runs:
            scores = self._scores(delta.scored) if delta.scored else None
            content = {"content": delta.text} if delta.text or finish is None else {}
            return event(self._chunk(choice.index, content, scores, finish, more))
        if not delta.text:
            return b""
        if (fast := self._fast.get(choice.index)) is None:
            fast = self._fast[choice.index] = TextEvents(self._chunk(choice.index, {"content": _HOLE}), _HOLE)
        return fast.event(delta.text)

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
            | self._fields.whole(answer)
            for answer in answers
        ]
        whole = {"object": "chat.completion", "choices": choices, "usage": usage}
        return self._head | whole | self._fields.prompt(answers[0])

    def _finish(self, choice: Choice, finish: str | None) -> str | None:
        called = choice.parser is not None and choice.parser.n_calls > 0
        return self._ends_with_calls if called and finish == "stop" else finish

    def _message(self, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._echo + answer.text, "refusal": None}
        if answer.choice.parser is None:
            return message
        written = Written.of(answer.parts)
        message["content"] = self._echo + written.content or (None if written.calls else "")
        if written.reasoning and self._reasons:
            message |= _reasoning(written.reasoning)
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
            return _reasoning(part.text) if self._reasons else None
        if isinstance(part, CallStart):
            function = {"name": part.name, "arguments": ""}
            call = {"index": part.index, "id": call_id(), "type": "function", "function": function}
        else:
            function = {"arguments": part.text}
            call = {"index": part.index, "function": function}
        return {"function_call": function} if self._legacy else {"tool_calls": [call]}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: object = None,
        finish: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish} | (more or {})
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | self._usage.now()

    def _scores(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._names.named(token.token_id, token.logprobs.logprob)
            | {"top_logprobs": [self._names.named(*top) for top in token.logprobs.top[: self._logprobs]]}
            for token in scored
        ]
        return {"content": content, "refusal": None}


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients know."""
    return {"reasoning_content": text, "reasoning": text}
