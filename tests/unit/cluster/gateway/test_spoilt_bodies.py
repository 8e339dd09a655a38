"""Would catch: a body that no one thought of and that ends in a 5xx, breaks a stream off, or holds up another's.

`EXPERTMESH_SPOILT=100000 pytest THIS -s` for more of them, with figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from cluster.gateway.tokenizer import Tokenizer
from cluster.router.params import SamplingParams, StepOutput
from tests.unit.cluster.gateway.corpus import CORPUS, spoilt
from tests.unit.cluster.gateway.fake_gateway import FakeSession, Served, serve

# Classes, files and addresses of the server, which are nothing to a client.
OURS = re.compile(
    r"instance of|Traceback|\w\.py\b|site-packages|/(home|root|usr|var|work|tmp)/|127\.0\.0\.1|Error:|\bpydantic|"
    + "|".join(rf"\b{name}\b" for name in ("ChatRequest", "CompletionRequest", "ChatTemplate", "SamplingParams"))
)
MANY = int(os.environ.get("EXPERTMESH_SPOILT", "1000"))
_AT_ONCE = 4


def test_the_corpus_is_right_as_it_is(roomy: Served) -> None:
    for path, body in CORPUS:
        answer = httpx.post(roomy.url + path, json=body)
        assert answer.status_code == 200 and '"error": {' not in answer.text, (body, answer.text)


class Brief(FakeSession):
    """Says a few tokens, however many are asked for, so that answers come when their requests were read."""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[StepOutput, None]:
        params = replace(params, max_tokens=min(params.max_tokens, 20), min_tokens=0)
        async with aclosing(super().generate(prompt_ids, params)) as outputs:
            async for output in outputs:
                yield output


@pytest.mark.timeout(3600)
def test_spoilt_bodies(byte_level_path: Path) -> None:
    tokenizer = Tokenizer(byte_level_path)
    session = Brief(tokenizer.vocab_size, tokenizer.eos_ids)
    with serve(byte_level_path, max_context=2000, session=session) as served:
        statuses, slowest, gaps = asyncio.run(send_all(served.url))
    p99 = sorted(gaps)[int(len(gaps) * 0.99)] if gaps else 0.0
    took = f"slowest {slowest[0]:.2f} s (seed {slowest[1]}); other stream's gaps p99 {p99 * 1e3:.1f} ms"
    print(f"\n{MANY} bodies: {dict(statuses)}; {took}")
    assert set(statuses) <= {200, 400, 404, 413, 415, 422}


async def send_all(url: str) -> tuple[Counter[int], tuple[float, int], list[float]]:
    """The statuses, the slowest answer (s, seed), and how long each event of a stream beside them was awaited."""
    statuses: Counter[int] = Counter()
    slowest, gaps = (0.0, 0), []
    seeds = iter(range(MANY))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def send() -> None:
            nonlocal slowest
            for seed in seeds:
                path, body = spoilt(random.Random(seed))
                began = time.perf_counter()
                answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
                slowest = max(slowest, (time.perf_counter() - began, seed))
                statuses[answer.status_code] += 1
                assert answer.status_code < 500, (seed, path, body[:2000], answer.text)
                if answer.status_code != 200:
                    message = json.loads(answer.content)["error"]["message"]
                    assert message and OURS.search(message) is None, (seed, answer.text)
                assert "broke off" not in answer.text and "internal_error" not in answer.text, (seed, answer.text)

        async def listen() -> None:
            asked = {
                "model": "tiny",
                "messages": [{"role": "user", "content": "Hi"}],
                "ignore_eos": True,
                "stream": True,
            }
            while True:
                async with client.stream("POST", "/v1/chat/completions", json=asked) as events:
                    last = time.perf_counter()
                    async for _ in events.aiter_lines():
                        now = time.perf_counter()
                        gaps.append(now - last)
                        last = now

        listener = asyncio.create_task(listen())
        await asyncio.gather(*(send() for _ in range(_AT_ONCE)))
        listener.cancel()
    return statuses, slowest, gaps
