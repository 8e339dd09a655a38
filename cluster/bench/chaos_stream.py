"""What `bench chaos` asks for, what one of its clients saw, and whether that is what an undisturbed client sees."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from cluster.bench.gateway import Client
from cluster.errors import ExpertMeshError

NEAR_TIE = 1e-4  # nats
_ON_ITS_WAY_S = 0.25  # tokens of a process still arrive that long after its end; only then the pause begins
SUBJECTS = ["the sea", "a clock", "bread", "winter", "the number seven", "a garden", "trains", "an old friend"]

Verdict = Literal["same", "near-tie", "changed"]


@dataclass(slots=True)
class Stream:
    """What one client saw."""

    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # between the two likeliest tokens, nats
    arrivals: list[float] = field(default_factory=list)  # monotonic seconds, the start of the request first
    finish: str | None = None
    left: float | None = None  # when it was given up without a finish, monotonic seconds

    @property
    def waits(self) -> list[float]:
        """`arrivals`, and the moment at which it was given up: a stream that hangs waits as well."""
        return self.arrivals if self.left is None else [*self.arrivals, self.left]

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to the first token; 0 before there is one."""
        return self.arrivals[1] - self.arrivals[0] if len(self.arrivals) > 1 else 0.0

    @property
    def longest_pause(self) -> float:
        """Seconds between two tokens."""
        return max((b - a for a, b in pairwise(self.arrivals[1:])), default=0.0)


def requests(n: int, max_tokens: int) -> list[dict[str, Any]]:
    """`n` different requests, every other one greedy, the rest sampled with a seed."""
    return [
        {
            "prompt": f"Story {i}. Once upon a time, {SUBJECTS[i % len(SUBJECTS)]}",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0.0 if i % 2 == 0 else 0.8,
            "seed": i,
            "logprobs": 2,
        }
        for i in range(n)
    ]


async def follow(client: Client, request: dict[str, Any], seen: Stream) -> None:
    """Run one streamed completion to its end. Raises like `Client.events`, and when it ends without saying so."""
    seen.arrivals.append(time.monotonic())
    try:
        async with aclosing(client.events("/v1/completions", request)) as events:
            async for event in events:
                for choice in event["choices"]:
                    note(seen, choice)
    finally:
        if seen.finish is None:
            seen.left = time.monotonic()
    if seen.finish is None:
        raise ExpertMeshError("a stream ended without a finish_reason")


def note(seen: Stream, choice: dict[str, Any]) -> None:
    """Add what one event says."""
    logprobs = choice.get("logprobs") or {}
    if tokens := logprobs.get("tokens"):
        seen.arrivals.append(time.monotonic())
        seen.tokens.extend(tokens)
        for top in logprobs["top_logprobs"]:
            best = sorted(top.values(), reverse=True)
            seen.margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
    seen.finish = choice.get("finish_reason") or seen.finish


def first_difference(seen: Stream, undisturbed: Stream) -> int | None:
    """The first position at which the tokens differ; the shorter one's end counts as a token."""
    if seen.tokens == undisturbed.tokens:
        return None
    pairs = zip(seen.tokens, undisturbed.tokens, strict=False)
    shorter = min(len(seen.tokens), len(undisturbed.tokens))
    return next((position for position, (a, b) in enumerate(pairs) if a != b), shorter)


def compare(seen: Stream, undisturbed: Stream) -> Verdict:
    """Equal tokens and end, but for what follows a near-tie of the undisturbed run."""
    position = first_difference(seen, undisturbed)
    if position is None:
        return "same" if seen.finish == undisturbed.finish else "changed"
    in_both = position < min(len(seen.tokens), len(undisturbed.tokens))
    return "near-tie" if in_both and undisturbed.margins[position] < NEAR_TIE else "changed"


def pauses(streams: list[Stream], moments: list[float]) -> list[float]:
    """Per kill, the longest time in seconds that any open stream went without a token around it or just after it."""
    gaps = [pair for stream in streams for pair in pairwise(stream.arrivals)]
    return [
        max(
            (after - before for before, after in gaps if before <= moment + _ON_ITS_WAY_S and moment <= after),
            default=0.0,
        )
        for moment in moments
    ]
