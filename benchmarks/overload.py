"""A running gateway at its limit and far beyond it, in turns: what is accepted, how fast the rest is refused."""

from __future__ import annotations

import asyncio
import json
import random
import time
from statistics import median
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import typer

from benchmarks.command import run
from cluster.bench.gateway import DEFAULT_URL, AsJson, Client, Key, Url, connect
from cluster.bench.load import Gateway, Record, follow, make_prompts
from cluster.fleet import run_state

_PROMPT_TOKENS = 16
_SETTLE = 0.25  # of a part, in which the queue fills


def overload(
    url: Url = DEFAULT_URL,
    key: Key = None,
    seconds: Annotated[float, typer.Option(help="of each part")] = 60.0,
    rounds: Annotated[int, typer.Option(help="how often both parts are run")] = 3,
    factor: Annotated[float, typer.Option(help="arrivals as a multiple of what the cluster does")] = 3.0,
    concurrency: Annotated[int, typer.Option(help="clients that keep the cluster at its limit")] = 64,
    tokens: Annotated[int, typer.Option(help="of each answer")] = 64,
    as_json: AsJson = False,
) -> None:
    """Alternate a part at the limit (each client starts when its last request ended) and one of `factor` times as many
    arrivals, which nothing holds back."""

    async def measure() -> list[dict[str, Any]]:
        client = await connect(url, key)
        return [await _round(client, seconds, factor, concurrency, tokens) for _ in range(rounds)]

    found = asyncio.run(measure())
    if as_json:
        print(json.dumps(found))
        return
    for each in found:
        print("  ".join(f"{name} {value:.4g}" for name, value in each.items()))
    print(f"accepted / at the limit, median: {median(each['ratio'] for each in found):.3f}")
    print(f"refusals p99, median: {median(each['refused_p99_ms'] for each in found):.1f} ms")


async def _round(client: Client, seconds: float, factor: float, concurrency: int, tokens: int) -> dict[str, Any]:
    limit = await _at_the_limit(client, seconds, concurrency, tokens)
    rate = factor * limit / tokens
    port = urlsplit(client.url).port or 80
    before = _memory_mb(port)
    began = time.monotonic()
    records = await _beyond(client, seconds, rate, tokens)
    window = (began + seconds * _SETTLE, began + seconds)
    refused = sorted(each.end - each.due for each in records if each.error == "queue_full")
    late = sum(each.error == "queue_timeout" for each in records)  # taken, and given up after the longest wait
    failed = [each.error for each in records if each.error not in (None, "queue_full", "queue_timeout")]
    accepted = _rate(records, *window)
    return {
        "limit_tokens_s": limit,
        "arrivals_s": rate,
        "accepted_tokens_s": accepted,
        "ratio": accepted / limit,
        "taken": sum(each.error is None for each in records),
        "refused": len(refused),
        "refused_late": late,
        "failed": len(failed),
        "refused_p50_ms": _quantile(refused, 0.5) * 1e3,
        "refused_p99_ms": _quantile(refused, 0.99) * 1e3,
        "longest_wait_s": max((each.arrivals[0] - each.due for each in records if each.arrivals), default=0.0),
        "memory_mb": _memory_mb(port),
        "memory_grown_mb": _memory_mb(port) - before,
    }


async def _at_the_limit(client: Client, seconds: float, concurrency: int, tokens: int) -> float:
    """Tokens a second."""
    end = time.monotonic() + seconds
    records: list[Record] = []

    async def one(number: int) -> None:
        prompts = iter(make_prompts(10_000, _PROMPT_TOKENS, number))
        while time.monotonic() < end:
            records.append(await follow(Gateway(client, "completions"), next(prompts), tokens, time.monotonic()))

    began = time.monotonic()
    await asyncio.gather(*(one(number) for number in range(concurrency)))
    return _rate(records, began + seconds * _SETTLE, end)


async def _beyond(client: Client, seconds: float, rate: float, tokens: int) -> list[Record]:
    """All requests that came within `seconds`, `rate` a second (a Poisson process)."""
    chance, due = random.Random(1), time.monotonic()
    end, tasks = due + seconds, []
    for prompt in make_prompts(int(rate * seconds * 2) + 10, _PROMPT_TOKENS, 2):
        if (due := due + chance.expovariate(rate)) > end:
            break
        await asyncio.sleep(max(due - time.monotonic(), 0))
        tasks.append(asyncio.create_task(follow(Gateway(client, "completions"), prompt, tokens, due)))
    return await asyncio.gather(*tasks)


def _rate(records: list[Record], start: float, end: float) -> float:
    """Pieces of text a second, of which a token makes one."""
    return sum(start <= at < end for each in records for at in each.arrivals) / (end - start)


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)] if ordered else 0.0


def _memory_mb(port: int) -> float:
    """Of all processes of the cluster whose gateway listens on `port` of this machine, what is theirs alone."""
    family = psutil.Process(run_state.find(port).pid).children(recursive=True)
    return sum(process.memory_full_info().uss for process in family if process.is_running()) / 1e6


if __name__ == "__main__":
    run(overload)
