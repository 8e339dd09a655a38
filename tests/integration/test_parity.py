"""Every family against transformers over many shapes: 2 routers and 3 expert workers, each a process of its own.

Would catch whatever the parts' own tests cannot: rows that go to the wrong worker, an order of experts, a dtype or a
checkpoint read differently by router and workers, a batch that changes its members' results, an option of a family
that is forgotten on the way. A few of the models are served by whole clusters too: Ray, controller and gateway.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel

from tests.cluster_fixture import RunningCluster, running_cluster
from tests.integration.parity_process import WORKERS
from tests.reference import EVERY_SHAPE, TOLERANCE, gate_margins, random_tokens, reference_logits, save_shape

VOCABULARY = 20  # as many as the likeliest tokens a response may name, so that it names the whole distribution
STEPS = 24
GATE_TIE = 2e-5  # of gate logits of order ten
ROUTERS = ("router-0", "router-1")


def check(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int], ours: Tensor, steps: int) -> None:
    """`ours` [T - 1, V]: the log-probabilities that each of `ids` but the first was drawn from."""
    assert list(ids[: len(prompt)]) == list(prompt)
    assert len(ids) == len(prompt) + steps
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


# --- routers and expert workers alone


class Processes:
    """Running routers and workers."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.integration.parity_process"]
        self._processes = {
            name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name in (*WORKERS, *ROUTERS)
        }

    def tell(self, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Ask the named processes at the same time; their answers."""
        for name, values in asked.items():
            stdin = self._processes[name].stdin
            assert stdin is not None
            stdin.write(json.dumps(values) + "\n")
            stdin.flush()
        return {name: json.loads(self._line(name)) for name in asked}

    def _line(self, name: str) -> str:
        process = self._processes[name]
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{name} ended with exit code {process.wait()}"
        return line

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate()  # closes its standard input, at which it ends


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    running = Processes()
    yield running
    running.close()


def dense_row(top: Sequence[tuple[int, float]]) -> Tensor:
    row = torch.full((len(top),), float("nan"))
    for token, logprob in top:
        row[token] = logprob
    return row


@pytest.mark.parametrize(("family", "shape"), EVERY_SHAPE, ids=["-".join(case) for case in EVERY_SHAPE])
def test_same_as_the_reference(family: str, shape: str, tmp_path: Path, processes: Processes) -> None:
    """Both routers send to the same workers at the same time."""
    model = save_shape(tmp_path, family, shape, seed=7, vocab_size=VOCABULARY)
    checkpoint = str(tmp_path)
    served = processes.tell({worker: {"checkpoint": checkpoint} for worker in WORKERS})
    addresses = {worker: answer["address"] for worker, answer in served.items()}
    prompts = [random_tokens(model.config.vocab_size, 3 + 5 * i, seed=i) for i in range(8)]
    asked = {"checkpoint": checkpoint, "addresses": addresses, "steps": STEPS}
    answers = processes.tell({router: asked | {"prompts": prompts[number::2]} for number, router in enumerate(ROUTERS)})
    for number, router in enumerate(ROUTERS):
        for prompt, (ids, tops) in zip(prompts[number::2], answers[router]["answers"], strict=True):
            check(model, prompt, ids, torch.stack([dense_row(top) for top in tops]), STEPS)


# --- whole clusters


def write_tokenizer(directory: Path) -> None:
    """One word per token id, so that the names in a response say which ids they are."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2"}))


def complete(cluster: RunningCluster, prompt: Sequence[int]) -> tuple[list[int], Tensor]:
    """A greedy continuation: ids of prompt and answer, and the log-probabilities [T - 1, V] of all but the first."""
    body = {
        "model": cluster.model, "prompt": list(prompt), "max_tokens": STEPS, "temperature": 0, "ignore_eos": True,
        "logprobs": VOCABULARY, "echo": True,
    }  # fmt: skip
    # On a crowded machine Serve may take HAProxy for dead and start another, which refuses for seconds.
    with httpx.Client(transport=httpx.HTTPTransport(retries=6), timeout=120) as client:
        response = client.post(f"{cluster.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][0]["logprobs"]
    tops = [[(int(word.strip()[1:]), value) for word, value in top.items()] for top in logprobs["top_logprobs"][1:]]
    return [int(word.strip()[1:]) for word in logprobs["tokens"]], torch.stack([dense_row(top) for top in tops])


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("family", "shape", "transport"),
    [
        ("mixtral", "sixteen_experts_top_4", "grpc"),
        ("qwen2_moe", "window_in_every_other_layer_dense_first", "shm"),
        ("llama", "gqa", "auto"),
    ],
)
def test_a_whole_cluster(family: str, shape: str, transport: str, tmp_path: Path) -> None:
    """A mixture, one with dense layers among its sparse ones, and a dense model, which routers serve alone."""
    model = save_shape(tmp_path / "model", family, shape, seed=7, vocab_size=VOCABULARY)
    write_tokenizer(tmp_path / "model")
    options = ("--routers", "2", "--expert-workers", "3", "--block-size", "4", "--max-batch-tokens", "64")
    options += ("--transport", transport, "--kv-cache-mb", "16")
    with running_cluster(tmp_path, tmp_path / "model", *options) as cluster:
        workers = [process for process in cluster.status()["processes"] if process["role"] == "expert"]
        assert len(workers) == (0 if family == "llama" else 3)
        prompts = [random_tokens(VOCABULARY, 3 + 5 * i, seed=i) for i in range(16)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: complete(cluster, prompt), prompts))
        for prompt, (ids, ours) in zip(prompts, answers, strict=True):
            check(model, prompt, ids, ours, STEPS)
