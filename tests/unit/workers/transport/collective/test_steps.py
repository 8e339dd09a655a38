"""Whole steps in lockstep over a group: the sums of the other ways, and nothing within a step visits the host.

Catches a worker whose place is another than its router thinks, padding that is computed, rows without room
that are added up all the same, and a step that waits for ever for a rank that is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.placement.placement import Placement, striped
from tests.contract.collective_harness import CollectiveWorkers
from tests.contract.model import Batch, Model, batch
from workers.transport.base import Tag
from workers.transport.collective import mesh as meshes
from workers.transport.collective.client import CollectiveTransport
from workers.transport.collective.joiner import Joiner
from workers.transport.collective.steps import CollectiveExperts, CollectiveSteps

MODEL = Model(n_layers=3)
TAG = Tag(0, 0, 0, 0, 0, 0)


class NoHost(TorchDispatchMode):
    """Fails where a tensor's values decide anything on the host: no graph could hold that."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        visits = ("_local_scalar_dense", "nonzero", "unique", "bincount", "repeat_inter")
        assert not any(word in str(func) for word in visits), func
        return func(*args, **(kwargs or {}))


class Cluster:
    """Workers and routers of this process, and the routers' steps."""

    def __init__(self, n_routers: int, n_workers: int, top_k: int) -> None:
        self.workers = CollectiveWorkers(MODEL)
        self.workers.steps = True
        self.placement = striped(MODEL.n_layers, MODEL.n_experts, tuple(f"worker-{i}" for i in range(n_workers)))
        for name in self.placement.workers:
            self.workers.start(name, self.placement.shard(name))
        transports = [self.workers.transport() for _ in range(n_routers)]
        self.routers = [self._steps(transport, top_k) for transport in transports]

    def _steps(self, transport: object, top_k: int) -> CollectiveSteps:
        assert isinstance(transport, CollectiveTransport)
        shape = (MODEL.n_layers, MODEL.n_experts, top_k, MODEL.hidden_size, MODEL.dtype)
        return CollectiveSteps(transport, *shape, limit_s=20, is_fused=False)


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(n_routers: int, n_workers: int, top_k: int = 3) -> Cluster:
        made.append(Cluster(n_routers, n_workers, top_k))
        return made[-1]

    yield make
    for each in made:
        each.workers.close()


def owners(placement: Placement) -> np.ndarray[Any, Any]:
    return np.array([[holders[0] for holders in layer] for layer in placement.replicas], np.int32)


def step(steps: CollectiveSteps, placement: Placement, given: Batch) -> list[Tensor] | None:
    assert steps.ready(placement.workers, owners(placement))
    assert steps.begin_step(len(given.x_TD), TAG, 1.0)
    experts, y_LTD = steps.experts, []
    assert isinstance(experts, CollectiveExperts)
    with NoHost():
        for layer in range(MODEL.n_layers):
            found = experts.combine(experts.dispatch(layer, given.x_TD, given.ids_TK, given.weights_TK))
            assert isinstance(found, Tensor)
            y_LTD.append(found)
    report = steps.end_step()
    if report is None:
        return None
    real_P = given.ids_TK.flatten()
    expected_E = real_P[real_P >= 0].bincount(minlength=MODEL.n_experts)
    assert (report.rows_LE == expected_E.numpy()).all(), "the rows of experts are counted wrong"
    return y_LTD


def check(y_LTD: list[Tensor] | None, given: Batch) -> None:
    assert y_LTD is not None
    for layer, y_TD in enumerate(y_LTD):
        expected_TD = MODEL.reference(layer, given.x_TD, given.ids_TK, given.weights_TK)
        torch.testing.assert_close(y_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n_routers", "n_workers"), [(1, 1), (2, 3)])
def test_sums_are_right_for_every_router_whoever_rests(
    cluster: Callable[..., Cluster], n_routers: int, n_workers: int
) -> None:
    each = cluster(n_routers, n_workers)
    for n_tokens in (1, 8, 3, 8):
        for number, router in enumerate(each.routers):
            if number == 1 and n_tokens == 8:
                continue  # it rests, and nobody waits for it
            given = batch(MODEL, n_tokens, k=3, seed=10 * number + n_tokens)
            check(step(router, each.placement, given), given)


def test_what_finds_no_room_makes_the_step_void_and_there_is_more_the_next_time(
    cluster: Callable[..., Cluster],
) -> None:
    each = cluster(1, 5, top_k=1)
    router, given = each.routers[0], batch(MODEL, 60, k=1, experts=[0])
    assert step(router, each.placement, given) is None
    key = router.key
    y_LTD = step(router, each.placement, given)
    assert router.key != key, "what was captured for less room would be replayed"
    check(y_LTD, given)


def test_padding_is_nobodys_and_an_expert_that_is_not_held_makes_the_step_void(cluster: Callable[..., Cluster]) -> None:
    each = cluster(1, 2, top_k=2)
    router, given = each.routers[0], batch(MODEL, 6, k=2, seed=4)
    padded = Batch(given.x_TD, given.ids_TK.clone(), given.weights_TK)
    padded.ids_TK[4:] = -1
    y_LTD, whole = step(router, each.placement, padded), step(router, each.placement, given)
    assert y_LTD is not None and whole is not None
    for mine, other in zip(y_LTD, whole, strict=True):
        assert torch.equal(mine[:4], other[:4])
        assert not mine[4:].any()
    swapped = Placement(2, each.placement.workers[::-1], each.placement.replicas)
    assert step(router, swapped, given) is None
    check(step(router, each.placement, given), given)


def test_a_worker_dies_in_a_step_and_the_next_group_goes_on(cluster: Callable[..., Cluster]) -> None:
    each = cluster(1, 3)
    router, given = each.routers[0], batch(MODEL, 5, k=3, seed=2)
    check(step(router, each.placement, given), given)
    group = router.key
    assert router.ready(each.placement.workers, owners(each.placement)) and router.begin_step(5, TAG, 1.0)
    experts = router.experts
    assert experts is not None
    first = experts.dispatch(0, given.x_TD, given.ids_TK, given.weights_TK)
    each.workers.kill("worker-1")
    experts.combine(first)
    experts.combine(experts.dispatch(1, given.x_TD, given.ids_TK, given.weights_TK))
    assert router.end_step() is None
    assert not router.ready(each.placement.workers, owners(each.placement)), "its experts are nowhere"
    each.workers.start("worker-1", each.placement.shard("worker-1"))
    check(step(router, each.placement, given), given)
    assert router.key != group


class _Event:
    """Of a stream that is done after so many looks."""

    def __init__(self, looks: float) -> None:
        self._left = looks

    def query(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(
    ("looks", "broken", "raises"), [(3, None, None), (float("inf"), "a: gone", "a: gone"), (float("inf"), None, "0.05")]
)
def test_work_of_a_gpu_is_waited_for_in_the_order_of_its_stream(
    monkeypatch: pytest.MonkeyPatch, looks: float, broken: str | None, raises: str | None
) -> None:
    """Whoever waits for a peer that is gone is let go: by the mesh that broke, or by the limit."""
    stream = SimpleNamespace(record_event=lambda: _Event(looks))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    asked: list[tuple[Any, ...]] = []
    work = SimpleNamespace(wait=lambda *args: asked.append(args))
    mesh: Any = SimpleNamespace(device=torch.device("cuda", 0), broken=broken)
    waits = meshes._InOrder(mesh, work)
    if raises is None:
        waits.wait(timedelta(seconds=0.05))
    else:
        with pytest.raises(RuntimeError, match=raises):
            waits.wait(timedelta(seconds=0.05))
    assert asked == [()], "a wait of NCCL's with a limit takes a millisecond"


def test_nccl_is_bound_to_the_interface_that_gloo_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it takes any, also one that others reach."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")  # restored whatever it was
    Joiner("a", "127.0.0.1", torch.device("cpu"), lambda mesh: None, None)
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    Joiner("a", "127.0.0.1", torch.device("cuda", 0), lambda mesh: None, None)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    Joiner("a", "127.0.0.1", torch.device("cuda", 0), lambda mesh: None, None)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "what the operator says counts"
