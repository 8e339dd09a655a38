"""A router or an expert worker as a process of its own, for one model after the other: starting it takes longer.

`python -m tests.integration.parity_process NAME`; a JSON object a line on standard input, one on standard output.
A worker is told a checkpoint, loads its share and says where it serves. A router is told a checkpoint, the workers'
addresses and prompts, and says what it generated. Both end when their standard input does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cluster.config import Config
from cluster.placement.placement import Placement, striped
from cluster.router.build import build_engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams
from tests.credentials import CREDENTIALS
from workers.checkpoint import Checkpoint
from workers.shard import load_shard
from workers.spec import ModelSpec
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.server import ExpertServer

WORKERS = ("expert-0", "expert-1", "expert-2")
# Small blocks and steps, so that sequences of a test's length cross them.
CONFIG = Config(block_size=4, max_batch_tokens=64, kv_cache_mb=16)


def placement(spec: ModelSpec) -> Placement:
    return striped(spec.n_layers, spec.n_experts, WORKERS, dense_layers=spec.dense_layers)


class Worker:
    """Serves its share of the last checkpoint it was told."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._server: ExpertServer | None = None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._server is not None:
            self._server.stop(0)
        checkpoint = Checkpoint(asked["checkpoint"])
        shard = load_shard(checkpoint, placement(checkpoint.spec).shard(self._name), torch.float32)
        self._server = ExpertServer(
            shard, self._name, "127.0.0.1", model=checkpoint.fingerprint(torch.float32), credentials=CREDENTIALS
        )
        self._server.start()
        return {"address": self._server.address}


def generate(asked: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations of all prompts at once: each a list of ids, and of (id, logprob) of every position."""
    directory, addresses = Path(asked["checkpoint"]), asked["addresses"]
    checkpoint, exchange = Checkpoint(directory), None
    spec = checkpoint.spec
    transport = GrpcTransport("router", checkpoint.fingerprint(torch.float32), CREDENTIALS)
    if spec.experts:
        exchange = Exchange(placement(spec), addresses, transport, reply_timeout_s=30, rejoin_timeout_s=30)
    engine = build_engine(CONFIG, directory, exchange)
    params = SamplingParams(
        max_tokens=asked["steps"], temperature=0.0, ignore_eos=True,
        logprobs=spec.vocab_size, prompt_logprobs=spec.vocab_size,
    )  # fmt: skip
    ids = {str(number): list(prompt) for number, prompt in enumerate(asked["prompts"])}
    scores: dict[str, list[Any]] = {name: [] for name in ids}
    for name, prompt in ids.items():
        engine.submit(name, prompt, params)
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output.error
            positions = (*(output.prompt_logprobs or ())[1:], *output.logprobs)
            scores[output.request_id] += [position.top for position in positions if position is not None]
            ids[output.request_id] += output.token_ids
    if exchange is not None:
        exchange.close()
    transport.close()
    return {"answers": [[ids[name], scores[name]] for name in ids]}


def main(name: str) -> None:
    torch.set_num_threads(1)
    answer = Worker(name) if name in WORKERS else generate
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
