"""Fail-over between two real engines: would catch a sampled token that depends on which router computed it, or when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.gateway.session import Session
from cluster.models.random import write_random
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.params import SamplingParams, StepOutput
from cluster.router.service import GenerationService
from tests.credentials import CREDENTIALS
from tests.loop import in_loop, until

CONFIG = Config(kv_cache_mb=8, max_batch_tokens=32)
PARAMS = [
    SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=48, temperature=1.0, top_p=0.9, seed=11, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=48, seed=12, repetition_penalty=1.2, frequency_penalty=0.5, min_tokens=40),
    SamplingParams(max_tokens=48, seed=13, top_k=20, logit_bias={7: 3.0}, ignore_eos=True),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "random"
    write_random(path)
    return path


def undisturbed(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> list[int]:
    engine.submit("alone", prompt_ids, params)
    tokens: list[int] = []
    while engine.has_work():
        for output in engine.step():
            tokens.extend(output.token_ids)
    return tokens


async def collect(outputs: AsyncGenerator[StepOutput, None]) -> list[int]:
    return [token async for output in outputs for token in output.token_ids]


@in_loop
async def test_streams_continue_with_the_tokens_of_an_undisturbed_run(checkpoint: Path) -> None:
    engines = [build_engine(CONFIG, checkpoint) for _ in range(2)]
    requests = [([10 + index, *range(20, 40)], replace(params, seed=params.seed + index))
                for index, params in enumerate(PARAMS * 2)]  # fmt: skip
    wanted = [undisturbed(engines[0], prompt_ids, params) for prompt_ids, params in requests]
    free = [engine.stats().free_blocks for engine in engines]
    async with AsyncExitStack() as stack:
        services = [
            GenerationService(engine, "127.0.0.1", router=str(i), credentials=CREDENTIALS)
            for i, engine in enumerate(engines)
        ]
        for service in services:
            await service.start()
            stack.push_async_callback(service.stop)
        session = await stack.enter_async_context(
            Session(CREDENTIALS, {service.router: service.address for service in services})
        )
        await until(lambda: all(stream.state == "ready" for stream in session.stats().streams))
        streams = [asyncio.create_task(collect(session.generate(*request))) for request in requests]
        await until(lambda: session.stats().tokens > 100)
        await services[0].stop()
        assert await asyncio.gather(*streams) == wanted
        assert session.stats().fail_overs == len(requests) / 2
        await until(lambda: [engine.stats().free_blocks for engine in engines] == free)
