"""A gateway whose session is a pure function instead of routers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from cluster.config import Config
from cluster.errors import RequestError
from cluster.gateway.app import create_app
from cluster.gateway.context import ModelCard
from cluster.gateway.defaults import read_defaults
from cluster.gateway.metrics import Metrics
from cluster.gateway.page.feed import Source
from cluster.gateway.tokenizer import Tokenizer
from cluster.router.params import Finish, Routing, SamplingParams, StepOutput, TokenLogprobs


def next_token(prompt_ids: Sequence[int], emitted: Sequence[int], seed: int, vocab_size: int) -> int:
    """A model of one line: any pure function will do."""
    state = hash((tuple(prompt_ids), tuple(emitted), seed))
    return 3 + state % (vocab_size - 3)


class FakeSession:
    """Generates by `script(prompt_ids, emitted, seed) -> token id`, and remembers what it was asked.

    `pause_s` between tokens. `refusal` is raised instead of the first token, `failure` instead of the third.
    """

    def __init__(self, vocab_size: int, eos_ids: Collection[int]):
        self.eos_ids = eos_ids
        self.open = 0
        self.script: Callable[[Sequence[int], Sequence[int], int], int] = lambda prompt, emitted, seed: next_token(
            prompt, emitted, seed, vocab_size
        )
        self.reset()

    def reset(self) -> None:
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.pause_s = 0.0
        self.is_ready = True
        self.refusal: RequestError | None = None
        self.failure: Exception | None = None

    @property
    def n_open(self) -> int:
        return self.open

    def ready(self) -> bool:
        return self.is_ready

    def say(self, *ids: int) -> None:
        """Generate `ids`, and the first of them again after the last."""
        self.script = lambda prompt, emitted, seed: ids[len(emitted) % len(ids)]

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[StepOutput, None]:
        self.asked.append((list(prompt_ids), params))
        if self.refusal is not None:
            raise self.refusal
        self.open += 1
        try:
            emitted: list[int] = []
            while True:
                await asyncio.sleep(self.pause_s)
                if self.failure is not None and len(emitted) == 2:
                    raise self.failure
                if params.max_tokens:
                    emitted.append(self.script(prompt_ids, emitted, params.seed))
                output = self._output(prompt_ids, emitted, params)
                yield output
                if output.finish is not None:
                    return
        finally:
            self.open -= 1

    def _output(self, prompt_ids: Sequence[int], emitted: list[int], params: SamplingParams) -> StepOutput:
        finish: Finish | None = "length" if len(emitted) == params.max_tokens else None
        ends = params.stop_ids if params.ignore_eos else (*params.stop_ids, *self.eos_ids)
        if emitted and emitted[-1] in ends and len(emitted) > params.min_tokens:
            finish = "stop"
        prompt = None
        if params.prompt_logprobs is not None and len(emitted) <= 1:
            prompt = (None, *(self._score(i, params.prompt_logprobs) for i in prompt_ids[1:]))
        tokens = tuple(emitted[-1:])
        scores = () if params.logprobs is None else tuple(self._score(i, params.logprobs) for i in tokens)
        routing = None
        if params.routing and len(emitted) > 1:
            i = len(emitted) - 2  # a token's experts come with the next one
            routing = Routing(i, np.array([[[i % 8, (i + 1) % 8], [-1, -1], [i % 8, (i + 1) % 8]]], np.int16))
        return StepOutput("0", tokens, scores, prompt, finish, routing=routing)

    @staticmethod
    def _score(token_id: int, n: int) -> TokenLogprobs:
        return TokenLogprobs(-0.5, tuple((3 + (token_id + i) % 50, -0.25 - i) for i in range(n)))


@dataclass
class Served:
    """A gateway on a loopback port, in a thread."""

    url: str
    session: FakeSession
    tokenizer: Tokenizer
    app: FastAPI

    def client(self, *, strict: bool = True) -> OpenAI:
        """`strict`: validate every response and every chunk against the client's own types."""
        url = f"{self.url}/v1"
        return OpenAI(base_url=url, api_key="unused", max_retries=0, _strict_response_validation=strict)


@contextmanager
def serve(
    path: Path,
    vocab_size: int | None = None,
    *,
    max_context: int = 256,
    metrics: Metrics | None = None,
    source: Source | None = None,
    session: FakeSession | None = None,
    **options: Any,
) -> Iterator[Served]:
    """`vocab_size`: rows of the model's embedding; default: one for each token. `session`: who generates."""
    tokenizer = Tokenizer(path)
    vocab_size = vocab_size or tokenizer.vocab_size
    session = session or FakeSession(vocab_size, tokenizer.eos_ids)
    model = ModelCard(
        "tiny", str(path), max_context=max_context, vocab_size=vocab_size, created=1_700_000_000,
        defaults=read_defaults(path),
    )  # fmt: skip
    app = create_app(Config(**options), model, tokenizer, session, metrics, source)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", session, tokenizer, app)
    finally:
        server.should_exit = True
        thread.join()
