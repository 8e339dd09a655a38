"""Steps of a router on a GPU over a group, on a CPU: the kernels in Triton's interpreter, graphs that compute anew.

Catches a captured step that keeps a row or a choice of the one before, and a group that ends with tokens lost or
changed. Capturing itself a GPU has to show.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import cluster.router.exchange.exchange as exchange_module
import workers.model.decoder as decoder_module
import workers.shard as shard_module
from cluster.config import Config
from cluster.models.random import SMALL, write_random
from cluster.placement.placement import striped
from cluster.router.build import build_model
from cluster.router.compute import Compute, HostCompute
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.exchange.step_compute import ExchangeCompute
from cluster.router.params import SamplingParams, StepOutput
from tests.contract.collective_harness import CollectiveWorkers
from tests.contract.harness import start_all
from tests.contract.test_same_bits import OnDisk
from tests.fake_gpu import captures
from tests.interpreter import quick_interpreter
from workers.checkpoint import Checkpoint
from workers.kernels.cuda.ops import CudaOps
from workers.kernels.ops import Ops
from workers.model.decode_graphs import size_of
from workers.model.decoder import Decoder
from workers.shard import ExpertShard
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.steps import CollectiveSteps
from workers.weights import FORMATS

__all__ = ["captures", "quick_interpreter"]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # of the interpreter
SPEC = replace(
    SMALL, hidden_size=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, ffn_size=64, n_experts=4, vocab_size=96,
    dtype=torch.float16,
)  # fmt: skip
CONFIG = Config(dtype="float16", kv_cache_mb=1, block_size=16, max_sequences=3, max_batch_tokens=64, prefix_cache=False)
Result = dict[str, tuple[list[int], list[list[list[int]]]]]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, captures: None) -> None:
    """Operations of a GPU on this CPU."""

    def ops_for(device: torch.device | str, dtype: torch.dtype) -> Ops:
        return CudaOps(torch.device(device), dtype)

    for module in (decoder_module, shard_module, exchange_module):
        monkeypatch.setattr(module, "ops_for", ops_for)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "random"
    write_random(path, SPEC)
    return path


def run(model: Decoder, compute: Compute, after_step: Callable[[int], None] = lambda n: None) -> Result:
    """Three requests of different lengths, one that ends early, one whose routing is asked for."""
    engine, given = Engine(model, CONFIG, compute=compute), Result()
    options: list[dict[str, Any]] = [
        {"temperature": 0.0, "routing": True}, {"temperature": 0.9, "max_tokens": 2},
        {"temperature": 0.7, "frequency_penalty": 0.5},
    ]  # fmt: skip
    for index, option in enumerate(options):
        prompt = torch.randint(3, SPEC.vocab_size, (3 + 9 * index,), generator=torch.Generator().manual_seed(index))
        params = SamplingParams(**({"max_tokens": 4, "seed": index, "ignore_eos": True} | option))
        engine.submit(str(index), prompt.tolist(), params)
        given[str(index)] = ([], [])
    n = 0
    while engine.has_work():
        for output in engine.step():
            take(given, output)
        n += 1
        after_step(n)
    return given


def take(given: Result, output: StepOutput) -> None:
    assert output.error is None, output.error
    tokens, routing = given[output.request_id]
    tokens += output.token_ids
    routing += [] if output.routing is None else output.routing.experts_NLK.tolist()


class Shards(OnDisk):
    """The experts of a checkpoint in float16."""

    def shard(self, experts: Any) -> ExpertShard:
        raise AssertionError("the harness makes them")

    def weights(self, layer: int, expert: int) -> Any:
        return Checkpoint(self.path).expert(layer, expert, FORMATS["float16"])


@pytest.fixture
def workers(checkpoint: Path) -> Iterator[CollectiveWorkers]:
    sizes = (SPEC.n_layers, SPEC.n_experts, SPEC.hidden_size, SPEC.ffn_size)
    workers = CollectiveWorkers(Shards(*sizes, dtype=torch.float16, path=checkpoint))
    workers.steps = True
    yield workers
    workers.close()


def test_steps_over_a_group_give_the_tokens_of_one_process_also_when_a_worker_dies(
    checkpoint: Path, workers: CollectiveWorkers
) -> None:
    alone = build_model(CONFIG, checkpoint)
    want = run(alone, HostCompute(alone))
    placement = striped(SPEC.n_layers, SPEC.n_experts, ("a", "b"))
    start_all(workers, placement)
    transport = workers.transport()
    assert isinstance(transport, CollectiveTransport)
    steps = CollectiveSteps(
        transport, SPEC.n_layers, SPEC.n_experts, SPEC.top_k, SPEC.hidden_size, torch.float16, limit_s=60,
        size_of=size_of,
    )  # fmt: skip
    exchange = Exchange(
        placement, dict(workers.addresses), transport, reply_timeout_s=60, rejoin_timeout_s=60, dtype=torch.float16,
        step_way=steps,
    )  # fmt: skip
    model = build_model(CONFIG, checkpoint, exchange)
    compute = ExchangeCompute(model, exchange, CONFIG.max_sequences, 64, 8)
    assert run(model, compute) == want
    counters = exchange.counters
    assert counters.captured_steps >= 3
    assert counters.void_steps == counters.repairs == 0

    def revive() -> None:
        workers.start("a", placement.shard("a"))
        exchange.publish(placement, dict(workers.addresses))

    def kill(n: int) -> None:
        if n == 2:
            workers.kill("a")
            threading.Timer(0.2, revive).start()

    assert run(model, compute, kill) == want
    assert counters.repairs > 0
    exchange.close()
