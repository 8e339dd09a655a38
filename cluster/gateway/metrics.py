"""What one gateway counts, and the scrape of the whole cluster.

The port that clients use leads to any of the gateways, so what it answers has to be the same whichever it is: whoever
is asked asks all other processes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import httpx

from cluster.gateway.session import SessionStats
from cluster.observe.discovery import Target
from cluster.observe.distribution import Distribution
from cluster.observe.exposition import Aliases, Reading, Readings, Source, merged, text_of
from cluster.observe.series import gateway as series

_PEER_TIMEOUT_S = 2.0


class Metrics:
    """One gateway's counters. The event loop adds, a scrape reads from its own thread.

    `gateway` is its name; `targets` are the endpoints of all processes; `more` gives what others count in this process.
    """

    def __init__(self, gateway: str = "gateway-0", more: Iterable[Source] = (), aliases: Aliases | None = None) -> None:
        self.gateway = gateway
        self.targets: Sequence[Target] = ()
        self.cluster = ""  # its name, for discovery
        self.requests: Counter[tuple[str, str]] = Counter()  # by route and status
        self.rejected: Counter[str] = Counter()  # by code
        self.finished: Counter[str] = Counter()  # by reason
        self.n_open = 0
        self.n_requests = 0  # that are being answered; each may have several sequences
        self.prompt_tokens = 0
        self.tokens = 0
        self.first_token = Distribution(series.FIRST_TOKEN.buckets)
        self.inter_token = Distribution(series.INTER_TOKEN.buckets)
        self.per_output_token = Distribution(series.PER_OUTPUT_TOKEN.buckets)
        self.end_to_end = Distribution(series.END_TO_END.buckets)
        self.prompt_lengths = Distribution(series.REQUEST_PROMPT_TOKENS.buckets)
        self.answer_lengths = Distribution(series.REQUEST_GENERATION_TOKENS.buckets)
        self.collector = Readings(gateway, (self._readings, *more), aliases)

    def rename(self, gateway: str) -> None:
        """Ray Serve numbers gateways anew when one of them leaves."""
        self.gateway = self.collector.process = gateway

    def n_gateways(self) -> int:
        """Gateways of the cluster, as far as known."""
        return max(sum(target.role == "gateway" for target in self.targets), 1)

    async def of_all(self) -> str:
        """The series of all processes as text; `expertmesh_process_scraped` says who did not answer."""
        others = [target for target in self.targets if target.process != self.gateway]
        # Past any proxy of the environment, as in all calls to processes of ours.
        async with httpx.AsyncClient(timeout=_PEER_TIMEOUT_S, trust_env=False) as client:
            texts = await asyncio.gather(*(_fetch(client, target.url) for target in others))
        came = [Reading(series.SCRAPED, 1, (self.gateway,))]
        came += [
            Reading(series.SCRAPED, float(text is not None), (target.process,))
            for target, text in zip(others, texts, strict=True)
        ]
        own = Readings(self.gateway, (lambda: came,))
        return merged([text_of(own).decode(), text_of(self.collector).decode(), *(text or "" for text in texts)])

    def _readings(self) -> Iterable[Reading]:
        yield from (Reading(series.HTTP_REQUESTS, n, labels) for labels, n in self.requests.copy().items())
        yield from (Reading(series.REJECTED, n, (reason,)) for reason, n in self.rejected.copy().items())
        yield from (Reading(series.FINISHED, n, (reason,)) for reason, n in self.finished.copy().items())
        yield Reading(series.OPEN, self.n_open)
        yield Reading(series.PROMPT_TOKENS, self.prompt_tokens)
        yield Reading(series.GENERATION_TOKENS, self.tokens)
        yield Reading(series.FIRST_TOKEN, self.first_token)
        yield Reading(series.INTER_TOKEN, self.inter_token)
        yield Reading(series.PER_OUTPUT_TOKEN, self.per_output_token)
        yield Reading(series.END_TO_END, self.end_to_end)
        yield Reading(series.REQUEST_PROMPT_TOKENS, self.prompt_lengths)
        yield Reading(series.REQUEST_GENERATION_TOKENS, self.answer_lengths)


def of_session(stats: SessionStats) -> Iterable[Reading]:
    """What a gateway's session says of itself."""
    yield Reading(series.UNPLACED, stats.waiting)
    yield Reading(series.FAIL_OVERS, stats.fail_overs)
    ready = {stream.router for stream in stats.streams if stream.state == "ready"}
    for router in sorted({stream.router for stream in stats.streams}):
        yield Reading(series.ROUTER_CONNECTED, float(router in ready), (router,))


class SequenceMeter:
    """Follows one sequence from its start to its end."""

    __slots__ = ("_began", "_clock", "_first", "_last", "_metrics")

    def __init__(self, metrics: Metrics, n_prompt: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._metrics, self._clock = metrics, clock
        self._began = self._last = clock()
        self._first: float | None = None
        metrics.n_open += 1
        metrics.prompt_tokens += n_prompt
        metrics.prompt_lengths.add(n_prompt)

    def output(self) -> None:
        """One more output is there."""
        now = self._clock()
        if self._first is None:
            self._first = now
            self._metrics.first_token.add(now - self._began)
        else:
            self._metrics.inter_token.add(now - self._last)
        self._last = now

    def end(self, n_tokens: int, reason: str) -> None:
        """It has `n_tokens` tokens. reason: stop, length, error, abort (the client left), or refused."""
        metrics = self._metrics
        metrics.n_open -= 1
        metrics.tokens += n_tokens
        if reason == "refused":  # which `rejected` counts
            return
        metrics.finished[reason] += 1
        metrics.answer_lengths.add(n_tokens)
        if reason in ("stop", "length"):
            metrics.end_to_end.add(self._last - self._began)
            if self._first is not None and n_tokens > 1:
                metrics.per_output_token.add((self._last - self._first) / (n_tokens - 1))


async def _fetch(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        return (await client.get(url)).raise_for_status().text
    except httpx.HTTPError:
        return None
