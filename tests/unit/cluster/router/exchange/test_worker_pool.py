"""The exchange's workers over a scripted transport. Catches a worker that is ejected for longer than it deserves, and a
connection that stays open to a worker that left."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cluster.placement.placement import Placement, striped
from cluster.router.exchange import worker_pool as module
from cluster.router.exchange.exchange import Exchange
from cluster.router.exchange.worker_pool import Reply, WorkerPool
from workers.errors import WorkerLost
from workers.transport.base import Received, Rows, Tag

PAIR = torch.zeros(1, dtype=torch.int32)


class Scripted:
    """A transport whose workers answer with zeros, unless they are down."""

    def __init__(self) -> None:
        self.dropped_replies = 0
        self.connected: set[str] = set()
        self.down: set[str] = set()
        self.refused: set[str] = set()  # those to whom no way can be opened any more

    def connect(self, worker: str, address: str) -> None:
        self.connected.add(worker)

    def disconnect(self, worker: str) -> None:
        self.connected.discard(worker)

    def send(self, worker: str, rows: Rows) -> None:
        if worker not in self.connected:
            raise WorkerLost(worker, "not connected")

    def receive(self, worker: str, tag: Tag, timeout_s: float, out_PD: Tensor) -> Received:
        if worker in self.down:
            raise WorkerLost(worker, "down")
        return Received(out_PD.zero_(), 0)

    def way(self, worker: str) -> str:
        return "local"

    def answers(self, worker: str) -> bool:
        return worker in self.connected and worker not in self.refused

    @property
    def unreachable(self) -> Mapping[str, str]:
        return {}

    def room(self, worker: str, n_bytes: int) -> None:
        """Anywhere."""

    def close(self) -> None:
        self.connected.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    yield clock


def ask(pool: WorkerPool, n: int) -> list[Reply]:
    """`n` requests to worker a, all sent before the first reply is awaited; the replies."""
    x_TD = torch.ones(1, 4)
    replies = [
        pool.send("a", Rows(Tag(7, 1, 1, 0, part, 0), x_TD, PAIR, PAIR), torch.empty_like(x_TD)) for part in range(n)
    ]
    for reply in replies:
        pool.wait(reply)
    return replies


def test_a_failure_counts_once_however_much_was_in_flight(clock: SimpleNamespace) -> None:
    transport = Scripted()
    pool = WorkerPool(transport, reply_timeout_s=1.0)
    pool.update({"a": "somewhere"})
    transport.down.add("a")
    for ejection_s in (5.0, 10.0, 20.0):
        assert all(reply.loss for reply in ask(pool, 4))
        pool.reopen("a")  # tried at once, for want of another replica
        assert all(reply.loss for reply in ask(pool, 2))
        clock.now += ejection_s - 0.1
        assert not pool.probe() and "a" in pool.ejected
        clock.now += 0.2
        assert pool.probe() and "a" not in pool.ejected
    transport.down.clear()
    assert not any(reply.loss for reply in ask(pool, 1))
    transport.down.add("a")
    ask(pool, 1)
    clock.now += 5.1
    assert pool.probe(), "a worker that has answered since starts anew"


@pytest.mark.parametrize("lost", [True, False], ids=["while_it_is_repaired", "while_two_are_in_flight"])
def test_a_worker_that_leaves_is_forgotten(lost: bool) -> None:
    transport = Scripted()
    addresses = {name: f"at {name}" for name in "abc"}
    exchange = Exchange(striped(1, 2, ("a", "b")), addresses, transport, reply_timeout_s=1.0, rejoin_timeout_s=5.0)
    rows = (0, torch.ones(2, 4), torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert transport.connected >= {"a", "b"}
    handles = [exchange.dispatch(*rows)]
    exchange.publish(Placement(2, ("b", "c"), (((0,), (1,)),)), {"b": "at b", "c": "at c"})
    if lost:
        transport.down.add("a")
    else:
        handles.append(exchange.dispatch(*rows))
        assert "a" in transport.connected, "a reply of it is still on the way"
    for handle in handles:
        assert not exchange.combine(handle).any()
    exchange.combine(exchange.dispatch(*rows))
    assert transport.connected == {"b", "c"}


def test_rows_go_to_a_worker_that_answers_again_however_long_it_is_to_be_passed_over() -> None:
    """All that hold an expert failed at once, and one of them is back: nobody waits for the other."""
    transport = Scripted()
    addresses = {"a": "at a", "b": "at b"}
    exchange = Exchange(
        Placement(1, ("a", "b"), (((0, 1),),)), addresses, transport, reply_timeout_s=1.0, rejoin_timeout_s=5.0
    )
    rows = (0, torch.ones(2, 4), torch.tensor([[0], [0]]), torch.ones(2, 1))
    transport.down |= {"a", "b"}
    handle = exchange.dispatch(*rows)
    threading.Timer(0.1, transport.down.discard, ("b",)).start()
    transport.refused.add("a")
    assert not exchange.combine(handle).any()
    assert exchange.ejected == {"a"}
