"""From the sequences that a request asks for to one answer, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response

from cluster.errors import RequestError
from cluster.gateway.context import Gateway
from cluster.gateway.metrics import SequenceMeter
from cluster.gateway.offload import TURN_S, give_way
from cluster.gateway.parsers.message_parser import MessageParser
from cluster.gateway.parsers.parts import Content, Part
from cluster.gateway.sampling import Streaming
from cluster.gateway.sequence_text import Delta, FinishReason, ScoredToken, SequenceText
from cluster.gateway.sse import EventStream, JsonAnswer, dump, dump_large
from cluster.gateway.tenants import Tenant, tenant
from cluster.router.params import Routing, SamplingParams, TokenLogprobs

_MOST_PROMPT_SCORES = 500_000  # in an answer: 100 MB of objects, which stay until it is written
_MANY_SCORES = 5000  # take 10 ms to write, in which no other stream would move


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is part of the answer: its text, and where in it, in characters, each of its tokens begins."""

    text: str
    offsets: list[int]


@dataclass(slots=True)
class Choice:
    """One sequence of a request. `parser` finds function calls and reasoning in its text where there may be any."""

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    text: SequenceText
    echo: Echo | None = None
    parser: MessageParser | None = None
    cached_tokens: int = 0  # of the prompt, that a router had in its cache
    reasoning_tokens: int = 0  # of the answer, without the marks around them


Usage = dict[str, Any]  # OpenAI's, of chat and text completions


@dataclass(slots=True)
class Answer:
    """What a choice came to."""

    choice: Choice
    text: str = ""
    parts: list[Part] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish: FinishReason | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None


class Form(Protocol):
    """How an endpoint writes answers."""

    done: bytes  # what ends every stream that did not break off

    def error(self, error: RequestError) -> bytes:
        """The event with which a stream breaks off."""
        ...

    def opening(self, choice: Choice, first: Delta) -> bytes:
        """The event that begins a choice, with what `first` says of its prompt; may be empty."""
        ...

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        """The events of more text, and of the end; empty where there is nothing to say yet."""
        ...

    def closing(self, usage: Usage, wanted: bool) -> bytes:
        """The events after the last choice has ended; `wanted`: with the usage."""
        ...

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        ...


def respond(gateway: Gateway, choices: list[Choice], n: int, form: Form, *, stream: bool, usage: bool) -> Response:
    """The response to a request for `choices`, `n` for each prompt; `usage`: a stream ends with a chunk of it.

    Raises RequestError where it would hold more numbers of its prompts than there is memory for.
    """
    _check_scores(choices)
    if stream:
        return EventStream(_events(gateway, choices, n, form, usage), done=form.done, error=form.error)
    return JsonAnswer(_whole(gateway, choices, n, form))


def _check_scores(choices: Sequence[Choice]) -> None:
    asked = ((len(choice.prompt_ids), choice.params.prompt_logprobs) for choice in choices)
    n_scores = sum(n_prompt * (1 + n_top) for n_prompt, n_top in asked if n_top is not None)
    if n_scores > _MOST_PROMPT_SCORES:
        message = f"The scores of the prompts are {n_scores} numbers; at most {_MOST_PROMPT_SCORES} are allowed"
        raise RequestError(f"{message}: send fewer prompts at once", code="invalid_value", param="prompt_logprobs")


async def _events(
    gateway: Gateway, choices: list[Choice], n: int, form: Form, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    opened: set[int] = set()
    async with _running(gateway, choices, n), aclosing(_deltas(gateway, choices)) as deltas:
        async for choice, delta in deltas:
            data = b""
            if choice.index not in opened:
                opened.add(choice.index)
                data = form.opening(choice, delta)
            data += form.delta(choice, delta)
            if data:
                yield data
    if last := form.closing(usage_of(choices, n), with_usage):
        yield last


async def _whole(gateway: Gateway, choices: list[Choice], n: int, form: Form) -> bytes:
    answers = [Answer(choice) for choice in choices]
    async with _running(gateway, choices, n), aclosing(_deltas(gateway, choices)) as deltas:
        async for choice, delta in deltas:
            answer = answers[choice.index]
            answer.text += delta.text
            answer.parts += delta.parts
            answer.token_ids += delta.token_ids
            if delta.routing is not None:
                answer.routing.append(delta.routing)
            answer.scored += delta.scored
            answer.finish = delta.finish
            answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
    usage = usage_of(choices, n)
    if max(map(_n_scores, answers)) > _MANY_SCORES:
        return await asyncio.to_thread(lambda: dump_large(form.whole(answers, usage)).encode("ascii"))
    return dump(form.whole(answers, usage)).encode("ascii")


def _n_scores(answer: Answer) -> int:
    """About how many numbers it tells of tokens."""
    params, n_prompt = answer.choice.params, len(answer.prompt_logprobs or ())
    return len(answer.scored) * (1 + (params.logprobs or 0)) + n_prompt * (1 + (params.prompt_logprobs or 0))


@asynccontextmanager
async def _running(gateway: Gateway, choices: Sequence[Choice], n: int) -> AsyncIterator[None]:
    """While a request is answered: its tenant has so many sequences more, and pays for the tokens, the prompt's at
    once."""
    whose = tenant.get() or Tenant("")
    with whose.admitted(len(choices)):
        whose.spend(usage_of(choices, n)["prompt_tokens"])
        gateway.metrics.n_requests += 1
        try:
            yield
        finally:
            gateway.metrics.n_requests -= 1
            whose.spend(usage_of(choices, n)["completion_tokens"])


def usage_of(choices: Sequence[Choice], n: int) -> Usage:
    """A prompt counts once, however many answers it got."""
    prompt = sum(len(choice.prompt_ids) for choice in choices[::n])
    completion = sum(choice.text.n_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[::n])},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }


class RunningUsage:
    """The `usage` that the chunks of a stream carry: none, null before the last, or what was used so far."""

    def __init__(self, choices: Sequence[Choice], n: int, streaming: Streaming) -> None:
        self._choices = choices
        self._n = n
        self._fixed: Usage = {"usage": None} if streaming.usage else {}
        self.runs = streaming.usage_so_far

    def now(self) -> dict[str, Any]:
        """The field of a chunk that is written now."""
        return {"usage": usage_of(self._choices, self._n)} if self.runs else self._fixed

    def before(self, choice: Choice) -> dict[str, Any]:
        """The field of a chunk that comes before the tokens of `choice`, whose first are there already."""
        if not self.runs:
            return self._fixed
        usage = usage_of(self._choices, self._n)
        early = choice.text.n_tokens
        less = {name: usage[name] - early for name in ("completion_tokens", "total_tokens")}
        return {"usage": usage | less}


def _deltas(gateway: Gateway, choices: list[Choice]) -> AsyncGenerator[tuple[Choice, Delta], None]:
    """What the choices add, each in its order, all as they come. Closing it cancels every sequence."""
    runs = [_run(gateway, choice) if _asks_router(choice) else _echo(choice) for choice in choices]
    return runs[0] if len(runs) == 1 else _merge(runs)


def _asks_router(choice: Choice) -> bool:
    return choice.params.max_tokens > 0 or choice.params.prompt_logprobs is not None


async def _echo(choice: Choice) -> AsyncGenerator[tuple[Choice, Delta], None]:
    yield choice, Delta("", finish="length")


async def _run(gateway: Gateway, choice: Choice) -> AsyncGenerator[tuple[Choice, Delta], None]:
    text, reason = choice.text, "abort"
    meter = SequenceMeter(gateway.metrics, len(choice.prompt_ids))
    try:
        async with aclosing(gateway.session.generate(choice.prompt_ids, choice.params)) as outputs:
            async for output in outputs:
                meter.output()
                if output.finish == "error" or output.finish == "cancelled":
                    raise output.error or RequestError("The sequence was ended", code="internal_error", status=500)
                choice.cached_tokens += output.cached_tokens
                delta = text.feed(output)
                delta.token_ids, delta.routing = output.token_ids, output.routing
                if choice.parser is not None:
                    reasoned = choice.parser.reasons
                    _parse(choice.parser, delta)
                    choice.reasoning_tokens += len(output.token_ids) * (reasoned and choice.parser.reasons)
                reason = delta.finish or reason
                yield choice, delta
                if delta.finish is not None:
                    return
        raise RequestError("The sequence broke off", code="internal_error", status=500)
    except RequestError as error:
        reason = "error" if error.status >= 500 else "refused"
        raise
    finally:
        meter.end(text.n_tokens, reason)


def parts_of(choice: Choice, delta: Delta) -> Sequence[Part]:
    """What `delta` adds, taken apart: all of it is content where nothing else is looked for."""
    if choice.parser is not None:
        return delta.parts
    return (Content(delta.text),) if delta.text else ()


def _parse(parser: MessageParser, delta: Delta) -> None:
    """Fill in `delta.parts`."""
    delta.parts = parser.push(delta.text)
    if delta.finish is not None:
        delta.parts += parser.finish()


async def _merge(
    runs: Iterable[AsyncGenerator[tuple[Choice, Delta], None]],
) -> AsyncGenerator[tuple[Choice, Delta], None]:
    queue: asyncio.Queue[tuple[Choice, Delta] | Exception | None] = asyncio.Queue()

    async def pump(run: AsyncGenerator[tuple[Choice, Delta], None]) -> None:
        try:
            async with aclosing(run):
                async for item in run:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(run)) for run in runs]
    try:
        n_open, since = len(tasks), time.perf_counter()
        while n_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_open -= 1
            else:
                yield item
                if time.perf_counter() - since > TURN_S:  # a step brings something for each, without a pause
                    await give_way()
                    since = time.perf_counter()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
