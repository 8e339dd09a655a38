"""Whole steps over NCCL: captured on both sides, their sums are those of the first one, which runs kernel by kernel.

One GPU is enough: NCCL refuses two ranks on one device by comparing host and bus, and every rank here names a host of
its own. Its messages then go through sockets: slow, but the code path of several GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.placement.placement import striped
from tests.contract.model import Batch, Model, batch
from workers.kernels.ops import Unsummed
from workers.shard import ExpertShard
from workers.transport.base import Tag
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.group import Group, host_store
from workers.transport.collective.server import CollectiveServer
from workers.transport.collective.steps import CollectiveExperts, CollectiveSteps
from workers.transport.device.router import added_up

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = Model(n_layers=3, hidden_size=64, ffn_size=96, dtype=torch.float16)
HOST = "127.0.0.1"
WORKERS = ("a", "b")
PLACEMENT = striped(MODEL.n_layers, MODEL.n_experts, WORKERS)
OWNERS = np.array([[holders[0] for holders in layer] for layer in PLACEMENT.replicas], np.int32)
TAG = Tag(0, 0, 0, 0, 0, 0)
READY_S = 60


def device_of(rank: int) -> torch.device:
    """Of a rank: its own GPU where there are enough, else the first."""
    index = rank if torch.cuda.device_count() > len(WORKERS) else 0
    os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def work(index: int, pipe: Connection) -> None:
    """The life of a worker process."""
    device, name = device_of(1 + index), WORKERS[index]
    shard = ExpertShard(MODEL.spec(), device=device)
    for layer, expert in PLACEMENT.shard(name):
        shard.load(layer, expert, MODEL.weights(layer, expert))
    server = CollectiveServer(shard, name, HOST, device=device, steps=True)
    while True:
        server.join(pipe.recv())


class Router:
    """Steps of one size, on the memory that they are captured with."""

    def __init__(self, steps: CollectiveSteps, device: torch.device) -> None:
        self.steps = steps
        self.given = Batch(*(tensor.to(device) for tensor in vars(batch(MODEL, 8, seed=1)).values()))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._y: list[Unsummed] = []

    def step(self, seed: int) -> Tensor | None:
        """y_LTD, float32 on the host; None where the step was void."""
        for mine, other in zip(vars(self.given).values(), vars(batch(MODEL, 8, seed=seed)).values(), strict=True):
            mine.copy_(other)
        end = time.monotonic() + READY_S
        while not self.steps.ready(WORKERS, OWNERS):
            assert time.monotonic() < end, "no group"
            time.sleep(0.01)
        if not self.steps.begin_step(8, TAG, 1.0):
            return None
        if self._graph is not None:
            self._graph.replay()
        else:
            found = self._layers()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._y = self._layers()
            for mine, first in zip(self._y, found, strict=True):
                for kept, value in zip(mine, first, strict=True):
                    kept.copy_(value)
        if self.steps.end_step() is None:
            self._graph = None
            return None
        return torch.stack([added_up(Unsummed(*(part.cpu() for part in y))) for y in self._y])

    def _layers(self) -> list[Unsummed]:
        experts, given, y = self.steps.experts, self.given, []
        assert isinstance(experts, CollectiveExperts)
        for layer in range(MODEL.n_layers):
            found = experts.combine(experts.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
            assert isinstance(found, Unsummed)
            y.append(found)
        return y


def route(pipe: Connection) -> None:
    """The router's process: tells where its store is, joins what it is told, says what each step gave."""
    device = device_of(0)
    store, address = host_store(HOST)
    pipe.send(address)
    transport = CollectiveTransport("router-0", HOST, device=device, steps=True)
    shape = (MODEL.n_layers, MODEL.n_experts, 2, MODEL.hidden_size, MODEL.dtype)
    router = Router(CollectiveSteps(transport, *shape, limit_s=10), device)
    while (said := pipe.recv()) is not None:
        if isinstance(said, Group):
            transport.join(said)
        else:
            pipe.send(router.step(said))
    transport.close()
    del store


class Ranks:
    """A router and its workers, each a process of its own."""

    def __init__(self) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._number = 0
        self.router, self.pipe = self._start(route)
        self.workers = {name: self._start(work, index) for index, name in enumerate(WORKERS)}
        self._store = self.pipe.recv()

    def group(self) -> None:
        """The next group, of who is there."""
        self._number += 1
        processes = [self.router, *(process for process, _ in self.workers.values())]
        pids = tuple(int(process.pid or 0) for process in processes)
        group = Group(self._number, self._store, ("router-0",), WORKERS, pids)
        for pipe in (self.pipe, *(pipe for _, pipe in self.workers.values())):
            pipe.send(group)

    def step(self, seed: int) -> Tensor | None:
        self.pipe.send(seed)
        y_LTD: Tensor | None = self.pipe.recv()
        return y_LTD

    def restart(self, name: str) -> None:
        self.workers[name][0].kill()
        self.workers[name] = self._start(work, WORKERS.index(name))

    def close(self) -> None:
        for process in (self.router, *(process for process, _ in self.workers.values())):
            process.kill()

    def _start(self, target: object, *args: object) -> tuple[BaseProcess, Connection]:
        pipe, other = self._spawn.Pipe()
        process = self._spawn.Process(target=target, args=(*args, other), daemon=True)  # type: ignore[arg-type]
        process.start()
        other.close()
        return process, pipe


def test_captured_steps_give_the_sums_of_the_first_and_go_on_after_a_kill() -> None:
    ranks = Ranks()
    try:
        ranks.group()
        sums = {}
        for seed in (1, 2, 3):
            y_LTD = sums[seed] = ranks.step(seed)
            assert y_LTD is not None
            given = batch(MODEL, 8, seed=seed)
            for layer in range(MODEL.n_layers):
                expected_TD = MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK)
                torch.testing.assert_close(y_LTD[layer].double(), expected_TD, atol=1e-2, rtol=1e-2)
        ranks.restart("a")
        while ranks.step(1) is not None:  # until the loss is there
            time.sleep(0.01)
        ranks.group()
        for seed, y_LTD in sums.items():
            assert y_LTD is not None
            again = ranks.step(seed)
            assert again is not None and torch.equal(again, y_LTD), "another group gives other bits"
    finally:
        ranks.close()
