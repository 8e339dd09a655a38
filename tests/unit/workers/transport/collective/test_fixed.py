"""Fixed capacity: the sums of the other transports, and nothing between a step's header and its end visits the host."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.placement.placement import striped
from tests.contract.model import Batch, Model, batch
from workers.transport.collective.fixed import FixedExperts, FixedGroup, FixedWorker, masked_swiglu
from workers.transport.collective.group import Group, host_store

MODEL = Model(n_layers=3)
HOST = "127.0.0.1"


class NoHost(TorchDispatchMode):
    """Fails where a tensor's values decide anything on the host: no graph could hold that."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func)
        assert not any(
            word in name for word in ("_local_scalar_dense", "nonzero", "unique", "bincount", "repeat_inter")
        )
        return func(*args, **(kwargs or {}))


class Ranks:
    """The ranks of a fixed group as threads: each has what runs for it, and all end together."""

    def __init__(self, n_routers: int, n_workers: int, capacity: int) -> None:
        self._store, address = host_store(HOST)
        names = tuple(f"worker-{i}" for i in range(n_workers))
        placement = striped(MODEL.n_layers, MODEL.n_experts, names)
        routers = tuple(f"router-{i}" for i in range(n_routers))
        group = Group(1, address, routers, names, (os.getpid(),) * (n_routers + n_workers))
        owner_LE = torch.tensor([[holders[0] for holders in layer] for layer in placement.replicas])
        self.routers: list[FixedExperts] = [None] * n_routers  # type: ignore[list-item]
        self.errors: list[BaseException] = []

        def build_router(rank: int) -> None:
            fixed = FixedGroup(group, rank, HOST)
            self.routers[rank] = FixedExperts(fixed, owner_LE, MODEL.hidden_size, MODEL.dtype, capacity)

        def work(index: int) -> None:
            fixed = FixedGroup(group, n_routers + index, HOST)
            FixedWorker(fixed, MODEL.shard(placement.shard(names[index])), capacity).serve()

        self._workers = [self._thread(work, index) for index in range(n_workers)]
        for thread in [self._thread(build_router, rank) for rank in range(n_routers)]:
            thread.join()

    def all(self, run: Callable[[int, FixedExperts], None]) -> None:
        """What every router does, at the same time."""
        for thread in [self._thread(run, rank, router) for rank, router in enumerate(self.routers)]:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def close(self) -> None:
        self.all(lambda _, router: router.stop())
        for thread in self._workers:
            thread.join()

    def _thread(self, run: Callable[..., None], *args: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                run(*args)
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        return thread


@pytest.fixture
def make_ranks() -> Iterator[Callable[[int, int, int], Ranks]]:
    made: list[Ranks] = []

    def make(n_routers: int, n_workers: int, capacity: int) -> Ranks:
        made.append(Ranks(n_routers, n_workers, capacity))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def step(router: FixedExperts, given: Batch) -> list[Tensor]:
    router.begin_step(1)
    with NoHost():
        return [
            router.combine(router.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
            for layer in range(MODEL.n_layers)
        ]


@pytest.mark.parametrize(("n_routers", "n_workers"), [(1, 1), (1, 3), (2, 2), (3, 4)])
def test_sums_are_right_for_every_router_whoever_rests(
    make_ranks: Callable[[int, int, int], Ranks], n_routers: int, n_workers: int
) -> None:
    ranks = make_ranks(n_routers, n_workers, 24)

    def run(rank: int, router: FixedExperts) -> None:
        for n_tokens in (1, 8, 3):
            if rank == 1 and n_tokens == 8:
                router.idle_step(1)
                continue
            given = batch(MODEL, n_tokens, k=3, seed=10 * rank + n_tokens)
            for layer, y_TD in enumerate(step(router, given)):
                expected_TD = MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK)
                torch.testing.assert_close(y_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)
        assert int(router.overflow) == 0

    ranks.all(run)


def test_pairs_without_a_slot_are_counted(make_ranks: Callable[[int, int, int], Ranks]) -> None:
    """The host learns of it after the step, in time to throw the step away."""
    ranks = make_ranks(1, 2, 4)

    def run(_: int, router: FixedExperts) -> None:
        given = batch(MODEL, 6, k=1, experts=[0])
        step(router, given)
        assert int(router.overflow) == MODEL.n_layers * 2
        router.overflow.zero_()
        step(router, batch(MODEL, 4, k=1, experts=[0]))
        assert int(router.overflow) == 0

    ranks.all(run)


def test_a_worker_visits_the_host_for_no_slot() -> None:
    shard = MODEL.shard([(0, 1), (0, 4)])
    x_SD, expert_S = torch.randn(5, MODEL.hidden_size), torch.tensor([4, -1, 1, 2, 4], dtype=torch.int32)
    with NoHost():
        y_SD = masked_swiglu(x_SD, expert_S, shard.weights(0))
    chosen = torch.tensor([2, 0, 4], dtype=torch.int32)
    expected_PD = shard.forward(0, x_SD, chosen, torch.tensor([1, 4, 4], dtype=torch.int32))
    torch.testing.assert_close(y_SD[chosen], expected_PD, atol=1e-5, rtol=1e-5)
    assert not y_SD[[1, 3]].any()
