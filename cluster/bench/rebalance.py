"""`expertmesh bench rebalance`: tokens per second of a running cluster before and after, and what the plan forecast.

With `--skew` the busiest experts of every layer are gathered on one worker first, as when traffic turns to what one
worker holds. With `--prompt-tokens` the traffic is long prompts, each a new one: then experts compute many rows at a
time, and who has more of them takes longer. A few rows take as long as one, the time of reading an expert's weights.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer

from cluster.bench.chaos_stream import Stream, follow, requests
from cluster.bench.common import console, print_json
from cluster.bench.gateway import DEFAULT_URL, AsJson, Client, Key, Url, connect
from cluster.bench.load import make_prompts
from cluster.errors import ExpertMeshError
from cluster.fleet.operator_cli import ask

_SETTLE_S = 2.0  # after a change: streams that waited go on

Homes = list[list[dict[str, float]]]


def skewed(shown: dict[str, Any]) -> Homes:
    """`shown` is a placement as the admin API shows it. The busiest experts of each layer on the first worker, as many
    as its slots hold, the others in turn on the others. ExpertMeshError for a single worker."""
    first, *others = [worker["id"] for worker in shown["workers"]]
    if not others:
        raise ExpertMeshError("this cluster has one expert worker: there is nothing to rebalance")
    homes_LE: Homes = shown["homes"]
    slots = {worker["id"]: worker["slots"] for worker in shown["workers"]}
    sparse = [layer for layer, experts in enumerate(homes_LE) if experts]
    n_experts = max(map(len, homes_LE))
    hot = n_experts - 1 if not slots[first] else min(n_experts - 1, (slots[first] - 1) // len(sparse))
    rows_LE = shown["recent_rows"] or [[0.0] * n_experts for _ in homes_LE]
    after: Homes = [[] for _ in homes_LE]
    for layer in sparse:
        busiest = np.argsort(np.array(rows_LE[layer]))[::-1].tolist()
        homes_E: list[dict[str, float]] = [{} for _ in busiest]
        for place, expert in enumerate(busiest):
            homes_E[expert] = {first if place < hot else others[(place + layer) % len(others)]: 1.0}
        after[layer] = homes_E
    return after


class Traffic:
    """The same requests over and over, from as many clients; each with a new prompt of `prompt_tokens`, if any."""

    def __init__(self, client: Client, todo: list[dict[str, Any]], prompt_tokens: int = 0) -> None:
        self._client = client
        self._todo = todo
        self._prompt_tokens = prompt_tokens
        self._seeds = random.Random(0)
        self._arrivals: list[list[float]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._ask(request)) for request in self._todo]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def rate(self, seconds: float) -> float:
        """Tokens per second of the next `seconds`, those of long prompts too. Raises what ended a stream."""
        begin = time.monotonic()
        await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in self._tasks:
            if task.done():
                task.result()
        end = time.monotonic()
        done = sum(self._tokens(arrivals, begin, end) for arrivals in self._arrivals)
        return done / (end - begin)

    def _tokens(self, arrivals: list[float], begin: float, end: float) -> int:
        """Of one request, what was done from `begin` on and before `end`: a prompt when its first token comes."""
        inside = [begin <= at < end for at in arrivals[1:]]  # the start of the request comes first
        return sum(inside) + self._prompt_tokens * sum(inside[:1])

    async def _ask(self, request: dict[str, Any]) -> None:
        while True:
            stream = Stream()
            if self._prompt_tokens:
                request = request | {"prompt": make_prompts(1, self._prompt_tokens, self._seeds.getrandbits(32))[0]}
            self._arrivals.append(stream.arrivals)
            with suppress(asyncio.IncompleteReadError):
                await follow(self._client, request, stream)


def rebalance(
    skew: Annotated[bool, typer.Option("--skew", help="gather the busiest experts on one worker first")] = False,
    streams: Annotated[int, typer.Option(min=1, help="concurrent streams")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each stream")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="of each prompt; 0: a short sentence, always the same")] = 0,
    seconds: Annotated[float, typer.Option(min=1, help="of each measurement")] = 15.0,
    repeats: Annotated[int, typer.Option(min=1, help="more than one need --skew")] = 1,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second before and after a rebalance, beside its receipt."""
    if repeats > 1 and not skew:
        raise ExpertMeshError("only what is skewed again can be rebalanced again: --repeats needs --skew")
    todo = requests(streams, tokens)
    result = asyncio.run(_measure(url, key, todo, prompt_tokens, seconds, repeats if skew else 0))
    if as_json:
        print_json(result)
    else:
        show(result)


async def _measure(
    url: str, key: str | None, todo: list[dict[str, Any]], prompt_tokens: int, seconds: float, skews: int
) -> dict[str, Any]:
    port = urlsplit(url).port
    rates: dict[str, list[float]] = {"before": [], "after": []}
    receipt: dict[str, Any] = {}
    async with Traffic(await connect(url, key), todo, prompt_tokens) as traffic:
        with console.status("") as status:
            await traffic.rate(seconds)  # so that the load is known
            for turn in range(max(1, skews)):
                status.update(f"run {turn + 1} of {max(1, skews)}")
                if skews:
                    shown = await asyncio.to_thread(ask, "GET", "/placement", port)
                    await asyncio.to_thread(ask, "PUT", "/placement", port, {"homes": skewed(shown)})
                    await traffic.rate(_SETTLE_S)
                rates["before"].append(await traffic.rate(seconds))
                await asyncio.to_thread(ask, "POST", "/rebalance", port, {"dry_run": False})
                await traffic.rate(_SETTLE_S)
                rates["after"].append(await traffic.rate(seconds))
            receipts = await asyncio.to_thread(ask, "GET", "/receipts", port)
            receipt = next(each for each in reversed(receipts) if each["action"] == "rebalance")
    before, after = (statistics.median(rates[name]) for name in ("before", "after"))
    return {"tokens_per_s": rates, "before": before, "after": after, "gain": after / before - 1, "receipt": receipt}


def show(result: dict[str, Any]) -> None:
    """The receipt's forecast and what was measured, side by side."""
    receipt = result["receipt"]
    forecast, since = receipt["forecast"], receipt["imbalance_since"]
    typer.echo(
        f"forecast: imbalance {forecast['imbalance_before']:.3f} -> {forecast['imbalance_after']:.3f}, experts' time "
        f"{-forecast['gain']:+.1%}, {forecast['moved_replicas']} replicas to load"
    )
    imbalance = f"imbalance {receipt['imbalance_before']:.3f} -> {1.0 if since is None else since:.3f}"
    rates = f"{result['before']:.1f} -> {result['after']:.1f} tokens/s ({result['gain']:+.1%})"
    typer.echo(f"measured: {imbalance}, {rates}, {receipt['added']} replicas loaded in {receipt['seconds']:.2f} s")
