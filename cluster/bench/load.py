"""Load on a running cluster: when requests start, what they ask for, what their clients see."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.bench.gateway import Client
from cluster.bench.sse_client import HTTPError, StreamError
from cluster.errors import ExpertMeshError, RequestError
from cluster.gateway.session import Session
from cluster.router.params import SamplingParams

Endpoint = Literal["completions", "chat"]
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One thing that came: a stream's event, or a step's output. `tokens` is 0 where only the end tells the sum."""

    has_text: bool
    tokens: int = 0


class Target(Protocol):
    """What is loaded."""

    def request(self, prompt_ids: Sequence[int], max_tokens: int) -> AsyncGenerator[Arrival, None]:
        """Run one greedy request of exactly `max_tokens` tokens; closing ends it."""
        ...


@dataclass(slots=True)
class Record:
    """What one client saw; times are monotonic seconds."""

    due: float  # when the request was to start: waiting for a late generator counts as waiting
    arrivals: list[float] = field(default_factory=list)  # of text
    end: float = 0.0
    tokens: int = 0
    error: str | None = None


class Gateway:
    """A gateway's streamed completions or chat completions."""

    def __init__(self, client: Client, endpoint: Endpoint) -> None:
        self._client = client
        self._endpoint = endpoint

    async def request(self, prompt_ids: Sequence[int], max_tokens: int) -> AsyncGenerator[Arrival, None]:
        body: dict[str, Any] = {
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self._endpoint == "chat":
            path, body["messages"] = (
                "/v1/chat/completions",
                [{"role": "user", "content": " ".join(map(str, prompt_ids))}],
            )
        else:
            path, body["prompt"] = "/v1/completions", list(prompt_ids)
        async with aclosing(self._client.events(path, body)) as events:
            async for event in events:
                yield _arrival(event)


def _arrival(event: dict[str, Any]) -> Arrival:
    if usage := event.get("usage"):
        return Arrival(False, usage["completion_tokens"])
    return Arrival(any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event["choices"]))


class Routers:
    """Routers without a gateway before them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def request(self, prompt_ids: Sequence[int], max_tokens: int) -> AsyncGenerator[Arrival, None]:
        params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
        async with aclosing(self._session.generate(prompt_ids, params)) as outputs:
            async for output in outputs:
                yield Arrival(True, len(output.token_ids))


def make_prompts(n: int, length: int, seed: int) -> list[list[int]]:
    """`n` prompts of `length` token ids that every vocabulary has."""
    chance = random.Random(seed)
    return [[chance.randrange(10, 250) for _ in range(length)] for _ in range(n)]


async def follow(target: Target, prompt_ids: Sequence[int], max_tokens: int, due: float) -> Record:
    """One request to its end; an error is part of the record."""
    record = Record(due)
    try:
        async with aclosing(target.request(prompt_ids, max_tokens)) as arrivals:
            async for arrival in arrivals:
                if arrival.has_text:
                    record.arrivals.append(time.monotonic())
                record.tokens += arrival.tokens
    except (HTTPError, StreamError, RequestError) as error:
        record.error = error.code
    except (ExpertMeshError, OSError, asyncio.IncompleteReadError) as error:
        record.error = str(error) or type(error).__name__
    record.end = time.monotonic()
    return record


async def closed_loop(
    target: Target, prompts: Prompts, max_tokens: int, concurrency: int, on_end: Callable[[], None]
) -> list[Record]:
    """`concurrency` clients; each starts its next request when its last has ended."""
    records: list[Record] = []
    todo = iter(prompts)

    async def client() -> None:
        for prompt_ids in todo:
            records.append(await follow(target, prompt_ids, max_tokens, time.monotonic()))
            on_end()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return records


async def open_loop(
    target: Target,
    prompts: Prompts,
    max_tokens: int,
    rate: float,
    seed: int,
    on_end: Callable[[], None],
) -> list[Record]:
    """Poisson arrivals, `rate` a second, whatever the server does with them."""
    tasks = []
    async for prompt_ids, due in _arrive(prompts, rate, random.Random(seed)):
        task = asyncio.create_task(follow(target, prompt_ids, max_tokens, due))
        task.add_done_callback(lambda _: on_end())
        tasks.append(task)
    return await asyncio.gather(*tasks)


async def _arrive(prompts: Prompts, rate: float, chance: random.Random) -> AsyncIterator[tuple[Sequence[int], float]]:
    due = time.monotonic()
    for prompt_ids in prompts:
        await asyncio.sleep(due - time.monotonic())
        yield prompt_ids, due
        due += chance.expovariate(rate)
