"""`python -m benchmarks.prefix_cache`: what a prompt costs that others began with, in one process or on a cluster."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import typer

from benchmarks.command import run
from benchmarks.engine import random_model
from cluster.bench.common import print_json
from cluster.bench.gateway import AsJson, Client, Key, connect
from cluster.config import Config
from cluster.errors import ExpertMeshError
from cluster.router.build import build_engine
from cluster.router.params import SamplingParams

_TAIL = 4  # tokens of a prompt that nobody shares


class Answer(NamedTuple):
    """To one prompt."""

    ttft_s: float
    tokens: list[int]


Ask = Callable[[list[int], str], Answer]  # of a prompt and a salt, within which blocks are shared


def prefix_cache(
    model: Annotated[
        Path | None, typer.Option(help="checkpoint directory; default: a random one of 200 million parameters")
    ] = None,
    url: Annotated[str | None, typer.Option(help="a running gateway, instead of an engine in this process")] = None,
    key: Key = None,
    shared: Annotated[int, typer.Option(min=1, help="tokens that prompts have in common")] = 2000,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each answer")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="prefixes, of whose figures the median counts")] = 7,
    as_json: AsJson = False,
) -> None:
    """Time to the first token of a prompt that begins as an earlier one, beside that of the same prompt computed whole;
    the answers have to be the same."""
    ask = _engine(model or random_model(), tokens) if url is None else _gateway(url, key, tokens)
    chance = random.Random(time.time_ns())  # a cluster may have seen the prompts of the last run

    def prompt(n: int) -> list[int]:
        return [chance.randrange(10, 250) for _ in range(n)]

    ask(prompt(shared), "warm up")
    whole, known = [], []
    for _ in range(repeats):
        prefix = prompt(shared)
        first = ask(prefix + prompt(_TAIL), "")
        following = prefix + prompt(_TAIL)
        second, alone = ask(following, ""), ask(following, str(chance.random()))
        if second.tokens != alone.tokens:
            raise ExpertMeshError(f"with a known prefix the answer is {second.tokens}, else {alone.tokens}")
        whole += [first.ttft_s, alone.ttft_s]
        known.append(second.ttft_s)
    figures = {"whole_ms": median(whole) * 1e3, "known_prefix_ms": median(known) * 1e3}
    figures["ratio"] = figures["known_prefix_ms"] / figures["whole_ms"]
    if as_json:
        print_json(figures)
        return
    print(f"time to the first token, {shared} tokens shared of {shared + _TAIL}, median of {repeats}: whole "
          f"{figures['whole_ms']:.1f} ms, known prefix {figures['known_prefix_ms']:.1f} ms: "
          f"{figures['ratio']:.3f}; all answers equal")  # fmt: skip


def _engine(directory: Path, tokens: int) -> Ask:
    engine = build_engine(Config(), directory)

    def ask(prompt: list[int], salt: str) -> Answer:
        params = SamplingParams(tokens, temperature=0.0, ignore_eos=True, cache_salt=salt)
        start = time.perf_counter()
        engine.submit("0", prompt, params)
        answer: list[int] = []
        first = 0.0
        while engine.has_work():
            answer += [token for output in engine.step() for token in output.token_ids]
            first = first or (time.perf_counter() - start if answer else 0.0)
        return Answer(first, answer)

    return ask


def _gateway(url: str, key: str | None, tokens: int) -> Ask:
    client = asyncio.run(connect(url, key))
    return lambda prompt, salt: asyncio.run(_stream(client, prompt, salt, tokens))


async def _stream(client: Client, prompt: list[int], salt: str, tokens: int) -> Answer:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    if salt:
        body["cache_salt"] = salt
    answer: list[int] = []
    start, first = time.perf_counter(), 0.0
    async with aclosing(client.events("/v1/completions", body)) as events:
        async for event in events:
            for choice in event["choices"]:
                answer += choice.get("token_ids") or []
            first = first or (time.perf_counter() - start if answer else 0.0)
    return Answer(first, answer)


if __name__ == "__main__":
    run(prefix_cache)
