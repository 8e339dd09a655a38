"""The part of `bench gpu` that has experts in other processes, on a CPU: catches a benchmark that cannot start its
workers, compares two different models, or measures something else than it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from cluster.bench.gpu import exchange
from cluster.bench.gpu.exchange import cache_of, over_grpc, workers_of
from cluster.bench.gpu.random_model import all_experts, dense_of, shard_of
from cluster.models.random import SMALL
from workers.model.decoder import Decoder

SPEC = replace(SMALL, n_layers=2, dtype=torch.float32)


def test_experts_in_other_processes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "REPEATS", 7)
    device = torch.device("cpu")
    with workers_of(SPEC, 2, device) as away, torch.inference_mode():
        dense, cache = dense_of(SPEC, device), cache_of(SPEC, 3, device)
        here = Decoder(SPEC, dense, shard_of(SPEC, all_experts(SPEC), device), cache)
        with away.reached("router-0", device, SPEC.dtype) as reached:
            found = over_grpc(here, Decoder(SPEC, dense, reached, cache), 3)
            n_layers = SPEC.n_layers
            assert reached.counters.rows_LE.sum() == 7 * n_layers * 3 * SPEC.top_k, "the steps did not go over it"
    assert found["same_bits"]
    assert found["us_a_layer"] == pytest.approx((found["ms"] - found["one_process_ms"]) * 1000 / n_layers, abs=1)


def test_without_a_gpu_it_is_said_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why = exchange.in_a_process(1, 1)
    assert isinstance(why, str) and why
