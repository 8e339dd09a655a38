"""An engine whose experts are in other processes of the GPU: the tokens of one process, also when a worker is killed.

Catches captured steps that give other bits than steps layer by layer, a poll that hangs on a dead worker, and a step
that was thrown away and left something behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.bench.gpu.workers import Workers
from cluster.config import Config
from cluster.models.random import SMALL, write_random
from cluster.placement.placement import striped
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.params import SamplingParams
from workers.checkpoint import Checkpoint
from workers.shard import ExpertShard, load_shard
from workers.transport.device.offer import Shape
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPEC = replace(
    SMALL, dtype=torch.bfloat16, hidden_size=512, ffn_size=1024, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=64
)
CONFIG = Config(router_device="cuda", expert_device="cuda", kv_cache_mb=256, max_sequences=16)


def shard_of(directory: Path, experts: Sequence[tuple[int, int]]) -> ExpertShard:
    """In a worker's process."""
    return load_shard(Checkpoint(directory, torch.device("cuda", 0)), experts, SPEC.dtype)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    write_random(path, SPEC)
    return path


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest, directory: Path) -> Iterator[Workers]:
    placement = striped(SPEC.n_layers, SPEC.n_experts, ("a", "b", "c")[: request.param])
    with Workers(placement, partial(shard_of, directory), "random") as workers:
        yield workers


def answers(
    engine: Engine, n: int = 8, length: int = 60, after_step: Callable[[int], None] = lambda n_steps: None
) -> dict[str, list[int]]:
    """The tokens of `n` requests that run together."""
    tokens: dict[str, list[int]] = {}
    for number in range(n):
        params = SamplingParams(max_tokens=length, temperature=0.8, seed=number, ignore_eos=True)
        engine.submit(str(number), [1, 2, 3 + number, 4], params)
        tokens[str(number)] = []
    n_steps = 0
    while engine.has_work():
        for output in engine.step():
            assert output.finish != "error", output.error
            tokens[output.request_id] += output.token_ids
        n_steps += 1
        after_step(n_steps)
    return tokens


def test_tokens_are_those_of_one_process_also_when_a_worker_is_killed(directory: Path, workers: Workers) -> None:
    expected = answers(build_engine(replace(CONFIG, expert_workers=0), directory))
    device = torch.device("cuda", 0)
    source, placement = Checkpoint(directory, device), workers.placement
    last = placement.workers[-1]
    shape = Shape(SPEC.n_layers, SPEC.n_experts, SPEC.top_k, SPEC.hidden_size, SPEC.dtype, 16)
    way = DeviceWay(shape, device, 1.0, StreamRows())
    with workers.reached("router-0", device, SPEC.dtype, (way,), way) as exchange:
        engine = build_engine(
            replace(CONFIG, expert_workers=len(placement.workers), transport="device"), source, exchange
        )
        assert answers(engine) == expected
        assert answers(engine) == expected
        captured = exchange.counters.captured_steps
        assert captured > 0, "no step went through device memory"

        def come_back() -> None:
            workers.start(last)
            workers.wait(last)
            exchange.publish(placement, workers.addresses)

        back = threading.Thread(target=come_back)

        def kill(n_steps: int) -> None:
            if n_steps == 20:
                workers.kill(last)
                back.start()

        assert answers(engine, after_step=kill) == expected
        back.join()
        assert exchange.counters.repairs > 0
        captured = exchange.counters.captured_steps
        while exchange.counters.captured_steps == captured:  # once the worker that came back is ready for steps
            assert answers(engine) == expected
        print("captured", exchange.counters.captured_steps, "void", exchange.counters.void_steps)
