"""Fixed capacity over NCCL: a decode step captured as a CUDA graph gives the sums of an eager one.

One GPU is enough: NCCL refuses two ranks on one device by comparing host and bus, and every rank here names a host of
its own. Its messages then go through sockets: slow, but the code path of several GPUs.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from cluster.placement.placement import striped
from tests.contract.model import Batch, Model, batch
from workers.shard import ExpertShard
from workers.transport.collective.fixed import FixedExperts, FixedGroup, FixedWorker
from workers.transport.collective.group import Group, host_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = Model(n_layers=3)
HOST = "127.0.0.1"
WORKERS = ("a", "b")
PLACEMENT = striped(MODEL.n_layers, MODEL.n_experts, WORKERS)
CAPACITY = 16


def device_of(rank: int) -> torch.device:
    """Of a rank: its own GPU where there are enough, else the first."""
    index = rank if torch.cuda.device_count() > len(WORKERS) else 0
    os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def work(index: int, pipe: Connection) -> None:
    """The life of a worker process."""
    device = device_of(1 + index)
    shard = ExpertShard(MODEL.spec(), device=device)
    for layer, expert in PLACEMENT.shard(WORKERS[index]):
        shard.load(layer, expert, MODEL.weights(layer, expert))
    FixedWorker(FixedGroup(pipe.recv(), 1 + index, HOST, device), shard, CAPACITY).serve()


def step(router: FixedExperts, given: Batch) -> torch.Tensor:
    """y_LTD: what every layer makes of the rows."""
    layers = range(MODEL.n_layers)
    return torch.stack(
        [router.combine(router.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK)) for layer in layers]
    )


def route(pipe: Connection) -> None:
    """The router's process: one step eagerly, then the captured one on rows of other values; says what came out."""
    device = device_of(0)
    store, address = host_store(HOST)
    pipe.send(address)
    group = FixedGroup(pipe.recv(), 0, HOST, device)
    owner_LE = torch.tensor([[holders[0] for holders in layer] for layer in PLACEMENT.replicas], device=device)
    router = FixedExperts(group, owner_LE, MODEL.hidden_size, MODEL.dtype, CAPACITY)
    given = Batch(*(tensor.to(device) for tensor in vars(batch(MODEL, 8, seed=1)).values()))
    router.begin_step(1)
    eager = step(router, given).cpu()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y_LTD = step(router, given)
    for mine, other in zip(vars(given).values(), vars(batch(MODEL, 8, seed=2)).values(), strict=True):
        mine.copy_(other)
    router.begin_step(2)
    graph.replay()
    captured = y_LTD.cpu()
    router.stop()
    pipe.send((eager, captured, int(router.overflow), store.num_keys()))


def test_a_captured_step_gives_the_sums_of_an_eager_one() -> None:
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for target, args in [(route, ()), *((work, (index,)) for index in range(len(WORKERS)))]:
        pipe, other = spawn.Pipe()
        processes.append(spawn.Process(target=target, args=(*args, other), daemon=True))
        processes[-1].start()
        other.close()
        pipes.append(pipe)
    try:
        pids = tuple(int(process.pid or 0) for process in processes)
        group = Group(1, pipes[0].recv(), ("router-0",), WORKERS, pids)
        for pipe in pipes:
            pipe.send(group)
        eager, captured, overflow, _ = pipes[0].recv()
    finally:
        for process in processes:
            process.kill()
    assert overflow == 0
    for seed, y_LTD in ((1, eager), (2, captured)):
        given = batch(MODEL, 8, seed=seed)
        for layer in range(MODEL.n_layers):
            expected_TD = MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK)
            torch.testing.assert_close(y_LTD[layer].double(), expected_TD, atol=1e-3, rtol=1e-3)
