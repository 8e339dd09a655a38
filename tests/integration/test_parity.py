"""A whole cluster against transformers: 2 routers, 3 expert workers, gRPC, Ray and the gateway, over many shapes.

Would catch whatever the parts' own tests cannot: rows that go to the wrong worker, an order of experts, a dtype or a
checkpoint read differently by router and workers, a batch that changes its members' results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MixtralForCausalLM

from tests.cluster_fixture import RunningCluster, running_cluster
from tests.reference import SHAPES, TOLERANCE, gate_margins, random_tokens, reference_logits, save_random

pytestmark = pytest.mark.cluster

VOCABULARY = 20  # as many as the likeliest tokens a response may name, so that it names the whole distribution
STEPS = 64
GATE_TIE = 2e-5  # of gate logits of order ten


def write_tokenizer(directory: Path) -> None:
    """One word per token id, so that the names in a response say which ids they are."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2"}))


def complete(cluster: RunningCluster, prompt: Sequence[int]) -> dict[str, Any]:
    """A greedy continuation, with the distribution at every position of prompt and answer."""
    body = {
        "model": cluster.model, "prompt": list(prompt), "max_tokens": STEPS, "temperature": 0, "ignore_eos": True,
        "logprobs": VOCABULARY, "echo": True,
    }  # fmt: skip
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0]["logprobs"])


def distributions(logprobs: dict[str, Any]) -> tuple[list[int], Tensor]:
    """The token ids of prompt and answer, and the log-probabilities [T, V] that each but the first was drawn from."""
    ids = [int(word.strip()[1:]) for word in logprobs["tokens"]]
    rows = torch.full((len(ids), VOCABULARY), float("nan"))
    for row, top in zip(rows[1:], logprobs["top_logprobs"][1:], strict=True):
        for word, value in top.items():
            row[int(word.strip()[1:])] = value
    return ids, rows[1:]


def check(model: MixtralForCausalLM, prompt: Sequence[int], logprobs: dict[str, Any]) -> None:
    ids, ours = distributions(logprobs)
    assert ids[: len(prompt)] == list(prompt)
    assert len(ids) == len(prompt) + STEPS
    # From a position on at which the gate itself hardly decides, another choice of experts is as right.
    undecided = (gate_margins(model, ids) < GATE_TIE).nonzero()
    end = int(undecided[0]) if len(undecided) else len(ids) - 1
    assert end > len(prompt) // 2, "choose another seed: there is hardly anything to compare"
    ours, reference = ours[:end], reference_logits(model, ids)[:end]
    # Log-probabilities are the logits but for one constant a position, which no sampling can see.
    torch.testing.assert_close(ours, reference.log_softmax(-1), atol=TOLERANCE, rtol=0)
    for position in range(len(prompt) - 1, end):
        best = reference[position].topk(2)
        taken = ids[position + 1]
        near_tie = best.values[0] - best.values[1] < TOLERANCE
        assert taken == best.indices[0] or (near_tie and taken == best.indices[1]), f"step {position}"


@pytest.mark.parametrize("shape", list(SHAPES))
def test_same_as_the_reference(shape: str, tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", seed=7, **(SHAPES[shape] | {"vocab_size": VOCABULARY}))
    write_tokenizer(tmp_path / "model")
    # Small blocks and steps, so that sequences of this length cross them.
    options = ("--routers", "2", "--expert-workers", "3", "--block-size", "4", "--max-batch-tokens", "64")
    with running_cluster(tmp_path, tmp_path / "model", *options, "--kv-cache-mb", "16") as cluster:
        prompts = [random_tokens(VOCABULARY, 3 + 5 * i, seed=i) for i in range(16)]
        check(model, prompts[5], complete(cluster, prompts[5]))
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: complete(cluster, prompt), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            check(model, prompt, answer)
