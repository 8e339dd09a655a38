"""`expertmesh bench chaos`: kill processes of a running cluster under streams, and see whether any client notices.

The streams are run once undisturbed; then again and again while processes of one role are killed (SIGKILL) at random
moments. Every stream has to end with the tokens of its undisturbed run. A position at which the two likeliest tokens
of the undisturbed run are within `NEAR_TIE` of each other may differ: there the order of float32 additions decides.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer

from cluster.errors import ExpertMeshError
from cluster.fleet.status import processes

NEAR_TIE = 1e-4  # nats
_QUIET_S = (0.5, 8.0)  # between two kills, once the fleet is whole again
SUBJECTS = ["the sea", "a clock", "bread", "winter", "the number seven", "a garden", "trains", "an old friend"]


@dataclass(slots=True)
class Stream:
    """What one client saw."""

    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # between the two likeliest tokens, nats
    arrivals: list[float] = field(default_factory=list)  # monotonic seconds, the start of the request first
    finish: str | None = None


async def follow(client: httpx.AsyncClient, request: dict[str, Any]) -> Stream:
    """Run one streamed completion to its end. Raises ExpertMeshError when the client is given an error."""
    seen = Stream(arrivals=[time.monotonic()])
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            raise ExpertMeshError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ExpertMeshError(f"error in the stream: {event['error']}")
            for choice in event["choices"]:
                note(seen, choice)
    if seen.finish is None:
        raise ExpertMeshError("a stream ended without a finish_reason")
    return seen


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


def same(seen: Stream, undisturbed: Stream) -> bool:
    """Equal tokens and end, up to a near-tie of the undisturbed run."""
    if seen.tokens == undisturbed.tokens:
        return seen.finish == undisturbed.finish
    pairs = zip(seen.tokens, undisturbed.tokens, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return first is not None and undisturbed.margins[first] < NEAR_TIE


def requests(model: str, n: int, max_tokens: int) -> list[dict[str, Any]]:
    """`n` different requests, every other one greedy, the rest sampled with a seed."""
    return [
        {
            "model": model,
            "prompt": f"Story {i}. Once upon a time, {SUBJECTS[i % len(SUBJECTS)]}",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0.0 if i % 2 == 0 else 0.8,
            "seed": i,
            "logprobs": 2,
            "stream": True,
        }
        for i in range(n)
    ]


async def run_all(client: httpx.AsyncClient, todo: list[dict[str, Any]]) -> list[Stream]:
    """All requests at once."""
    return await asyncio.gather(*(follow(client, request) for request in todo))


async def killer(port: int | None, role: str, kills: int, rng: random.Random, done: asyncio.Event) -> list[float]:
    """Kill `kills` processes of `role` in the cluster on `port`, each after the fleet is whole again.

    Returns the moments of the kills.
    """
    moments: list[float] = []
    dead: set[int] = set()
    while len(moments) < kills:
        await asyncio.sleep(rng.uniform(*_QUIET_S))
        fleet = await asyncio.to_thread(processes, port)
        if any(process["state"] != "ready" or process["pid"] in dead for process in fleet):
            continue
        candidates = [process["pid"] for process in fleet if process["role"] == role]
        if not candidates:
            raise ExpertMeshError(f"this cluster has no process of role {role}")
        victim = rng.choice(candidates)
        os.kill(victim, signal.SIGKILL)
        dead.add(victim)
        moments.append(time.monotonic())
    done.set()
    return moments


def pauses(streams: list[Stream], moments: list[float]) -> list[float]:
    """Per kill, the longest time in seconds that any open stream went without a token around it."""
    gaps = [pair for stream in streams for pair in zip(stream.arrivals, stream.arrivals[1:], strict=False)]
    return [
        max((after - before for before, after in gaps if before <= moment <= after), default=0.0) for moment in moments
    ]


async def campaign(
    url: str, key: str | None, role: str, kills: int, streams: int, tokens: int, seed: int
) -> dict[str, Any]:
    """The whole measurement against the gateway at `url`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=streams + 4)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        todo = requests(model, streams, tokens)
        undisturbed = await run_all(client, todo)
        done = asyncio.Event()
        killing = asyncio.create_task(killer(urlsplit(url).port, role, kills, random.Random(seed), done))
        seen: list[Stream] = []
        changed = 0
        while not done.is_set():
            if killing.done():
                await killing  # only an error ends it before it has set the event
            round_ = await run_all(client, todo)
            changed += sum(not same(a, b) for a, b in zip(round_, undisturbed, strict=True))
            seen += round_
        longest = pauses(seen, await killing)
    quiet = [max(b - a for a, b in zip(s.arrivals[1:], s.arrivals[2:], strict=False)) for s in undisturbed]
    return {
        "role": role,
        "kills": kills,
        "streams": len(seen),
        "changed": changed,
        "pause_s": {"median": statistics.median(longest), "max": max(longest)},
        "undisturbed_pause_s": max(quiet),
    }


def chaos(
    role: Annotated[str, typer.Option(help="what to kill: expert or router")] = "expert",
    kills: Annotated[int, typer.Option(help="how many processes to kill")] = 20,
    streams: Annotated[int, typer.Option(help="concurrent streams")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens of each stream")] = 64,
    url: Annotated[str, typer.Option(help="where the gateway listens")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key, if the gateway asks for one")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the moments and the victims")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Kill processes of a running cluster under load and compare every stream with its undisturbed run."""
    result = asyncio.run(campaign(url, key, role, kills, streams, tokens, seed))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        pause = result["pause_s"]
        typer.echo(f"{kills} x kill -9 of one {role} under {streams} streams; {result['streams']} streams ended")
        typer.echo(f"streams whose tokens changed: {result['changed']}")
        typer.echo(
            f"longest pause a client saw: median {pause['median']:.2f} s, maximum {pause['max']:.2f} s "
            f"(undisturbed: {result['undisturbed_pause_s']:.2f} s)"
        )
    if result["changed"]:
        raise typer.Exit(1)
