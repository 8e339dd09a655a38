"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import sampling
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Answer, Choice, respond
from cluster.gateway.prompts import encode
from cluster.gateway.schemas import ChatRequest, Message
from cluster.gateway.sequence_text import Delta, ScoredToken, SequenceText
from cluster.gateway.sse import TextEvents, event

_HOLE = "\0"


def plain_messages(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages as templates know them: text parts joined by line ends, and `system` for its newer name."""
    plain = []
    for message in messages:
        content = message.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": content} | ({"name": message.name} if message.name else {}))
    return plain


async def chat(gateway: Gateway, request: ChatRequest) -> Response:
    gateway.check_model(request.model)
    n_top = _top_logprobs(request)
    prompt = gateway.tokenizer.apply_chat_template(plain_messages(request.messages))
    prompt_ids = await encode(gateway, prompt, add_special_tokens=False)
    limit = request.max_completion_tokens
    name = "max_tokens" if limit is None else "max_completion_tokens"
    limit = request.max_tokens if limit is None else limit
    if limit is None:  # as long as it likes, or as the checkpoint says
        room = max(gateway.model.max_context - len(prompt_ids), 1)
        limit = min(gateway.model.defaults.max_new_tokens or room, room)
    params = sampling.sampling_params(gateway, request, max_tokens=limit, logprobs=n_top)
    sampling.check(gateway, prompt_ids, params, prompt="messages", max_tokens=name)
    stops = sampling.stop_strings(request)
    n = request.n or 1
    choices = [
        Choice(
            i,
            prompt_ids,
            sampling.nth(params, i),
            SequenceText(gateway.tokenizer.detokenizer(), stops, params.min_tokens),
        )
        for i in range(n)
    ]
    stream, usage = sampling.stream_options(request)
    form = ChatForm(gateway, logprobs=n_top, usage_in_chunks=usage)
    return respond(gateway, choices, n, form, stream=stream, usage=usage)


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true", code="invalid_value", param="top_logprobs")
    return None


class ChatForm:
    """Chat completions and their chunks, as OpenAI writes them."""

    def __init__(self, gateway: Gateway, *, logprobs: int | None, usage_in_chunks: bool):
        self._names = gateway.names
        self._logprobs = logprobs
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": gateway.model.id}
        self._tail = {"usage": None} if usage_in_chunks else {}
        self._fast: dict[int, TextEvents] = {}

    def opening(self, choice: Choice, first: Delta) -> bytes:
        return event(self._chunk(choice.index, {"role": "assistant", "content": ""}))

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        data = b""
        if delta.scored:
            data = event(self._chunk(choice.index, {"content": delta.text}, self._scores(delta.scored)))
        elif delta.text:
            if (fast := self._fast.get(choice.index)) is None:
                fast = self._fast[choice.index] = TextEvents(self._chunk(choice.index, {"content": _HOLE}), _HOLE)
            data = fast.event(delta.text)
        if delta.finish is not None:
            data += event(self._chunk(choice.index, {}, finish=delta.finish))
        return data

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, answers: Sequence[Answer], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": answer.choice.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None if self._logprobs is None else self._scores(answer.scored),
                "finish_reason": answer.finish,
            }
            for answer in answers
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def _chunk(
        self, index: int, delta: Mapping[str, str], logprobs: object = None, finish: str | None = None
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
