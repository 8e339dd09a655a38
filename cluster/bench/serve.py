"""`expertmesh bench serve`: load on a running gateway, or on routers without one, and what its clients see."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cluster.bench.common import console, print_json, print_table
from cluster.bench.gateway import DEFAULT_URL, AsJson, Key, Url, connect
from cluster.bench.load import Endpoint, Gateway, Record, Routers, Target, closed_loop, make_prompts, open_loop
from cluster.errors import ExpertMeshError
from cluster.fleet import snapshot
from cluster.fleet.run_state import credentials_path
from cluster.gateway.session import Session
from workers.transport.grpc.credentials import Credentials

_CONNECT_S = 10.0


def serve(
    url: Url = DEFAULT_URL,
    router: Annotated[
        list[str] | None,
        typer.Option(help="host:port of a router of this user's cluster, to load past the gateway; repeatable"),
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="what is asked of the gateway")] = "completions",
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="requests a second, Poisson; default: --concurrency instead")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="clients, each with one request at a time")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="requests in all")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt; for chat, words")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each answer")] = 128,
    key: Key = None,
    seed: Annotated[int, typer.Option(help="of prompts and arrivals")] = 0,
    as_json: AsJson = False,
) -> None:
    """Time to first token, time between events, tokens per second, pauses and errors under a load."""
    prompts = make_prompts(requests, prompt_tokens, seed)
    result: dict[str, Any] = {
        "target": ", ".join(router) if router else url, "endpoint": "router" if router else endpoint, "rate": rate,
        "concurrency": None if rate else concurrency, "prompt_tokens": prompt_tokens, "answer_tokens": tokens,
    }  # fmt: skip

    async def run() -> list[Record]:
        async with AsyncExitStack() as stack:
            target: Target = await routers(stack, router) if router else Gateway(await connect(url, key), endpoint)
            with console.status("") as status:
                ended = 0

                def on_end() -> None:
                    nonlocal ended
                    ended += 1
                    status.update(f"{ended} of {requests} requests")

                if rate is not None:
                    return await open_loop(target, prompts, tokens, rate, seed, on_end)
                return await closed_loop(target, prompts, tokens, concurrency, on_end)

    cpu = time.process_time()
    result |= summary(asyncio.run(run()))
    result["generator_cpu_s"] = time.process_time() - cpu
    if as_json:
        print_json(result)
    else:
        show(result)
    if result["errors"] and not result["tokens"]:
        raise typer.Exit(1)


async def routers(stack: AsyncExitStack, addresses: Sequence[str]) -> Routers:
    """Routers of this user's running cluster, once all are ready. ExpertMeshError when they do not get so."""
    cluster = snapshot.read()
    names = {process["address"]: process["id"] for process in cluster["processes"] if process["role"] == "router"}
    if unknown := [address for address in addresses if address not in names]:
        raise ExpertMeshError(f"no router of the cluster is at {', '.join(unknown)}; they are at {', '.join(names)}")
    credentials = Credentials.read(credentials_path(Path(cluster["run_dir"])))
    session = await stack.enter_async_context(Session(credentials, {names[address]: address for address in addresses}))
    deadline = time.monotonic() + _CONNECT_S
    while any(stream.state != "ready" for stream in session.stats().streams):
        if time.monotonic() > deadline:
            raise ExpertMeshError(f"no ready router at {', '.join(addresses)} within {_CONNECT_S:g} s")
        await asyncio.sleep(0.05)
    return Routers(session)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Seconds throughout. Tokens per second count from the first start to the last end."""
    started = [record for record in records if record.arrivals]
    gaps = [b - a for record in started for a, b in pairwise(record.arrivals)]
    duration = max(record.end for record in records) - min(record.due for record in records)
    tokens = sum(record.tokens for record in records)
    return {
        "requests": len(records),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "duration_s": duration,
        "tokens": tokens,
        "tokens_per_s": tokens / duration,
        "requests_per_s": len(records) / duration,
        "ttft_s": percentiles([record.arrivals[0] - record.due for record in started]),
        "itl_s": percentiles(gaps),
        "request_s": percentiles([record.end - record.due for record in started]),
        "max_pause_s": max(gaps, default=None),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the largest; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(values)}


def show(result: dict[str, Any]) -> None:
    names = {"ttft_s": "to the first token", "itl_s": "between two events", "request_s": "whole request"}
    rows = [
        [names[name], *(f"{value * 1000:.1f}" for value in result[name].values())] for name in names if result[name]
    ]
    print_table(f"{result['target']} ({result['endpoint']}), ms", ["", "p50", "p90", "p99", "max"], rows)
    typer.echo(
        f"{result['tokens_per_s']:.1f} tokens/s, {result['requests_per_s']:.2f} requests/s: "
        f"{result['tokens']} tokens of {result['requests']} requests in {result['duration_s']:.1f} s"
    )
    if result["max_pause_s"] is not None:
        typer.echo(f"longest pause in a stream: {result['max_pause_s']:.3f} s")
    for error, n in result["errors"].items():
        typer.echo(f"{n} requests failed: {error}")
