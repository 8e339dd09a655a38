"""The default model, served: the answers of transformers on the same checkpoint, also while processes are killed.

Would catch what small random models do not: 30 layers, bfloat16 on disk, a real tokenizer and template, long streams.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from openai import OpenAI
from transformers import MixtralForCausalLM

from cluster.fleet.run_state import credentials_path
from cluster.gateway.session import Session
from cluster.router.build import dense_bytes
from cluster.router.params import SamplingParams
from tests.cluster_fixture import RunningCluster, run, running_cluster
from tests.reference import TOLERANCE
from workers.checkpoint import Checkpoint
from workers.transport.grpc.credentials import Credentials

pytestmark = pytest.mark.cluster

STEPS = 64
KV_CACHE_MB = 512  # the default
MIB = 2**20
QUESTIONS = """
What is the capital of France?
Name three rivers.
How do bees make honey?
Write a haiku about rain.
What is 12 times 12?
Explain gravity to a child.
Why is the sky blue?
Translate 'good morning' to Spanish.
Give me a recipe for pancakes.
Who wrote Hamlet?
What does a compiler do?
Write a Python function that adds.
What is photosynthesis?
Tell me a short story.
List five fruits.
How far away is the moon?
What is a black hole?
How do I boil an egg?
Name a famous painter.
What is the opposite of cold?
""".strip().splitlines()


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    result = run("model", "default", timeout_s=600)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[RunningCluster]:
    options = ("--routers", "2", "--expert-workers", "3")
    with running_cluster(tmp_path_factory.mktemp("cluster"), checkpoint, *options) as running:
        yield running


async def answers(cluster: RunningCluster, prompts: list[list[int]]) -> list[list[int]]:
    """The token ids of greedy answers, all at once; from the routers, for text would hide where token ids differ."""
    routers = {p["id"]: p["address"] for p in cluster.status()["processes"] if p["role"] == "router"}
    credentials = Credentials.read(credentials_path(Path(cluster.status()["run_dir"])))
    params = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    async with Session(credentials, routers) as session:

        async def answer(prompt: list[int]) -> list[int]:
            return [token async for output in session.generate(prompt, params) for token in output.token_ids]

        return await asyncio.gather(*(answer(prompt) for prompt in prompts))


def tokens_of(cluster: RunningCluster, question: str) -> list[int]:
    """The question as a chat prompt, in token ids."""
    body = {"model": cluster.model, "messages": [{"role": "user", "content": question}]}
    return list(httpx.post(f"{cluster.url}/tokenize", json=body).raise_for_status().json()["tokens"])


def test_a_process_holds_its_part_of_the_model(served: RunningCluster, checkpoint: Path) -> None:
    """Once loaded. Would catch a second copy of weights, or what loading them leaves behind."""
    dense = dense_bytes(Checkpoint(checkpoint), torch.float32)
    for process in served.status()["processes"]:
        resident = psutil.Process(process["pid"]).memory_info().rss
        if process["role"] == "expert":
            assert resident < process["detail"]["weight_bytes"] + 400 * MIB, process["id"]
        elif process["role"] == "router":
            assert resident < dense + (KV_CACHE_MB + 500) * MIB, process["id"]


def test_a_sensible_answer(served: RunningCluster) -> None:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": QUESTIONS[0]}], temperature=0, stream=True
    )
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_what_is_left_open_is_what_the_card_recommends(served: RunningCluster) -> None:
    """Would catch defaults that do not reach the gateways: at temperature 1 half of these answers do not name it."""
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    question = {"role": "user", "content": "What is the capital of Germany?"}
    answer = client.chat.completions.create(model=served.model, messages=[question], n=8, seed=1, max_tokens=32)
    assert all("Berlin" in (choice.message.content or "") for choice in answer.choices)


@torch.no_grad()
def test_same_as_the_reference(served: RunningCluster, checkpoint: Path) -> None:
    # The routers are asked before transformers loads a second copy of the model.
    prompts = [tokens_of(served, question) for question in QUESTIONS]
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for question, prompt, ids in zip(QUESTIONS, prompts, asyncio.run(answers(served, prompts)), strict=True):
        assert len(ids) == STEPS
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        for step, (row, taken) in enumerate(zip(logits, ids, strict=True)):
            best = row.topk(2)
            near_tie = best.values[0] - best.values[1] < TOLERANCE
            assert taken == best.indices[0] or (near_tie and taken == best.indices[1]), f"{question} step {step}"


@pytest.mark.parametrize("role", ["expert", "router"])
def test_no_client_notices_a_kill(served: RunningCluster, role: str) -> None:
    command = ("bench", "chaos", "--role", role, "--kills", "3", "--tokens", "32", "--url", served.url, "--json")
    result = served.command(*command)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["kills"], report["changed"]) == (3, 0)
