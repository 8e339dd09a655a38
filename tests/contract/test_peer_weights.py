"""Experts that a worker gets from another one. Catches weights that are not those of the peer to the bit, a peer that
gives to strangers or what it does not hold, damage on the way, and a source that gives up before all were asked."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.fleet.weight_source import WeightSource
from cluster.models.random import SMALL, write_random
from tests.contract.harness import MODEL_NAME, GrpcWorkers
from tests.contract.model import Model
from tests.credentials import CREDENTIALS
from workers.checkpoint import Checkpoint
from workers.errors import CheckpointError, WireError, WorkerLost
from workers.shard import ExpertShard, load_shard
from workers.transport.grpc import peer_weights as module
from workers.transport.grpc.credentials import Credentials
from workers.transport.grpc.peer_weights import PeerWeights
from workers.transport.grpc.server import ExpertServer

# An expert of several pieces, the last one not whole, in either dtype.
MODEL = Model(n_layers=1, n_experts=2, hidden_size=520, ffn_size=1040, dtype=torch.bfloat16)


@pytest.fixture
def workers() -> Iterator[GrpcWorkers]:
    running = GrpcWorkers(MODEL)
    running.start("a", [(0, 1)])
    yield running
    running.close()


def ask(workers: GrpcWorkers, expert: int = 1, peer: str = "a", model: str = MODEL_NAME) -> ExpertShard:
    """A shard with what the peer gave."""
    peers = PeerWeights("b", model, CREDENTIALS)
    here = ExpertShard(MODEL.spec())
    sizes = (here.ffn_size, here.hidden_size, workers.shard("a").format.dtype)
    try:
        here.load(0, expert, peers.fetch(peer, workers.addresses["a"], 0, expert, *sizes))
    finally:
        peers.close()
    return here


def test_the_weights_are_the_peers_to_the_bit(workers: GrpcWorkers) -> None:
    there, here = (shard.weights(0)[1] for shard in (workers.shard("a"), ask(workers)))
    assert all(torch.equal(a.values_ND, b.values_ND) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize(
    ("expert", "peer", "model", "reason"),
    [(0, "a", MODEL_NAME, "holds no replica of expert 0"), (1, "c", MODEL_NAME, "this is worker 'a'"),
     (1, "a", "another", "serves model 'tests'")],
)  # fmt: skip
def test_a_peer_refuses_what_it_cannot_give(
    workers: GrpcWorkers, expert: int, peer: str, model: str, reason: str
) -> None:
    with pytest.raises(WorkerLost, match=reason):
        ask(workers, expert, peer, model)


def test_strangers_get_nothing(workers: GrpcWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.contract.test_peer_weights.CREDENTIALS", Credentials.generate())
    with pytest.raises(WorkerLost, match="token"):
        ask(workers)


@pytest.mark.parametrize("what", ["damaged", "short", "of another size"])
def test_what_is_not_as_it_was_is_refused(workers: GrpcWorkers, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    whole = module.pieces

    async def pieces(tensors: list[Tensor]) -> AsyncIterator[bytes]:
        async for piece in whole(tensors):
            if what == "damaged":
                yield piece[:-1] + bytes([piece[-1] ^ 1])
            else:
                yield piece
                return

    if what == "of another size":
        monkeypatch.setattr(module, "words", lambda *asked: ((("expertmesh-weights", "[]"),), []))
    monkeypatch.setattr(module, "pieces", pieces)
    with pytest.raises(WireError):
        ask(workers)


def test_the_order_of_sources_and_what_is_done_when_one_fails(tmp_path: Path) -> None:
    write_random(tmp_path / "model", dataclasses.replace(SMALL))
    checkpoint = Checkpoint(tmp_path / "model")
    there = load_shard(checkpoint, [(0, 0), (0, 1)], torch.float32)
    server = ExpertServer(there, "a", "127.0.0.1", model="m", credentials=CREDENTIALS)
    server.start()
    holders = {"gone": "127.0.0.1:1", "a": server.address}

    def load(order: str, expert: int, holders: dict[str, str], broken: bool = False) -> tuple[ExpertShard, int]:
        opened = Checkpoint(tmp_path / "model")
        if broken:
            opened.expert = _unreadable  # type: ignore[method-assign]
        source = WeightSource(order, opened, PeerWeights("b", "m", CREDENTIALS))  # type: ignore[arg-type]
        shard = load_shard(opened, [], torch.float32)
        source.load(shard, 0, expert, holders)
        source.rest()
        return shard, source.from_peers

    try:
        for order, expert, where, broken, asked in (
            ("storage", 0, holders, False, 0),
            ("auto", 0, holders, False, 0),
            ("auto", 1, holders, True, 1),
            ("peer", 0, holders, True, 1),
            ("peer", 1, {"gone": "127.0.0.1:1"}, False, 0),
            ("peer", 2, holders, False, 0),  # nobody there has it
        ):
            shard, from_peers = load(order, expert, where, broken)
            assert from_peers == asked, (order, expert)
            wanted = load_shard(checkpoint, [(0, expert)], torch.float32).weights(0)[expert]
            pairs = zip(shard.weights(0)[expert], wanted, strict=True)
            assert all(torch.equal(a.values_ND, b.values_ND) for a, b in pairs)
        with pytest.raises(CheckpointError, match="unreadable"):
            load("storage", 0, holders, broken=True)
    finally:
        server.stop(0)


def _unreadable(*asked: object) -> None:
    raise CheckpointError("unreadable")
