"""Requests that wait together are computed together, and each still gets its own rows or its own error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tests.contract.model import Model
from workers import wire
from workers.errors import ExpertNotHeld
from workers.shard import ExpertShard
from workers.transport.batcher import Batcher, Job
from workers.wire import Request

MODEL = Model()


class SlowShard(ExpertShard):
    """Counts forwards, and holds them up until `open`."""

    def __init__(self) -> None:
        super().__init__(MODEL.spec())
        for expert in range(5):  # one is missing
            for layer in range(2):
                self.load(layer, expert, MODEL.weights(layer, expert))
        self.calls: list[tuple[int, int]] = []
        self.called, self.open = threading.Event(), threading.Event()

    def forward(
        self, layer: int, x_TD: Tensor, token_P: Tensor, expert_P: Tensor, out_PD: Tensor | None = None
    ) -> Tensor:
        self.calls.append((layer, len(token_P)))
        self.called.set()
        self.open.wait(20)
        return super().forward(layer, x_TD, token_P, expert_P, out_PD)


def request(seed: int, experts: list[int]) -> Request:
    x_TD = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
    token_P = torch.arange(len(experts), dtype=torch.int32) % 3
    return Request(x_TD, token_P, torch.tensor(experts, dtype=torch.int32))


def head(layer: int, each: Request) -> wire.Header:
    tag = wire.Tag(1, 1, 1, layer, 0, 0)
    return wire.Header(wire.REQUEST, torch.float32, tag, 3, len(each.token_P), 32, 0, 0)


def wanted() -> bool:
    return True


def run(jobs: list[tuple[int, Request]]) -> tuple[SlowShard, list[tuple[Tensor, int] | str | None]]:
    """The first job holds the shard up until all others wait."""
    shard = SlowShard()
    batcher = Batcher(shard)

    def enqueue(layer: int, each: Request) -> Job:
        return batcher.enqueue(head(layer, each), each, wanted)

    with ThreadPoolExecutor(len(jobs)) as pool:
        first = pool.submit(batcher.outcome, enqueue(*jobs[0]))
        assert shard.called.wait(20)
        others = [pool.submit(batcher.outcome, job) for job in [enqueue(*job) for job in jobs[1:]]]
        shard.open.set()
        return shard, [future.result() for future in (first, *others)]


def test_waiting_requests_of_one_layer_are_one_batch_and_layers_are_not_mixed() -> None:
    jobs = [(0, request(0, [0])), (1, request(1, [0, 2, 2, 4])), (0, request(2, [1])), (1, request(3, [1, 2]))]
    shard, results = run(jobs)
    assert sorted(shard.calls[1:]) == [(0, 1), (1, 6)]
    for (layer, each), y_PD in zip(jobs, results, strict=True):
        assert isinstance(y_PD, tuple)
        torch.testing.assert_close(y_PD[0], ExpertShard.forward(shard, layer, *each), atol=1e-5, rtol=1e-5)


def test_an_error_of_one_router_is_not_the_error_of_another() -> None:
    _, results = run([(0, request(0, [0])), (0, request(1, [1])), (0, request(2, [5])), (0, request(3, [2]))])
    assert results[2] == str(ExpertNotHeld(0, [5]))
    assert all(isinstance(results[i], tuple) for i in (0, 1, 3))


def test_nothing_is_computed_for_a_router_that_is_gone() -> None:
    shard = SlowShard()
    shard.open.set()
    asked = request(0, [0])
    assert Batcher(shard).respond(head(0, asked), asked, lambda: False) is None
    assert shard.calls == []
