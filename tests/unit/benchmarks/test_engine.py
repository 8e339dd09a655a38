"""`benchmarks.engine` without its minutes: what it computes from figures; each engine answers from its process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.child import Child, ChildRunner
from benchmarks.engine import CLUSTER, OURS, OVER_GRPC, REFERENCE, ratios
from benchmarks.gguf_file import interleaved
from cluster.bench.common import alternate
from cluster.errors import StartError
from cluster.models.random import SMALL, write_random


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "small"
    write_random(directory, dataclasses.replace(SMALL, max_context=1024))
    return directory


@pytest.fixture(params=["expertmesh", "cluster"])
def child(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Child]:
    command = [sys.executable, "-m", "benchmarks.runner_process", request.param, str(checkpoint), "1"]
    process = Child(request.param, command)
    yield process
    process.close()


def test_an_engine_decodes_and_prefills_in_a_process_of_its_own(child: Child) -> None:
    runner = ChildRunner(child)
    assert runner.decode(1) > 0
    assert runner.decode(16) > 0
    assert runner.prefill(512) > 0


def test_an_engine_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.runner_process", "expertmesh", str(tmp_path / "none"), "1"]
    with pytest.raises(StartError, match="exit code 1"):
        Child("expertmesh", command)


def test_runs_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []
    values = {"a": iter([1e9, 5.0, 1.0, 3.0]), "b": iter([0.0, 2.0, 2.0, 8.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(values[name])

    assert alternate({"a": lambda: run("a"), "b": lambda: run("b")}, 3) == {"a": 3.0, "b": 2.0}
    assert order == ["a", "b"] * 4


def test_ratios_are_ours_by_transformers_and_the_clusters_by_ours() -> None:
    figures = {
        "decode_1": {OURS: 40.0, REFERENCE: 20.0, CLUSTER: 30.0, OVER_GRPC: 10.0, "vllm": 32.0},
        "prefill_512": {OURS: 1500.0, REFERENCE: 1000.0, CLUSTER: 900.0, OVER_GRPC: 900.0},
    }
    assert ratios(figures) == {
        "decode_1": 2.0, "prefill_512": 1.5, "cluster_decode_1": 0.75, "grpc_cluster_decode_1": 0.25,
    }  # fmt: skip


def test_rotary_pairs_become_neighbours_head_by_head() -> None:
    weight = torch.arange(8.0)[:, None]  # two heads of four rows: pairs (0, 2), (1, 3)
    assert interleaved(weight, 2)[:, 0].tolist() == [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
