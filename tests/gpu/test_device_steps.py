"""An engine whose experts are in other processes of the GPU: the tokens of one process, also when a worker is killed.

Catches captured steps that give other bits than steps layer by layer, a poll that hangs on a dead worker, and a step
that was thrown away and left something behind.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from cluster.config import Config
from cluster.models.random import SMALL, write_random
from cluster.placement.placement import striped
from cluster.router.build import build_engine
from cluster.router.engine import Engine
from cluster.router.exchange.exchange import Exchange
from cluster.router.params import SamplingParams
from tests.gpu.device_worker import serve
from workers.checkpoint import Checkpoint
from workers.transport.device.offer import Shape
from workers.transport.device.stream_rows import StreamRows
from workers.transport.device.way import DeviceWay
from workers.transport.grpc.client import GrpcTransport
from workers.transport.grpc.credentials import Credentials

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPEC = replace(
    SMALL, dtype=torch.bfloat16, hidden_size=512, ffn_size=1024, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=64
)
CONFIG = Config(router_device="cuda", expert_device="cuda", kv_cache_mb=256, max_sequences=16)


class Workers:
    """Worker processes by name."""

    def __init__(self, directory: Path, names: tuple[str, ...]) -> None:
        self.placement = striped(SPEC.n_layers, SPEC.n_experts, names)
        self.credentials = Credentials.generate()
        self.addresses: dict[str, str] = {}
        self._directory = directory
        self._processes: dict[str, BaseProcess] = {}
        self._pipes: dict[str, Connection] = {}  # a worker ends with its pipe

    def start(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        args = (other, self._directory, name, self.placement, self.credentials)
        self._processes[name] = context.Process(target=serve, args=args, daemon=True)
        self._processes[name].start()
        other.close()
        self._pipes[name] = pipe
        self.addresses[name] = pipe.recv()

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].join()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    write_random(path, SPEC)
    return path


@pytest.fixture(params=[1, 2, 3])
def workers(request: pytest.FixtureRequest, directory: Path) -> Iterator[Workers]:
    names = ("a", "b", "c")[: request.param]
    workers = Workers(directory, names)
    for name in names:
        workers.start(name)
    yield workers
    for name in names:
        workers.kill(name)


def answers(engine: Engine, n: int = 8, length: int = 60) -> dict[str, list[int]]:
    """The tokens of `n` requests that run together."""
    tokens: dict[str, list[int]] = {}
    for number in range(n):
        params = SamplingParams(max_tokens=length, temperature=0.8, seed=number, ignore_eos=True)
        engine.submit(str(number), [1, 2, 3 + number, 4], params)
        tokens[str(number)] = []
    while engine.has_work():
        for output in engine.step():
            assert output.finish != "error", output.error
            tokens[output.request_id] += output.token_ids
    return tokens


def test_tokens_are_those_of_one_process_also_when_a_worker_is_killed(directory: Path, workers: Workers) -> None:
    expected = answers(build_engine(replace(CONFIG, expert_workers=0), directory))
    device = torch.device("cuda", 0)
    source, placement = Checkpoint(directory, device), workers.placement
    last = placement.workers[-1]
    shape = Shape(SPEC.n_layers, SPEC.n_experts, SPEC.top_k, SPEC.hidden_size, SPEC.dtype, 16)
    way = DeviceWay(shape, device, 1.0, StreamRows())
    model = source.fingerprint(torch.bfloat16)
    transport = GrpcTransport("router-0", model, workers.credentials, ways=(way,))
    exchange = Exchange(
        placement, workers.addresses, transport, reply_timeout_s=10, rejoin_timeout_s=60,
        device=device, dtype=torch.bfloat16, step_way=way,
    )  # fmt: skip
    engine = build_engine(replace(CONFIG, expert_workers=len(placement.workers), transport="device"), source, exchange)
    assert answers(engine) == expected
    assert answers(engine) == expected
    captured = exchange.counters.captured_steps
    assert captured > 0, "no step went through device memory"

    def come_back() -> None:
        workers.start(last)
        exchange.publish(placement, workers.addresses)

    back = threading.Thread(target=come_back)
    threading.Timer(0.15, lambda: (workers.kill(last), back.start())).start()
    assert answers(engine, length=400) == answers(
        build_engine(replace(CONFIG, expert_workers=0), directory), length=400
    )
    back.join()
    assert exchange.counters.repairs > 0
    captured = exchange.counters.captured_steps
    while exchange.counters.captured_steps == captured:  # once the worker that came back is ready for steps
        assert answers(engine) == expected
    print("captured", exchange.counters.captured_steps, "void", exchange.counters.void_steps)
    transport.close()
