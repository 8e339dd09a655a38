"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway import sampling
from cluster.gateway.context import Gateway
from cluster.gateway.generation import Answer, Choice, Echo, RunningUsage, Usage, respond
from cluster.gateway.logprobs import finite
from cluster.gateway.offload import give_way
from cluster.gateway.prompts import echo_of, prompts
from cluster.gateway.schemas.completions import CompletionRequest
from cluster.gateway.sequence_text import Delta, ScoredToken
from cluster.gateway.sse import DONE, TextEvents, error_event, event
from cluster.gateway.structured import grammar_of
from cluster.gateway.token_fields import TokenFields
from cluster.router import limits
from cluster.router.params import TokenLogprobs

_HOLE = "\0"
_DEFAULT_MAX_TOKENS = 16


async def complete(gateway: Gateway, request: CompletionRequest) -> Response:
    gateway.check_model(request.model)
    gateway.check_unknown(request)
    await give_way()
    grammar = await grammar_of(gateway, request)
    bad_words = await sampling.bad_words(gateway, request)
    n = request.n or 1
    choices: list[Choice] = []
    for text, whole_ids in await prompts(gateway, request.prompt):
        prompt_ids = sampling.truncated(whole_ids, request)
        text = text if len(prompt_ids) == len(whole_ids) else None
        echo = await echo_of(gateway, text, prompt_ids) if request.echo else None
        choices += _choices(gateway, request, len(choices), echo, prompt_ids, n, grammar, bad_words)
        await give_way()
    if len(choices) > limits.MAX_CHOICES:
        message = f"'n' times the prompts is {len(choices)}; at most {limits.MAX_CHOICES} are allowed"
        raise RequestError(message, code="invalid_value", param="n")
    streaming = sampling.streaming(request)
    form = CompletionForm(gateway, request, choices, streaming)
    return respond(gateway, choices, n, form, stream=streaming.wanted, usage=streaming.usage)


def _choices(
    gateway: Gateway,
    request: CompletionRequest,
    start: int,
    echo: Echo | None,
    prompt_ids: list[int],
    n: int,
    grammar: str,
    bad_words: sampling.BadWords,
) -> list[Choice]:
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(min(_DEFAULT_MAX_TOKENS, gateway.model.max_context - len(prompt_ids)), 1)
    if max_tokens == 0 and not request.echo:
        raise RequestError("'max_tokens' may be 0 only with 'echo'", code="invalid_value", param="max_tokens")
    params = sampling.sampling_params(
        gateway,
        request,
        max_tokens=max_tokens,
        bad_words=bad_words,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    params = replace(params, grammar=grammar)
    # To the router an answer without tokens makes sense for its scores only; an echo alone does not get that far.
    checked = params if max_tokens else replace(params, prompt_logprobs=params.prompt_logprobs or 0)
    sampling.check(gateway, prompt_ids, checked, prompt="prompt", max_tokens="max_tokens")
    text = sampling.sequence_texts(gateway, request, after_text=True, special=request.skip_special_tokens is False)
    return [
        Choice(
            start + i,
            prompt_ids,
            sampling.nth(params, i),
            text(),
            echo=echo,
        )
        for i in range(n)
    ]


class CompletionForm:
    """Text completions and their chunks, as OpenAI writes them."""

    done = DONE

    def __init__(
        self, gateway: Gateway, request: CompletionRequest, choices: list[Choice], streaming: sampling.Streaming
    ):
        self._names = gateway.names.by_id if request.return_tokens_as_token_ids else gateway.names
        self._fields = TokenFields(gateway.names, request)
        self._logprobs = request.logprobs
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": gateway.model.id,
            "system_fingerprint": gateway.fingerprint,
        }
        self._usage = RunningUsage(choices, request.n or 1, streaming)
        self._opened: set[int] = set()
        self._fast: dict[int, TextEvents] = {}

    def error(self, error: RequestError) -> bytes:
        return error_event(error)

    def opening(self, choice: Choice, first: Delta) -> bytes:
        if choice.echo is None:
            return b""
        scores = self._scores(_prompt_scores(choice, first.prompt_logprobs), 0)
        return event(self._chunk(choice.index, choice.echo.text, scores) | self._usage.before(choice))

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        if delta.scored or delta.finish is not None or self._fields.any or self._usage.runs:
            scores = self._scores(delta.scored, _echoed(choice))
            more = self._fields.chunk(delta)
            if delta.finish is not None:
                more["stop_reason"] = self._fields.stop_reason(choice)
            if choice.index not in self._opened:
                self._opened.add(choice.index)
                more |= self._fields.opening(choice)
            return event(self._chunk(choice.index, delta.text, scores, delta.finish, more))
        if not delta.text:
            return b""
        if (fast := self._fast.get(choice.index)) is None:
            fast = self._fast[choice.index] = TextEvents(self._chunk(choice.index, _HOLE), _HOLE)
        return fast.event(delta.text)

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        return event(self._head | {"choices": [], "usage": usage}) if wanted else b""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        return self._head | {"choices": [self._choice(answer) for answer in answers], "usage": usage}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        echo = answer.choice.echo
        scores = self._scores(answer.scored, _echoed(answer.choice))
        if scores is not None and echo is not None:
            prompt = self._scores(_prompt_scores(answer.choice, answer.prompt_logprobs), 0) or {}
            scores = {name: prompt[name] + values for name, values in scores.items()}
        return (
            {
                "index": answer.choice.index,
                "text": answer.text if echo is None else echo.text + answer.text,
                "logprobs": scores,
                "finish_reason": answer.finish,
            }
            | self._fields.whole(answer)
            | self._fields.prompt(answer)
        )

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: object = None,
        finish: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish} | (more or {})
        return self._head | {"choices": [choice]} | self._usage.now()

    def _scores(
        self, scored: Sequence[ScoredToken | tuple[int, TokenLogprobs | None, int]], start: int
    ) -> dict[str, list[Any]] | None:
        """OpenAI's four lists; offsets count from the beginning of the choice's text, which is `start` earlier."""
        if self._logprobs is None:
            return None
        rows = [(t.token_id, t.logprobs, t.offset) if isinstance(t, ScoredToken) else t for t in scored]
        return {
            "tokens": [self._names.name(token_id) for token_id, _, _ in rows],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry, _ in rows],
            "top_logprobs": [None if entry is None else self._top(token_id, entry) for token_id, entry, _ in rows],
            "text_offset": [start + offset for _, _, offset in rows],
        }

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The token that is there, first, as with vLLM, and the likeliest."""
        top = {self._names.name(other): finite(logprob) for other, logprob in reversed(entry.top[: self._logprobs])}
        own = {self._names.name(token_id): finite(entry.logprob)}
        return own | dict(reversed(top.items())) | own


def _echoed(choice: Choice) -> int:
    """Characters of the choice's text that are its prompt."""
    return 0 if choice.echo is None else len(choice.echo.text)


def _prompt_scores(
    choice: Choice, logprobs: Sequence[TokenLogprobs | None] | None
) -> list[tuple[int, TokenLogprobs | None, int]]:
    """The tokens of an echoed prompt, and where they begin in it."""
    if logprobs is None or choice.echo is None:
        return []
    return list(zip(choice.prompt_ids, logprobs, choice.echo.offsets, strict=True))
