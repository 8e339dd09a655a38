"""Catches experts that are unloaded while a router uses them, loaded twice or never, and a probe that says nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.control.view import View
from cluster.fleet import shard_keeper as module
from cluster.fleet.shard_keeper import ShardKeeper
from cluster.fleet.weight_source import WeightSource
from cluster.models.random import SMALL, write_random
from cluster.placement.edit import move
from cluster.placement.placement import striped
from tests.loop import in_loop, until
from workers.checkpoint import Checkpoint
from workers.shard import ExpertShard, load_shard

FIRST = striped(SMALL.n_layers, SMALL.n_experts, ("a", "b"))
SECOND = move(FIRST, 0, 0, "a", "b")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("keeper") / "model"
    write_random(directory, dataclasses.replace(SMALL))
    return Checkpoint(directory)


def shard_of(source: Checkpoint, worker: str) -> ExpertShard:
    return load_shard(source, FIRST.shard(worker), torch.float32)


@in_loop
async def test_both_ends_of_a_move_probe_and_only_an_acknowledged_one_unloads(source: Checkpoint) -> None:
    changes: list[None] = []
    keepers = {
        name: ShardKeeper(
            name, shard_of(source, name), WeightSource("auto", source, None), 1, lambda: changes.append(None)
        )
        for name in "ab"
    }

    def show(view: View) -> None:
        for keeper in keepers.values():
            keeper.follow(view)

    show(View(1, (), FIRST, next=SECOND))
    await until(lambda: all(keeper.preparation for keeper in keepers.values()))
    a, b = (keepers[name].preparation for name in "ab")
    assert a is not None and b is not None and a.epoch == b.epoch == 2 and not a.error and not b.error
    assert a.probes.keys() == b.probes.keys() == {(0, 0)}
    assert a.probes[0, 0].agrees(b.probes[0, 0], same_machine=True)
    show(View(2, (), SECOND, acknowledged=False))
    await until(lambda: all(keeper.epoch == 2 for keeper in keepers.values()))
    assert (0, 0) in keepers["a"].held, "a router may still use it"
    show(View(3, (), SECOND, acknowledged=True))
    await until(lambda: keepers["a"].held == set(SECOND.shard("a")))
    assert keepers["b"].held == set(SECOND.shard("b")) and changes


@in_loop
async def test_a_change_that_was_given_up_leaves_nothing_behind(source: Checkpoint) -> None:
    keeper = ShardKeeper("b", shard_of(source, "b"), WeightSource("auto", source, None), 1, lambda: None)
    keeper.follow(View(1, (), FIRST, next=SECOND))
    await until(lambda: (0, 0) in keeper.held)
    keeper.follow(View(2, (), FIRST))
    await until(lambda: keeper.held == set(FIRST.shard("b")))
    assert keeper.preparation is None


@in_loop
async def test_what_does_not_fit_is_said_and_what_is_in_force_is_tried_again(
    source: Checkpoint,
) -> None:
    keeper = ShardKeeper("b", shard_of(source, "b"), WeightSource("auto", source, None), 1, lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.router.memory.available_bytes", lambda: 0)
        patch.setattr(module, "_RETRY_S", 0.01)
        keeper.follow(View(1, (), FIRST, next=SECOND))
        await until(lambda: keeper.preparation is not None)
        assert keeper.preparation is not None and "not enough memory" in keeper.preparation.error
        keeper.follow(View(2, (), SECOND))
        await asyncio.sleep(0.05)
        assert keeper.epoch == 1
        patch.undo()
        await until(lambda: keeper.epoch == 2)
    assert keeper.held == set(SECOND.shard("b"))


def test_distinct_experts_have_distinct_probes(source: Checkpoint) -> None:
    from workers.probe import probe

    shard = shard_of(source, "a")
    digests = {probe(shard, layer, expert).digest for layer, expert in FIRST.shard("a")}
    assert len(digests) == len(FIRST.shard("a"))
